//! Keys, revisions and leases: what etcd's requests mean, in terms of a key index in memory and append-only tables.
//!
//! ```text
//!   Store (store, route) ── a write ──> leader's writer thread         reads: the published State, at any node
//!                                  writer: run, undo, doubt            view: range, compare, checks
//!                                  transaction: put, delete, txn ..    cache: values by row
//!                                    │ rows, sidecar                   past: events from the tables
//!                      raft-sqlite: pages + sidecar, committed
//!                                    │
//!                                  replica: applied(sidecar) -> Contents, ring, State -> EventSink
//! ```
//!
//! `contents` holds what both sides agree on: the index, the leases, the revisions and the changes that can be made.
//! `removal` is physical compaction, `request` the form in which requests travel to the leader, `outcome` what
//! raft-sqlite's errors mean.
//!
//! Invariants: INV-KV-REBUILD (contents), INV-KV-WRITER (writer), INV-KV-PUBLISH (replica).
//! Sources: etcd server/etcdserver/txn, server/etcdserver/api/v3rpc/key.go, server/storage/mvcc (3.7).

mod cache;
mod check;
mod contents;
mod event;
mod outcome;
mod past;
mod removal;
mod replica;
mod request;
mod ring;
mod route;
mod sidecar;
mod state;
mod store;
mod transaction;
mod view;
mod writer;

pub use event::{Event, EventBatch, EventKind, EventSink, LeaseChange, PastEvents, Previous, RecentEvents};
pub use route::DATABASE;
pub use state::State;
pub use store::{Store, StoreOptions};

pub use crate::index::ValueId;

/// A lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Its id, never 0.
    pub id: i64,
    /// The time to live it was granted, in seconds.
    pub ttl_seconds: i64,
}

#[cfg(test)]
mod tests;
