//! What a watcher is told: events, grouped by the revision they happened at.
//!
//! One encoding of each event serves the index, the ring of recent events and the watchers: key and value are slices of
//! the sidecar that came with the Raft entry.

use super::{LeaseInfo, ValueId};
use crate::proto::mvccpb;
use bytes::Bytes;
use std::sync::Arc;

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// The key got a value.
    Put,
    /// The key is gone.
    Delete,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key.
    pub key: Bytes,
    /// The value put; empty on a delete.
    pub value: Bytes,
    /// The revision at which the key came into being; 0 on a delete.
    pub create_revision: i64,
    /// The revision of this change.
    pub mod_revision: i64,
    /// Puts since the key came into being, 1 for the one that made it; 0 on a delete.
    pub version: i64,
    /// The lease the key hangs on, 0 for none.
    pub lease: i64,
    /// The key as it was at `mod_revision - 1`; None if it did not exist, or if that is not known any more.
    pub previous: Option<Box<Previous>>,
}

/// A key before an event. See [`super::Store::previous`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Previous {
    /// As in [`Event`], never 0.
    pub create_revision: i64,
    /// As in [`Event`].
    pub mod_revision: i64,
    /// As in [`Event`], never 0.
    pub version: i64,
    /// As in [`Event`].
    pub lease: i64,
    /// Where its value is stored.
    pub value_id: ValueId,
    /// Its value, if that was at hand.
    pub value: Option<Bytes>,
}

impl Previous {
    /// The previous state as the API has it.
    #[must_use]
    pub fn key_value(&self, key: Bytes, value: Bytes) -> mvccpb::KeyValue {
        mvccpb::KeyValue {
            key,
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            value,
            lease: self.lease,
        }
    }
}

impl Event {
    /// The event's `kv` as the API has it: of a delete only key and mod_revision.
    #[must_use]
    pub fn key_value(&self) -> mvccpb::KeyValue {
        mvccpb::KeyValue {
            key: self.key.clone(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            value: self.value.clone(),
            lease: self.lease,
        }
    }

    /// Bytes of memory this event is counted with in bounded buffers.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        let previous = self.previous.as_ref().and_then(|p| p.value.as_ref()).map_or(0, Bytes::len);
        self.key.len() + self.value.len() + previous + size_of::<Event>() + size_of::<Previous>()
    }
}

/// All events of one revision, in the order of their sub-revisions. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventBatch {
    /// The revision they happened at.
    pub revision: i64,
    /// What happened: at most one event a key.
    pub events: Box<[Event]>,
}

impl EventBatch {
    /// Bytes of memory this batch is counted with in bounded buffers.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.events.iter().map(Event::weight_bytes).sum::<usize>() + size_of::<EventBatch>()
    }
}

/// Where committed events go. Called on the apply thread, in the order of revisions, after [`super::Store::state`]
/// shows the state that the events led to. Must not block.
pub trait EventSink: Send + Sync {
    /// What one Raft entry brought: revisions ascending, without a hole except where a revision has no event.
    fn committed(&self, batches: &[Arc<EventBatch>]);
    /// Leases that were granted or ended by one Raft entry, in order; called after `committed` for that entry.
    fn leases_changed(&self, changes: &[LeaseChange]);
    /// The whole state was replaced (start of the node, snapshot of the leader) and stands at `revision` now: events
    /// in between were not delivered and must be caught up from the ring or the tables.
    fn restored(&self, revision: i64);
    /// History before `revision` is gone.
    fn compacted(&self, revision: i64);
}

/// A change of a lease (what happens to its keys are events).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// There is a new lease.
    Granted(LeaseInfo),
    /// The lease of this id was revoked or has expired.
    Ended(i64),
}

/// What the ring of recent events has after some revision.
#[derive(Debug, Clone)]
pub enum RecentEvents {
    /// The batches after that revision, in order. Empty: there was nothing after it at the time of the call.
    Batches(Vec<Arc<EventBatch>>),
    /// The ring starts later: what lies in between must come from [`super::Store::events_from_tables`].
    Gone {
        /// The ring holds every event after this revision.
        after: i64,
    },
}

/// What was found in the tables.
#[derive(Debug, Clone)]
pub struct PastEvents {
    /// Batches in order, holding only events of the range asked for.
    pub batches: Vec<Arc<EventBatch>>,
    /// Every event of the range up to and including this revision has been found: go on at the next one.
    pub complete_to: i64,
}
