//! The watch hub: committed events in, answers of all watch streams out.
//!
//! ```text
//! apply thread ── committed ──▶ inbox ──▶ live task ──▶ synced watchers ──┐
//!                                                                         ├──▶ outbox of each stream ──▶ gRPC
//!          ring, tables ─────────────────▶ catch-up task ──▶ those behind ┘
//! ```
//!
//! The apply thread only appends to the inbox. The live task gives runs of events to the synced watchers; `catch_up`
//! serves the others from history until they have reached the hub's revision, and makes them synced under the same
//! lock that the live task delivers under. An inbox that grows too long is dropped whole: then everybody catches up.
//!
//! Invariants: INV-WATCH-ORDER (a watcher's events come in the order of revisions), INV-WATCH-ONCE (each once),
//! INV-WATCH-ATOMIC (a revision is never split, unless the watcher takes fragments), INV-WATCH-COMPLETE (no event of
//! the range from the start revision on is left out: a full queue, a snapshot, a restart lead to catching up, and only
//! compaction ends a watch), INV-WATCH-PROGRESS (a progress answer comes after every event up to its revision).
//!
//! Sources: etcd server/storage/mvcc/watchable_store.go and server/etcdserver/api/v3rpc/watch.go.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tonic::Status;

use super::dispatch::{Audience, Run, dispatch};
use super::history::History;
use super::outbox::{Content, Frame, Frames, HeaderSource, Notice, Outbox};
use super::watchers::{Filter, Place, StreamKey, Watcher, Watchers};
use crate::error::KvError;
use crate::index::KeyRange;
use crate::kv::EventBatch;

/// Events waiting for the live task, in bytes: some tenths of a second at full load. More means that it does not get
/// to run, and the ring is the better place to keep them.
const MAX_INBOX_BYTES: usize = 32 << 20;
/// One run: what is delivered under one hold of the lock, and merged into one answer for a watcher.
pub(super) const MAX_RUN_BATCHES: usize = 256;
/// See [`MAX_RUN_BATCHES`]. One revision may be larger.
pub(super) const MAX_RUN_BYTES: usize = 256 << 10;
/// Watch ids that no watcher has.
const NO_WATCH_ID: i64 = -1;
/// How often a previous value is asked for before it is left out.
const PREVIOUS_ATTEMPTS: u32 = 3;

/// What a client asks of a new watcher; the fields are those of etcd's `WatchCreateRequest`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CreateRequest {
    /// First key, or the only one; empty means the smallest key there is.
    pub key: Bytes,
    /// Empty: `key` alone. `"\0"`: from `key` on.
    pub range_end: Bytes,
    /// First revision wanted; 0 means from now on.
    pub start_revision: i64,
    /// Periodic answers without events tell how far the watcher has got.
    pub progress_notify: bool,
    /// Leave out puts.
    pub no_put: bool,
    /// Leave out deletes.
    pub no_delete: bool,
    /// Each event carries the key as it was before.
    pub previous: bool,
    /// 0 lets the hub choose.
    pub watch_id: i64,
    /// Revisions may be split over several answers.
    pub fragment: bool,
}

/// Counts for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Watchers there are.
    pub watchers: usize,
    /// Of these, watchers that are catching up.
    pub behind: usize,
    /// Streams there are.
    pub streams: usize,
    /// The revision up to which the synced watchers have been served.
    pub revision: i64,
}

/// See the module.
pub struct Hub {
    pub(super) history: Box<dyn History>,
    pub(super) header: Arc<HeaderSource>,
    pub(super) max_fragment_bytes: usize,
    watchers: Mutex<Watchers>,
    inbox: Mutex<Inbox>,
    inbox_filled: Notify,
    /// Wakes the catch-up task.
    pub(super) behind: Notify,
    next_stream: AtomicU64,
    stopped: AtomicBool,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("statistics", &self.statistics()).finish_non_exhaustive()
    }
}

/// What the apply thread left for the live task.
#[derive(Debug, Default)]
struct Inbox {
    /// First this: events up to this revision are not in the inbox.
    jump: Option<i64>,
    batches: Vec<Arc<EventBatch>>,
    bytes: usize,
}

/// One watch stream, for the side that reads the client's requests.
#[derive(Debug, Clone)]
pub struct StreamHandle {
    key: StreamKey,
    outbox: Arc<Outbox>,
}

impl StreamHandle {
    /// Waits until the client takes answers again (its answers to control requests are bounded), or is gone.
    pub async fn room(&self) {
        self.outbox.room().await;
    }

    /// Waits until the client is gone.
    pub async fn closed(&self) {
        self.outbox.closed().await;
    }

    /// Ends the stream with this status after what is waiting to be sent.
    pub fn finish(&self, status: Status) {
        self.outbox.finish(status);
    }
}

impl Hub {
    /// A hub on this history. Nothing is delivered until [`Hub::run`] runs; before that, the hub must have been made
    /// part of the store's sink and [`Hub::begin`] called.
    pub(super) fn new(
        history: Box<dyn History>,
        cluster_id: u64,
        member_id: u64,
        max_fragment_bytes: usize,
    ) -> Arc<Hub> {
        Arc::new(Hub {
            header: Arc::new(HeaderSource { cluster_id, member_id, term: AtomicU64::new(0) }),
            max_fragment_bytes,
            watchers: Mutex::new(Watchers::new(0)),
            inbox: Mutex::default(),
            inbox_filled: Notify::new(),
            behind: Notify::new(),
            next_stream: AtomicU64::new(1),
            stopped: AtomicBool::new(false),
            history,
        })
    }

    /// The hub of a store.
    #[must_use]
    pub fn of_store(store: &crate::kv::Store, max_fragment_bytes: usize) -> Arc<Hub> {
        let node = store.node();
        Hub::new(Box::new(store.clone()), node.cluster_id(), node.id().0, max_fragment_bytes)
    }

    /// Takes what is committed by now as the past. First the sink, then this: what is committed in between comes twice
    /// and is left out once.
    pub fn begin(&self) {
        self.lock().revision = self.history.revision();
    }

    /// Part of the store's sink: see [`crate::kv::EventSink::committed`]. Only queues, so it never blocks the apply thread.
    pub fn committed(&self, batches: &[Arc<EventBatch>]) {
        let Some(last) = batches.last() else { return };
        let mut inbox = self.inbox.lock();
        inbox.bytes += batches.iter().map(|batch| batch.weight_bytes()).sum::<usize>();
        if inbox.bytes > MAX_INBOX_BYTES {
            tracing::info!(revision = last.revision, "watch hub is late: watchers catch up from the ring");
            *inbox = Inbox { jump: Some(last.revision), ..Inbox::default() };
        } else {
            inbox.batches.extend_from_slice(batches);
        }
        drop(inbox);
        self.inbox_filled.notify_one();
    }

    /// Part of the store's sink: see [`crate::kv::EventSink::restored`].
    pub fn restored(&self, revision: i64) {
        *self.inbox.lock() = Inbox { jump: Some(revision), ..Inbox::default() };
        self.inbox_filled.notify_one();
    }

    /// Part of the store's sink: those behind the compacted revision are told so.
    pub fn compacted(&self) {
        self.behind.notify_one();
    }

    /// The Raft term for the headers of answers from now on.
    pub fn set_term(&self, term: u64) {
        self.header.term.store(term, Ordering::Relaxed);
    }

    /// Delivers events until the future is dropped.
    pub async fn run(self: Arc<Self>) {
        let catch_up = super::catch_up::run(&self);
        let live = self.live();
        futures_util::future::join(live, catch_up).await;
    }

    /// Ends every stream, also those opened later, with "server stopped".
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for stream in self.lock().streams.values() {
            stream.outbox.finish(KvError::Stopped.into());
        }
    }

    /// Counts for metrics.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let watchers = self.lock();
        Statistics {
            watchers: watchers.len(),
            behind: watchers.behind_set.len(),
            streams: watchers.streams.len(),
            revision: watchers.revision,
        }
    }

    /// What answers carry in their headers, for encoding [`Frame`]s.
    pub(crate) fn header(&self) -> Arc<HeaderSource> {
        self.header.clone()
    }

    /// A new stream. Dropping the frames closes it.
    #[must_use]
    pub fn open(self: &Arc<Self>) -> (StreamHandle, Frames) {
        let key = StreamKey(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let outbox = Outbox::new();
        self.lock().open_stream(key, outbox.clone());
        if self.stopped.load(Ordering::SeqCst) {
            outbox.finish(KvError::Stopped.into());
        }
        let hub = self.clone();
        let frames = Frames::new(outbox.clone(), move |notice| match notice {
            Notice::Room => {
                if hub.lock().room(key) {
                    hub.behind.notify_one();
                }
            }
            Notice::Gone => hub.lock().close_stream(key),
        });
        (StreamHandle { key, outbox }, frames)
    }

    /// A new watcher on the stream: answers `created`, then its events; or that there will be none, and why.
    pub fn create(&self, stream: &StreamHandle, request: CreateRequest) {
        let now = self.history.revision();
        let refuse = |reason: &str| {
            let content = Content::Refused { reason: reason.to_owned() };
            stream.outbox.push_control(Frame { watch_id: NO_WATCH_ID, revision: now, content });
        };
        if request.start_revision < 0 {
            return refuse(&KvError::Compacted.to_string());
        }
        let key = if request.key.is_empty() { Bytes::from_static(b"\0") } else { request.key };
        let range = KeyRange::new(key, request.range_end);
        if range.is_empty() {
            return refuse("mvcc: watcher range is empty");
        }
        let mut watchers = self.lock();
        if !watchers.streams.contains_key(&stream.key) {
            return;
        }
        let Some(watch_id) = watchers.choose_id(stream.key, request.watch_id) else {
            return refuse("mvcc: duplicate watch ID provided on the WatchStream");
        };
        stream.outbox.push_control(Frame { watch_id, revision: now, content: Content::Created });
        // The store may be ahead of the hub: what was committed before this call belongs to the past, whatever the
        // hub has delivered. Events between the two are held back by `next_revision`.
        let next_revision = if request.start_revision == 0 { now + 1 } else { request.start_revision };
        let place = if next_revision > watchers.revision {
            Place::Synced
        } else {
            Place::Behind { waits_for_room: false, served: 0 }
        };
        watchers.add(Watcher {
            stream: stream.key,
            outbox: stream.outbox.clone(),
            watch_id,
            range,
            start_revision: request.start_revision,
            next_revision,
            previous: request.previous,
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            filter: Filter { no_put: request.no_put, no_delete: request.no_delete },
            told: false,
            place,
        });
        drop(watchers);
        if place != Place::Synced {
            self.behind.notify_one();
        }
    }

    /// No more events of this watcher; answered if there is such a watcher.
    pub fn cancel(&self, stream: &StreamHandle, watch_id: i64) {
        let now = self.history.revision();
        let mut watchers = self.lock();
        let Some(key) = watchers.streams.get(&stream.key).and_then(|stream| stream.ids.get(&watch_id)).copied() else {
            return;
        };
        watchers.remove(key);
        stream.outbox.push_control(Frame {
            watch_id,
            revision: now,
            content: Content::Canceled { compact_revision: 0 },
        });
        watchers.answer_progress();
    }

    /// Answers with watch id -1 as soon as every watcher of the stream has been given all that is committed by now.
    /// Requests that wait are answered together; a stream without watchers gets no answer.
    pub fn request_progress(&self, stream: &StreamHandle) {
        let now = self.history.revision();
        let mut watchers = self.lock();
        let Some(state) = watchers.streams.get_mut(&stream.key) else {
            return;
        };
        if state.ids.is_empty() {
            return;
        }
        if state.progress_wanted.replace(now).is_none() {
            watchers.progress_waiting.push(stream.key);
        }
        watchers.answer_progress();
    }

    /// The periodic progress of one stream: to each watcher that asked for it, is synced and has had no events since
    /// the last time.
    pub fn periodic_progress(&self, stream: &StreamHandle) {
        let mut watchers = self.lock();
        let Some(state) = watchers.streams.get(&stream.key) else {
            return;
        };
        let keys: Vec<_> = state.ids.values().copied().collect();
        for key in keys {
            let current = watchers.is_current(key);
            let revision = watchers.revision;
            let watcher = watchers.get_mut(key);
            if !watcher.progress_notify {
                continue;
            }
            if !std::mem::take(&mut watcher.told) && current {
                let frame = Frame { watch_id: watcher.watch_id, revision, content: Content::Progress };
                watcher.outbox.push_control(frame);
            }
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock()
    }

    /// The live task.
    async fn live(&self) {
        loop {
            let inbox = std::mem::take(&mut *self.inbox.lock());
            if inbox.jump.is_none() && inbox.batches.is_empty() {
                self.inbox_filled.notified().await;
                continue;
            }
            if let Some(revision) = inbox.jump {
                self.lock().jump(revision);
                self.behind.notify_one();
            }
            let mut batches = inbox.batches.into_iter().peekable();
            while let Some(first) = batches.next() {
                let mut bytes = first.weight_bytes();
                let mut run = vec![first];
                while run.len() < MAX_RUN_BATCHES && bytes < MAX_RUN_BYTES {
                    let Some(batch) = batches.next() else { break };
                    bytes += batch.weight_bytes();
                    run.push(batch);
                }
                self.deliver(Run::new(run)).await;
                if batches.peek().is_some() {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// One run to the synced watchers.
    async fn deliver(&self, mut run: Run) {
        let Some(to) = run.batches().last().map(|batch| batch.revision) else {
            return;
        };
        loop {
            let missing = {
                let mut watchers = self.lock();
                run.skip_to(watchers.revision);
                if run.batches().is_empty() {
                    return;
                }
                let behind_before = watchers.behind_set.len();
                match dispatch(
                    &mut watchers,
                    &mut run,
                    Audience::Synced,
                    to,
                    &*self.history,
                    &self.header,
                    self.max_fragment_bytes,
                ) {
                    Ok(()) => {
                        watchers.revision = to;
                        watchers.answer_progress();
                        // Those behind may now have this much further to go.
                        if watchers.behind_set.len() != behind_before {
                            self.behind.notify_one();
                        }
                        return;
                    }
                    Err(missing) => missing,
                }
            };
            self.read_previous(&mut run, missing).await;
        }
    }

    /// Reads previous values that were not at hand.
    pub(super) async fn read_previous(&self, run: &mut Run, missing: HashSet<(u32, u32)>) {
        for at in missing {
            let mut attempt = 1;
            let previous = loop {
                match self.history.previous(run.event(at)).await {
                    Ok(previous) => break previous,
                    Err(KvError::Compacted | KvError::FutureRevision) => break None,
                    Err(error) if attempt < PREVIOUS_ATTEMPTS => {
                        tracing::debug!(%error, attempt, "previous value of an event not readable yet");
                        attempt += 1;
                        tokio::task::yield_now().await;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "previous value of an event left out");
                        break None;
                    }
                }
            };
            run.set_previous(at, previous);
        }
    }
}
