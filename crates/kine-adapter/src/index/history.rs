//! The older states of one key: a persistent list, newest first, in which any state is found in O(log n).
//!
//! A list with jump pointers (E. W. Myers, "An applicative random-access stack", 1983): each node knows the next older
//! one and one much older, and putting a state in front costs one small node however many clones share the rest. A hot
//! key between two compactions easily has a hundred thousand states.

use super::Record;
use std::sync::Arc;

/// See the module. The default is the empty list.
#[derive(Debug, Clone, Default)]
pub(crate) struct History(Option<Arc<Node>>);

#[derive(Debug)]
struct Node {
    record: Record,
    length: usize,
    next: History,
    jump: History,
}

impl History {
    /// Number of states.
    pub(crate) fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |node| node.length)
    }

    /// This list with a newer state in front.
    pub(crate) fn push(self, record: Record) -> History {
        let length = self.len() + 1;
        let jump = match &self.0 {
            Some(next) => {
                let second = next.jump.len();
                let third = next.jump.0.as_ref().map_or(0, |node| node.jump.len());
                if second > 0 && next.length - second == second - third {
                    next.jump.0.as_ref().map_or_else(History::default, |node| node.jump.clone())
                } else {
                    self.clone()
                }
            }
            None => History::default(),
        };
        History(Some(Arc::new(Node { record, length, next: self, jump })))
    }

    /// The newest state whose revision is at most `revision`.
    pub(crate) fn at(&self, revision: i64) -> Option<&Record> {
        let mut node = self.0.as_deref()?;
        while node.record.mod_revision > revision {
            node = match &node.jump.0 {
                Some(older) if older.record.mod_revision > revision => older,
                _ => node.next.0.as_deref()?,
            };
        }
        Some(&node.record)
    }

    /// The states, newest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Record> {
        std::iter::successors(self.0.as_deref(), |node| node.next.0.as_deref()).map(|node| &node.record)
    }
}

impl Drop for History {
    /// One node after the other: a list of a hundred thousand must not be dropped by recursion. A jump never holds the
    /// last reference, since the nodes up to its target are still there when it goes.
    fn drop(&mut self) {
        let mut list = self.0.take();
        while let Some(mut node) = list.and_then(Arc::into_inner) {
            node.jump.0 = None;
            list = node.next.0.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ValueId;
    use super::*;

    fn record(revision: i64) -> Record {
        Record { create_revision: 1, mod_revision: revision, version: 1, lease: 0, value_id: ValueId(revision) }
    }

    #[test]
    fn every_state_is_found_and_clones_do_not_change() {
        let mut list = History::default();
        let mut kept = Vec::new();
        for n in 1..=300 {
            kept.push(list.clone());
            list = list.push(record(n * 2));
        }
        kept.push(list);
        for (length, list) in kept.iter().enumerate() {
            assert_eq!(list.len(), length);
            for revision in 0..=(length as i64 * 2 + 1) {
                let want = (revision >= 2).then(|| revision / 2 * 2);
                assert_eq!(list.at(revision).map(|r| r.mod_revision), want);
            }
        }
    }

    #[test]
    fn of_two_states_of_one_revision_the_newer_one_counts() {
        let list = History::default().push(record(5)).push(Record { value_id: ValueId(99), ..record(5) });
        assert_eq!(list.at(5).map(|r| r.value_id), Some(ValueId(99)));
        assert!(list.at(4).is_none());
    }

    #[test]
    fn a_long_list_is_searched_in_few_steps_and_dropped_without_recursion() {
        let mut list = History::default();
        for n in 1..=1_000_000 {
            list = list.push(record(n));
        }
        let mut steps = 0;
        let mut node = list.0.as_deref();
        while let Some(n) = node.filter(|n| n.record.mod_revision > 12_345) {
            node = match &n.jump.0 {
                Some(older) if older.record.mod_revision > 12_345 => Some(older),
                _ => n.next.0.as_deref(),
            };
            steps += 1;
        }
        assert!(steps < 80, "{steps} steps");
        let second = list.clone();
        drop(list);
        assert_eq!(second.iter().count(), 1_000_000);
    }
}
