//! The log as the rest of the program sees it.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle, ThreadId};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};

use super::disk::{DirectoryDisk, Disk};
use super::index::Slot;
use super::open::{self, Opened};
use super::placement::{Segment, segment_name};
use super::queue::Step;
use super::record::{Decoded, RecordType, decode_record, record_bytes};
use super::state::{Source, State};
use super::vote::MAX_VOTE_BYTES;
use super::writer::{Shared, Writer};
use super::{Entry, EntryId, LogError, LogOptions, LogState, LogStatistics};

/// Bytes that may wait to be written before [`Log::append`] makes its caller wait: bounds the
/// memory of a log whose disk is slow.
const MAX_QUEUED_BYTES: u64 = 256 * 1024 * 1024;
/// Entries that stand side by side in a segment are read together, up to this many bytes.
const MAX_READ_BYTES: u32 = 1024 * 1024;

/// An open Raft log. A clone is another handle of the same log; the log is closed when the last one
/// is dropped, or by [`Log::shutdown`].
///
/// No method waits for the disk, but for [`Log::read`] of entries that are not in memory,
/// [`Log::flush`], [`Log::shutdown`], and [`Log::append`] when 256 MiB wait to be written.
/// Callbacks run on the log's thread, in the order in which the operations were accepted; they must
/// be short, must not panic (that stops the log), and must not call [`Log::flush`], which would
/// wait for itself.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: ThreadId,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("directory", &self.inner.shared.disk.path(""))
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Log {
    /// Opens the log in `directory`, or makes a new one there, and starts the thread "raft-log".
    /// Reads all segments: time and disk reads grow with what is not purged. All that is found is
    /// on disk when this returns.
    ///
    /// # Errors
    /// [`LogError::Locked`], [`LogError::Damaged`], [`LogError::Missing`],
    /// [`LogError::NewerFormat`], [`LogError::DiskFull`], [`LogError::Io`].
    pub fn open(directory: &Path, options: &LogOptions) -> Result<Self, LogError> {
        Self::open_on(Arc::new(DirectoryDisk::open(directory)?), options)
    }

    pub(crate) fn open_on(disk: Arc<dyn Disk>, options: &LogOptions) -> Result<Self, LogError> {
        let Opened { shared, writer, lock } = open::open(disk, options)?;
        let thread = thread::Builder::new()
            .name("raft-log".to_owned())
            .spawn(move || run(writer, lock))
            .map_err(|source| LogError::Io { action: "starting the thread of", path: shared.disk.path(""), source })?;
        let thread_id = thread.thread().id();
        Ok(Self { inner: Arc::new(Inner { shared, thread: Mutex::new(Some(thread)), thread_id }) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.shared.state.lock()
    }

    /// Accepts one operation and wakes the writer.
    fn submit(
        &self,
        mut state: MutexGuard<'_, State>,
        operation: impl FnOnce(&mut State, &dyn Disk) -> Result<(), LogError>,
    ) -> Result<(), LogError> {
        state.check_running()?;
        let result = operation(&mut state, &*self.inner.shared.disk);
        drop(state);
        self.inner.shared.work.notify_one();
        result
    }

    /// The ends of the log.
    pub fn state(&self) -> LogState {
        let state = self.lock();
        LogState { purged: state.index.purged(), last: state.index.last() }
    }

    /// Adds entries after the last one. They can be read when this returns; `done` is called once
    /// they, and all operations before, are on disk, or with an error when that failed: then they
    /// may or may not be there after the next open. An empty log that was never purged may start at
    /// any index. Without entries this is a barrier.
    ///
    /// # Errors
    /// Without effect, and `done` is dropped: [`LogError::NotNext`], [`LogError::TooLarge`],
    /// [`LogError::DiskFull`] (later calls may succeed), [`LogError::Io`] (a new segment file could
    /// not be made), [`LogError::Failed`], [`LogError::Closed`].
    pub fn append(
        &self,
        entries: Vec<Entry>,
        done: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<(), LogError> {
        let mut state = self.lock();
        // The writer makes the room: it must never wait for itself.
        while state.queue.bytes() > MAX_QUEUED_BYTES
            && state.check_running().is_ok()
            && thread::current().id() != self.inner.thread_id
        {
            self.inner.shared.room.wait(&mut state);
        }
        self.submit(state, |state, disk| state.append(disk, entries, Box::new(done)))
    }

    /// Drops the entries after index `last`; `None` drops all that are not purged. They cannot be
    /// read any more when this returns; `done` is called once the truncation is on disk.
    ///
    /// # Errors
    /// Without effect, and `done` is dropped: [`LogError::Purged`] when `last` is before the last
    /// purged entry, [`LogError::DiskFull`], [`LogError::Io`], [`LogError::Failed`],
    /// [`LogError::Closed`].
    pub fn truncate_after(
        &self,
        last: Option<u64>,
        done: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<(), LogError> {
        self.submit(self.lock(), |state, disk| state.truncate_after(disk, last, Box::new(done)))
    }

    /// Drops the entries up to `upto`, inclusive. When the log ends before `upto` it is empty
    /// afterwards and goes on after it. Purging what is purged already does nothing. `done` is
    /// called once the purge is on disk; segments are set free after that.
    ///
    /// # Errors
    /// Without effect, and `done` is dropped: [`LogError::DiskFull`] (only after dozens of purges
    /// that freed no segment), [`LogError::Io`], [`LogError::Failed`], [`LogError::Closed`].
    pub fn purge(&self, upto: EntryId, done: impl FnOnce(io::Result<()>) + Send + 'static) -> Result<(), LogError> {
        self.submit(self.lock(), |state, disk| state.purge(disk, upto, Box::new(done)))
    }

    /// Replaces the vote. [`Log::vote`] returns it at once; `done` is called once it, and all
    /// operations before, are on disk.
    ///
    /// # Errors
    /// Without effect, and `done` is dropped: [`LogError::TooLarge`] above [`MAX_VOTE_BYTES`],
    /// [`LogError::Failed`], [`LogError::Closed`].
    pub fn save_vote(&self, vote: &[u8], done: impl FnOnce(io::Result<()>) + Send + 'static) -> Result<(), LogError> {
        if vote.len() > MAX_VOTE_BYTES {
            return Err(LogError::TooLarge { what: "a vote", bytes: vote.len(), limit_bytes: MAX_VOTE_BYTES });
        }
        let vote = Bytes::copy_from_slice(vote);
        self.submit(self.lock(), |state, _| {
            state.save_vote(vote, Box::new(done));
            Ok(())
        })
    }

    /// The newest vote, on disk or not yet.
    pub fn vote(&self) -> Option<Bytes> {
        self.lock().vote()
    }

    /// Notes up to where the log is known to be committed. It is written beside the next batch or
    /// when the log is idle, without a sync of its own: after a crash an older value may come back.
    pub fn save_committed(&self, committed: Option<EntryId>) {
        let mut state = self.lock();
        state.save_committed(committed);
        let wake = state.writer_sleeps;
        drop(state);
        if wake {
            self.inner.shared.work.notify_one();
        }
    }

    /// What was saved last; after an open, what was found: never beyond the last entry.
    pub fn committed(&self) -> Option<EntryId> {
        self.lock().committed()
    }

    /// The entries of `range` that exist, oldest first: what is purged or not yet appended is left
    /// out. With `max_bytes` as many as have together at most so many bytes of payload, but at
    /// least one. Never waits for a running sync. An entry that is dropped during the call may
    /// still be returned.
    ///
    /// # Errors
    /// [`LogError::Damaged`] or [`LogError::Io`] when an entry cannot be read from its segment.
    pub fn read(&self, range: Range<u64>, max_bytes: Option<usize>) -> Result<Vec<Entry>, LogError> {
        let sources = self.lock().sources(range.start, range.end, max_bytes);
        let mut entries = Vec::with_capacity(sources.len());
        let mut stored: Vec<(u64, Slot)> = Vec::new();
        let mut stored_in: Option<Arc<Segment>> = None;
        for source in sources {
            match source {
                Source::Cached(entry) => {
                    self.read_stored(stored_in.take(), &mut stored, &mut entries)?;
                    entries.push(entry);
                }
                Source::Stored { index, slot, segment } => {
                    let joins = match (stored.first(), stored.last()) {
                        (Some((_, first)), Some((_, last))) => {
                            let end = last.position.offset() + record_bytes(last.payload_bytes as usize);
                            last.position.segment() == slot.position.segment()
                                && end == slot.position.offset()
                                && end - first.position.offset() < MAX_READ_BYTES
                        }
                        _ => true,
                    };
                    if !joins {
                        self.read_stored(stored_in.take(), &mut stored, &mut entries)?;
                    }
                    stored.push((index, slot));
                    stored_in = Some(segment);
                }
            }
        }
        self.read_stored(stored_in, &mut stored, &mut entries)?;
        Ok(entries)
    }

    /// Reads entries that stand side by side in a segment.
    fn read_stored(
        &self,
        segment: Option<Arc<Segment>>,
        stored: &mut Vec<(u64, Slot)>,
        entries: &mut Vec<Entry>,
    ) -> Result<(), LogError> {
        let (Some(segment), Some(&(_, first)), Some(&(_, last))) = (segment, stored.first(), stored.last()) else {
            return Ok(());
        };
        let path = || self.inner.shared.disk.path(&segment_name(segment.number));
        let start = first.position.offset();
        let end = last.position.offset() + record_bytes(last.payload_bytes as usize);
        let mut bytes = vec![0; (end - start) as usize];
        segment.file.read_at(&mut bytes, u64::from(start)).map_err(|source| LogError::Io {
            action: "reading",
            path: path(),
            source,
        })?;
        let bytes = Bytes::from(bytes);
        for (index, slot) in stored.drain(..) {
            let at = (slot.position.offset() - start) as usize;
            let id = EntryId { term: slot.term, index };
            match decode_record(&bytes[at..], segment.number, segment.salt) {
                Decoded::Record(header, payload) if header.record_type == RecordType::Entry && header.id == id => {
                    entries.push(Entry { id, kind: header.kind, payload: bytes.slice_ref(payload) });
                }
                _ => {
                    return Err(LogError::Damaged {
                        path: path(),
                        offset: u64::from(slot.position.offset()),
                        detail: format!("entry {index} of term {} cannot be read any more", slot.term),
                    });
                }
            }
        }
        Ok(())
    }

    /// Waits until all operations accepted before are on disk.
    ///
    /// # Errors
    /// [`LogError::Failed`], [`LogError::Closed`].
    #[cfg_attr(not(test), allow(dead_code, reason = "the blocking form, for tests and tools"))]
    pub fn flush(&self) -> Result<(), LogError> {
        let (sender, receiver) = mpsc::channel();
        self.submit(self.lock(), |state, _| {
            state.queue.push(Step::Call(Box::new(move |result| {
                // The receiver waits below.
                let _ = sender.send(result);
            })));
            Ok(())
        })?;
        match receiver.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(LogError::Failed { reason: error.to_string() }),
            Err(_) => Err(LogError::Failed { reason: "its writer thread has ended".to_owned() }),
        }
    }

    /// Counters and sizes.
    pub fn statistics(&self) -> LogStatistics {
        self.lock().statistics()
    }

    /// Writes and syncs all that has queued, calls back, and closes the log; entries can still be
    /// read. Another process may open it afterwards. Does nothing the second time.
    pub fn shutdown(&self) {
        self.inner.shutdown();
    }
}

impl Inner {
    fn shutdown(&self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_one();
        self.shared.room.notify_all();
        // The last handle may be dropped in a callback: a thread cannot wait for itself.
        if thread::current().id() == self.thread_id {
            return;
        }
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the Raft log's thread has panicked");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The body of the thread; the lock goes last.
fn run(writer: Writer, lock: Box<dyn Any + Send>) {
    writer.run();
    drop(lock);
}
