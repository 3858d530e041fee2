//! All watchers of a node and where each of them stands.
//!
//! ```text
//!   created, start in the past ──▶ behind ──(caught up, under the hub's lock)──▶ synced
//!                                    ▲  └──────(queue full: waits for room)        │
//!                                    └──────────(queue full, or state replaced)────┘
//! ```
//!
//! A *synced* watcher has been given every event up to the hub's revision and hears of new ones at once. One that is
//! *behind* has been given every event before its `next_revision` and is served from history. A watcher is in exactly
//! one of the two indexes, so it gets each event once (INV-WATCH-ONCE), in order (INV-WATCH-ORDER).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::outbox::{Content, Frame, Outbox};
use super::range_index::RangeIndex;
use crate::index::KeyRange;

/// A watcher of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct WatcherKey(usize);

/// A stream of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct StreamKey(pub u64);

/// Kinds of events that a watcher does not want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Filter {
    pub no_put: bool,
    pub no_delete: bool,
}

/// Where a watcher stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Synced,
    Behind {
        /// The stream's queue is full: waits for room.
        waits_for_room: bool,
        /// The number of the catch-up pass that it last took part in: those that waited longest come first.
        served: u64,
    },
}

/// One watcher.
#[derive(Debug)]
pub(super) struct Watcher {
    pub stream: StreamKey,
    pub outbox: Arc<Outbox>,
    pub watch_id: i64,
    pub range: KeyRange,
    /// As asked for; 0 for "from now".
    pub start_revision: i64,
    /// Every event before it has been given, or was not asked for.
    pub next_revision: i64,
    pub previous: bool,
    pub fragment: bool,
    pub progress_notify: bool,
    pub filter: Filter,
    /// Got events since the last periodic progress.
    pub told: bool,
    pub place: Place,
}

/// One stream.
#[derive(Debug)]
pub(super) struct WatchStream {
    pub outbox: Arc<Outbox>,
    pub ids: HashMap<i64, WatcherKey>,
    next_id: i64,
    /// Progress was asked for and is to be answered at this revision or a later one.
    pub progress_wanted: Option<i64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Watchers {
    all: Vec<Option<Watcher>>,
    free: Vec<WatcherKey>,
    pub synced: RangeIndex<WatcherKey>,
    pub behind: RangeIndex<WatcherKey>,
    pub behind_set: HashSet<WatcherKey>,
    pub streams: HashMap<StreamKey, WatchStream>,
    /// Streams with `progress_wanted`.
    pub progress_waiting: Vec<StreamKey>,
    /// Every event up to it has been given to all synced watchers.
    pub revision: i64,
}

impl Watchers {
    pub fn new(revision: i64) -> Watchers {
        Watchers {
            all: Vec::new(),
            free: Vec::new(),
            synced: RangeIndex::new(),
            behind: RangeIndex::new(),
            behind_set: HashSet::new(),
            streams: HashMap::new(),
            progress_waiting: Vec::new(),
            revision,
        }
    }

    /// Number of watchers.
    pub fn len(&self) -> usize {
        self.all.len() - self.free.len()
    }

    pub fn get(&self, key: WatcherKey) -> &Watcher {
        self.all[key.0].as_ref().expect("invariant: keys in the indexes point at watchers")
    }

    pub fn get_mut(&mut self, key: WatcherKey) -> &mut Watcher {
        self.all[key.0].as_mut().expect("invariant: keys in the indexes point at watchers")
    }

    pub fn open_stream(&mut self, key: StreamKey, outbox: Arc<Outbox>) {
        self.streams.insert(key, WatchStream { outbox, ids: HashMap::new(), next_id: 0, progress_wanted: None });
    }

    /// The stream and all its watchers go.
    pub fn close_stream(&mut self, key: StreamKey) {
        if let Some(stream) = self.streams.remove(&key) {
            for watcher in stream.ids.into_values() {
                self.take(watcher);
            }
        }
        self.progress_waiting.retain(|waiting| *waiting != key);
    }

    /// The id for a new watcher: the one asked for, or for 0 the next that is free. None if it is in use.
    pub fn choose_id(&mut self, stream: StreamKey, asked: i64) -> Option<i64> {
        let stream = self.streams.get_mut(&stream)?;
        if asked != 0 {
            return (!stream.ids.contains_key(&asked)).then_some(asked);
        }
        while stream.ids.contains_key(&stream.next_id) {
            stream.next_id += 1;
        }
        stream.next_id += 1;
        Some(stream.next_id - 1)
    }

    pub fn add(&mut self, watcher: Watcher) {
        let key = self.free.pop().unwrap_or(WatcherKey(self.all.len()));
        if let Some(stream) = self.streams.get_mut(&watcher.stream) {
            stream.ids.insert(watcher.watch_id, key);
        }
        match watcher.place {
            Place::Synced => self.synced.insert(&watcher.range, key, watcher.previous),
            Place::Behind { .. } => {
                self.behind.insert(&watcher.range, key, watcher.previous);
                self.behind_set.insert(key);
            }
        }
        if key.0 == self.all.len() {
            self.all.push(Some(watcher));
        } else {
            self.all[key.0] = Some(watcher);
        }
    }

    /// The watcher goes, from its stream too.
    pub fn remove(&mut self, key: WatcherKey) -> Watcher {
        let watcher = self.take(key);
        if let Some(stream) = self.streams.get_mut(&watcher.stream) {
            stream.ids.remove(&watcher.watch_id);
        }
        watcher
    }

    fn take(&mut self, key: WatcherKey) -> Watcher {
        let watcher = self.all[key.0].take().expect("invariant: keys in the indexes point at watchers");
        match watcher.place {
            Place::Synced => self.synced.remove(&watcher.range, key, watcher.previous),
            Place::Behind { .. } => {
                self.behind_set.remove(&key);
                self.behind.remove(&watcher.range, key, watcher.previous)
            }
        };
        self.free.push(key);
        watcher
    }

    /// The synced watcher has to catch up from `next_revision` on.
    pub fn fall_back(&mut self, key: WatcherKey, next_revision: i64, waits_for_room: bool) {
        let watcher = self.get_mut(key);
        watcher.next_revision = watcher.next_revision.max(next_revision);
        watcher.place = Place::Behind { waits_for_room, served: 0 };
        let (range, previous) = (watcher.range.clone(), watcher.previous);
        self.synced.remove(&range, key, previous);
        self.behind.insert(&range, key, previous);
        self.behind_set.insert(key);
    }

    /// The watcher has caught up with `self.revision`.
    pub fn promote(&mut self, key: WatcherKey) {
        let watcher = self.get_mut(key);
        watcher.place = Place::Synced;
        let (range, previous) = (watcher.range.clone(), watcher.previous);
        self.behind_set.remove(&key);
        self.behind.remove(&range, key, previous);
        self.synced.insert(&range, key, previous);
    }

    /// Everybody has to catch up: what follows `self.revision` was not delivered. The store stands at `revision` now.
    pub fn jump(&mut self, revision: i64) {
        let next = self.revision + 1;
        let synced: Vec<WatcherKey> = (0..self.all.len())
            .map(WatcherKey)
            .filter(|key| self.all[key.0].as_ref().is_some_and(|watcher| watcher.place == Place::Synced))
            .collect();
        for key in synced {
            self.fall_back(key, next, false);
        }
        self.revision = revision;
    }

    /// The stream's queue was taken: its watchers may go on catching up. True if there are any that waited.
    pub fn room(&mut self, stream: StreamKey) -> bool {
        let Some(stream) = self.streams.get(&stream) else {
            return false;
        };
        let keys: Vec<WatcherKey> = stream.ids.values().copied().collect();
        let mut any = false;
        for key in keys {
            if let Place::Behind { waits_for_room, .. } = &mut self.get_mut(key).place {
                any |= std::mem::take(waits_for_room);
            }
        }
        any
    }

    /// Answers the requests for progress that can be answered now: all watchers of the stream are synced and have
    /// been given everything up to `self.revision`, which goes through the same queue as the events before it
    /// (INV-WATCH-PROGRESS).
    pub fn answer_progress(&mut self) {
        let mut waiting = std::mem::take(&mut self.progress_waiting);
        waiting.retain(|key| {
            let Some(stream) = self.streams.get(key) else {
                return false;
            };
            let Some(wanted) = stream.progress_wanted else {
                return false;
            };
            let ready = self.revision >= wanted && stream.ids.values().all(|key| self.is_current(*key));
            if !ready {
                return true;
            }
            if !stream.ids.is_empty() {
                stream.outbox.push_control(Frame { watch_id: -1, revision: self.revision, content: Content::Progress });
            }
            if let Some(stream) = self.streams.get_mut(key) {
                stream.progress_wanted = None;
            }
            false
        });
        self.progress_waiting = waiting;
    }

    /// Whether `self.revision` may be told to the watcher as progress: it lies neither before what the watcher asked
    /// for nor before what it was told when it was created.
    pub fn is_current(&self, key: WatcherKey) -> bool {
        let watcher = self.get(key);
        watcher.place == Place::Synced
            && self.revision >= watcher.start_revision
            && self.revision + 1 >= watcher.next_revision
    }
}
