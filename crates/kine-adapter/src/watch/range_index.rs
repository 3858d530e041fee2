//! Who watches a key: the ranges that are watched, found by a key in them.
//!
//! Every distinct range has one *slot* with all its watchers, so the same `/registry/pods/` of eleven apiservers is
//! found once and its answer is encoded once. Single keys are in a hash table; other ranges in a treap ordered by
//! (start, end) in which each node knows the furthest end below it:
//!
//! ```text
//!                  [/c, /d)  furthest /z          stab(/k): left subtree only if its furthest end > /k,
//!                 /        \                                right subtree only if this start <= /k
//!        [/a, /z)           [/m, /n)
//! ```
//!
//! An event costs O(log ranges + ranges that hold the key); joining and leaving cost O(log ranges).

use std::collections::HashMap;

use bytes::Bytes;

use crate::index::{KeyRange, RangeEnd};

/// A slot of a [`RangeIndex`]; valid until the last watcher leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SlotId(usize);

/// The watchers of one range.
#[derive(Debug)]
pub(super) struct Slot<W> {
    range: KeyRange,
    pub members: Vec<W>,
    /// How many members want the previous value of each event.
    pub wanting_previous: usize,
    /// Scratch of the dispatcher: events of the current run that are in the range, as (batch, event).
    pub matched: Vec<(u32, u32)>,
    left: Option<SlotId>,
    right: Option<SlotId>,
    priority: u64,
    furthest: RangeEnd,
}

/// See the module.
#[derive(Debug)]
pub(super) struct RangeIndex<W> {
    slots: Vec<Option<Slot<W>>>,
    free: Vec<SlotId>,
    single: HashMap<Bytes, SlotId>,
    root: Option<SlotId>,
    random: u64,
}

impl<W: Copy + PartialEq> RangeIndex<W> {
    pub fn new() -> Self {
        RangeIndex {
            slots: Vec::new(),
            free: Vec::new(),
            single: HashMap::new(),
            root: None,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// A watcher joins the range.
    pub fn insert(&mut self, range: &KeyRange, watcher: W, wants_previous: bool) {
        let id = self.find(range).unwrap_or_else(|| self.add_slot(range));
        let slot = self.slot_mut(id);
        slot.members.push(watcher);
        slot.wanting_previous += usize::from(wants_previous);
    }

    /// A watcher leaves the range. False if it was not there.
    pub fn remove(&mut self, range: &KeyRange, watcher: W, wants_previous: bool) -> bool {
        let Some(id) = self.find(range) else {
            return false;
        };
        let slot = self.slot_mut(id);
        let Some(position) = slot.members.iter().position(|member| *member == watcher) else {
            return false;
        };
        slot.members.swap_remove(position);
        slot.wanting_previous -= usize::from(wants_previous);
        if slot.members.is_empty() {
            self.drop_slot(id);
        }
        true
    }

    /// Calls `found` with the slot of each range that holds `key`.
    pub fn stab(&mut self, key: &[u8], mut found: impl FnMut(SlotId, &mut Slot<W>)) {
        if let Some(id) = self.single.get(key).copied() {
            found(id, self.slot_mut(id));
        }
        self.stab_below(self.root, key, &mut found);
    }

    /// The slot with this id.
    pub fn slot_mut(&mut self, id: SlotId) -> &mut Slot<W> {
        self.slots[id.0].as_mut().expect("invariant: slot ids in use point at slots")
    }

    fn slot(&self, id: SlotId) -> &Slot<W> {
        self.slots[id.0].as_ref().expect("invariant: slot ids in use point at slots")
    }

    fn stab_below(&mut self, node: Option<SlotId>, key: &[u8], found: &mut impl FnMut(SlotId, &mut Slot<W>)) {
        let Some(id) = node else { return };
        let slot = self.slot(id);
        if ends_by(&slot.furthest, key) {
            return;
        }
        let (left, right, start_reached) = (slot.left, slot.right, slot.range.start().as_ref() <= key);
        self.stab_below(left, key, found);
        if start_reached {
            let slot = self.slot_mut(id);
            if !ends_by(slot.range.end(), key) {
                found(id, slot);
            }
            self.stab_below(right, key, found);
        }
    }

    fn find(&self, range: &KeyRange) -> Option<SlotId> {
        if range.is_single() {
            return self.single.get(range.start()).copied();
        }
        let mut node = self.root;
        while let Some(id) = node {
            let slot = self.slot(id);
            node = match compare(range, &slot.range) {
                std::cmp::Ordering::Equal => return Some(id),
                std::cmp::Ordering::Less => slot.left,
                std::cmp::Ordering::Greater => slot.right,
            };
        }
        None
    }

    fn add_slot(&mut self, range: &KeyRange) -> SlotId {
        let slot = Slot {
            range: range.clone(),
            members: Vec::new(),
            wanting_previous: 0,
            matched: Vec::new(),
            left: None,
            right: None,
            priority: self.next_priority(),
            furthest: range.end().clone(),
        };
        let id = if let Some(id) = self.free.pop() {
            self.slots[id.0] = Some(slot);
            id
        } else {
            self.slots.push(Some(slot));
            SlotId(self.slots.len() - 1)
        };
        if range.is_single() {
            self.single.insert(range.start().clone(), id);
        } else {
            let (less, greater) = self.split(self.root, range);
            let with = self.merge(less, Some(id));
            self.root = self.merge(with, greater);
        }
        id
    }

    fn drop_slot(&mut self, id: SlotId) {
        let range = self.slot(id).range.clone();
        if range.is_single() {
            self.single.remove(range.start());
        } else {
            self.root = self.without(self.root, &range);
        }
        self.slots[id.0] = None;
        self.free.push(id);
    }

    /// The tree below `node` without the node of `range`.
    fn without(&mut self, node: Option<SlotId>, range: &KeyRange) -> Option<SlotId> {
        let id = node?;
        let (left, right) = (self.slot(id).left, self.slot(id).right);
        match compare(range, &self.slot(id).range) {
            std::cmp::Ordering::Equal => return self.merge(left, right),
            std::cmp::Ordering::Less => self.slot_mut(id).left = self.without(left, range),
            std::cmp::Ordering::Greater => self.slot_mut(id).right = self.without(right, range),
        }
        self.update(id);
        Some(id)
    }

    /// The nodes below `node` with ranges less than, and greater than, one that is not there.
    fn split(&mut self, node: Option<SlotId>, range: &KeyRange) -> (Option<SlotId>, Option<SlotId>) {
        let Some(id) = node else { return (None, None) };
        if compare(&self.slot(id).range, range).is_lt() {
            let (less, greater) = self.split(self.slot(id).right, range);
            self.slot_mut(id).right = less;
            self.update(id);
            (Some(id), greater)
        } else {
            let (less, greater) = self.split(self.slot(id).left, range);
            self.slot_mut(id).left = greater;
            self.update(id);
            (less, Some(id))
        }
    }

    /// One tree of two, all of `less` being less than all of `greater`.
    fn merge(&mut self, less: Option<SlotId>, greater: Option<SlotId>) -> Option<SlotId> {
        let (Some(l), Some(g)) = (less, greater) else {
            return less.or(greater);
        };
        if self.slot(l).priority > self.slot(g).priority {
            let right = self.slot(l).right;
            self.slot_mut(l).right = self.merge(right, greater);
            self.update(l);
            Some(l)
        } else {
            let left = self.slot(g).left;
            self.slot_mut(g).left = self.merge(less, left);
            self.update(g);
            Some(g)
        }
    }

    fn update(&mut self, id: SlotId) {
        let slot = self.slot(id);
        let mut furthest = slot.range.end();
        for child in [slot.left, slot.right].into_iter().flatten() {
            let end = &self.slot(child).furthest;
            if compare_ends(end, furthest).is_gt() {
                furthest = end;
            }
        }
        let furthest = furthest.clone();
        self.slot_mut(id).furthest = furthest;
    }

    /// xorshift: priorities only need to be unrelated to the order of the ranges.
    fn next_priority(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// Whether nothing that ends there can hold `key`.
fn ends_by(end: &RangeEnd, key: &[u8]) -> bool {
    match end {
        RangeEnd::Before(end) => end.as_ref() <= key,
        RangeEnd::Unbounded => false,
        RangeEnd::Single => true,
    }
}

fn compare_ends(a: &RangeEnd, b: &RangeEnd) -> std::cmp::Ordering {
    let rank = |end: &RangeEnd| match end {
        RangeEnd::Single => 0,
        RangeEnd::Before(_) => 1,
        RangeEnd::Unbounded => 2,
    };
    match (a, b) {
        (RangeEnd::Before(a), RangeEnd::Before(b)) => a.cmp(b),
        _ => rank(a).cmp(&rank(b)),
    }
}

fn compare(a: &KeyRange, b: &KeyRange) -> std::cmp::Ordering {
    a.start().cmp(b.start()).then_with(|| compare_ends(a.end(), b.end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range() -> impl Strategy<Value = KeyRange> {
        let key = || proptest::collection::vec(0u8..4, 1..4).prop_map(Bytes::from);
        (key(), prop_oneof![2 => Just(Bytes::new()), 1 => Just(Bytes::from_static(b"\0")), 5 => key()])
            .prop_map(|(start, end)| KeyRange::new(start, end))
            .prop_filter("empty ranges are refused before", |range| !range.is_empty())
    }

    proptest! {
        #[test]
        fn finds_exactly_the_ranges_that_hold_the_key(
            steps in proptest::collection::vec((range(), any::<bool>(), any::<prop::sample::Index>()), 1..80),
            keys in proptest::collection::vec(proptest::collection::vec(0u8..4, 1..4), 20),
        ) {
            let mut index = RangeIndex::new();
            let mut model: Vec<(KeyRange, u32)> = Vec::new();
            for (number, (range, leave, pick)) in (0u32..).zip(steps) {
                if leave && !model.is_empty() {
                    let (range, watcher) = model.remove(pick.index(model.len()));
                    prop_assert!(index.remove(&range, watcher, watcher % 2 == 0));
                    prop_assert!(!index.remove(&range, watcher, watcher % 2 == 0));
                } else {
                    index.insert(&range, number, number % 2 == 0);
                    model.push((range, number));
                }
                for key in &keys {
                    let mut found = Vec::new();
                    index.stab(key, |_, slot| {
                        assert_eq!(slot.wanting_previous, slot.members.iter().filter(|w| *w % 2 == 0).count());
                        found.extend_from_slice(&slot.members);
                    });
                    found.sort_unstable();
                    let mut expected: Vec<u32> =
                        model.iter().filter(|(range, _)| range.contains(key)).map(|(_, watcher)| *watcher).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }

    #[test]
    fn watchers_of_one_range_share_a_slot() {
        let mut index = RangeIndex::new();
        let range = KeyRange::new(Bytes::from_static(b"/pods/"), Bytes::from_static(b"/pods0"));
        for watcher in 0..11 {
            index.insert(&range, watcher, true);
        }
        let mut slots = Vec::new();
        index.stab(b"/pods/a", |id, slot| slots.push((id, slot.members.len())));
        assert_eq!(slots, [(SlotId(0), 11)]);
    }
}
