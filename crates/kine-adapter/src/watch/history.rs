//! What the watch hub needs of the store: committed events, recent and past. A seam, so that the hub's rules are tested
//! on a history made by hand.

use futures_util::future::BoxFuture;

use crate::error::KvError;
use crate::index::KeyRange;
use crate::kv::{Event, PastEvents, RecentEvents, Store};
use crate::proto::mvccpb;

/// Committed events of this node. See the methods of the same meaning in [`Store`].
pub(super) trait History: Send + Sync + 'static {
    /// The committed revision.
    fn revision(&self) -> i64;
    /// Events below it may be gone.
    fn compact_revision(&self) -> i64;
    /// Recent events after `revision` (exclusive), at most `max_batches` revisions of them.
    fn recent(&self, revision: i64, max_batches: usize) -> RecentEvents;
    /// Events of `range` in `start..=up_to` from the tables.
    fn stored(
        &self,
        range: KeyRange,
        start: i64,
        up_to: i64,
        limit: usize,
    ) -> BoxFuture<'_, Result<PastEvents, KvError>>;
    /// The event's `prev_kv`, if that needs no reading.
    fn previous_at_hand(&self, event: &Event) -> Option<Option<mvccpb::KeyValue>>;
    /// The event's `prev_kv`.
    fn previous<'a>(&'a self, event: &'a Event) -> BoxFuture<'a, Result<Option<mvccpb::KeyValue>, KvError>>;
}

impl History for Store {
    fn revision(&self) -> i64 {
        self.state().revision()
    }

    fn compact_revision(&self) -> i64 {
        self.state().compact_revision()
    }

    fn recent(&self, revision: i64, max_batches: usize) -> RecentEvents {
        self.events_after(revision, max_batches)
    }

    fn stored(
        &self,
        range: KeyRange,
        start: i64,
        up_to: i64,
        limit: usize,
    ) -> BoxFuture<'_, Result<PastEvents, KvError>> {
        Box::pin(async move { self.events_from_tables(&range, start, up_to, limit).await })
    }

    fn previous_at_hand(&self, event: &Event) -> Option<Option<mvccpb::KeyValue>> {
        Store::previous_at_hand(self, event)
    }

    fn previous<'a>(&'a self, event: &'a Event) -> BoxFuture<'a, Result<Option<mvccpb::KeyValue>, KvError>> {
        Box::pin(Store::previous(self, event))
    }
}
