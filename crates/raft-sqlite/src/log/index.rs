//! Where each entry stands, and the rules by which records change that: one implementation for the
//! running log and for replay.

use std::collections::VecDeque;

use super::EntryId;
use super::record::Position;

/// One entry's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) position: Position,
    pub(super) payload_bytes: u32,
    pub(super) term: u64,
}

/// The entries of the log without their payloads.
///
/// In replay the first segments may be gone. Then `before` names the entry before the first known
/// one, and there are entries in between that are missing until a purge or a truncation drops them
/// ([`Index::missing`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    purged: Option<EntryId>,
    /// The entry right before the first slot; `None` when the log may start at any index.
    before: Option<EntryId>,
    /// Index of the first slot; means nothing when there is none.
    first: u64,
    slots: VecDeque<Slot>,
}

impl Index {
    /// As a segment header describes it.
    pub(super) fn new(purged: Option<EntryId>, last: Option<EntryId>) -> Self {
        Self { purged, before: last, first: last.map_or(0, |last| last.index + 1), slots: VecDeque::new() }
    }

    pub(super) fn purged(&self) -> Option<EntryId> {
        self.purged
    }

    /// The newest entry, or the last purged one.
    pub(super) fn last(&self) -> Option<EntryId> {
        match self.slots.back() {
            Some(slot) => Some(EntryId { term: slot.term, index: self.first + self.slots.len() as u64 - 1 }),
            None => self.before,
        }
    }

    /// The index the next entry must have; `None` when the log is empty and was never purged.
    pub(super) fn next(&self) -> Option<u64> {
        self.last().map(|last| last.index + 1)
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Index of the first entry known; one past the last when there is none.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    pub(super) fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// Place of the oldest entry that is not purged.
    pub(super) fn first_position(&self) -> Option<Position> {
        self.slots.front().map(|slot| slot.position)
    }

    /// True while entries that are not purged stand in no known segment.
    pub(super) fn missing(&self) -> bool {
        self.before.is_some() && self.before != self.purged
    }

    /// Adds an entry; false, without effect, when it is not the next one.
    pub(super) fn push(&mut self, id: EntryId, position: Position, payload_bytes: u32) -> bool {
        if self.next().is_some_and(|next| next != id.index) || id.index == u64::MAX {
            return false;
        }
        if self.slots.is_empty() {
            self.first = id.index;
        }
        self.slots.push_back(Slot { position, payload_bytes, term: id.term });
        true
    }

    /// Drops the entries after `last`, which is known (or, in replay, missing).
    pub(super) fn truncate_after(&mut self, last: EntryId) {
        if self.slots.is_empty() && self.before.is_none_or(|before| before.index <= last.index) {
            return;
        }
        if last.index >= self.first {
            let keep = last.index - self.first + 1;
            self.slots.truncate(usize::try_from(keep).unwrap_or(usize::MAX));
        } else {
            self.slots.clear();
            self.before = Some(last);
            self.first = last.index + 1;
        }
    }

    /// Drops all entries that are not purged.
    pub(super) fn truncate_all(&mut self) {
        self.slots.clear();
        self.before = self.purged;
        self.first = self.purged.map_or(0, |purged| purged.index + 1);
    }

    /// Drops the entries up to `upto`; when that is beyond the last one, the log goes on after it.
    pub(super) fn purge(&mut self, upto: EntryId) {
        if self.purged.is_some_and(|purged| purged.index >= upto.index) {
            return;
        }
        self.purged = Some(upto);
        while !self.slots.is_empty() && self.first <= upto.index {
            self.slots.pop_front();
            self.first += 1;
        }
        if self.slots.is_empty() && self.before.is_none_or(|before| before.index <= upto.index) {
            self.first = self.first.max(upto.index + 1);
            self.before = Some(upto);
        }
        if !self.slots.is_empty() && self.first == upto.index + 1 {
            self.before = Some(upto);
        }
    }
}
