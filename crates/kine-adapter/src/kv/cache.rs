//! A bounded cache of committed values, shared by readers and the writer.
//!
//! Keyed by the row that holds a value. Only values of committed rows enter it: rows of versions that were dropped are
//! given out again, to other values. Rows never change, so an entry is never wrong, only no longer wanted: the value of a key that has
//! a newer one goes at once, and what is read of the past comes from the database.
//!
//! Eviction is CLOCK (second chance): a hit sets a mark, and costs no more than that.

use super::ValueId;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Parts that are locked apart from each other.
const SHARDS: usize = 16;
/// What an entry is counted with beside its bytes.
const OVERHEAD_BYTES: usize = 128;
/// A single value may take at most this share of a shard.
const LARGEST_SHARE: usize = 4;

/// See the module.
#[derive(Debug)]
pub(crate) struct ValueCache {
    shards: Box<[Mutex<Shard>]>,
    shard_bytes: usize,
}

#[derive(Debug, Default)]
struct Shard {
    entries: HashMap<i64, usize, BuildHasherDefault<RowHasher>>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    hand: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    id: i64,
    value: Bytes,
    wanted: bool,
    used: bool,
}

/// Rows are consecutive numbers: one multiplication spreads them.
#[derive(Debug, Default)]
struct RowHasher(u64);

impl Hasher for RowHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    fn write_i64(&mut self, n: i64) {
        self.write_u64(n.cast_unsigned());
    }
}

impl ValueCache {
    /// One that holds about `capacity_bytes`.
    pub(crate) fn new(capacity_bytes: usize) -> ValueCache {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect();
        ValueCache { shards, shard_bytes: capacity_bytes / SHARDS }
    }

    fn shard(&self, id: ValueId) -> &Mutex<Shard> {
        &self.shards[(id.0.cast_unsigned() as usize) % SHARDS]
    }

    /// The value, if it is here.
    pub(crate) fn get(&self, id: ValueId) -> Option<Bytes> {
        let mut shard = self.shard(id).lock();
        let at = *shard.entries.get(&id.0)?;
        let slot = &mut shard.slots[at];
        slot.wanted = true;
        Some(slot.value.clone())
    }

    /// Lets go of the value of a key that has a newer one.
    pub(crate) fn forget(&self, id: ValueId) {
        let mut shard = self.shard(id).lock();
        if let Some(at) = shard.entries.remove(&id.0) {
            shard.empty(at);
        }
    }

    /// Keeps a committed value. One that shares a buffer more than twice its size with others is copied, so that a
    /// small value cannot hold on to a large buffer: `buffer_bytes` is the size of that buffer.
    pub(crate) fn insert(&self, id: ValueId, value: &Bytes, buffer_bytes: usize) {
        let value = if buffer_bytes > 2 * value.len() { Bytes::copy_from_slice(value) } else { value.clone() };
        let weight = weight(&value);
        if weight > self.shard_bytes / LARGEST_SHARE {
            return;
        }
        let mut shard = self.shard(id).lock();
        if shard.entries.contains_key(&id.0) {
            return;
        }
        while shard.bytes + weight > self.shard_bytes {
            shard.evict();
        }
        shard.bytes += weight;
        let slot = Slot { id: id.0, value, wanted: false, used: true };
        let at = match shard.free.pop() {
            Some(at) => {
                shard.slots[at] = slot;
                at
            }
            None => {
                shard.slots.push(slot);
                shard.slots.len() - 1
            }
        };
        shard.entries.insert(id.0, at);
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.shards.iter().for_each(|shard| *shard.lock() = Shard::default());
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().bytes).sum()
    }
}

fn weight(value: &Bytes) -> usize {
    // A value that is not copied may hold on to a buffer twice its size.
    value.len() + OVERHEAD_BYTES
}

impl Shard {
    /// Drops one entry; there is one.
    fn evict(&mut self) {
        loop {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[at];
            if slot.used && !std::mem::take(&mut slot.wanted) {
                let id = slot.id;
                self.entries.remove(&id);
                self.empty(at);
                return;
            }
        }
    }

    /// Frees a slot whose entry has been removed.
    fn empty(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        slot.used = false;
        self.bytes -= weight(&slot.value);
        slot.value = Bytes::new();
        self.free.push(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_fits_and_prefers_what_is_used() {
        let capacity = SHARDS * 64 * (1000 + OVERHEAD_BYTES);
        let cache = ValueCache::new(capacity);
        let value = |id: i64| Bytes::from(vec![id as u8; 1000]);
        for id in 0..10_000 {
            cache.insert(ValueId(id), &value(id), 1000);
            assert!(cache.bytes() <= capacity);
            assert_eq!(cache.get(ValueId(5)), Some(value(5)).filter(|_| id >= 5));
        }
        assert_eq!(cache.get(ValueId(9_999)), Some(value(9_999)));
        assert_eq!(cache.get(ValueId(100)), None);
        let before = cache.bytes();
        cache.forget(ValueId(9_999));
        cache.forget(ValueId(9_999));
        assert_eq!((cache.get(ValueId(9_999)), cache.bytes()), (None, before - 1000 - OVERHEAD_BYTES));
        cache.insert(ValueId(9_999), &value(1), 1000);
        assert_eq!((cache.get(ValueId(9_999)), cache.bytes()), (Some(value(1)), before));
        cache.clear();
        assert_eq!((cache.get(ValueId(5)), cache.bytes()), (None, 0));
    }

    #[test]
    fn too_large_a_value_is_not_kept_and_a_small_one_holds_no_large_buffer() {
        let cache = ValueCache::new(SHARDS * 4096);
        cache.insert(ValueId(1), &Bytes::from(vec![0; 4000]), 4000);
        assert_eq!(cache.get(ValueId(1)), None);
        let buffer = Bytes::from(vec![1; 1 << 20]);
        cache.insert(ValueId(2), &buffer.slice(..100), buffer.len());
        drop(cache.get(ValueId(2)));
        assert!(buffer.is_unique(), "the cache holds on to the buffer");
    }
}
