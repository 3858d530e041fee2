//! What the log holds in memory, and what each call changes there.
//!
//! Every call is checked and gets its places here, under one lock that is never held across a write
//! or a sync; the writer thread then only carries out the queue. So entries can be read, and a full
//! disk is known, before anything is written: room for a new segment is taken when the record that
//! needs it is placed, and a call that finds none changes nothing.

use std::sync::Arc;

use bytes::Bytes;

use super::cache::Cache;
use super::disk::Disk;
use super::index::{Index, Slot};
use super::placement::{Before, CONTROL_RESERVE_BYTES, Placement, Segment};
use super::queue::{Done, PlacedRecord, Queue, Step};
use super::record::{MAX_PAYLOAD_BYTES, Position, RecordType, record_bytes};
use super::{Entry, EntryId, LogError, LogStatistics};

/// The id of records that speak of no entry.
const NO_ENTRY: EntryId = EntryId { term: 0, index: 0 };

/// Where an entry is read from.
#[derive(Debug)]
pub(super) enum Source {
    Cached(Entry),
    Stored { index: u64, slot: Slot, segment: Arc<Segment> },
}

/// Everything that changes; behind one lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) index: Index,
    cache: Cache,
    pub(super) placement: Placement,
    pub(super) queue: Queue,
    /// Records before this place are written.
    written: Position,
    committed: Option<EntryId>,
    /// The newest `committed` that has a record.
    committed_placed: Option<EntryId>,
    vote: Option<Bytes>,
    /// The first failure: nothing is accepted after it.
    pub(super) failed: Option<String>,
    pub(super) closing: bool,
    /// The writer waits without a time limit.
    pub(super) writer_sleeps: bool,
    pub(super) statistics: LogStatistics,
}

impl State {
    /// A log all of whose records are written.
    pub(super) fn new(
        index: Index,
        placement: Placement,
        committed: Option<EntryId>,
        vote: Option<Bytes>,
        cache_bytes: usize,
    ) -> Self {
        Self {
            index,
            cache: Cache::new(cache_bytes),
            written: placement.end(),
            placement,
            queue: Queue::default(),
            committed,
            committed_placed: committed,
            vote,
            failed: None,
            closing: false,
            writer_sleeps: false,
            statistics: LogStatistics::default(),
        }
    }

    /// Refuses calls after a failure or a shutdown.
    pub(super) fn check_running(&self) -> Result<(), LogError> {
        if let Some(reason) = &self.failed {
            return Err(LogError::Failed { reason: reason.clone() });
        }
        if self.closing { Err(LogError::Closed) } else { Ok(()) }
    }

    /// Accepts entries: they can be read when this returns.
    ///
    /// # Errors
    /// Without effect: [`LogError::NotNext`], [`LogError::TooLarge`], [`LogError::DiskFull`],
    /// [`LogError::Io`] of a new file.
    pub(super) fn append(&mut self, disk: &dyn Disk, entries: Vec<Entry>, done: Done) -> Result<(), LogError> {
        self.check_next(&entries)?;
        let savepoint = self.placement.savepoint();
        let mut steps = Vec::with_capacity(entries.len() + 2);
        let committed = self.place_committed();
        let committed_id = committed.as_ref().map(|record| record.id);
        steps.extend(committed.map(Step::Write));
        let mut positions = Vec::with_capacity(entries.len());
        let mut last = self.index.last();
        for entry in &entries {
            let bytes = record_bytes(entry.payload.len());
            let before = self.before(last);
            match self.placement.place(disk, bytes, CONTROL_RESERVE_BYTES, before) {
                Ok((rotation, position)) => {
                    steps.extend(rotation.map(|rotation| Step::Rotate(Box::new(rotation))));
                    steps.push(Step::Write(PlacedRecord {
                        record_type: RecordType::Entry,
                        position,
                        id: entry.id,
                        kind: entry.kind,
                        payload: entry.payload.clone(),
                    }));
                    positions.push(position);
                }
                Err(error) => {
                    let rotations = steps.into_iter().filter_map(|step| match step {
                        Step::Rotate(rotation) => Some(*rotation),
                        _ => None,
                    });
                    self.placement.roll_back(disk, savepoint, rotations);
                    return Err(error);
                }
            }
            last = Some(entry.id);
        }
        self.committed_placed = committed_id.or(self.committed_placed);
        for (entry, position) in entries.into_iter().zip(positions) {
            let pushed = self.index.push(entry.id, position, entry.payload.len() as u32);
            assert!(pushed, "invariant: entries were checked to follow the last one");
            self.cache.push(entry);
        }
        for step in steps {
            self.queue.push(step);
        }
        self.queue.push(Step::Call(done));
        self.cache.evict(&self.index, self.written);
        Ok(())
    }

    fn check_next(&self, entries: &[Entry]) -> Result<(), LogError> {
        let mut next = self.index.next();
        for entry in entries {
            let found = entry.id.index;
            let expected = next.unwrap_or(found);
            if found != expected || found == u64::MAX {
                return Err(LogError::NotNext { expected, found });
            }
            let bytes = entry.payload.len();
            if bytes > MAX_PAYLOAD_BYTES {
                let limit_bytes = MAX_PAYLOAD_BYTES;
                return Err(LogError::TooLarge { what: "an entry", bytes, limit_bytes });
            }
            next = Some(found + 1);
        }
        Ok(())
    }

    /// Drops the entries after `last` (`None`: all that are not purged). They cannot be read any
    /// more when this returns.
    ///
    /// # Errors
    /// Without effect: [`LogError::Purged`], [`LogError::DiskFull`], [`LogError::Io`].
    pub(super) fn truncate_after(&mut self, disk: &dyn Disk, last: Option<u64>, done: Done) -> Result<(), LogError> {
        let purged = self.index.purged().map(|purged| purged.index);
        if let (Some(last), Some(purged)) = (last, purged)
            && last < purged
        {
            return Err(LogError::Purged { index: last, purged });
        }
        let nothing = match last {
            Some(last) => self.index.last().is_none_or(|newest| newest.index <= last),
            None => self.index.len() == 0,
        };
        if !nothing {
            let kept = last.and_then(|index| self.index.slot(index).map(|slot| EntryId { term: slot.term, index }));
            match kept {
                Some(id) => {
                    self.write_control(disk, RecordType::TruncateAfter, id)?;
                    self.index.truncate_after(id);
                }
                None => {
                    self.write_control(disk, RecordType::TruncateAll, NO_ENTRY)?;
                    self.index.truncate_all();
                }
            }
            // Raft never drops what is committed; should a caller do so, what was saved means
            // nothing any more.
            let last = self.index.last().map(|last| last.index);
            self.committed = self.committed.filter(|id| Some(id.index) <= last);
            self.committed_placed = self.committed_placed.filter(|id| Some(id.index) <= last);
            self.cache.follow(&self.index);
        }
        self.queue.push(Step::Call(done));
        Ok(())
    }

    /// Drops the entries up to `upto`.
    ///
    /// # Errors
    /// Without effect: [`LogError::DiskFull`], [`LogError::Io`].
    pub(super) fn purge(&mut self, disk: &dyn Disk, upto: EntryId, done: Done) -> Result<(), LogError> {
        if self.index.purged().is_none_or(|purged| purged.index < upto.index) {
            self.write_control(disk, RecordType::Purge, upto)?;
            self.index.purge(upto);
            self.cache.follow(&self.index);
            // Replay can begin with the segment of the oldest entry: its header has the rest.
            let newest = self.placement.newest().number;
            let needed = self.index.first_position().map_or(newest, Position::segment);
            self.queue.push(Step::Release(needed));
        }
        self.queue.push(Step::Call(done));
        Ok(())
    }

    /// Replaces the vote.
    pub(super) fn save_vote(&mut self, vote: Bytes, done: Done) {
        self.vote = Some(vote.clone());
        self.queue.push(Step::SaveVote(vote));
        self.queue.push(Step::Call(done));
    }

    pub(super) fn vote(&self) -> Option<Bytes> {
        self.vote.clone()
    }

    pub(super) fn save_committed(&mut self, committed: Option<EntryId>) {
        self.committed = committed;
    }

    pub(super) fn committed(&self) -> Option<EntryId> {
        self.committed
    }

    /// The log before a record, when `last` is the newest entry before it.
    fn before(&self, last: Option<EntryId>) -> Before {
        let within = |id: &EntryId| last.is_some_and(|last| id.index <= last.index);
        Before { purged: self.index.purged(), last, committed: self.committed.filter(within) }
    }

    fn write_control(&mut self, disk: &dyn Disk, record_type: RecordType, id: EntryId) -> Result<(), LogError> {
        let before = self.before(self.index.last());
        let (rotation, position) = self.placement.place(disk, record_bytes(0), 0, before)?;
        if let Some(rotation) = rotation {
            self.queue.push(Step::Rotate(Box::new(rotation)));
        }
        self.queue.push(Step::Write(PlacedRecord::control(record_type, position, id)));
        Ok(())
    }

    /// `committed`, when no record has it and the log reaches as far.
    pub(super) fn committed_to_tell(&self) -> Option<EntryId> {
        self.committed.filter(|committed| {
            self.committed_placed != Some(*committed)
                && self.index.last().is_some_and(|last| committed.index <= last.index)
        })
    }

    /// A record for `committed`, when there is need of one and room for it in the segment.
    fn place_committed(&mut self) -> Option<PlacedRecord> {
        let id = self.committed_to_tell()?;
        let position = self.placement.place_here(record_bytes(0), 0)?;
        Some(PlacedRecord::control(RecordType::Committed, position, id))
    }

    /// A record that carries only how far the segment is synced, and `committed` when that has
    /// changed. `None` when the segment is full: the next one's header will tell.
    pub(super) fn place_mark(&mut self) -> Option<PlacedRecord> {
        if let Some(record) = self.place_committed() {
            self.committed_placed = Some(record.id);
            return Some(record);
        }
        let position = self.placement.place_here(record_bytes(0), 0)?;
        Some(PlacedRecord::control(RecordType::Mark, position, NO_ENTRY))
    }

    /// Notes that all records before `end`, which are `bytes` of the queue, are written.
    pub(super) fn written(&mut self, end: Position, bytes: u64) {
        self.written = end;
        self.queue.finish(bytes);
        self.cache.evict(&self.index, end);
    }

    /// Where the entries of `start..end` that exist are, oldest first, up to `max_bytes` of payload
    /// but at least one.
    pub(super) fn sources(&self, start: u64, end: u64, max_bytes: Option<usize>) -> Vec<Source> {
        let mut sources = Vec::new();
        if self.index.len() == 0 {
            return sources;
        }
        let start = start.max(self.index.first());
        let end = end.min(self.index.next().unwrap_or(0));
        let mut bytes = 0usize;
        for index in start..end {
            let slot = *self.index.slot(index).expect("invariant: the range is within the log");
            bytes = bytes.saturating_add(slot.payload_bytes as usize);
            if !sources.is_empty() && max_bytes.is_some_and(|max_bytes| bytes > max_bytes) {
                break;
            }
            sources.push(match self.cache.get(index) {
                Some(entry) => Source::Cached(entry.clone()),
                None => {
                    let segment = Arc::clone(self.placement.segment(slot.position.segment()));
                    Source::Stored { index, slot, segment }
                }
            });
        }
        sources
    }

    /// Counters and sizes.
    pub(super) fn statistics(&self) -> LogStatistics {
        let segments = &self.placement.segments;
        LogStatistics {
            entries: self.index.len() as u64,
            segments: segments.len() as u64,
            segment_bytes: segments.iter().map(|segment| u64::from(segment.length)).sum(),
            spare_segments: self.placement.spares.len() as u64,
            ready_bytes: self.placement.ready_bytes(),
            cached_bytes: self.cache.bytes() as u64,
            queued_bytes: self.queue.bytes(),
            ..self.statistics.clone()
        }
    }
}
