//! What an embedding program may watch of the apply.

use bytes::Bytes;

use crate::page::Version;

/// Told of every change of every database of this node, in order. The methods must not block long and must not fail: a node cannot
/// skip an entry.
pub trait ApplyObserver: Send + Sync {
    /// The whole state of `database` was replaced (node start, snapshot install) or begins (creation): rebuild whatever is derived
    /// from it. `connection` has a read transaction open at `version`.
    fn restored(&self, database: &str, version: Version, connection: &rusqlite::Connection);

    /// A committed entry became visible to readers as `version`, with the sidecars of its transactions in order. Called in log order.
    fn applied(&self, database: &str, version: Version, sidecars: &[Bytes]);

    /// On the writer's thread: before the first closure of a leadership, and after captured versions were dropped. The next closure
    /// starts from the committed state. Every committed version has been given to [`Self::applied`] before.
    fn writer_reset(&self, database: &str);
}
