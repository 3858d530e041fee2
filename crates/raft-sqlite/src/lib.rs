//! SQLite, replicated: every node of a cluster holds the same database, byte for byte.
//!
//! Writes run as ordinary SQL on the leader, inside this process. The WAL frames that SQLite writes at COMMIT are captured,
//! replicated through Raft, and only then become visible, on every node. So any SQL is allowed, followers run none of it, and each
//! replica can prove that it is identical.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use raft_sqlite::{Node, NodeConfig, ReadConsistency, Statement};
//!
//! let node = Node::start(NodeConfig::single("/var/lib/example")).await?;
//! let db = node.database("app");
//! node.wait_for_leader(std::time::Duration::from_secs(10)).await?;
//! db.execute("CREATE TABLE IF NOT EXISTS word(id INTEGER PRIMARY KEY, text TEXT)").await?;
//! db.execute(Statement::new("INSERT INTO word(text) VALUES (?)").bind("hello".to_owned())).await?;
//! let rows = db.query("SELECT text FROM word", ReadConsistency::Linearizable).await?;
//! assert_eq!(rows.columns, ["text"]);
//! node.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The way of a write: [`Database`] → `database` (writer thread) → `vfs` captures → `page` (PageSet) → `consensus` → `log` and the
//! quorum → `state_machine` → `page` store: readers see it → [`ApplyObserver`]. docs/architecture.md tells more.

pub mod config;
pub mod error;

mod client;
mod consensus;
mod database;
mod log;
mod network;
mod node;
mod page;
mod state_machine;
mod vfs;

pub use client::{Database, Executed, ReadConsistency, Row, Rows, SqlError, Statement, Value};
pub use config::{ClusterStart, InitialMember, NodeConfig, PeerTls};
pub use database::DatabaseError;
pub use database::job::WriteContext;
pub use error::{CallError, ErrorClass, MembershipError, ReadError, StartError, WriteError};
pub use log::{LogError, LogStatistics, SYNC_LATENCY_BUCKETS, SyncMode};
pub use node::{
    CallHandler, DatabaseStatistics, Leadership, Member, Node, NodeBuilder, NodeStatus, Role, SnapshotStatistics,
};
pub use page::Version;
pub use rusqlite;
pub use state_machine::observer::ApplyObserver;

use serde::{Deserialize, Serialize};

/// A member of a cluster. Displayed as 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
