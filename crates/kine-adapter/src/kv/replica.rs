//! The committed side of the store: what the observer keeps, and what readers take from it. No network.
//!
//! ```text
//! raft-sqlite, apply thread ── applied(sidecars) ── Contents (committed)
//!                                                     ├─ one lock ─┬─ ring of recent events
//!                                                     │            └─ published State
//!                                                     └─ sink: events, leases, compaction
//! ```
//!
//! INV-KV-PUBLISH: whoever sees a revision in the published state finds its events in the ring, and the other way
//! round: both change under the ring's lock. The sink is told afterwards.
//!
//! The committed contents exist twice, in trees that share no nodes: one is published, the other catches up with it,
//! is changed in place, and is published in its turn. Publishing clones of a single tree would copy a path of it for
//! each entry, and a copied leaf costs dozens of reference counts scattered over memory. A reader that keeps an old state
//! makes the nodes it shares be copied when their turn comes; nothing else.
//!
//! A sidecar that cannot be understood, or that does not fit the state, must not be passed over in silence: the replica
//! is marked as failed with the reason, and answers `Corrupt` from then on.

use super::cache::ValueCache;
use super::contents::{Changed, Contents, Touched};
use super::event::{Event, EventBatch, EventKind, EventSink, LeaseChange, Previous};
use super::ring::Ring;
use super::sidecar::{DecodeError, Decoder, Item};
use super::state::State;
use super::{LeaseInfo, past};
use crate::error::KvError;
use crate::index::{KeyEntry, Record};
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use raft_sqlite::Version;
use rusqlite::Connection;
use std::sync::{Arc, OnceLock};

/// Keys that the index may be rid of garbage in, for each entry applied.
const FORGET_PER_ENTRY: usize = 128;

/// See the module.
pub(super) struct Replica {
    /// The apply thread's own.
    twins: Mutex<Twins>,
    state: RwLock<Arc<State>>,
    pub(super) ring: Ring,
    pub(super) cache: ValueCache,
    sink: RwLock<Option<Arc<dyn EventSink>>>,
    failure: OnceLock<String>,
    revision: tokio::sync::watch::Sender<i64>,
    version: tokio::sync::watch::Sender<Version>,
    /// At most this much of history is read into the ring at the start.
    ring_bytes: usize,
}

/// See the module.
#[derive(Debug, Default)]
struct Twins {
    published: Contents,
    /// Equal to the published one but for what is noted.
    other: Contents,
    behind: Touched,
}

/// Why a sidecar cannot be applied.
#[derive(Debug, thiserror::Error)]
enum ApplyError {
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("the sidecar starts at revision {found} and row {found_id}, this node expects {revision} and {id}")]
    Hole { found: i64, found_id: i64, revision: i64, id: i64 },
    #[error("the sidecar does not fit the state: {0}")]
    Mismatch(&'static str),
}

/// What one entry brought.
#[derive(Default)]
struct Applied {
    batches: Vec<Arc<EventBatch>>,
    leases: Vec<LeaseChange>,
    compacted: Option<i64>,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica").field("revision", &self.state().revision()).finish_non_exhaustive()
    }
}

impl Replica {
    pub(super) fn new(value_cache_bytes: usize, event_ring_bytes: usize) -> Replica {
        let contents = Contents::default();
        let state = Arc::new(State { contents: contents.clone(), version: Version(0), lease_generation: 0 });
        Replica {
            revision: tokio::sync::watch::channel(state.revision()).0,
            version: tokio::sync::watch::channel(state.version).0,
            twins: Mutex::new(Twins { published: contents.clone(), other: contents, ..Twins::default() }),
            state: RwLock::new(state),
            ring: Ring::new(event_ring_bytes),
            cache: ValueCache::new(value_cache_bytes),
            sink: RwLock::new(None),
            failure: OnceLock::new(),
            ring_bytes: event_ring_bytes,
        }
    }

    pub(super) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.read())
    }

    pub(super) fn set_sink(&self, sink: Arc<dyn EventSink>) {
        *self.sink.write() = Some(sink);
    }

    pub(super) fn revisions(&self) -> tokio::sync::watch::Receiver<i64> {
        self.revision.subscribe()
    }

    pub(super) fn versions(&self) -> tokio::sync::watch::Receiver<Version> {
        self.version.subscribe()
    }

    /// `Corrupt` if the replica has failed.
    pub(super) fn check(&self) -> Result<(), KvError> {
        if self.failure.get().is_some() { Err(KvError::Corrupt) } else { Ok(()) }
    }

    fn fail(&self, reason: String) {
        tracing::error!(reason, "the etcd state of this node cannot be trusted any more; it stops serving");
        let _ = self.failure.set(reason);
    }

    /// Starts over from the tables.
    pub(super) fn restored(&self, version: Version, connection: &Connection) {
        self.cache.clear();
        let loaded = Contents::load(connection).and_then(|contents| {
            let recent = past::newest(connection, &contents, self.ring_bytes / 2)?;
            Ok((contents, recent))
        });
        let (contents, (after, batches)) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => return self.fail(error.to_string()),
        };
        let revision = contents.revision;
        *self.twins.lock() = Twins { published: contents.clone(), other: contents.clone(), ..Twins::default() };
        self.ring.reset(after, batches, || self.publish(contents, version, true));
        self.announce(revision, version);
        if let Some(sink) = self.sink.read().as_ref() {
            sink.restored(revision);
        }
    }

    fn publish(&self, contents: Contents, version: Version, leases_changed: bool) {
        let lease_generation = self.state.read().lease_generation + u64::from(leases_changed);
        let new = Arc::new(State { contents, version, lease_generation });
        let old = std::mem::replace(&mut *self.state.write(), new);
        drop(old); // outside of the lock: it may hold the last reference to much
    }

    fn announce(&self, revision: i64, version: Version) {
        self.revision.send_if_modified(|now| std::mem::replace(now, revision) != revision);
        self.version.send_replace(version);
    }

    /// Brings the state forward by one entry.
    pub(super) fn applied(&self, version: Version, sidecars: &[Bytes]) {
        if self.failure.get().is_some() {
            return;
        }
        let mut twins = self.twins.lock();
        let Twins { published, other: contents, behind } = &mut *twins;
        contents.follow(published, behind);
        let mut applied = Applied::default();
        for sidecar in sidecars {
            // A buffer of its own: events live long, and the entry's buffer holds pages too.
            let sidecar = Bytes::copy_from_slice(sidecar);
            if let Err(error) = self.apply_sidecar(contents, behind, sidecar, &mut applied) {
                return self.fail(error.to_string());
            }
        }
        behind.note_keys(contents.forget_some(FORGET_PER_ENTRY));
        std::mem::swap(published, contents);
        let (revision, copy) = (published.revision, published.clone());
        drop(twins);
        self.ring.append(&applied.batches, || self.publish(copy, version, !applied.leases.is_empty()));
        self.announce(revision, version);
        self.tell(&applied);
    }

    fn tell(&self, applied: &Applied) {
        let sink = self.sink.read();
        let Some(sink) = sink.as_ref() else { return };
        if !applied.batches.is_empty() {
            sink.committed(&applied.batches);
        }
        if !applied.leases.is_empty() {
            sink.leases_changed(&applied.leases);
        }
        if let Some(revision) = applied.compacted {
            sink.compacted(revision);
        }
    }

    fn apply_sidecar(
        &self,
        contents: &mut Contents,
        touched: &mut Touched,
        sidecar: Bytes,
        applied: &mut Applied,
    ) -> Result<(), ApplyError> {
        let buffer_bytes = sidecar.len();
        let mut decoder = Decoder::new(sidecar)?;
        let (revision, first_id) = (decoder.revision, decoder.first_id);
        if revision != contents.revision + 1 || first_id != contents.next_id {
            return Err(ApplyError::Hole {
                found: revision,
                found_id: first_id.0,
                revision: contents.revision + 1,
                id: contents.next_id.0,
            });
        }
        let mut events = Vec::with_capacity(1);
        while let Some(item) = decoder.item()? {
            match item {
                Item::Put { key, value, create_revision, version, lease } => {
                    if lease != 0 && contents.leases.get(&lease).is_none() {
                        return Err(ApplyError::Mismatch("a put with a lease that does not exist"));
                    }
                    let changed = contents.put(&key, lease, revision);
                    touched.note(&changed);
                    let Changed { record, before, .. } = changed;
                    if (record.create_revision, record.version) != (create_revision, version) {
                        return Err(ApplyError::Mismatch("a put of a key in another state"));
                    }
                    self.cache.insert(record.value_id, &value, buffer_bytes);
                    events.push(self.event(EventKind::Put, key, value, &record, before.as_ref()));
                }
                Item::Delete { key } => {
                    let changed = contents.delete(&key, revision);
                    let changed = changed.ok_or(ApplyError::Mismatch("a delete of a key that does not exist"))?;
                    touched.note(&changed);
                    let Changed { record, before, .. } = changed;
                    events.push(self.event(EventKind::Delete, key, Bytes::new(), &record, before.as_ref()));
                }
                Item::Grant { id, ttl_seconds } => {
                    let info = LeaseInfo { id, ttl_seconds };
                    contents.grant(info);
                    touched.note_lease(id);
                    applied.leases.push(LeaseChange::Granted(info));
                }
                Item::EndLease { id } => {
                    touched.note_lease(id);
                    contents.end_lease(id).ok_or(ApplyError::Mismatch("an end of a lease that does not exist"))?;
                    applied.leases.push(LeaseChange::Ended(id));
                }
                Item::Compact { revision } => {
                    contents.compact(revision);
                    applied.compacted = Some(revision);
                }
                Item::Removed { revision } => drop(contents.removed(revision)),
            }
        }
        // Not before: several events of a revision may tell of the same value.
        for previous in events.iter().filter_map(|event: &Event| event.previous.as_ref()) {
            self.cache.forget(previous.value_id);
        }
        if !events.is_empty() {
            applied.batches.push(Arc::new(EventBatch { revision, events: events.into_boxed_slice() }));
        }
        Ok(())
    }

    fn event(&self, kind: EventKind, key: Bytes, value: Bytes, record: &Record, before: Option<&KeyEntry>) -> Event {
        let before = before.and_then(|entry| entry.live_at(record.mod_revision - 1));
        let previous = before.map(|before| Box::new(self.previous(before)));
        event(kind, key, value, record, previous)
    }

    fn previous(&self, record: &Record) -> Previous {
        previous(record, self.cache.get(record.value_id))
    }
}

/// An event from the state it led to.
pub(super) fn event(
    kind: EventKind,
    key: Bytes,
    value: Bytes,
    record: &Record,
    previous: Option<Box<Previous>>,
) -> Event {
    Event {
        kind,
        key,
        value,
        create_revision: record.create_revision,
        mod_revision: record.mod_revision,
        version: record.version,
        lease: record.lease,
        previous,
    }
}

/// The state before an event.
pub(super) fn previous(record: &Record, value: Option<Bytes>) -> Previous {
    Previous {
        create_revision: record.create_revision,
        mod_revision: record.mod_revision,
        version: record.version,
        lease: record.lease,
        value_id: record.value_id,
        value,
    }
}
