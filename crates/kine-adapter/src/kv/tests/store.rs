//! The store on real nodes, alone and in a cluster of three: the asynchronous paths.

use crate::error::KvError;
use crate::index::KeyRange;
use crate::kv::{EventBatch, EventSink, LeaseChange, RecentEvents, Store, StoreOptions};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{
    CompactionRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use bytes::Bytes;
use futures_util::future::{join_all, join3};
use parking_lot::Mutex;
use raft_sqlite::{InitialMember, Node, NodeConfig};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long to wait for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

async fn start_node(mut config: NodeConfig, options: StoreOptions) -> Store {
    config.heartbeat_interval = Duration::from_millis(20);
    config.election_timeout = Duration::from_millis(100);
    let store = Store::new(options);
    let builder = Node::builder(config).observer(store.observer()).handler("etcd", store.handler());
    store.attach(builder.start().await.unwrap());
    store
}

async fn start_in(directory: &Path, options: StoreOptions) -> Store {
    let store = start_node(NodeConfig::single(directory), options).await;
    let mut leadership = store.node().leadership();
    tokio::time::timeout(PATIENCE, leadership.wait_for(|now| now.writable_here)).await.unwrap().unwrap();
    store
}

/// A node that leads a cluster of one.
pub(super) async fn start(options: StoreOptions) -> (Store, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let store = start_in(directory.path(), options).await;
    (store, directory)
}

fn members() -> Vec<InitialMember> {
    let listeners: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let url = |l: &std::net::TcpListener| format!("http://{}", l.local_addr().unwrap());
    listeners
        .iter()
        .enumerate()
        .map(|(n, listener)| InitialMember { name: format!("n{n}"), peer_urls: vec![url(listener)] })
        .collect()
}

/// Three nodes; the first in the list leads.
async fn start_three() -> (Vec<Store>, Vec<tempfile::TempDir>) {
    let members = members();
    let directories: Vec<_> = members.iter().map(|_| tempfile::tempdir().unwrap()).collect();
    let mut stores = Vec::new();
    for (member, directory) in members.iter().zip(&directories) {
        let config = NodeConfig::member(directory.path(), &member.name, members.clone()).unwrap();
        stores.push(start_node(config, StoreOptions::default()).await);
    }
    let leader = stores[0].node().wait_for_leader(PATIENCE).await.unwrap();
    stores.sort_by_key(|store| store.node().id() != leader);
    (stores, directories)
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: Bytes::copy_from_slice(key.as_bytes()), value: value.to_owned().into(), ..PutRequest::default() }
}

fn get(key: &str, end: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), ..RangeRequest::default() }
}

#[tokio::test]
async fn writes_and_reads_carry_full_headers() {
    let (store, _directory) = start(StoreOptions::default()).await;
    let written = store.put(put("a", "1")).await.unwrap().header.unwrap();
    let status = store.node().status();
    assert_eq!((written.revision, written.raft_term), (2, status.term));
    assert_eq!((written.cluster_id, written.member_id), (status.cluster_id, status.id.0));
    let read = store.range(get("a", "")).await.unwrap();
    assert_eq!((read.header.unwrap(), read.kvs[0].value.as_ref()), (written, &b"1"[..]));
    let txn = store.txn(TxnRequest::default()).await.unwrap();
    assert_eq!(txn.header.unwrap(), written);
    assert_eq!(store.header(), written);
}

#[tokio::test]
async fn a_store_that_was_never_written_can_be_read() {
    let (store, _directory) = start(StoreOptions::default()).await;
    assert_eq!(store.range(get("a", "z")).await.unwrap().header.unwrap().revision, 1);
    let op = RequestOp { request: Some(Request::RequestRange(get("a", ""))) };
    let txn = store.txn(TxnRequest { success: vec![op], ..TxnRequest::default() }).await.unwrap();
    assert_eq!((txn.succeeded, txn.header.unwrap().revision), (true, 1));
    let past = store.events_from_tables(&KeyRange::all(), 1, 1, 10).await.unwrap();
    assert_eq!((past.batches.len(), past.complete_to), (0, 1));
    assert_eq!(store.value_at(b"a", 1).await, Ok(None));
}

#[tokio::test]
async fn what_does_not_fit_the_cache_is_read_from_the_tables() {
    let (store, _directory) = start(StoreOptions { value_cache_bytes: 0, ..StoreOptions::default() }).await;
    for n in 0..30 {
        store.put(put(&format!("k{n:02}"), &format!("value {n}"))).await.unwrap();
    }
    let page = store.range(RangeRequest { limit: 10, ..get("k", "l") }).await.unwrap();
    assert_eq!((page.kvs.len(), page.count, page.more), (10, 30, true));
    assert!(page.kvs.iter().enumerate().all(|(n, kv)| kv.value == format!("value {n}")));
    store.put(put("k00", "new")).await.unwrap();
    let RecentEvents::Batches(batches) = store.events_after(31, 5) else { panic!() };
    let event = &batches[0].events[0];
    assert_eq!((batches.len(), store.previous_at_hand(event)), (1, None));
    assert_eq!(store.previous(event).await.unwrap().unwrap().value, "value 0");
    assert_eq!(store.value_at(b"k00", 31).await.unwrap().unwrap().value, "value 0");
    assert_eq!(store.value_at(b"k00", 99).await, Err(KvError::FutureRevision));
}

#[tokio::test]
async fn physical_compaction_waits_until_the_rows_are_gone() {
    let (store, _directory) = start(StoreOptions::default()).await;
    for n in 0..20 {
        join_all((0..100).map(|k| store.put(put(&format!("k{k}"), &format!("{n}"))))).await;
    }
    let old = store.state();
    store.compact(CompactionRequest { revision: 2001, physical: true }).await.unwrap();
    let database = store.node().database("etcd");
    let count = database.read(|connection, _| {
        connection.query_row("SELECT count(*) FROM rev", [], |row| row.get::<_, i64>(0)).unwrap()
    });
    assert_eq!(count.await.unwrap(), 100);
    // A state kept from before still answers, as far as its values are in the cache.
    assert_eq!(store.range_at(&old, get("k", "l")).await.unwrap().count, 100);
    let again = store.compact(CompactionRequest { revision: 2001, physical: true }).await;
    assert_eq!(again, Err(KvError::Compacted));
}

#[tokio::test]
async fn a_pinned_state_is_told_when_its_values_are_gone() {
    let (store, _directory) = start(StoreOptions { value_cache_bytes: 0, ..StoreOptions::default() }).await;
    store.put(put("a", "1")).await.unwrap();
    let old = store.state();
    store.put(put("a", "2")).await.unwrap();
    assert_eq!(store.range_at(&old, get("a", "")).await.unwrap().kvs[0].value, "1");
    store.compact(CompactionRequest { revision: 3, physical: true }).await.unwrap();
    assert_eq!(store.range_at(&old, get("a", "")).await, Err(KvError::Compacted));
    let read = store.range(get("a", "")).await.unwrap();
    assert_eq!(read.kvs[0].value, "2");
}

#[tokio::test]
async fn leases_are_granted_revoked_and_expire() {
    let (store, _directory) = start(StoreOptions::default()).await;
    let granted = store.lease_grant(LeaseGrantRequest { id: 0, ttl: 1 }).await.unwrap();
    assert!(granted.id > 0 && granted.ttl == 2);
    let state = store.state();
    assert_eq!(state.lease(granted.id).map(|l| l.ttl_seconds), Some(2));
    store.put(PutRequest { lease: granted.id, ..put("b", "1") }).await.unwrap();
    store.put(PutRequest { lease: granted.id, ..put("a", "1") }).await.unwrap();
    assert_eq!(store.state().lease_keys(granted.id).collect::<Vec<_>>(), ["a", "b"]);
    let other = store.lease_grant(LeaseGrantRequest { id: 5, ttl: 60 }).await.unwrap();
    assert_ne!(store.state().lease_generation(), state.lease_generation());
    store.lease_expire(vec![99, granted.id, other.id]).await.unwrap();
    assert_eq!((store.state().revision(), store.state().lease_count(), store.state().key_count()), (4, 0, 0));
    assert_eq!(store.lease_revoke(LeaseRevokeRequest { id: 5 }).await, Err(KvError::LeaseNotFound));
}

#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl EventSink for Told {
    fn committed(&self, batches: &[Arc<EventBatch>]) {
        self.0.lock().extend(batches.iter().map(|batch| format!("event {}", batch.revision)));
    }
    fn leases_changed(&self, changes: &[LeaseChange]) {
        self.0.lock().extend(changes.iter().map(|change| format!("{change:?}")));
    }
    fn restored(&self, revision: i64) {
        self.0.lock().push(format!("restored {revision}"));
    }
    fn compacted(&self, revision: i64) {
        self.0.lock().push(format!("compacted {revision}"));
    }
}

#[tokio::test]
async fn the_sink_is_told_everything_in_order() {
    let (store, _directory) = start(StoreOptions::default()).await;
    let told = Arc::new(Told::default());
    store.put(put("a", "1")).await.unwrap();
    store.set_sink(told.clone());
    let (a, b, c) = join3(store.put(put("a", "2")), store.put(put("b", "2")), store.put(put("a", "3"))).await;
    assert!(a.is_ok() && b.is_ok() && c.is_ok());
    store.lease_grant(LeaseGrantRequest { id: 5, ttl: 60 }).await.unwrap();
    store.lease_revoke(LeaseRevokeRequest { id: 5 }).await.unwrap();
    store.compact(CompactionRequest { revision: 2, physical: false }).await.unwrap();
    let granted = "Granted(LeaseInfo { id: 5, ttl_seconds: 60 })";
    let want = ["event 3", "event 4", "event 5", granted, "Ended(5)", "compacted 2"];
    let told = told.0.lock().clone();
    assert_eq!(told[..want.len()], want);
}

#[tokio::test]
async fn without_a_leader_a_write_says_that_it_had_no_effect() {
    let members = members();
    let directory = tempfile::tempdir().unwrap();
    let config = NodeConfig::member(directory.path(), "n0", members).unwrap();
    let options = StoreOptions { request_timeout: Duration::from_millis(300), ..StoreOptions::default() };
    let store = start_node(config, options).await;
    assert_eq!(store.put(put("a", "1")).await, Err(KvError::NoLeader));
    assert_eq!(store.lease_expire(vec![1]).await, Err(KvError::NotLeader));
    // Whether the request's patience or the node's ends first.
    let read = store.range(get("a", "")).await;
    assert!(matches!(read, Err(KvError::NoLeader | KvError::Timeout)), "{read:?}");
    assert!(store.range(RangeRequest { serializable: true, ..get("a", "") }).await.is_ok());
}

#[tokio::test]
async fn a_restart_finds_everything_again() {
    let directory = tempfile::tempdir().unwrap();
    let store = start_in(directory.path(), StoreOptions::default()).await;
    store.lease_grant(LeaseGrantRequest { id: 5, ttl: 60 }).await.unwrap();
    for n in 0..20 {
        let lease = if n % 3 == 0 { 5 } else { 0 };
        store.put(PutRequest { lease, ..put(&format!("k{}", n % 7), &format!("{n}")) }).await.unwrap();
    }
    store.compact(CompactionRequest { revision: 9, physical: true }).await.unwrap();
    let before = store.state();
    store.node().shutdown().await.unwrap();
    let store = start_in(directory.path(), StoreOptions::default()).await;
    store.linearize().await.unwrap();
    let after = store.state();
    assert_eq!(format!("{:?}", after.contents.portrait()), format!("{:?}", before.contents.portrait()));
    assert!(matches!(store.events_after(9, 100), RecentEvents::Batches(b) if b.len() == 12));
    assert_eq!(store.put(put("k0", "new")).await.unwrap().header.unwrap().revision, 22);
}

struct Echo;
impl raft_sqlite::CallHandler for Echo {
    fn call(&self, payload: Bytes) -> futures_util::future::BoxFuture<'static, Result<Bytes, Bytes>> {
        let refuse = payload.is_empty();
        Box::pin(async move { if refuse { Err(KvError::LeaseNotFound.encode()) } else { Ok(payload) } })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_of_three_takes_writes_and_shows_them_when_it_answers() {
    let (stores, _directories) = start_three().await;
    for (n, store) in stores.iter().enumerate() {
        let written = store.put(put("a", &format!("{n}"))).await.unwrap().header.unwrap();
        assert_eq!((written.revision, written.member_id), (n as i64 + 2, store.node().id().0));
        let local = store.range(RangeRequest { serializable: true, ..get("a", "") }).await.unwrap();
        assert_eq!(local.kvs[0].value, format!("{n}"));
        let granted = store.lease_grant(LeaseGrantRequest { id: 0, ttl: 60 }).await.unwrap();
        assert!(store.state().lease(granted.id).is_some());
        assert_eq!(store.lease_revoke(LeaseRevokeRequest { id: 9 }).await, Err(KvError::LeaseNotFound));
    }
    // A read on any node sees what another node has just written.
    for n in 0..20 {
        let (writer, reader) = (&stores[n % 3], &stores[(n + 1) % 3]);
        writer.put(put("b", &format!("{n}"))).await.unwrap();
        assert_eq!(reader.range(get("b", "")).await.unwrap().kvs[0].value, format!("{n}"));
    }
    let follower = &stores[1];
    follower.compact(CompactionRequest { revision: 5, physical: true }).await.unwrap();
    assert_eq!(follower.state().contents.removed_revision, 5);
    assert_eq!(follower.call_lease_leader(Bytes::from_static(b"x")).await, Err(KvError::NoLeader));
    stores[0].set_lease_handler(Arc::new(Echo));
    assert_eq!(follower.call_lease_leader(Bytes::from_static(b"x")).await, Ok(Bytes::from_static(b"x")));
    assert_eq!(follower.call_lease_leader(Bytes::new()).await, Err(KvError::LeaseNotFound));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_goes_the_others_go_on_with_the_same_state() {
    let (mut stores, _directories) = start_three().await;
    join_all((0..60).map(|n| stores[n % 3].put(put(&format!("k{}", n % 10), &format!("{n}"))))).await;
    let leader = stores.remove(0);
    let (stopped, written) =
        futures_util::future::join(leader.node().shutdown(), stores[0].put(put("during", "1"))).await;
    stopped.unwrap();
    assert!(written.is_ok() || written.as_ref().is_err_and(|e| e.class() == crate::error::Class::OutcomeUnknown));
    stores[1].put(put("after", "1")).await.unwrap();
    stores[0].linearize().await.unwrap();
    let states: Vec<_> = stores.iter().map(|store| format!("{:?}", store.state().contents.portrait())).collect();
    assert_eq!(states[0], states[1]);
    assert_eq!(stores[0].range(get("k", "l")).await.unwrap().count, 10);
}
