//! Random requests, with commits that are held back, dropped, or fail: whatever happens, the writer, the committed
//! state and the tables agree, nothing committed is lost, and what was dropped leaves no trace.

use super::Bench;
use crate::index::KeyRange;
use crate::kv::EventKind;
use crate::kv::event::{EventBatch, RecentEvents};
use crate::kv::past;
use crate::kv::request::Write;
use crate::kv::tests::script::{Command, parse};
use crate::kv::view::Fault;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Clone)]
enum Step {
    Write(String),
    /// The request runs, but its COMMIT fails.
    Fail(String),
    Hold,
    Release,
    Discard,
    Remove(usize),
    Restart,
    /// A reader keeps the state of now until the end.
    Keep,
}

fn key() -> impl Strategy<Value = String> {
    (0_u8..12).prop_map(|n| format!("k{n}"))
}

fn op() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => (key(), 0_u32..1000).prop_map(|(k, v)| format!("put {k} {v}")),
        1 => (key(), 0_u32..1000, 1_u8..4).prop_map(|(k, v, l)| format!("put {k} {v} lease={l} prev")),
        1 => key().prop_map(|k| format!("put {k} - ignore_value")),
        1 => (key(), 0_u32..1000).prop_map(|(k, v)| format!("put {k} {v} ignore_lease")),
        2 => key().prop_map(|k| format!("del {k}")),
        1 => (key(), key()).prop_map(|(a, b)| format!("del {a} {b} prev")),
        1 => (key(), key()).prop_map(|(a, b)| format!("get {a} {b} limit=2")),
        1 => key().prop_map(|k| format!("get {k}")),
    ]
}

fn txn(op: impl Strategy<Value = String> + Clone) -> impl Strategy<Value = String> {
    let ops = proptest::collection::vec(op, 0..4).prop_map(|ops| ops.join(" , "));
    (key(), 0_u8..3, ops.clone(), ops).prop_map(|(k, v, a, b)| format!("txn ( version {k} > {v} ) ( {a} ) ( {b} )"))
}

fn request() -> impl Strategy<Value = String> {
    let nested = prop_oneof![4 => op().boxed(), 1 => txn(op().boxed()).boxed()].boxed();
    prop_oneof![
        6 => op(),
        5 => txn(nested),
        1 => (1_u8..4).prop_map(|id| format!("grant {id} 60")),
        1 => (1_u8..4).prop_map(|id| format!("revoke {id}")),
        1 => (0_u8..40).prop_map(|n| format!("compact {n}")),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        16 => request().prop_map(Step::Write),
        1 => request().prop_map(Step::Fail),
        2 => Just(Step::Hold),
        2 => Just(Step::Release),
        1 => Just(Step::Discard),
        1 => (1_usize..5).prop_map(Step::Remove),
        1 => Just(Step::Restart),
        2 => Just(Step::Keep),
    ];
    proptest::collection::vec(step, 1..80)
}

/// Applies events to a map, as a client that watches everything would.
fn replay(model: &mut BTreeMap<Vec<u8>, (Vec<u8>, i64)>, batches: &[Arc<EventBatch>], seen: &mut i64) {
    for batch in batches {
        assert!(batch.revision > *seen && !batch.events.is_empty());
        *seen = batch.revision;
        for event in &batch.events {
            assert_eq!(event.mod_revision, batch.revision);
            let old = match event.kind {
                EventKind::Put => model.insert(event.key.to_vec(), (event.value.to_vec(), batch.revision)),
                EventKind::Delete => model.remove(event.key.as_ref()),
            };
            let previous = event.previous.as_ref();
            // The previous state is that of the revision before, which a second event of one revision does not change.
            if old.as_ref().is_none_or(|old| old.1 < batch.revision) {
                assert_eq!(previous.map(|p| p.mod_revision), old.as_ref().map(|old| old.1));
                if let Some(value) = previous.and_then(|p| p.value.as_ref()) {
                    assert_eq!(Some(value.as_ref()), old.as_ref().map(|old| old.0.as_slice()));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_writer_the_committed_state_and_the_tables_agree(steps in steps()) {
        let mut bench = Bench::new();
        let (mut model, mut seen) = (BTreeMap::new(), 1);
        let mut kept = Vec::new();
        let mut committed = format!("{:?}", bench.replica.state().contents.portrait());
        for step in steps {
            let holding = bench.held.is_some();
            match step {
                Step::Write(line) => {
                    bench.command(&line);
                }
                Step::Fail(line) => {
                    if let Command::Write(request) = parse(&line)
                        && request.check(&bench.options).is_ok()
                    {
                        let options = bench.options.clone();
                        let _ = bench.run(false, |transaction| request.execute(transaction, &options));
                        // Whatever comes next, a read included, notices.
                        let read = Write::Txn(parse_txn("txn ( ) ( ) ( )"));
                        bench.write(&read).unwrap();
                    }
                }
                Step::Hold if !holding => bench.hold(),
                Step::Release if holding => bench.release(),
                Step::Discard if holding => bench.discard(),
                Step::Remove(step) if !holding && bench.replica.state().compact_revision() >= 0 => {
                    bench.remove(step);
                }
                Step::Keep => kept.push((bench.replica.state(), committed.clone())),
                Step::Restart if !holding => {
                    let version = bench.replica.state().version();
                    bench.replica.restored(version, &bench.connection);
                    bench.writer.reset(bench.replica.state().contents.clone());
                }
                _ => {}
            }
            bench.check();
            let now = format!("{:?}", bench.replica.state().contents.portrait());
            if bench.held.is_some() {
                prop_assert_eq!(&now, &committed, "what is held back is not seen");
            }
            committed = now;
            // Events, from the ring and from the tables, lead to the state.
            let state = bench.replica.state();
            match bench.replica.ring.after(seen, usize::MAX) {
                RecentEvents::Batches(batches) => {
                    if bench.held.is_none() {
                        let compacted = state.compact_revision();
                        let past = past::between(
                            Some(&bench.connection), &state.contents, &KeyRange::all(), (seen + 1, i64::MAX), usize::MAX,
                        );
                        match past {
                            Ok(past) => {
                                prop_assert_eq!(past.complete_to, state.revision());
                                let bare = |batches: &[Arc<EventBatch>]| -> Vec<_> {
                                    batches.iter().flat_map(|b| b.events.iter()).map(|e| (
                                        e.kind, e.key.clone(), e.value.clone(), e.mod_revision, e.create_revision,
                                        e.version, e.lease, e.previous.as_ref().map(|p| p.value_id),
                                    )).collect()
                                };
                                if seen >= compacted {
                                    prop_assert_eq!(bare(&past.batches), bare(&batches));
                                }
                            }
                            Err(Fault::Refused(_)) => prop_assert!(seen + 1 < compacted),
                            Err(other) => panic!("{other:?}"),
                        }
                    }
                    replay(&mut model, &batches, &mut seen);
                }
                RecentEvents::Gone { .. } => panic!("the ring is large enough"),
            }
            let keys = state.contents.keys.list(&KeyRange::all(), state.revision(), usize::MAX);
            let keys: Vec<_> = keys.into_iter().map(|(k, r)| (k.to_vec(), r.mod_revision)).collect();
            prop_assert_eq!(keys, model.iter().map(|(k, v)| (k.clone(), v.1)).collect::<Vec<_>>());
        }
        for (state, then) in kept {
            prop_assert_eq!(format!("{:?}", state.contents.portrait()), then, "a state that is kept never changes");
        }
    }
}

fn parse_txn(line: &str) -> crate::proto::etcdserverpb::TxnRequest {
    match parse(line) {
        Command::Write(Write::Txn(request)) => request,
        other => panic!("{other:?}"),
    }
}
