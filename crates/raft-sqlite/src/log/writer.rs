//! The thread "raft-log": carries out what has been placed, and is the only one to write to the
//! log's files.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::disk::Disk;
use super::placement::{Rotation, Segment, segment_name};
use super::queue::{Done, PlacedRecord, Step};
use super::record::{Position, RECORDS_START, RecordHeader, RecordType, encode_record, record_bytes};
use super::recycle::{begin_segment, keep_spare, release};
use super::state::State;
use super::vote::{VOTE_FILE, VoteFile};
use super::{LogError, LogOptions, SyncMode};

/// Most bytes written before a sync (one entry may be larger): bounds the buffer, and how long the
/// first caller of a batch waits for the last.
const MAX_BATCH_BYTES: u64 = 8 * 1024 * 1024;
/// A buffer that grew beyond this for one large entry is given back.
const MAX_KEPT_BUFFER_BYTES: usize = 16 * 1024 * 1024;

/// What callers and the writer share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) state: Mutex<State>,
    /// Signalled when there is something for the writer.
    pub(super) work: Condvar,
    /// Signalled when the queue has become shorter.
    pub(super) room: Condvar,
}

impl Shared {
    /// Stops the log for good and tells everybody who waits.
    fn fail(&self, reason: &str) {
        let queue = {
            let mut state = self.state.lock();
            if state.failed.is_none() {
                tracing::error!(reason, "the Raft log has stopped");
                state.failed = Some(reason.to_owned());
            }
            state.queue.abandon()
        };
        self.room.notify_all();
        for step in queue {
            if let Step::Call(done) = step {
                done(Err(stopped(reason)));
            }
        }
    }
}

fn stopped(reason: &str) -> io::Error {
    LogError::Failed { reason: reason.to_owned() }.into()
}

/// The thread's own state.
pub(super) struct Writer {
    shared: Arc<Shared>,
    vote_file: VoteFile,
    segment: Arc<Segment>,
    /// The segment is synced up to here.
    durable: u32,
    epoch: u32,
    sync: SyncMode,
    mark_delay: Duration,
    recycle: usize,
    progress: Progress,
}

/// How far the current segment and batch are.
#[derive(Debug, Default)]
struct Progress {
    /// Bytes not yet written; they belong right before `end`.
    buffer: Vec<u8>,
    /// Where the next record goes.
    end: u32,
    /// Something was written since the last sync that was promised to be synced.
    unsynced: bool,
    /// Something was synced that no later record tells of.
    unmarked: bool,
    /// There was no room for a mark.
    mark_refused: bool,
    syncs: Vec<Duration>,
    entries: u64,
    bytes: u64,
}

enum Work {
    Batch(Vec<Step>, u64),
    Mark(PlacedRecord),
    Stop(Option<PlacedRecord>),
}

impl Writer {
    /// For a log all of whose records are synced.
    pub(super) fn new(shared: Arc<Shared>, vote_file: VoteFile, options: &LogOptions) -> Self {
        let (segment, end, epoch) = {
            let placement = &shared.state.lock().placement;
            (Arc::clone(placement.newest()), placement.cursor, placement.epoch)
        };
        Self {
            shared,
            vote_file,
            segment,
            durable: end,
            epoch,
            sync: options.sync,
            mark_delay: options.mark_delay,
            recycle: options.recycle,
            progress: Progress { end, unmarked: true, ..Progress::default() },
        }
    }

    /// Works until the log is closed or fails.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        // A caller's `done` may panic: those who wait must still be told.
        if catch_unwind(AssertUnwindSafe(|| self.work())).is_err() {
            shared.fail("its writer thread has panicked");
        }
    }

    fn work(&mut self) {
        loop {
            let written = match self.next_work() {
                Work::Batch(steps, bytes) => self.batch(steps, bytes),
                Work::Mark(record) => self.mark(record, false),
                Work::Stop(record) => {
                    if let Some(record) = record
                        && let Err(error) = self.mark(record, true)
                    {
                        self.shared.fail(&error.to_string());
                    }
                    return;
                }
            };
            if let Err(error) = written {
                self.shared.fail(&error.to_string());
                return;
            }
        }
    }

    /// Waits for something to do.
    fn next_work(&mut self) -> Work {
        let mut state = self.shared.state.lock();
        loop {
            if !state.queue.is_empty() {
                let (steps, bytes) = state.queue.take(MAX_BATCH_BYTES);
                return Work::Batch(steps, bytes);
            }
            if state.closing {
                return Work::Stop(if state.failed.is_none() { state.place_mark() } else { None });
            }
            let to_tell = self.progress.unmarked || state.committed_to_tell().is_some();
            if to_tell && !self.progress.mark_refused {
                if self.shared.work.wait_for(&mut state, self.mark_delay).timed_out() && state.queue.is_empty() {
                    match state.place_mark() {
                        Some(record) => return Work::Mark(record),
                        None => self.progress.mark_refused = true,
                    }
                }
            } else {
                state.writer_sleeps = true;
                self.shared.work.wait(&mut state);
                state.writer_sleeps = false;
            }
        }
    }

    /// Writes a mark; without a sync it is a help, not a promise.
    fn mark(&mut self, record: PlacedRecord, sync: bool) -> Result<(), LogError> {
        self.encode(&record);
        self.progress.unmarked = false;
        if !sync {
            return self.flush();
        }
        self.progress.unsynced = true;
        self.sync()
    }

    /// Carries out steps, syncs once, and calls back.
    fn batch(&mut self, steps: Vec<Step>, queued_bytes: u64) -> Result<(), LogError> {
        let mut calls = Vec::new();
        // Who purges finds the room there when called back.
        let mut calls_after_release = Vec::new();
        let mut vote = None;
        let mut release_below = None;
        let mut result = Ok(());
        for step in steps {
            match step {
                // After a failure only the callers are still to be told.
                Step::Call(done) if release_below.is_some() => calls_after_release.push(done),
                Step::Call(done) => calls.push(done),
                _ if result.is_err() => {}
                Step::Write(record) => {
                    self.encode(&record);
                    self.progress.unsynced = true;
                }
                Step::Rotate(rotation) => result = self.rotate(*rotation),
                Step::SaveVote(bytes) => vote = Some(bytes),
                Step::Release(below) => release_below = Some(below),
            }
        }
        let result = result.and_then(|()| self.sync()).and_then(|()| match vote {
            Some(vote) => self.save_vote(vote),
            None => Ok(()),
        });
        if let Err(error) = result {
            calls.append(&mut calls_after_release);
            self.tell_failure(calls, &error);
            return Err(error);
        }
        self.publish(queued_bytes);
        for done in calls {
            done(Ok(()));
        }
        if let Some(below) = release_below
            && let Err(error) = release(&self.shared, below, self.recycle)
        {
            self.tell_failure(calls_after_release, &error);
            return Err(error);
        }
        for done in calls_after_release {
            done(Ok(()));
        }
        keep_spare(&self.shared);
        Ok(())
    }

    /// Nothing may be accepted any more when the first caller hears of the failure.
    fn tell_failure(&self, calls: Vec<Done>, error: &LogError) {
        let reason = error.to_string();
        self.shared.state.lock().failed.get_or_insert_with(|| reason.clone());
        tracing::error!(reason, "the Raft log has stopped");
        for done in calls {
            done(Err(stopped(&reason)));
        }
    }

    fn publish(&mut self, queued_bytes: u64) {
        let progress = &mut self.progress;
        progress.mark_refused = false;
        let mut state = self.shared.state.lock();
        state.written(Position::new(self.segment.number, progress.end), queued_bytes);
        state.statistics.batches += 1;
        state.statistics.written_entries += std::mem::take(&mut progress.entries);
        state.statistics.written_bytes += std::mem::take(&mut progress.bytes);
        for time in progress.syncs.drain(..) {
            state.statistics.count_sync(time);
        }
        drop(state);
        self.shared.room.notify_all();
    }

    fn encode(&mut self, record: &PlacedRecord) {
        let progress = &mut self.progress;
        assert!(
            record.position == Position::new(self.segment.number, progress.end),
            "invariant: records are written where they were placed"
        );
        let header = RecordHeader {
            record_type: record.record_type,
            kind: record.kind,
            payload_bytes: record.payload.len() as u32,
            synced: self.durable,
            segment: self.segment.number,
            salt: self.segment.salt,
            epoch: self.epoch,
            id: record.id,
        };
        encode_record(&mut progress.buffer, &header, &record.payload);
        progress.end += record_bytes(record.payload.len());
        progress.entries += u64::from(record.record_type == RecordType::Entry);
    }

    /// Hands what is buffered to the kernel.
    fn flush(&mut self) -> Result<(), LogError> {
        let progress = &mut self.progress;
        if progress.buffer.is_empty() {
            return Ok(());
        }
        let start = u64::from(progress.end) - progress.buffer.len() as u64;
        self.segment.file.write_at(&progress.buffer, start).map_err(|source| LogError::Io {
            action: "writing",
            path: self.shared.disk.path(&segment_name(self.segment.number)),
            source,
        })?;
        progress.bytes += progress.buffer.len() as u64;
        progress.buffer.clear();
        progress.buffer.shrink_to(MAX_KEPT_BUFFER_BYTES);
        Ok(())
    }

    /// Puts all that was written into the segment on disk.
    fn sync(&mut self) -> Result<(), LogError> {
        self.flush()?;
        if !self.progress.unsynced {
            return Ok(());
        }
        self.timed_sync(|writer| {
            writer.segment.file.sync().map_err(|source| LogError::Io {
                action: "syncing",
                path: writer.shared.disk.path(&segment_name(writer.segment.number)),
                source,
            })
        })?;
        self.durable = self.progress.end;
        self.progress.unsynced = false;
        self.progress.unmarked = true;
        Ok(())
    }

    fn timed_sync(&mut self, sync: impl FnOnce(&mut Self) -> Result<(), LogError>) -> Result<(), LogError> {
        if self.sync != SyncMode::Full {
            return Ok(());
        }
        let start = Instant::now();
        sync(self)?;
        self.progress.syncs.push(start.elapsed());
        Ok(())
    }

    /// Seals the segment and begins the next one.
    fn rotate(&mut self, rotation: Rotation) -> Result<(), LogError> {
        // Also a mark: the next segment's header says that all before it is on disk.
        self.progress.unsynced |= self.progress.end > self.durable;
        self.sync()?;
        let Rotation { segment, spare_name, header } = rotation;
        begin_segment(&*self.shared.disk, &segment, &spare_name, &header)?;
        self.segment = segment;
        self.durable = RECORDS_START;
        self.progress.end = RECORDS_START;
        Ok(())
    }

    fn save_vote(&mut self, vote: Bytes) -> Result<(), LogError> {
        let sync = self.sync == SyncMode::Full;
        let start = Instant::now();
        self.vote_file.save(vote, sync).map_err(|source| LogError::Io {
            action: "writing",
            path: self.shared.disk.path(VOTE_FILE),
            source,
        })?;
        if sync {
            self.progress.syncs.push(start.elapsed());
        }
        Ok(())
    }
}
