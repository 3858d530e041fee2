//! What the hot paths cost: `cargo test --release -p kine-adapter speed -- --ignored --nocapture`.

use super::Bench;
use crate::kv::request::Write;
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{Compare, PutRequest, RangeRequest, RequestOp, TxnRequest};
use bytes::Bytes;
use raft_sqlite::Version;
use std::time::Instant;

const KEYS: usize = 100_000;
const OPERATIONS: usize = 200_000;
const GROUP: usize = 32;

fn key(n: usize) -> Bytes {
    format!("/registry/leases/kube-node-lease/node-{:06}", n % KEYS).into()
}

fn put(n: usize) -> PutRequest {
    PutRequest { key: key(n), value: vec![n as u8; 300].into(), ..PutRequest::default() }
}

/// As kube-apiserver updates an object.
fn update(n: usize, mod_revision: i64) -> TxnRequest {
    let op = |request| RequestOp { request: Some(request) };
    TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal as i32,
            target: CompareTarget::Mod as i32,
            key: key(n),
            target_union: Some(TargetUnion::ModRevision(mod_revision)),
            ..Compare::default()
        }],
        success: vec![op(Request::RequestPut(put(n)))],
        failure: vec![op(Request::RequestRange(RangeRequest { key: key(n), ..RangeRequest::default() }))],
    }
}

fn report(what: &str, operations: usize, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    println!("{what}: {:.2} us, {:.0}/s", seconds * 1e6 / operations as f64, operations as f64 / seconds);
}

/// Runs requests `GROUP` at a time in one SQL transaction, so that COMMIT counts little; the sidecars of each group.
fn run(bench: &mut Bench, requests: impl Iterator<Item = Write>) -> Vec<Vec<Bytes>> {
    let options = bench.options.clone();
    let mut groups = vec![Vec::with_capacity(GROUP)];
    bench.connection.execute_batch("BEGIN").unwrap();
    for request in requests {
        if groups.last().is_some_and(|group| group.len() == GROUP) {
            bench.connection.execute_batch("COMMIT; BEGIN").unwrap();
            groups.push(Vec::with_capacity(GROUP));
        }
        let size = request.message_bytes();
        let done = bench
            .writer
            .run(&bench.connection, &bench.replica.cache, size, |transaction| request.execute(transaction, &options));
        groups.last_mut().unwrap().extend(done.unwrap().1);
    }
    bench.connection.execute_batch("COMMIT").unwrap();
    groups
}

fn apply(bench: &Bench, groups: &[Vec<Bytes>]) {
    for (version, group) in groups.iter().enumerate() {
        bench.replica.applied(Version(version as u64), group);
    }
}

#[test]
#[ignore = "measures"]
fn speed() {
    let mut bench = Bench::new();
    bench.connection.set_prepared_statement_cache_capacity(128);
    let scattered = |n: usize| n * 7919 % KEYS;
    let start = Instant::now();
    let groups = run(&mut bench, (0..KEYS).map(|n| Write::Put(put(scattered(n)))));
    report("put, new key, scattered", KEYS, start);
    let start = Instant::now();
    apply(&bench, &groups);
    report("apply of that", KEYS, start);
    drop(groups);

    let mut revisions: Vec<i64> = vec![0; KEYS];
    (0..KEYS).for_each(|n| revisions[scattered(n)] = n as i64 + 2);
    let mut revision = KEYS as i64 + 1;
    for round in 0..2 {
        let requests: Vec<Write> = (0..OPERATIONS)
            .map(|n| {
                let n = n * 31 % KEYS;
                revision += 1;
                Write::Txn(update(n, std::mem::replace(&mut revisions[n], revision)))
            })
            .collect();
        let start = Instant::now();
        let groups = run(&mut bench, requests.into_iter());
        report(&format!("update txn, round {round}"), OPERATIONS, start);
        let start = Instant::now();
        apply(&bench, &groups);
        report("apply of that", OPERATIONS, start);
    }
    let failing = (0..OPERATIONS).map(|n| Write::Txn(update(n, 1)));
    let start = Instant::now();
    run(&mut bench, failing);
    report("update txn that fails its compare", OPERATIONS, start);

    let start = Instant::now();
    for n in 0..OPERATIONS {
        bench.get(&RangeRequest { key: key(n), ..RangeRequest::default() }).unwrap();
    }
    report("get", OPERATIONS, start);
    let all = |limit, revision| RangeRequest {
        key: "/registry/leases/".into(),
        range_end: "/registry/leases0".into(),
        limit,
        revision,
        ..RangeRequest::default()
    };
    let pages = 200;
    for (what, request) in [
        ("list of 500 and the count", all(500, 0)),
        ("the same, 1000 revisions ago", all(500, revision - 1000)),
        ("the same, 100000 revisions ago", all(500, revision - 100_000)),
        ("count alone", RangeRequest { count_only: true, ..all(0, 0) }),
    ] {
        let start = Instant::now();
        for _ in 0..pages {
            assert_eq!(bench.get(&request).unwrap().count, KEYS as i64);
        }
        report(what, pages, start);
    }
    let rows = bench.rows() as usize;
    let start = Instant::now();
    bench.replica.restored(Version(0), &bench.connection);
    report("rebuild, for each row", rows, start);
    bench.writer.reset(bench.replica.state().contents.clone());
    bench.command(&format!("compact {revision}"));
    let start = Instant::now();
    let garbage = bench.remove(512);
    report("removal, for each row", garbage, start);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn speed_of_the_store() {
    const TASKS: usize = 64;
    const EACH: usize = 1500;
    let (store, _directory) = super::store::start(crate::kv::StoreOptions::default()).await;
    for what in ["put, new key", "put", "get"] {
        let start = Instant::now();
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let store = store.clone();
                tokio::spawn(async move {
                    for n in 0..EACH {
                        let n = task * EACH + n;
                        if what == "get" {
                            store.range(RangeRequest { key: key(n), ..RangeRequest::default() }).await.unwrap();
                        } else {
                            store.put(put(n)).await.unwrap();
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        report(&format!("store: {what}"), TASKS * EACH, start);
    }
    let revision = store.state().revision();
    let start = Instant::now();
    let compaction = store.compact(crate::proto::etcdserverpb::CompactionRequest { revision, physical: true });
    let mut compaction = std::pin::pin!(compaction);
    let (mut slowest, mut puts) = (std::time::Duration::ZERO, 0);
    loop {
        let one = Instant::now();
        let request = store.put(put(puts));
        match futures_util::future::select(&mut compaction, std::pin::pin!(request)).await {
            futures_util::future::Either::Left((done, request)) => {
                done.unwrap();
                request.await.unwrap();
                break;
            }
            futures_util::future::Either::Right((done, _)) => done.unwrap(),
        };
        slowest = slowest.max(one.elapsed());
        puts += 1;
    }
    report("store: compaction, for each row removed", TASKS * EACH, start);
    println!("  meanwhile {puts} puts one after the other, the slowest took {slowest:?}");
}
