//! The key index against a model that keeps every state of every key in plain maps.

use super::ValueId;
use super::*;
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Clone, Default)]
struct Model {
    keys: BTreeMap<Vec<u8>, Vec<Record>>,
}

impl Model {
    fn at(&self, key: &[u8], revision: i64) -> Option<Record> {
        self.keys.get(key)?.iter().rev().find(|r| r.mod_revision <= revision).copied().filter(Record::is_live)
    }

    fn list(&self, range: &KeyRange, revision: i64) -> Vec<(Vec<u8>, Record)> {
        let keys = self.keys.keys().filter(|key| range.contains(key));
        keys.filter_map(|key| Some((key.clone(), self.at(key, revision)?))).collect()
    }

    /// What compaction keeps, in the words of the specification.
    fn compact(&mut self, revision: i64) -> Vec<ValueId> {
        let mut gone = Vec::new();
        for records in self.keys.values_mut() {
            let newest = records.iter().rposition(|r| r.mod_revision <= revision);
            let mut at = 0;
            records.retain(|r| {
                let keep =
                    r.mod_revision > revision || (Some(at) == newest && (r.is_live() || r.mod_revision == revision));
                at += 1;
                if !keep {
                    gone.push(r.value_id);
                }
                keep
            });
        }
        self.keys.retain(|_, records| !records.is_empty());
        gone.sort_unstable();
        gone
    }
}

#[derive(Debug, Clone)]
enum Step {
    Put(u16),
    Delete(u16),
    /// Put and delete, or delete and put, of one key at one revision.
    Both(u16, bool),
    Undo(u16),
    Compact(u8),
    Keep,
}

fn key(n: u16) -> Vec<u8> {
    // Keys of which some are prefixes of others.
    let text = format!("/{}", u32::from(n) * 40_503 % 997);
    text.into_bytes()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let k = 0_u16..250;
    proptest::collection::vec(
        prop_oneof![
            8 => k.clone().prop_map(Step::Put),
            4 => k.clone().prop_map(Step::Delete),
            1 => (k.clone(), any::<bool>()).prop_map(|(k, b)| Step::Both(k, b)),
            2 => k.prop_map(Step::Undo),
            1 => any::<u8>().prop_map(Step::Compact),
            1 => Just(Step::Keep),
        ],
        1..700,
    )
}

fn next_record(model: &Model, key: &[u8], live: bool, revision: i64, id: i64) -> Record {
    let before = model.at(key, i64::MAX);
    Record {
        create_revision: if live { before.map_or(revision, |r| r.create_revision) } else { 0 },
        mod_revision: revision,
        version: if live { before.map_or(1, |r| r.version + 1) } else { 0 },
        lease: 0,
        value_id: ValueId(id),
    }
}

fn check(index: &KeyIndex, model: &Model, revisions: impl Iterator<Item = i64>, ranges: &[KeyRange]) {
    for revision in revisions {
        for range in ranges {
            let want = model.list(range, revision);
            assert_eq!(index.count(range, revision), want.len());
            for limit in [1, 3, usize::MAX] {
                let got = index.list(range, revision, limit);
                let got: Vec<_> = got.into_iter().map(|(k, r)| (k.to_vec(), *r)).collect();
                assert_eq!(got, want[..want.len().min(limit)]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn behaves_as_the_model(
        steps in steps(),
        bounds in proptest::collection::vec((0_u16..250, 0_u16..250), 4),
    ) {
        let mut ranges = vec![
            KeyRange::all(),
            KeyRange::single(key(7).into()),
            KeyRange::new(Bytes::from_static(b"/3"), Bytes::from_static(b"/4")),
            KeyRange::new(Bytes::from_static(b"/5"), Bytes::from_static(b"\0")),
        ];
        ranges.extend(bounds.iter().map(|(a, b)| KeyRange::new(key(*a).into(), key(*b).into())));
        let (mut index, mut model) = (KeyIndex::default(), Model::default());
        let (mut revision, mut compacted, mut id) = (1_i64, -1_i64, 0_i64);
        let mut kept: Vec<(KeyIndex, Model, i64, i64)> = Vec::new();
        let mut cursor: Option<(i64, Option<Arc<[u8]>>)> = None;
        for step in steps {
            let lives: &[(u16, bool)] = match &step {
                Step::Put(k) => &[(*k, true)],
                Step::Delete(k) if model.at(&key(*k), i64::MAX).is_some() => &[(*k, false)],
                Step::Both(k, true) => &[(*k, true), (*k, false)],
                Step::Both(k, false) if model.at(&key(*k), i64::MAX).is_some() => &[(*k, false), (*k, true)],
                Step::Undo(k) => {
                    let k = key(*k);
                    let record = next_record(&model, &k, true, revision + 1, id + 1);
                    let (_, _, before) = index.push(&k, |_| record);
                    index.restore(&k, before);
                    &[]
                }
                Step::Compact(share) => {
                    if cursor.is_none() {
                        let at = compacted.max(0) + (revision - compacted.max(0)) * i64::from(*share) / 255;
                        if at > compacted {
                            compacted = at;
                            let garbage = index.garbage(at);
                            prop_assert_eq!(garbage, model.compact(at));
                            cursor = Some((at, None));
                        }
                    }
                    &[]
                }
                Step::Keep => {
                    kept.push((index.clone(), model.clone(), revision, compacted));
                    &[]
                }
                _ => &[],
            };
            if !lives.is_empty() {
                revision += 1;
            }
            for (k, live) in lives.iter().copied() {
                id += 1;
                let k = key(k);
                let record = next_record(&model, &k, live, revision, id);
                index.push(&k, |live| {
                    assert_eq!(live.copied(), model.at(&k, i64::MAX));
                    record
                });
                model.keys.entry(k).or_default().push(record);
            }
            if let Some((at, from)) = cursor.take() {
                cursor = index.forget_garbage(at, from.as_deref(), 3).next.map(|next| (at, Some(next)));
            }
        }
        kept.push((index.clone(), model.clone(), revision, compacted));
        if let Some((at, from)) = cursor {
            index.forget_garbage(at, from.as_deref(), usize::MAX);
        }
        for (index, model, revision, compacted) in &kept {
            let from = (*compacted).max(0);
            let step = ((revision - from) / 5).max(1) as usize;
            check(index, model, (from..=*revision).step_by(step).chain([*revision]), &ranges);
        }
        // Garbage is forgotten, and nothing else.
        let got: Vec<_> = index.iter().map(|(k, e)| (k.to_vec(), e.records().copied().collect::<Vec<_>>())).collect();
        let want: Vec<_> =
            model.keys.iter().map(|(k, r)| (k.clone(), r.iter().rev().copied().collect::<Vec<_>>())).collect();
        prop_assert_eq!(&got, &want);
        prop_assert_eq!(index.live_count(), want.iter().filter(|(_, r)| r[0].is_live()).count());
        prop_assert_eq!(index.extra_count() + index.live_count(), want.iter().map(|(_, r)| r.len()).sum::<usize>());
        // Built at once it is the same.
        let built = KeyIndex::from_ascending(model.keys.iter().map(|(k, r)| (k.as_slice().into(), r.clone())));
        check(&built, &model, [revision, compacted.max(0)].into_iter(), &ranges);
        prop_assert_eq!(built.garbage(revision), index.garbage(revision));
    }

    #[test]
    fn a_range_says_what_it_contains(start in "[ab]{0,3}", end in "[ab\0]{0,3}", key in "[ab\0]{1,4}") {
        let range = KeyRange::new(start.clone().into(), end.clone().into());
        let want = match end.as_str() {
            "" => key == start,
            "\0" => key >= start,
            _ => key >= start && key < end,
        };
        prop_assert_eq!(range.contains(key.as_bytes()), want);
        prop_assert!(!(want && range.is_past(key.as_bytes())));
        prop_assert!(!(want && range.is_empty()));
        if !want && key >= start {
            prop_assert!(range.is_past(key.as_bytes()));
        }
    }
}
