//! The log against a Vec, with random calls and reopening.

use proptest::prelude::*;

use super::sim_disk::SimDisk;
use super::{entry, id, open};
use crate::log::{Entry, EntryId, LogError, LogState};

#[derive(Clone, Debug)]
enum Call {
    Append {
        count: u64,
        payload_bytes: usize,
        skip: u64,
    },
    /// Where, as a part of 100 of the log; 100 and above is at or behind its end.
    TruncateAfter(Option<u64>),
    Purge(u64),
    SaveVote(Vec<u8>),
    SaveCommitted(u64),
    Read {
        from: u64,
        count: u64,
        max_bytes: Option<usize>,
    },
    Flush,
    Reopen,
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        6 => (0..5u64, prop_oneof![4 => 0..600usize, 1 => 4_000..40_000usize], prop_oneof![9 => Just(0), 1 => 1..3u64])
            .prop_map(|(count, payload_bytes, skip)| Call::Append { count, payload_bytes, skip }),
        1 => prop::option::weighted(0.8, 0..110u64).prop_map(Call::TruncateAfter),
        1 => (0..110u64).prop_map(Call::Purge),
        1 => prop::collection::vec(any::<u8>(), 0..30).prop_map(Call::SaveVote),
        1 => (0..100u64).prop_map(Call::SaveCommitted),
        4 => (0..110u64, 0..50u64, prop::option::of(0..3_000usize))
            .prop_map(|(from, count, max_bytes)| Call::Read { from, count, max_bytes }),
        1 => Just(Call::Flush),
        1 => Just(Call::Reopen),
    ]
}

#[derive(Default)]
struct Model {
    purged: Option<EntryId>,
    entries: Vec<Entry>,
    vote: Option<Vec<u8>>,
    committed: Option<EntryId>,
}

impl Model {
    fn last(&self) -> Option<EntryId> {
        self.entries.last().map(|entry| entry.id).or(self.purged)
    }

    fn next(&self) -> u64 {
        self.last().map_or(0, |last| last.index + 1)
    }

    /// The index at this part of the log.
    fn at(&self, part: u64) -> u64 {
        let first = self.entries.first().map_or(self.next(), |entry| entry.id.index);
        first + (self.next() - first) * part / 100
    }

    fn read(&self, from: u64, to: u64, max_bytes: Option<usize>) -> Vec<Entry> {
        let mut found: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        for entry in self.entries.iter().filter(|entry| (from..to).contains(&entry.id.index)) {
            bytes += entry.payload.len();
            if !found.is_empty() && max_bytes.is_some_and(|max_bytes| bytes > max_bytes) {
                break;
            }
            found.push(entry.clone());
        }
        found
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_vec(calls in prop::collection::vec(call(), 1..60)) {
        let disk = SimDisk::new();
        let mut log = open(&disk).unwrap();
        let mut model = Model::default();
        let mut term = 1;
        for call in calls {
            match call {
                Call::Append { count, payload_bytes, skip } => {
                    let start = model.next() + skip;
                    let entries: Vec<_> = (start..start + count).map(|index| entry(term, index, payload_bytes)).collect();
                    let fits = skip == 0 || count == 0 || model.last().is_none();
                    let result = log.append(entries.clone(), |_| {});
                    if fits {
                        result.unwrap();
                        model.entries.extend(entries);
                    } else {
                        let refused = matches!(result, Err(LogError::NotNext { .. }));
                        prop_assert!(refused);
                    }
                }
                Call::TruncateAfter(part) => {
                    let last = part.map(|part| model.at(part));
                    model.entries.retain(|entry| last.is_some_and(|last| entry.id.index <= last));
                    log.truncate_after(last, |_| {}).unwrap();
                    let last = model.last().map(|id| id.index);
                    model.committed = model.committed.filter(|id| Some(id.index) <= last);
                    term += 1;
                }
                Call::Purge(part) => {
                    let index = model.at(part);
                    let upto = model.entries.iter().map(|entry| entry.id).find(|id| id.index == index).unwrap_or(id(term, index));
                    if model.purged.is_none_or(|purged| purged.index < index) {
                        model.purged = Some(upto);
                        model.entries.retain(|entry| entry.id.index > index);
                    }
                    log.purge(upto, |_| {}).unwrap();
                }
                Call::SaveVote(vote) => {
                    log.save_vote(&vote, |_| {}).unwrap();
                    model.vote = Some(vote);
                }
                Call::SaveCommitted(part) => {
                    let index = model.at(part);
                    model.committed = model.entries.iter().map(|entry| entry.id).find(|id| id.index == index);
                    log.save_committed(model.committed);
                }
                Call::Read { from, count, max_bytes } => {
                    let from = model.at(from);
                    prop_assert_eq!(log.read(from..from + count, max_bytes).unwrap(), model.read(from, from + count, max_bytes));
                }
                Call::Flush => log.flush().unwrap(),
                Call::Reopen => {
                    log.shutdown();
                    log = open(&disk).unwrap();
                    let committed = log.committed();
                    if model.committed.is_some() {
                        prop_assert_eq!(committed, model.committed);
                    }
                    model.committed = committed;
                    prop_assert!(committed.map(|id| id.index) <= model.last().map(|id| id.index));
                }
            }
            prop_assert_eq!(log.state(), LogState { purged: model.purged, last: model.last() });
            prop_assert_eq!(log.vote().map(|vote| vote.to_vec()), model.vote.clone());
        }
        prop_assert_eq!(log.read(0..u64::MAX, None).unwrap(), model.entries);
    }
}
