//! Rules that the scripts cannot show: budgets, compaction in the tables, events, and the writer's doubts.

use super::Bench;
use super::script::{Command, parse};
use crate::error::KvError;
use crate::index::KeyRange;
use crate::kv::event::{EventKind, RecentEvents};
use crate::kv::request::Write;
use crate::kv::view::Fault;
use crate::kv::writer::Refusal;
use crate::kv::{check, past};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{PutRequest, RangeRequest, RequestOp, TxnRequest};

fn write(line: &str) -> Write {
    match parse(line) {
        Command::Write(write) => write,
        other => panic!("{other:?}"),
    }
}

fn gets(n: usize) -> Vec<RequestOp> {
    let range = RangeRequest { key: "a".into(), ..RangeRequest::default() };
    vec![RequestOp { request: Some(Request::RequestRange(range)) }; n]
}

#[test]
fn a_txn_has_a_budget_that_nested_ones_share() {
    let txn = |success, failure| TxnRequest { success, failure, ..TxnRequest::default() };
    let nested = |t: TxnRequest| vec![RequestOp { request: Some(Request::RequestTxn(t)) }];
    assert_eq!(check::txn(&txn(gets(128), gets(128)), 128), Ok(()));
    assert_eq!(check::txn(&txn(gets(1), gets(129)), 128), Err(KvError::TooManyOps));
    assert_eq!(check::txn(&txn(nested(txn(gets(127), Vec::new())), Vec::new()), 128), Ok(()));
    assert_eq!(check::txn(&txn(nested(txn(gets(128), Vec::new())), Vec::new()), 128), Err(KvError::TooManyOps));
    let mut both = nested(txn(gets(126), Vec::new()));
    both.extend(nested(txn(gets(126), Vec::new())));
    assert_eq!(check::txn(&txn(both, Vec::new()), 128), Ok(()));
    let deep = (0..200).fold(TxnRequest::default(), |inner, _| txn(nested(inner), Vec::new()));
    assert_eq!(check::txn(&deep, 128), Err(KvError::TooManyOps));
}

#[test]
fn a_request_that_is_too_large_is_refused() {
    let mut bench = Bench::new();
    let put = |bytes: usize| {
        Write::Put(PutRequest { key: "a".into(), value: vec![0; bytes].into(), ..PutRequest::default() })
    };
    assert!(bench.write(&put(1_500_000)).is_ok());
    assert_eq!(bench.write(&put(1_600_000)), Err(KvError::RequestTooLarge));
}

#[test]
fn compaction_removes_what_nobody_can_read_and_keeps_the_rest() {
    let mut bench = Bench::new();
    for line in ["put a 1", "put a 2", "put b 1", "del b", "put c 1", "put a 3", "del c", "put d 1"] {
        bench.command(line);
    }
    // a: 2, 3, 7; b: 4, deleted 5; c: 6, deleted 8; d: 9.
    assert!(bench.write(&write("compact 5")).is_ok());
    assert_eq!((bench.rows(), bench.remove(1), bench.rows()), (8, 2, 6), "a@2 and b@4; the tombstone at 5 stays");
    bench.check();
    assert!(bench.write(&write("compact 8")).is_ok());
    bench.hold();
    bench.write(&write("put a 4")).unwrap();
    bench.release();
    assert_eq!((bench.remove(2), bench.rows()), (3, 4), "a@3, b's tombstone, c@6; c's tombstone at 8 stays");
    bench.check();
    assert_eq!(bench.remove(2), 0);
    let all = RangeRequest { key: "a".into(), range_end: "z".into(), revision: 8, ..RangeRequest::default() };
    assert_eq!(bench.get(&all).unwrap().count, 1);
    assert_eq!(bench.get(&RangeRequest { revision: 7, ..all }).unwrap_err(), KvError::Compacted);
}

#[test]
fn forgotten_history_is_really_gone_from_the_index() {
    let mut bench = Bench::new();
    for n in 0..1000 {
        bench.command(&format!("put k{} {n}", n % 300));
    }
    assert!(bench.write(&write("compact 1001")).is_ok());
    assert_eq!(bench.remove(512), 700);
    for n in 0..40 {
        bench.command(&format!("put x {n}"));
    }
    for contents in [bench.writer.contents(), &bench.replica.state().contents] {
        assert_eq!((contents.keys.live_count(), contents.keys.extra_count()), (301, 39));
    }
    bench.check();
}

#[test]
fn events_know_what_was_there_before() {
    let mut bench = Bench::new();
    for line in
        ["put a 1", "put a 2", "txn ( ) ( put b 1 , del a ) ( )", "put a 3", "txn ( ) ( del a .. , put b 2 ) ( )"]
    {
        bench.command(line);
    }
    let RecentEvents::Batches(batches) = bench.replica.ring.after(1, usize::MAX) else { panic!() };
    let told: Vec<String> = batches
        .iter()
        .flat_map(|batch| batch.events.iter())
        .map(|event| {
            let kind = if event.kind == EventKind::Put { "put" } else { "del" };
            let previous = event.previous.as_ref().map(|p| (p.mod_revision, p.version, p.value.clone().unwrap()));
            let kv = event.key_value();
            format!("{kind} {:?}={:?} {} {} {previous:?}", kv.key, kv.value, kv.mod_revision, kv.version)
        })
        .collect();
    assert_eq!(
        told,
        [
            "put b\"a\"=b\"1\" 2 1 None",
            "put b\"a\"=b\"2\" 3 2 Some((2, 1, b\"1\"))",
            "put b\"b\"=b\"1\" 4 1 None",
            "del b\"a\"=b\"\" 4 0 Some((3, 2, b\"2\"))",
            "put b\"a\"=b\"3\" 5 1 None",
            "del b\"a\"=b\"\" 6 0 Some((5, 1, b\"3\"))",
            "del b\"b\"=b\"\" 6 0 Some((4, 1, b\"1\"))",
            // As etcd: a delete from a key on and a put beyond it are not found to overlap, and the put comes anew.
            "put b\"b\"=b\"2\" 6 1 Some((4, 1, b\"1\"))",
        ]
    );
}

#[test]
fn events_from_the_tables_keep_revisions_whole_and_say_how_far_they_go() {
    let mut bench = Bench::new();
    for n in 0..20 {
        bench.command(&format!("txn ( ) ( put a{n} 1 , put b{n} 1 , put c{n} 1 ) ( )"));
    }
    let state = bench.replica.state();
    let b = KeyRange::new("b".into(), "c".into());
    let read =
        |start, end, limit| past::between(Some(&bench.connection), &state.contents, &b, (start, end), limit).unwrap();
    let (mut start, mut found) = (2, Vec::new());
    while start <= 21 {
        let past = read(start, 21, 3);
        assert!(past.batches.iter().all(|batch| batch.events.len() == 1 && batch.revision <= past.complete_to));
        found.extend(past.batches.iter().map(|batch| batch.revision));
        assert!(past.complete_to >= start);
        start = past.complete_to + 1;
    }
    assert_eq!(found, (2..=21).collect::<Vec<_>>());
    assert_eq!(read(5, 7, 100).batches.len(), 3);
    assert_eq!((read(22, 30, 100).batches.len(), read(22, 30, 100).complete_to), (0, 21));
    assert_eq!(read(0, 2, 100).batches.len(), 1);
    bench.write(&write("compact 10")).unwrap();
    let state = bench.replica.state();
    let old = past::between(Some(&bench.connection), &state.contents, &b, (9, 21), 100);
    assert!(matches!(old, Err(Fault::Refused(KvError::Compacted))));
    assert!(past::between(Some(&bench.connection), &state.contents, &b, (10, 21), 100).is_ok());
}

#[test]
fn the_ring_is_filled_at_the_start_as_far_as_it_has_room() {
    let mut bench = Bench::new();
    for n in 0..50 {
        bench.command(&format!("txn ( ) ( put a {n} , put b {n} ) ( )"));
    }
    let small = crate::kv::replica::Replica::new(1 << 20, 40 * 2 * 300);
    small.restored(raft_sqlite::Version(9), &bench.connection);
    let RecentEvents::Gone { after } = small.ring.after(1, 100) else { panic!("everything fits") };
    assert!((10..45).contains(&after), "{after}");
    let RecentEvents::Batches(batches) = small.ring.after(after, 100) else { panic!() };
    assert_eq!(batches.first().map(|b| (b.revision, b.events.len())), Some((after + 1, 2)));
    assert_eq!(batches.last().map(|b| b.revision), Some(51));
    bench.replica.restored(raft_sqlite::Version(9), &bench.connection);
    assert!(matches!(bench.replica.ring.after(1, 100), RecentEvents::Batches(b) if b.len() == 50));
}

#[test]
fn a_commit_that_failed_is_noticed_by_whatever_comes_next() {
    let failing = ["put a 9", "del b", "grant 7 60", "revoke 5", "compact 3", "txn ( ) ( put a 1 , del b ) ( )"];
    let following = [
        ("put a 5", "rev=5"),
        ("txn ( version a = 2 ) ( put z 1 ) ( get a )", "rev=4 else ( rev=4 count=1 a=1@c2m2v1l0 )"),
        ("put a 5 lease=7", "error: etcdserver: requested lease not found"),
        ("del c d", "rev=4 deleted=0"),
        ("put b 1 lease=5 prev", "rev=5 prev b=1@c3m4v2l5"),
        ("compact 3", "rev=4"),
    ];
    for fail in failing {
        for (line, want) in following {
            let mut bench = Bench::new();
            for line in ["put a 1", "put b 1", "grant 5 60", "put b 1 lease=5"] {
                bench.command(line);
            }
            let (request, options) = (write(fail), bench.options.clone());
            bench.run(false, |transaction| request.execute(transaction, &options)).unwrap();
            assert_eq!(bench.command(line), want, "{line} after {fail} failed");
            bench.check();
        }
    }
}

#[test]
fn a_failed_first_commit_leaves_no_tables_behind() {
    let mut bench = Bench::new();
    let (request, options) = (write("put a 9"), bench.options.clone());
    bench.run(false, |transaction| request.execute(transaction, &options)).unwrap();
    assert_eq!(bench.command("put a 1"), "rev=2");
    bench.check();
}

#[test]
fn a_refused_first_request_leaves_no_tables_behind() {
    let mut bench = Bench::new();
    assert_eq!(bench.command("revoke 1"), "error: etcdserver: requested lease not found");
    assert_eq!(bench.command("put a 1"), "rev=2");
    bench.check();
}

#[test]
fn an_error_in_the_middle_undoes_everything() {
    let mut bench = Bench::new();
    for line in ["grant 1 60", "put a 1 lease=1", "put b 1"] {
        bench.command(line);
    }
    let options = bench.options.clone();
    let result: Result<(), _> = bench.run(true, |transaction| {
        for line in ["put a 2", "del b", "put c 1 lease=1", "grant 2 60", "revoke 1", "compact 2"] {
            write(line).execute(transaction, &options)?;
        }
        Err(Fault::Refused(KvError::NoSpace))
    });
    assert!(matches!(result, Err(Refusal::Kv(KvError::NoSpace))));
    bench.check();
    assert_eq!(bench.command("get a .."), "rev=3 count=2 a=1@c2m2v1l1 b=1@c3m3v1l0");
}

#[test]
fn a_put_that_needs_what_its_txn_has_deleted_is_refused() {
    // etcd 3.7.3 takes this for a txn without overlaps, finds the key when it checks, and panics when it executes.
    let mut bench = Bench::new();
    bench.command("put b 1");
    for option in ["ignore_lease", "ignore_value"] {
        let txn = format!("txn ( ) ( put c 1 , del a .. , put b - {option} ) ( )");
        assert_eq!(bench.command(&txn), "error: etcdserver: key not found");
        bench.check();
    }
    assert_eq!(bench.command("get a .."), "rev=2 count=1 b=1@c2m2v1l0");
}

#[test]
fn a_body_that_panics_does_not_poison_the_writer() {
    let mut bench = Bench::new();
    bench.command("put a 1");
    bench.connection.execute_batch("SAVEPOINT panicking").unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = bench.writer.run(&bench.connection, &bench.replica.cache, 0, |transaction| {
            transaction.put(&PutRequest { key: "b".into(), ..PutRequest::default() })?;
            panic!("a bug");
            #[allow(unreachable_code)]
            Ok(())
        });
    }));
    assert!(panicked.is_err());
    bench.connection.execute_batch("ROLLBACK TO panicking; RELEASE panicking").unwrap();
    assert_eq!(bench.command("put c 1"), "rev=3");
    bench.check();
}

#[test]
fn what_was_dropped_is_not_cached_and_its_rows_are_given_out_again() {
    let mut bench = Bench::new();
    bench.command("put a 1");
    bench.hold();
    bench.command("put a dropped");
    bench.command("txn ( ) ( get a , put b dropped ) ( )");
    bench.discard();
    bench.check();
    bench.command("put a 2");
    bench.command("put b 3");
    assert_eq!(bench.command("get a .."), "rev=4 count=2 a=2@c2m3v2l0 b=3@c4m4v1l0");
}

#[test]
fn a_sidecar_that_does_not_fit_stops_the_replica() {
    for bytes in [&b"\x02\x02\x01"[..], b"\x01\x07\x01", b"\x01\x02\x01\x02\x01a", b"\x01\x02\x01\x09"] {
        let bench = Bench::new();
        bench.replica.applied(raft_sqlite::Version(1), &[bytes::Bytes::copy_from_slice(bytes)]);
        assert_eq!(bench.replica.check(), Err(KvError::Corrupt));
        assert_eq!(bench.replica.state().revision(), 1);
    }
}
