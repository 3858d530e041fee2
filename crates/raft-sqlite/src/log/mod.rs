//! The Raft log on disk: entries, vote and the known committed index of one member.
//!
//! ```text
//!  append, truncate_after, purge, save_vote      any thread: checks, gives each record its place
//!        |  queue
//!        v
//!  thread "raft-log": all that has queued        as few writes as possible, one fdatasync,
//!        |                                       then the callers' `done`, in order
//!        v
//!  segment files, vote file
//! ```
//!
//! The log is a stream of records cut into preallocated segments. Nothing is ever overwritten in
//! place: dropping entries is a record of its own, so a crash in a truncation cannot lose what it
//! kept. Purged segments are renamed and used again, because overwriting blocks that are already
//! allocated and written makes each fdatasync cheaper. The layout, byte by byte, is in
//! docs/formats.md, "Raft log".
//!
//! Invariants:
//! - INV-LOG-SYNCED: `done(Ok)` is called only after everything placed before it is on disk.
//! - INV-LOG-ORDER: records are written in the order in which their calls were accepted, and `done`
//!   is called in that order.
//! - INV-LOG-FAIL-STOP: after a failed write or sync nothing is acknowledged any more; what the
//!   kernel kept of it is unknown.
//! - INV-LOG-TORN-OR-DAMAGED: at open, bytes are cut off only at the end of the newest segment, and
//!   only where nothing on disk says that they had been synced; any other unreadable byte is damage,
//!   which is reported and leaves every file as it was.
//! - INV-LOG-COMMITTED-LAGS: [`Log::committed`] after a restart never exceeds what was saved, nor
//!   the last entry.
//!
//! Parts: [`record`] and [`vote`] are the codecs, [`disk`] the seam for faults; [`state`] is what
//! is in memory ([`index`], [`cache`], [`placement`], [`queue`]); [`writer`] and [`recycle`] change
//! the files, [`recovery`] and [`open`] are the way back from them; [`handle`] is the public face.
//!
//! Sources: Raft (Ongaro, 2014) section 3.8 (what must be persistent); Rebello et al., "Can
//! Applications Recover from fsync Failures?", ATC 2020; Alagappan et al., "Protocol-Aware Recovery
//! for Consensus-Based Storage", FAST 2018 (torn or damaged).

use std::time::Duration;

use bytes::Bytes;

mod cache;
pub(crate) mod disk;
mod error;
mod handle;
mod index;
mod open;
mod placement;
mod queue;
mod record;
mod recovery;
mod recycle;
mod state;
mod statistics;
mod vote;
mod writer;

#[cfg(test)]
mod tests;

pub use error::LogError;
pub use handle::Log;
pub use statistics::{LogStatistics, SYNC_LATENCY_BUCKETS};

/// Names one entry: two logs that hold an entry with the same id hold the same entries up to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId {
    /// Raft term of the leader that proposed the entry.
    pub term: u64,
    /// Position in the Raft log.
    pub index: u64,
}

/// One entry of the Raft log. A clone shares the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Term and index.
    pub id: EntryId,
    /// What the payload is; opaque to the log.
    pub kind: u8,
    /// Opaque to the log; at most `record::MAX_PAYLOAD_BYTES`.
    pub payload: Bytes,
}

/// The two ends of the log, including what is not on disk yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogState {
    /// The last purged entry; it and all before it are gone.
    pub purged: Option<EntryId>,
    /// The newest entry, or `purged` when there is none after it.
    pub last: Option<EntryId>,
}

/// When an operation counts as being on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncMode {
    /// After fdatasync.
    #[default]
    Full,
    /// As soon as the kernel has it. A power failure or a kernel crash then takes back acknowledged
    /// entries and votes: a cluster can lose committed writes and elect two leaders in one term.
    /// For tests and throw-away data.
    LosesAcknowledgedOnPowerFailure,
}

/// How a log is kept.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Length of a segment file in bytes; brought into 16 KiB..=1 GiB and rounded up to 4 KiB. An
    /// entry that does not fit gets a segment of its own length.
    pub segment_bytes: u64,
    /// Newest entries kept in memory, in bytes of payload plus 64 for each entry. Entries not yet
    /// written are kept beyond this.
    pub cache_bytes: usize,
    /// Purged segments kept for use again; more are deleted.
    pub recycle: usize,
    /// When an operation counts as being on disk.
    pub sync: SyncMode,
    /// After this long without work a mark is written (not synced) that tells a later open how far
    /// the log had been synced, so that damage to the last batch is told from a torn write.
    pub mark_delay: Duration,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 16 * 1024 * 1024,
            cache_bytes: 32 * 1024 * 1024,
            recycle: 4,
            sync: SyncMode::Full,
            mark_delay: Duration::from_millis(50),
        }
    }
}
