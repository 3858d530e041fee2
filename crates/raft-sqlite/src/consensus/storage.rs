//! openraft's log storage on [`crate::log`].
//!
//! Stands between openraft's core and the segments: maps entries to records, and holds one invariant of ours:
//! INV-PURGE-AFTER-CHECKPOINT: no entry is purged before this node's checkpoint contains it, whatever openraft asks for. openraft counts
//! a pinned version as a snapshot; after a crash only what is checkpointed is there, and the log must reach back to it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::types::{
    KIND_COMMAND, LogId, RaftEntry, TypeConfig, Vote, decode_vote, encode_vote, from_log_parts, log_id, term_of,
    to_log_entry,
};
use crate::log::{Entry, EntryId, Log, LogError};
use crate::metrics::recorder::Recorder;

/// Most bytes of entries in one replication request (one entry may be larger): keeps a lagging peer's requests small enough to be
/// answered within the time-outs, and bounds what a request holds in memory.
const MAX_REPLICATION_BYTES: usize = 2 * 1024 * 1024;

/// How often entries that found no room on the disk are tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// The log of this node, as openraft wants it.
#[derive(Clone)]
pub struct LogStorage {
    log: Log,
    /// Index up to which the checkpoint on this node's disk contains the log.
    checkpointed: Arc<AtomicU64>,
    stalled: Arc<Mutex<Stalled>>,
    recorder: Arc<Recorder>,
    holds: Arc<Mutex<Holds>>,
}

/// From which entries on the log is kept for transfers of snapshots.
#[derive(Debug, Default)]
struct Holds {
    next: u64,
    /// Entries after these indexes.
    after: BTreeMap<u64, u64>,
}

/// Keeps log entries from being purged for as long as it lives, unless they became too many.
#[derive(Debug)]
pub struct LogHold {
    id: u64,
    holds: Arc<Mutex<Holds>>,
}

impl LogHold {
    /// Holds the entries after `index` from now on. False: it holds nothing any more.
    pub fn set(&self, index: u64) -> bool {
        self.holds.lock().after.get_mut(&self.id).map(|after| *after = index).is_some()
    }

    /// False: there were too many entries, and they may be purged.
    pub fn holds(&self) -> bool {
        self.holds.lock().after.contains_key(&self.id)
    }
}

impl Drop for LogHold {
    fn drop(&mut self) {
        self.holds.lock().after.remove(&self.id);
    }
}

/// Entries that found no room on the disk: readable, not acknowledged, written as soon as there is room. So a full disk stops neither
/// Raft's core (which could not even give up its leadership) nor reads; what is here is bounded by the replication pipeline.
#[derive(Default)]
struct Stalled {
    appends: VecDeque<(Vec<Entry>, IOFlushed<TypeConfig>)>,
    retrying: bool,
}

impl Stalled {
    fn last(&self) -> Option<EntryId> {
        self.appends.back().and_then(|(entries, _)| entries.last()).map(|entry| entry.id)
    }
}

impl LogStorage {
    /// `checkpointed`: the index up to which entries may be purged, moved forward by the state machine.
    pub fn new(log: Log, checkpointed: Arc<AtomicU64>) -> Self {
        Self { log, checkpointed, stalled: Arc::default(), recorder: Arc::default(), holds: Arc::default() }
    }

    /// Counts there.
    pub(crate) fn counting(mut self, recorder: Arc<Recorder>) -> Self {
        self.recorder = recorder;
        self
    }

    /// Whether entries wait for room on the disk.
    pub fn is_full(&self) -> bool {
        !self.stalled.lock().appends.is_empty()
    }

    /// Keeps the entries after `index`. None: some of them are gone already.
    pub fn hold(&self, index: u64) -> Option<LogHold> {
        let hold = {
            let mut holds = self.holds.lock();
            let id = holds.next;
            holds.next += 1;
            holds.after.insert(id, index);
            LogHold { id, holds: self.holds.clone() }
        };
        let purged = self.log.state().purged.map_or(0, |purged| purged.index);
        (purged <= index).then_some(hold)
    }

    /// Entries up to this index are wanted by no transfer.
    pub fn unheld(&self) -> u64 {
        self.holds.lock().after.values().min().copied().unwrap_or(u64::MAX)
    }

    /// Lets go of what is kept for transfers: they begin anew. How many there were.
    pub fn release_holds(&self) -> usize {
        std::mem::take(&mut self.holds.lock().after).len()
    }

    /// Entries of `range`, at most about `max_bytes` and one at least, with the payloads of those that are commands.
    pub fn commands(&self, range: std::ops::Range<u64>, max_bytes: usize) -> io::Result<Vec<(u64, Option<Bytes>)>> {
        let entries = self.log.read(range, Some(max_bytes)).map_err(to_io)?;
        let command = |entry: Entry| (entry.id.index, (entry.kind == KIND_COMMAND).then_some(entry.payload));
        Ok(entries.into_iter().map(command).collect())
    }

    /// Waits until no entry up to `index` waits for room on the disk. openraft takes entries for written once something later is, and a
    /// vote is written at once although entries before it wait: so no follower's acknowledgement may leave this node before
    /// (INV-LOG-SYNCED).
    pub async fn written(&self, index: u64) {
        let waits = |stalled: &Stalled| {
            stalled
                .appends
                .front()
                .and_then(|(entries, _)| entries.first())
                .is_some_and(|first| first.id.index <= index)
        };
        while waits(&self.stalled.lock()) {
            tokio::time::sleep(RETRY_INTERVAL / 4).await;
        }
    }

    /// Tries to write what is stalled, in order. True: nothing is left.
    fn retry(&self) -> io::Result<bool> {
        let mut stalled = self.stalled.lock();
        while let Some((entries, callback)) = stalled.appends.pop_front() {
            match self.append_now(entries, callback)? {
                None => {}
                Some(back) => {
                    stalled.appends.push_front(back);
                    return Ok(false);
                }
            }
        }
        stalled.retrying = false;
        Ok(true)
    }

    /// Gives everything back when there is no room.
    fn append_now(
        &self,
        entries: Vec<Entry>,
        callback: IOFlushed<TypeConfig>,
    ) -> io::Result<Option<(Vec<Entry>, IOFlushed<TypeConfig>)>> {
        let slot = Arc::new(Mutex::new(Some(callback)));
        let done = slot.clone();
        let (recorder, began) = (self.recorder.clone(), Instant::now());
        let result = self.log.append(entries.clone(), move |result| {
            recorder.append_time.time(began.elapsed());
            if let Some(callback) = done.lock().take() {
                callback.io_completed(result);
            }
        });
        match result {
            Ok(()) => Ok(None),
            Err(LogError::DiskFull { .. }) => Ok(slot.lock().take().map(|callback| (entries, callback))),
            Err(error) => Err(to_io(error)),
        }
    }

    fn spawn_retry(&self) {
        let storage = self.clone();
        tokio::spawn(async move {
            tracing::error!("no space is left for the log: entries are kept in memory, unacknowledged, until there is");
            loop {
                tokio::time::sleep(RETRY_INTERVAL).await;
                match storage.retry() {
                    Ok(true) => {
                        tracing::info!("there is space for the log again");
                        return;
                    }
                    Ok(false) => {}
                    Err(error) => {
                        tracing::error!(%error, "the log failed");
                        return;
                    }
                }
            }
        });
    }
}

fn entry_id(id: &LogId) -> EntryId {
    EntryId { term: term_of(id), index: id.index }
}

fn to_log_id(id: EntryId) -> LogId {
    log_id(id.term, id.index)
}

fn to_io(error: LogError) -> io::Error {
    io::Error::other(error)
}

/// Runs one operation of the log and waits until it is on disk.
async fn wait_synced(start: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Result<(), LogError>) -> io::Result<()> {
    let (sender, receiver) = oneshot::channel();
    start(sender).map_err(to_io)?;
    synced(receiver).await
}

async fn synced(receiver: oneshot::Receiver<io::Result<()>>) -> io::Result<()> {
    receiver.await.map_err(|_| io::Error::other("the log's writer thread has ended"))?
}

impl RaftLogReader<TypeConfig> for LogStorage {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<RaftEntry>, io::Error> {
        let start = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(index) => index + 1,
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end, None)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.log.vote().map(|bytes| decode_vote(&bytes)).transpose()
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<RaftEntry>, io::Error> {
        self.read(start, end, Some(MAX_REPLICATION_BYTES))
    }
}

impl LogStorage {
    fn read(&self, start: u64, end: u64, max_bytes: Option<usize>) -> io::Result<Vec<RaftEntry>> {
        let mut entries = {
            let stalled = self.stalled.lock();
            let mut entries = self.log.read(start..end, max_bytes).map_err(to_io)?;
            let next = self.log.state().last.map_or(0, |last| last.index + 1).max(start);
            let whole = entries.last().map_or(start, |last| last.id.index + 1) >= next;
            if whole {
                let waiting = stalled.appends.iter().flat_map(|(entries, _)| entries);
                entries.extend(waiting.filter(|entry| entry.id.index >= next && entry.id.index < end).cloned());
            }
            entries
        };
        entries.shrink_to_fit();
        entries
            .into_iter()
            .map(|entry| from_log_parts(entry.id.term, entry.id.index, entry.kind, entry.payload))
            .collect()
    }
}

impl RaftLogStorage<TypeConfig> for LogStorage {
    type LogReader = LogStorage;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let stalled = self.stalled.lock().last();
        let state = self.log.state();
        let last_purged_log_id = state.purged.map(to_log_id);
        let last_log_id = stalled.or(state.last).map(to_log_id).or(last_purged_log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let bytes = encode_vote(vote);
        wait_synced(|done| {
            self.log.save_vote(&bytes, move |result| {
                let _ = done.send(result);
            })
        })
        .await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.log.save_committed(committed.as_ref().map(entry_id));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        // Rides along with batches of entries without a sync of its own: it may name less than was committed, and a torn tail may
        // have taken entries that it names (they were never acknowledged by this node).
        let last = self.log.state().last;
        let committed = self.log.committed().filter(|committed| last.is_some_and(|last| committed.index <= last.index));
        Ok(committed.map(to_log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().map(|entry| to_log_entry(&entry)).collect();
        let mut stalled = self.stalled.lock();
        let refused =
            if stalled.appends.is_empty() { self.append_now(entries, callback)? } else { Some((entries, callback)) };
        if let Some(refused) = refused {
            stalled.appends.push_back(refused);
            if !std::mem::replace(&mut stalled.retrying, true) {
                self.spawn_retry();
            }
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        {
            // What is dropped here is acknowledged by nobody: openraft asked for it itself.
            let mut stalled = self.stalled.lock();
            let keep = last_log_id.as_ref().map_or(0, |id| id.index + 1);
            for (entries, _) in &mut stalled.appends {
                entries.retain(|entry| entry.id.index < keep);
            }
            stalled.appends.retain(|(entries, _)| !entries.is_empty());
            if self.log.state().last.is_none_or(|last| last.index < keep) {
                return Ok(());
            }
        }
        let last = last_log_id.map(|id| id.index);
        loop {
            let (sender, receiver) = oneshot::channel();
            let done = move |result| {
                let _ = sender.send(result);
            };
            match self.log.truncate_after(last, done) {
                Ok(()) => return synced(receiver).await,
                // Only when dozens of truncations have used up what is kept free for them. A follower that cannot drop its tail
                // can take no entries either: it waits.
                Err(LogError::DiskFull { .. }) => tokio::time::sleep(RETRY_INTERVAL).await,
                Err(error) => return Err(to_io(error)),
            }
        }
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let checkpointed = self.checkpointed.load(Ordering::Acquire);
        let upto = if upto.index <= checkpointed {
            entry_id(&upto)
        } else {
            // INV-PURGE-AFTER-CHECKPOINT
            let Some(entry) = self.log.read(checkpointed..checkpointed + 1, None).map_err(to_io)?.pop() else {
                return Ok(());
            };
            entry.id
        };
        let (sender, receiver) = oneshot::channel();
        let done = move |result| {
            let _ = sender.send(result);
        };
        match self.log.purge(upto, done) {
            Ok(()) => synced(receiver).await,
            // The next purge takes these entries along.
            Err(LogError::DiskFull { .. }) => Ok(()),
            Err(error) => Err(to_io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::LogOptions;
    use futures_util::FutureExt as _;

    #[tokio::test]
    async fn nothing_is_acknowledged_from_a_stalled_entry_on() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), &LogOptions::default()).unwrap();
        let storage = LogStorage::new(log, Arc::default());
        assert!(storage.written(7).now_or_never().is_some());
        let entry = |index| Entry { id: EntryId { term: 1, index }, kind: 0, payload: Bytes::new() };
        storage.stalled.lock().appends.push_back((vec![entry(5), entry(6)], IOFlushed::noop()));
        assert!(storage.is_full());
        assert!(storage.written(4).now_or_never().is_some());
        for index in [5, 6, 7] {
            assert!(storage.written(index).now_or_never().is_none(), "entry {index} was acknowledged");
        }
        let waits = tokio::spawn({
            let storage = storage.clone();
            async move { storage.written(6).await }
        });
        storage.stalled.lock().appends.clear();
        waits.await.unwrap();
    }
}
