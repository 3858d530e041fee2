//! SQL through the replicated handle of three nodes is SQL on a plain SQLite.
//!
//! - `handle`: what went wrong once.

#![allow(clippy::unwrap_used)]

mod handle;
mod nodes;
