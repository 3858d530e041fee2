//! The key index: each key's current state, and its older ones as far as they are not compacted.
//!
//! Lists and counts at the current revision cost O(log n + what is returned). At an older one they enter only those
//! subtrees in which something has changed since: an inner node keeps the newest revision below it.

use super::history::History;
use super::range::{KeyRange, RangeEnd};
use super::tree::{Item, Subtree, Summary, Tree, Visitor};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Where a value is stored: the row of `rev`. Given out in ascending order, never again to another value once
/// committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ValueId(pub i64);

/// One state of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The revision at which the key came into being; 0 in a tombstone.
    pub create_revision: i64,
    /// The revision of this state.
    pub mod_revision: i64,
    /// Puts since the key came into being; 0 in a tombstone.
    pub version: i64,
    /// The lease it hangs on, 0 for none.
    pub lease: i64,
    /// The row that holds the state.
    pub value_id: ValueId,
}

impl Record {
    /// Whether the key exists in this state.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.version != 0
    }
}

/// A key with all its states.
#[derive(Debug, Clone)]
pub(crate) struct KeyEntry {
    key: Arc<[u8]>,
    current: Record,
    older: History,
}

impl KeyEntry {
    /// The state at a revision, which may be a tombstone.
    fn at(&self, revision: i64) -> Option<&Record> {
        if self.current.mod_revision <= revision { Some(&self.current) } else { self.older.at(revision) }
    }

    /// The state at a revision if the key existed then.
    pub(crate) fn live_at(&self, revision: i64) -> Option<&Record> {
        self.at(revision).filter(|record| record.is_live())
    }

    /// The current state if the key exists.
    pub(crate) fn live(&self) -> Option<&Record> {
        Some(&self.current).filter(|record| record.is_live())
    }

    /// All states, newest first.
    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        std::iter::once(&self.current).chain(self.older.iter())
    }

    /// States that compaction at `revision` needs not keep: each one that another of at most that revision has
    /// replaced, and a tombstone from before it.
    fn garbage(&self, revision: i64) -> impl Iterator<Item = &Record> {
        let mut found = false;
        self.records().filter(move |record| {
            if record.mod_revision > revision {
                return false;
            }
            let newest = !std::mem::replace(&mut found, true);
            !newest || (!record.is_live() && record.mod_revision < revision)
        })
    }

    /// This entry without its garbage; None if nothing of it is left.
    fn compacted(&self, revision: i64) -> Option<KeyEntry> {
        let garbage = self.garbage(revision).count();
        let mut kept: Vec<Record> = self.records().take(self.older.len() + 1 - garbage).copied().collect();
        if kept.is_empty() {
            return None;
        }
        let current = kept.remove(0);
        let older = kept.into_iter().rev().fold(History::default(), History::push);
        Some(KeyEntry { key: Arc::clone(&self.key), current, older })
    }
}

impl Item for KeyEntry {
    type Key = [u8];
    type Owned = Arc<[u8]>;
    type Summary = KeySummary;
    fn key(&self) -> &[u8] {
        &self.key
    }
    fn owned_key(&self) -> Arc<[u8]> {
        Arc::clone(&self.key)
    }
    fn summary(&self) -> KeySummary {
        let live = usize::from(self.current.is_live());
        KeySummary { live, extra: self.older.len() + 1 - live, newest: self.current.mod_revision }
    }
}

/// What an inner node knows of the keys below it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct KeySummary {
    /// Keys that exist.
    live: usize,
    /// States other than those: what compaction may be able to drop.
    extra: usize,
    /// A bound of the newest revision.
    newest: i64,
}

impl Summary for KeySummary {
    fn add(&mut self, other: &KeySummary) {
        self.live += other.live;
        self.extra += other.extra;
        self.newest = self.newest.max(other.newest);
    }
    fn subtract(&mut self, other: &KeySummary) {
        self.live -= other.live;
        self.extra -= other.extra;
    }
}

/// See the module. A clone is O(1) and never changes.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyIndex {
    tree: Tree<KeyEntry>,
}

/// What [`KeyIndex::forget_garbage`] did.
#[derive(Debug)]
pub(crate) struct Forgotten {
    /// The keys that had garbage.
    pub(crate) keys: Vec<Arc<[u8]>>,
    /// Where to go on, if there is more.
    pub(crate) next: Option<Arc<[u8]>>,
}

/// A key and its state, as found.
pub(crate) type Found<'a> = (&'a Arc<[u8]>, &'a Record);

impl KeyIndex {
    /// Of (key, states oldest first), the keys ascending.
    pub(crate) fn from_ascending(keys: impl IntoIterator<Item = (Arc<[u8]>, Vec<Record>)>) -> KeyIndex {
        let entries = keys.into_iter().filter_map(|(key, mut records)| {
            let current = records.pop()?;
            let older = records.into_iter().fold(History::default(), History::push);
            Some(KeyEntry { key, current, older })
        });
        KeyIndex { tree: Tree::from_ascending(entries) }
    }

    /// Number of keys that exist.
    pub(crate) fn live_count(&self) -> usize {
        self.tree.summary().live
    }

    /// Number of states that are not the current one of an existing key.
    #[cfg(test)]
    pub(crate) fn extra_count(&self) -> usize {
        self.tree.summary().extra
    }

    /// Whatever is known of a key.
    pub(crate) fn get(&self, key: &[u8]) -> Option<&KeyEntry> {
        self.tree.get(key)
    }

    /// Gives a key the new state that `make` makes of its current one, if it exists; the key as kept, the state, and
    /// what was known of the key before. Revisions never go back.
    pub(crate) fn push(
        &mut self,
        key: &[u8],
        make: impl FnOnce(Option<&Record>) -> Record,
    ) -> (Arc<[u8]>, Record, Option<KeyEntry>) {
        let mut made = None;
        let before = self.tree.update(key, |old| {
            let current = make(old.and_then(KeyEntry::live));
            let entry = match old {
                Some(old) => {
                    assert!(old.current.mod_revision <= current.mod_revision, "invariant: revisions of a key ascend");
                    KeyEntry { key: Arc::clone(&old.key), current, older: old.older.clone().push(old.current) }
                }
                None => KeyEntry { key: key.into(), current, older: History::default() },
            };
            made = Some((Arc::clone(&entry.key), current));
            entry
        });
        let (key, current) = made.expect("invariant: an update makes an item");
        (key, current, before)
    }

    /// Makes what is known of a key what another index knows.
    pub(crate) fn follow(&mut self, other: &KeyIndex, key: &[u8]) {
        self.restore(key, other.get(key).cloned());
    }

    /// Undoes a [`KeyIndex::push`]: `before` is what it returned.
    pub(crate) fn restore(&mut self, key: &[u8], before: Option<KeyEntry>) {
        match before {
            Some(entry) => drop(self.tree.insert(entry)),
            None => drop(self.tree.remove(key)),
        }
    }

    /// Number of keys of a range that existed at a revision that is not compacted.
    pub(crate) fn count(&self, range: &KeyRange, revision: i64) -> usize {
        match range.end() {
            RangeEnd::Single => usize::from(self.get(range.start()).and_then(|e| e.live_at(revision)).is_some()),
            end => {
                let mut count = Count { revision, keys: 0 };
                self.tree.visit(Some(range.start()), end_key(end), &mut count);
                count.keys
            }
        }
    }

    /// The first keys of a range that existed at a revision that is not compacted, at most `limit` of them.
    pub(crate) fn list(&self, range: &KeyRange, revision: i64, limit: usize) -> Vec<Found<'_>> {
        match range.end() {
            _ if limit == 0 => Vec::new(),
            RangeEnd::Single => {
                let entry = self.get(range.start());
                entry.and_then(|entry| Some((&entry.key, entry.live_at(revision)?))).into_iter().collect()
            }
            end => {
                let mut list = List { revision, limit, found: Vec::new() };
                self.tree.visit(Some(range.start()), end_key(end), &mut list);
                list.found
            }
        }
    }

    /// Rows that nobody needs once the history before `revision` is gone, ascending.
    pub(crate) fn garbage(&self, revision: i64) -> Vec<ValueId> {
        let mut extra = Extra { from: None, limit: usize::MAX, entries: Vec::new() };
        self.tree.visit(None, None, &mut extra);
        let garbage = extra.entries.iter().flat_map(|entry| entry.garbage(revision).map(|record| record.value_id));
        let mut ids: Vec<ValueId> = garbage.collect();
        ids.sort_unstable();
        ids
    }

    /// Forgets the garbage of `revision` in up to `limit` keys after `from`.
    pub(crate) fn forget_garbage(&mut self, revision: i64, from: Option<&[u8]>, limit: usize) -> Forgotten {
        let mut extra = Extra { from, limit, entries: Vec::new() };
        self.tree.visit(from, None, &mut extra);
        let next = extra.entries.last().filter(|_| extra.entries.len() >= limit).map(|entry| Arc::clone(&entry.key));
        let dirty: Vec<KeyEntry> =
            extra.entries.into_iter().filter(|entry| entry.garbage(revision).next().is_some()).cloned().collect();
        let keys = dirty.into_iter().map(|entry| {
            self.restore(&entry.key, entry.compacted(revision));
            entry.key
        });
        Forgotten { keys: keys.collect(), next }
    }

    /// Everything, in order of keys.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Arc<[u8]>, &KeyEntry)> {
        self.tree.iter().map(|entry| (&entry.key, entry))
    }
}

fn end_key(end: &RangeEnd) -> Option<&[u8]> {
    match end {
        RangeEnd::Before(end) => Some(end),
        RangeEnd::Single | RangeEnd::Unbounded => None,
    }
}

struct Count {
    revision: i64,
    keys: usize,
}

impl<'a> Visitor<'a, KeyEntry> for Count {
    fn subtree(&mut self, summary: &KeySummary) -> Subtree {
        if summary.newest > self.revision {
            return Subtree::Enter;
        }
        self.keys += summary.live;
        Subtree::Done
    }
    fn item(&mut self, entry: &'a KeyEntry) -> ControlFlow<()> {
        self.keys += usize::from(entry.live_at(self.revision).is_some());
        ControlFlow::Continue(())
    }
}

struct List<'a> {
    revision: i64,
    limit: usize,
    found: Vec<Found<'a>>,
}

impl<'a> Visitor<'a, KeyEntry> for List<'a> {
    fn subtree(&mut self, summary: &KeySummary) -> Subtree {
        let empty = summary.newest <= self.revision && summary.live == 0;
        if empty { Subtree::Done } else { Subtree::Enter }
    }
    fn item(&mut self, entry: &'a KeyEntry) -> ControlFlow<()> {
        if let Some(record) = entry.live_at(self.revision) {
            self.found.push((&entry.key, record));
            if self.found.len() >= self.limit {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }
}

/// Keys after `from` that have more than their current state.
struct Extra<'a, 'f> {
    from: Option<&'f [u8]>,
    limit: usize,
    entries: Vec<&'a KeyEntry>,
}

impl<'a> Visitor<'a, KeyEntry> for Extra<'a, '_> {
    fn subtree(&mut self, summary: &KeySummary) -> Subtree {
        if summary.extra == 0 { Subtree::Done } else { Subtree::Enter }
    }
    fn item(&mut self, entry: &'a KeyEntry) -> ControlFlow<()> {
        if entry.summary().extra > 0 && self.from.is_none_or(|from| &*entry.key > from) {
            self.entries.push(entry);
            if self.entries.len() >= self.limit {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }
}
