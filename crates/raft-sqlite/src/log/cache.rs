//! The newest entries in memory.

use std::collections::VecDeque;

use super::Entry;
use super::index::Index;
use super::record::Position;

/// What a cached entry counts beyond its payload.
const ENTRY_BYTES: usize = 64;

/// A run of entries without a gap up to the last one of the log.
#[derive(Debug)]
pub(super) struct Cache {
    entries: VecDeque<Entry>,
    bytes: usize,
    limit_bytes: usize,
}

impl Cache {
    pub(super) fn new(limit_bytes: usize) -> Self {
        Self { entries: VecDeque::new(), bytes: 0, limit_bytes }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Index of the oldest entry held.
    pub(super) fn first(&self) -> Option<u64> {
        self.entries.front().map(|entry| entry.id.index)
    }

    pub(super) fn get(&self, index: u64) -> Option<&Entry> {
        let place = index.checked_sub(self.first()?)?;
        self.entries.get(usize::try_from(place).ok()?)
    }

    /// Adds the entry that follows.
    pub(super) fn push(&mut self, entry: Entry) {
        self.bytes += entry.payload.len() + ENTRY_BYTES;
        self.entries.push_back(entry);
    }

    fn forget(&mut self, entry: Option<Entry>) {
        self.bytes -= entry.map_or(0, |entry| entry.payload.len() + ENTRY_BYTES);
    }

    /// Forgets what is no longer in the log.
    pub(super) fn follow(&mut self, index: &Index) {
        let end = index.next().unwrap_or(0);
        let first = if index.len() == 0 { end } else { index.first() };
        while self.entries.back().is_some_and(|entry| entry.id.index >= end) {
            let entry = self.entries.pop_back();
            self.forget(entry);
        }
        while self.entries.front().is_some_and(|entry| entry.id.index < first) {
            let entry = self.entries.pop_front();
            self.forget(entry);
        }
    }

    /// Keeps within the bound; what stands at `written` or behind it is nowhere else and stays.
    pub(super) fn evict(&mut self, index: &Index, written: Position) {
        while self.bytes > self.limit_bytes {
            let Some(first) = self.first() else { return };
            let slot = index.slot(first).expect("invariant: the cache holds entries of the log");
            if slot.position >= written {
                return;
            }
            let entry = self.entries.pop_front();
            self.forget(entry);
        }
    }
}
