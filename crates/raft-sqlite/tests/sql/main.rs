//! SQL through the replicated handle of three nodes is SQL on a plain SQLite: the same rows, the same errors, and in the end the same
//! file on every node.
//!
//! - `equality`: random SQL, beside a plain SQLite;
//! - `handle`: what the two found, one by one;
//! - `logic`: files in the format of SQLite's sqllogictest (`logic/*.slt`).

#![allow(clippy::unwrap_used)]

mod equality;
mod handle;
mod logic;
mod nodes;
#[path = "../../src/database/tests/random_sql/mod.rs"]
mod random_sql;
