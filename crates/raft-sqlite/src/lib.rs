//! SQLite, replicated: every node of a cluster holds the same database, byte for byte.
//!
//! Writes run as ordinary SQL on the leader, inside this process. The WAL frames that SQLite writes at COMMIT are captured,
//! replicated through Raft, and only then become visible, on every node. So any SQL is allowed, followers run none of it, and each
//! replica can prove that it is identical.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use raft_sqlite::{Node, NodeConfig, ReadConsistency};
//!
//! let node = Node::start(NodeConfig::single("/var/lib/example")).await?;
//! let db = node.database("app");
//! node.wait_for_leader(std::time::Duration::from_secs(10)).await?;
//! db.execute("CREATE TABLE IF NOT EXISTS word(id INTEGER PRIMARY KEY, text TEXT)").await?;
//! db.execute(("INSERT INTO word(text) VALUES (?)", ["hello"])).await?;
//! let rows = db.query("SELECT id, text FROM word", ReadConsistency::Linearizable).await?;
//! assert_eq!(rows[0].get::<String>("text")?, "hello");
//! assert_eq!(rows.deserialize::<(i64, String)>()?, [(1, "hello".to_owned())]);
//! node.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! The way of a write: [`Database`] → `database` (writer thread) → `vfs` captures → `page` (PageSet) → `consensus` → `log` and the
//! quorum → `state_machine` → `page` store: readers see it → [`ApplyObserver`]. docs/architecture.md tells more.

pub mod blocking;
pub mod config;
pub mod error;
pub mod metrics;

mod client;
mod consensus;
#[cfg(test)]
mod crash_tests;
mod database;
mod log;
mod network;
mod node;
mod page;
mod state_machine;
mod vfs;

pub use client::{
    Change, Changes, Client, ClientBuilder, ColumnIndex, ConnectError, Database, EndReason, Executed, LocalDatabase,
    Migrated, Migration, MigrationError, Parameters, ReadConsistency, Row, RowError, RowStream, Rows, SqlError,
    Statement, Transaction, TransactionError, TransactionOptions,
};
pub use config::{ClusterStart, InitialMember, NodeConfig, PeerTls};
pub use database::DatabaseError;
pub use database::job::WriteContext;
pub use database::prepare::{ConnectionPurpose, ConnectionRole, PrepareError, PrepareFailure};
pub use error::{CallError, ErrorClass, MembershipError, ReadError, StartError, WriteError};
pub use log::{LogError, LogStatistics, SYNC_LATENCY_BUCKETS, SyncMode};
pub use node::{
    CallHandler, DatabaseStatistics, Leadership, Member, Node, NodeBuilder, NodeStatus, Role, SnapshotStatistics,
};
pub use page::{PageDamage, Version};
pub use rusqlite::types::{FromSql, ToSql, Value};
pub use rusqlite::{self, named_params, params};
pub use state_machine::observer::ApplyObserver;
pub use tokio_rustls::rustls;

use serde::{Deserialize, Serialize};

/// A member of a cluster. Displayed as 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
