//! Recent committed events, from which watchers catch up without touching the tables.

use super::event::{EventBatch, RecentEvents};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// See the module. Bounded by bytes; the newest batch is always kept.
#[derive(Debug)]
pub(crate) struct Ring {
    capacity_bytes: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Every event after this revision is here.
    after: i64,
    batches: VecDeque<Arc<EventBatch>>,
    bytes: usize,
}

impl Ring {
    pub(crate) fn new(capacity_bytes: usize) -> Ring {
        Ring { capacity_bytes, inner: Mutex::new(Inner { after: 0, batches: VecDeque::new(), bytes: 0 }) }
    }

    /// Starts over: `batches` are all events after `after`. `publish` is called while the ring is locked.
    pub(crate) fn reset(&self, after: i64, batches: VecDeque<Arc<EventBatch>>, publish: impl FnOnce()) {
        let bytes = batches.iter().map(|batch| batch.weight_bytes()).sum();
        let mut inner = self.inner.lock();
        let old = std::mem::replace(&mut *inner, Inner { after, batches, bytes });
        publish();
        drop(inner);
        drop(old);
    }

    /// Adds what one Raft entry brought. `publish` is called while the ring is locked. What no longer fits is dropped
    /// when the lock has been given back.
    pub(crate) fn append(&self, batches: &[Arc<EventBatch>], publish: impl FnOnce()) {
        let weight: usize = batches.iter().map(|batch| batch.weight_bytes()).sum();
        let mut dropped = Vec::new();
        let mut inner = self.inner.lock();
        publish();
        inner.bytes += weight;
        inner.batches.extend(batches.iter().cloned());
        while inner.bytes > self.capacity_bytes && inner.batches.len() > 1 {
            let Some(oldest) = inner.batches.pop_front() else {
                break;
            };
            inner.bytes -= oldest.weight_bytes();
            inner.after = oldest.revision;
            dropped.push(oldest);
        }
        drop(inner);
        drop(dropped);
    }

    /// Batches after a revision, at most `limit` of them.
    pub(crate) fn after(&self, revision: i64, limit: usize) -> RecentEvents {
        let inner = self.inner.lock();
        if revision < inner.after {
            return RecentEvents::Gone { after: inner.after };
        }
        let from = inner.batches.partition_point(|batch| batch.revision <= revision);
        RecentEvents::Batches(inner.batches.range(from..).take(limit).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::event::{Event, EventKind};
    use bytes::Bytes;

    fn batch(revision: i64, bytes: usize) -> Arc<EventBatch> {
        let event = Event {
            kind: EventKind::Put,
            key: Bytes::from_static(b"k"),
            value: Bytes::from(vec![0; bytes]),
            create_revision: 1,
            mod_revision: revision,
            version: 1,
            lease: 0,
            previous: None,
        };
        Arc::new(EventBatch { revision, events: Box::new([event]) })
    }

    fn revisions(ring: &Ring, after: i64, limit: usize) -> Result<Vec<i64>, i64> {
        match ring.after(after, limit) {
            RecentEvents::Batches(batches) => Ok(batches.iter().map(|b| b.revision).collect()),
            RecentEvents::Gone { after } => Err(after),
        }
    }

    #[test]
    fn gives_what_it_has_and_says_what_it_has_not() {
        let ring = Ring::new(10 * batch(0, 1000).weight_bytes());
        ring.reset(3, [batch(5, 1000), batch(6, 1000)].into(), || ());
        assert_eq!(revisions(&ring, 3, 9), Ok(vec![5, 6]));
        assert_eq!(revisions(&ring, 5, 9), Ok(vec![6]));
        assert_eq!(revisions(&ring, 6, 9), Ok(vec![]));
        assert_eq!(revisions(&ring, 2, 9), Err(3));
        ring.append(&(7..=16).map(|r| batch(r, 1000)).collect::<Vec<_>>(), || ());
        assert_eq!(revisions(&ring, 5, 9), Err(6));
        assert_eq!(revisions(&ring, 6, 3), Ok(vec![7, 8, 9]));
        ring.append(&[batch(17, 1 << 20)], || ());
        assert_eq!(revisions(&ring, 15, 3), Err(16));
        assert_eq!(revisions(&ring, 16, 3), Ok(vec![17]));
    }
}
