//! What a program that embeds raft-sqlite adds to it: prepared connections, migrations, metrics, listeners and certificates of its own.

#![allow(clippy::unwrap_used)]

mod migrations;
mod network;
#[path = "../sql/nodes.rs"]
mod nodes;
mod observed;
mod prepared;
