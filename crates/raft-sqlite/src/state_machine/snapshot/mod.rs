//! Snapshots on the move: what a receiver lacks of this node's state, and how it is put together there.
//!
//! Nothing is pinned while a database is copied, so a transfer costs the sender no memory however long it takes:
//! ```text
//! copy   each page as it is committed when its turn comes: the copy is of no single version
//! redo   the PageSets committed since the copy began, from the log: now it is the database at the snapshot's version
//! ```
//! INV-REDO-ABSOLUTE: PageSets hold absolute bytes. So laying all of them, from the first after the copy's beginning to the last before the snapshot, over
//! pages that were read anywhere in between gives what they give over the pages of the beginning. The state hash proves it.
//!
//! openraft fixes a snapshot's position before it is sent. If nothing was written during the copy, the copy is that snapshot. Otherwise
//! the sender gives up, openraft asks for a newer snapshot, and the same [`send::Transfer`] goes on with the redo alone.
//!
//! Copying compares first: hashes of ranges, then of the pages of those that differ, so that only pages that the receiver does not have
//! are sent, whether it has them from its own database or from a transfer that was broken off. What arrives in DATA/incoming is a
//! source for the next attempt and never trusted: its pages are hashed again.
//!
//! - [`send`], [`receive`]: the two ends, without the network between them;
//! - [`files`]: everything that touches DATA/incoming.

pub(crate) mod files;
pub(crate) mod receive;
pub(crate) mod send;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::{Machine, MembershipRecord, PinnedState, invalid};
use crate::database::DatabaseError;
use crate::database::replica::{AppliedMark, LogPosition, Replica};
use crate::page::{PageNumber, PageSize, StateHash, Version, page_hash};
use files::IncomingFiles;

/// About how many bytes of page images go into one chunk.
const CHUNK_BYTES: usize = 512 * 1024;
/// Largest chunk of page images taken from a peer, decompressed.
const MAX_CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of pages under one hash of the first comparison.
const RANGE_BYTES: usize = 1024 * 1024;

/// One piece of a snapshot, as the sender says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// A database begins; answered by an [`Action`].
    Begin(Begin),
    /// Hashes of ranges that follow each other, the first of them with this number; answered by [`Answer::Differs`].
    Ranges { first: u32, hashes: Vec<u128> },
    /// Images of the pages of these numbers, which ascend.
    Pages { numbers: Vec<u32>, images: Bytes, lz4: bool, crc32c: u32 },
    /// Every page of the database has been compared or sent.
    Copied,
    /// A PageSet that was committed since a database's copy began.
    Redo { name: String, page_set: Bytes },
    /// Nothing more comes. `exact`: every database is at its version. Answered by [`Answer::Finished`].
    Finish { exact: bool },
}

/// What a database of a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    pub name: String,
    pub page_size: u32,
    pub page_count: u32,
    pub version: u64,
    pub state_hash: u128,
    /// The version that an earlier call of this transfer has copied; 0: none.
    pub continues: u64,
}

/// What the receiver wants of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// All pages.
    Whole,
    /// Hashes, then what differs.
    Compare,
    /// The PageSets since `continues`.
    Continue,
    /// Nothing: its own database is at this version.
    Same,
}

/// What the receiver says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Action(Action),
    /// The ranges that differ, each with the lower half of the hash of each of its pages.
    Differs(Vec<(u32, Vec<u64>)>),
    /// The databases whose pages do not have the state hash they must have.
    Finished {
        mismatched: Vec<String>,
    },
}

/// How the pages of a database are cut into ranges.
#[derive(Clone, Copy, Debug)]
struct Ranges {
    pages: u32,
    page_count: u32,
}

impl Ranges {
    fn new(page_size: PageSize, page_count: u32) -> Self {
        Self { pages: (RANGE_BYTES / page_size.bytes()).max(1) as u32, page_count }
    }

    fn count(self) -> u32 {
        self.page_count.div_ceil(self.pages)
    }

    /// The page numbers of a range. `range` is below [`Self::count`].
    fn pages(self, range: u32) -> RangeInclusive<u32> {
        let first = range * self.pages + 1;
        first..=(first - 1 + self.pages.min(self.page_count - (first - 1)))
    }
}

/// Hashes of pages that follow each other from `first` on, and of the range they are.
fn hash_range(first: u32, images: &[u8], page_size: PageSize) -> (u128, Vec<u64>) {
    let mut whole = Vec::with_capacity(images.len() / page_size.bytes() * 16);
    let mut halves = Vec::with_capacity(images.len() / page_size.bytes());
    for (at, image) in images.chunks_exact(page_size.bytes()).enumerate() {
        let hash = page_hash(PageNumber(first + at as u32), image);
        whole.extend(hash.to_le_bytes());
        halves.push(hash as u64);
    }
    (xxhash_rust::xxh3::xxh3_128(&whole), halves)
}

/// What this node has sent of snapshots since it started.
#[derive(Debug, Default)]
pub(crate) struct SendCounters {
    pub sent_bytes: AtomicU64,
    pub sent_pages: AtomicU64,
    pub compared_pages: AtomicU64,
    pub completed: AtomicU64,
}

impl SendCounters {
    fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}

struct ReceivedDatabase {
    name: String,
    version: Version,
    state_hash: StateHash,
    /// This node's own database is at this version: there is no file.
    same: bool,
}

/// A complete snapshot on this node's disk; its files go when this is dropped, installed or not.
pub(crate) struct ReceivedSnapshot {
    files: IncomingFiles,
    databases: Vec<ReceivedDatabase>,
    /// Until this is dropped nobody else receives.
    lock: Option<tokio::sync::OwnedMutexGuard<receive::Incoming>>,
}

impl ReceivedSnapshot {
    pub fn lock(&mut self, incoming: tokio::sync::OwnedMutexGuard<receive::Incoming>) {
        self.lock = Some(incoming);
    }
}

impl Drop for ReceivedSnapshot {
    fn drop(&mut self) {
        self.files.remove_all();
    }
}

/// Writes a pinned state into `files` as if it had come from a peer. Blocking I/O.
pub(crate) fn materialise(state: &PinnedState, files: IncomingFiles) -> io::Result<ReceivedSnapshot> {
    files.begin(state.position.map_or(0, |position| position.index))?;
    let mut received = ReceivedSnapshot { files, databases: Vec::new(), lock: None };
    for (name, _, pin) in &state.databases {
        let file = received.files.open(name)?;
        let bytes = pin.page_size().bytes() as u64;
        for number in 1..=pin.page_count() {
            let page = pin.read_page(PageNumber(number)).map_err(io::Error::other)?;
            file.write_at(page.bytes(), u64::from(number - 1) * bytes)?;
        }
        file.set_length(u64::from(pin.page_count()) * bytes)?;
        file.sync()?;
        let (version, state_hash) = (pin.version(), pin.state_hash());
        received.databases.push(ReceivedDatabase { name: name.clone(), version, state_hash, same: false });
    }
    received.files.sync()?;
    Ok(received)
}

impl Machine {
    /// DATA/incoming.
    pub fn incoming_files(&self) -> IncomingFiles {
        let data = self.directory().parent().unwrap_or(self.directory());
        IncomingFiles::new(data.join("incoming"), self.inner.setup.options.disk.clone())
    }

    /// Replaces the whole state of this node by a received snapshot; on disk when it returns.
    pub async fn install(
        &self,
        position: LogPosition,
        membership: MembershipRecord,
        snapshot: ReceivedSnapshot,
    ) -> Result<(), DatabaseError> {
        self.close_writers("a snapshot is installed").await;
        let _files = self.inner.files.lock().await;
        let machine = self.clone();
        let span = tracing::info_span!("install_snapshot", term = position.term, index = position.index);
        let install = move || span.in_scope(|| machine.install_files(position, membership, &snapshot));
        let result = tokio::task::spawn_blocking(install).await;
        result.map_err(|error| DatabaseError::Internal(format!("the install ended early: {error}")))?
    }

    fn install_files(
        &self,
        position: LogPosition,
        membership: MembershipRecord,
        snapshot: &ReceivedSnapshot,
    ) -> Result<(), DatabaseError> {
        let kept: BTreeSet<&str> = snapshot.databases.iter().map(|database| database.name.as_str()).collect();
        let gone: Vec<String> =
            self.database_names().into_iter().filter(|name| !kept.contains(name.as_str())).collect();
        for name in gone {
            if let Some(state) = self.inner.databases.write().remove(&name) {
                state.writer.stop();
                self.part_from(&state);
            }
            self.inner.dropped.lock().insert(name);
        }
        let mut catalog = super::catalog::Catalog {
            position: Some(position),
            membership: membership.clone(),
            databases: Default::default(),
        };
        for received in &snapshot.databases {
            let state = match self.database(&received.name) {
                Some(state) => state,
                None => {
                    self.inner.dropped.lock().remove(&received.name);
                    self.add_database(&received.name, received.version)?
                }
            };
            if received.same {
                keep(&state.replica, received, position)?;
            } else {
                let mark = AppliedMark { position, version: received.version, state_hash: received.state_hash };
                state.replica.install(&snapshot.files.path(&received.name), mark)?;
            }
            state.restored_index.store(position.index, Ordering::Release);
            catalog.databases.insert(received.name.clone(), received.version.0);
            if !received.same {
                state.feed.replaced(received.version);
                self.notify_restored(&received.name, &state)?;
            }
        }
        self.write_catalog(&catalog, position)?;
        self.advance(position, Some(membership));
        Ok(())
    }
}

/// A database that is at the snapshot's version already: only its file may be behind.
fn keep(replica: &Replica, received: &ReceivedDatabase, position: LogPosition) -> Result<(), DatabaseError> {
    let pin = replica.pin();
    if (pin.version(), pin.state_hash()) != (received.version, received.state_hash) {
        let why = format!("database {:?} has moved to version {} under a snapshot", received.name, pin.version());
        return Err(DatabaseError::Internal(why));
    }
    replica.checkpoint(pin, position)
}

/// Whether what lies in DATA/incoming is of no more use: this node has come past it by other ways.
pub(crate) fn is_obsolete(folder: &Path, applied_index: u64) -> bool {
    files::target_index(folder).is_none_or(|target| target <= applied_index)
}
