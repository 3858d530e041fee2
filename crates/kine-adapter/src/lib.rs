//! The etcd v3 API on raft-sqlite: keys, watches and leases kept in a replicated SQLite database.
//!
//! ```text
//! client ── rpc/ ── kv/, watch/, lease/ ── index/, schema/ ── raft-sqlite (its public face only)
//! ```
//!
//! A write: `rpc` decodes, [`kv::Store`] checks it and runs it on the leader's writer thread (the key index answers what
//! exists, SQL appends one row to `rev`), raft-sqlite replicates the pages together with a sidecar that describes the
//! events, and on every node the observer brings the committed index forward from the sidecar and hands the events to
//! the watch hub. Reads take the committed index, which is a persistent tree.

pub mod error;
pub mod http;
pub mod index;
pub mod kv;
pub mod lease;
pub mod proto;
pub mod rpc;
pub mod schema;
pub mod server;
pub mod watch;

pub use error::KvError;
pub use server::Server;
