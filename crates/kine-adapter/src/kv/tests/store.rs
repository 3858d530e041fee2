//! The store on a node: the asynchronous paths.

use crate::error::KvError;
use crate::kv::{EventBatch, EventSink, LeaseChange, RecentEvents, Store, StoreOptions};
use crate::proto::etcdserverpb::{
    CompactionRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest, TxnRequest,
};
use bytes::Bytes;
use parking_lot::Mutex;
use raft_sqlite::{Node, NodeConfig};
use std::sync::Arc;
use std::time::Duration;

/// The one place that knows how to start a node for the tests of this module.
pub(super) async fn start(options: StoreOptions) -> Store {
    let store = Store::new(options);
    let builder = Node::builder(NodeConfig::default());
    let node = builder.observer(store.observer()).handler("etcd", store.handler()).start().await.unwrap();
    store.attach(node);
    store
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: Bytes::copy_from_slice(key.as_bytes()), value: value.to_owned().into(), ..PutRequest::default() }
}

fn get(key: &str, end: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), ..RangeRequest::default() }
}

#[tokio::test]
async fn writes_and_reads_carry_full_headers() {
    let store = start(StoreOptions::default()).await;
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
async fn what_does_not_fit_the_cache_is_read_from_the_tables() {
    let store = start(StoreOptions { value_cache_bytes: 0, ..StoreOptions::default() }).await;
    for n in 0..30 {
        store.put(put(&format!("k{n:02}"), &format!("value {n}"))).await.unwrap();
    }
    let page = store.range(RangeRequest { limit: 10, ..get("k", "l") }).await.unwrap();
    assert_eq!((page.kvs.len(), page.count, page.more), (10, 30, true));
    assert!(page.kvs.iter().enumerate().all(|(n, kv)| kv.value == format!("value {n}")));
    let RecentEvents::Batches(batches) = store.events_after(30, 5) else { panic!() };
    assert_eq!(batches.len(), 1);
    store.put(put("k00", "new")).await.unwrap();
    let RecentEvents::Batches(batches) = store.events_after(31, 5) else { panic!() };
    let event = &batches[0].events[0];
    assert_eq!(store.previous_at_hand(event), None);
    assert_eq!(store.previous(event).await.unwrap().unwrap().value, "value 0");
    assert_eq!(store.value_at(b"k00", 31).await.unwrap().unwrap().value, "value 0");
    assert_eq!(store.value_at(b"k00", 99).await, Err(KvError::FutureRevision));
}

#[tokio::test]
async fn physical_compaction_waits_until_the_rows_are_gone() {
    let store = start(StoreOptions::default()).await;
    for n in 0..2000 {
        store.put(put(&format!("k{}", n % 10), "x")).await.unwrap();
    }
    let old = store.state();
    store.compact(CompactionRequest { revision: 2001, physical: true }).await.unwrap();
    let database = store.node().database("etcd");
    let count = database.read(|connection, _| {
        connection.query_row("SELECT count(*) FROM rev", [], |row| row.get::<_, i64>(0)).unwrap()
    });
    assert_eq!(count.await.unwrap(), 10);
    // A state kept from before still answers, as far as its values are in the cache.
    assert_eq!(store.range_at(&old, get("k", "l")).await.unwrap().count, 10);
    let again = store.compact(CompactionRequest { revision: 2001, physical: true }).await;
    assert_eq!(again, Err(KvError::Compacted));
}

#[tokio::test]
async fn a_pinned_state_is_told_when_its_values_are_gone() {
    let store = start(StoreOptions { value_cache_bytes: 0, ..StoreOptions::default() }).await;
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
    let store = start(StoreOptions::default()).await;
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
        let revisions: Vec<_> = batches.iter().map(|batch| batch.revision).collect();
        self.0.lock().push(format!("events {revisions:?}"));
    }
    fn leases_changed(&self, changes: &[LeaseChange]) {
        self.0.lock().push(format!("leases {}", changes.len()));
    }
    fn restored(&self, revision: i64) {
        self.0.lock().push(format!("restored {revision}"));
    }
    fn compacted(&self, revision: i64) {
        self.0.lock().push(format!("compacted {revision}"));
    }
}

#[tokio::test]
async fn the_sink_is_told_once_an_entry_and_in_order() {
    let store = start(StoreOptions::default()).await;
    let told = Arc::new(Told::default());
    store.set_sink(told.clone());
    store.put(put("a", "1")).await.unwrap();
    store.node().hold_commits();
    let held = futures_util::future::join3(
        store.put(put("a", "2")),
        store.lease_grant(LeaseGrantRequest { id: 5, ttl: 60 }),
        store.put(put("a", "3")),
    );
    let release = async {
        tokio::task::yield_now().await;
        let node = store.node().clone();
        tokio::task::spawn_blocking(move || node.release_commits()).await.unwrap();
    };
    let ((a, b, c), ()) = futures_util::future::join(held, release).await;
    assert!(a.is_ok() && b.is_ok() && c.is_ok());
    store.compact(CompactionRequest { revision: 2, physical: false }).await.unwrap();
    let told = told.0.lock().clone();
    assert_eq!(told[..4], ["events [2]", "events [3, 4]", "leases 1", "compacted 2"]);
}

#[tokio::test]
async fn a_write_whose_outcome_is_unknown_says_so_and_one_whose_commit_failed_too() {
    let store = start(StoreOptions::default()).await;
    store.put(put("a", "1")).await.unwrap();
    store.node().hold_commits();
    let discard = async {
        tokio::task::yield_now().await;
        let node = store.node().clone();
        tokio::task::spawn_blocking(move || node.discard_commits()).await.unwrap();
    };
    let (lost, ()) = futures_util::future::join(store.put(put("a", "2")), discard).await;
    assert_eq!(lost, Err(KvError::Timeout));
    assert_eq!(store.range(get("a", "")).await.unwrap().kvs[0].value, "1");
    store.node().fail_next_commit();
    assert_eq!(store.put(put("a", "3")).await, Err(KvError::NoSpace));
    let written = store.put(PutRequest { prev_kv: true, ..put("a", "4") }).await.unwrap();
    assert_eq!((written.header.unwrap().revision, written.prev_kv.unwrap().value.as_ref()), (3, &b"1"[..]));
}

#[tokio::test]
async fn without_a_leader_a_write_waits_and_then_says_that_it_had_no_effect() {
    let options = StoreOptions { request_timeout: Duration::from_millis(300), ..StoreOptions::default() };
    let store = start(options).await;
    let leading = store.node().leadership().borrow().clone();
    let none = raft_sqlite::Leadership { leader: None, writable_here: false, ..leading.clone() };
    store.node().set_leadership(none.clone());
    assert_eq!(store.put(put("a", "1")).await, Err(KvError::NoLeader));
    assert_eq!(store.range(get("a", "")).await, Err(KvError::NoLeader));
    assert!(store.range(RangeRequest { serializable: true, ..get("a", "") }).await.is_ok());
    let back = async {
        tokio::task::yield_now().await;
        store.node().set_leadership(leading);
    };
    let (written, ()) = futures_util::future::join(store.put(put("a", "1")), back).await;
    assert!(written.is_ok());
    store.node().set_leadership(none);
    assert_eq!(store.lease_expire(vec![1]).await, Err(KvError::NotLeader));
}

#[tokio::test]
async fn lease_calls_reach_the_handler_of_the_leader() {
    struct Echo;
    impl raft_sqlite::CallHandler for Echo {
        fn call(&self, payload: Bytes) -> futures_util::future::BoxFuture<'static, Result<Bytes, Bytes>> {
            let refuse = payload.is_empty();
            Box::pin(async move { if refuse { Err(KvError::LeaseNotFound.encode()) } else { Ok(payload) } })
        }
    }
    let store = start(StoreOptions::default()).await;
    assert_eq!(store.call_lease_leader(Bytes::from_static(b"x")).await, Err(KvError::NoLeader));
    store.set_lease_handler(Arc::new(Echo));
    assert_eq!(store.call_lease_leader(Bytes::from_static(b"x")).await, Ok(Bytes::from_static(b"x")));
    assert_eq!(store.call_lease_leader(Bytes::new()).await, Err(KvError::LeaseNotFound));
}
