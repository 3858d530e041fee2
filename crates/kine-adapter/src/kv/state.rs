//! The committed state as readers see it.

use super::LeaseInfo;
use super::contents::Contents;
use bytes::Bytes;
use raft_sqlite::Version;

/// The committed state at one revision: cheap to keep, never changes.
#[derive(Debug, Clone)]
pub struct State {
    pub(super) contents: Contents,
    pub(super) version: Version,
    pub(super) lease_generation: u64,
}

impl State {
    /// The store's revision: 1 when it is empty.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.contents.revision
    }

    /// History before this revision is gone; -1 if nothing has been compacted yet.
    #[must_use]
    pub fn compact_revision(&self) -> i64 {
        self.contents.compact_revision
    }

    /// The database version it belongs to.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The lease with that id.
    #[must_use]
    pub fn lease(&self, id: i64) -> Option<LeaseInfo> {
        self.contents.leases.get(&id).map(|lease| lease.info)
    }

    /// All leases, by id.
    pub fn leases(&self) -> impl Iterator<Item = LeaseInfo> + '_ {
        self.contents.leases.iter().map(|lease| lease.info)
    }

    /// The keys that hang on a lease, in order.
    pub fn lease_keys(&self, id: i64) -> impl Iterator<Item = Bytes> + '_ {
        let lease = self.contents.leases.get(&id).into_iter();
        lease.flat_map(|lease| lease.keys.iter().map(|attached| Bytes::copy_from_slice(&attached.0)))
    }

    /// Number of leases.
    #[must_use]
    pub fn lease_count(&self) -> usize {
        self.contents.leases.len()
    }

    /// Changes whenever a lease is granted or ends, and when the whole state is replaced.
    #[must_use]
    pub fn lease_generation(&self) -> u64 {
        self.lease_generation
    }

    /// Number of keys that exist.
    #[must_use]
    pub fn key_count(&self) -> usize {
        self.contents.keys.live_count()
    }
}
