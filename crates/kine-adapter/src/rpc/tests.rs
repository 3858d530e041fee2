//! The services as a client sees them: a server on a port of its own, tonic's clients.

mod serving;

use std::time::Duration;

use serving::{Running, key_range, put, start, start_with};
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status};

use crate::error::KvError;
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::request_op::Request as Op;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::{
    AlarmRequest, AuthStatusRequest, AuthenticateRequest, CompactionRequest, Compare, DefragmentRequest,
    DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, MemberListRequest, PutRequest, RangeRequest, RequestOp, StatusRequest, TxnRequest,
    WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest,
};
use crate::server::ServerOptions;

fn is(status: Status, error: KvError) {
    assert_eq!((status.code(), status.message()), (super::status::code(&error), error.to_string().as_str()));
}

/// Metadata as etcd's WithRequireLeader sets it.
fn with_leader<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", "true".parse().unwrap());
    request
}

mod kv {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn put_range_delete_txn() {
        let server = start().await;
        let mut kv = server.kv();
        let answer = kv.put(put("a", "1")).await.unwrap().into_inner();
        let header = answer.header.unwrap();
        let own = (server.node.cluster_id(), server.node.id().0, 2);
        assert_eq!((header.cluster_id, header.member_id, header.revision), own);
        assert!(header.raft_term > 0);
        kv.put(put("b", "2")).await.unwrap();

        let answer = kv.range(key_range("a", "z")).await.unwrap().into_inner();
        assert_eq!((answer.count, answer.more, answer.kvs.len()), (2, false, 2));
        assert_eq!((answer.kvs[0].key.as_ref(), answer.kvs[0].value.as_ref()), (&b"a"[..], &b"1"[..]));

        let compare = Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: "a".into(),
            target_union: Some(TargetUnion::ModRevision(2)),
            range_end: Default::default(),
        };
        let update = |value: &str| RequestOp { request: Some(Op::RequestPut(put("a", value))) };
        let read = RequestOp { request: Some(Op::RequestRange(key_range("a", ""))) };
        let txn = TxnRequest { compare: vec![compare], success: vec![update("2")], failure: vec![read] };
        assert!(kv.txn(txn.clone()).await.unwrap().into_inner().succeeded);
        let second = kv.txn(txn).await.unwrap().into_inner();
        assert!(!second.succeeded);
        assert_eq!((second.responses.len(), second.header.unwrap().revision), (1, 4));

        let delete = DeleteRangeRequest { key: "a".into(), range_end: "z".into(), prev_kv: true };
        let answer = kv.delete_range(delete).await.unwrap().into_inner();
        assert_eq!((answer.deleted, answer.prev_kvs.len()), (2, 2));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn errors_have_etcds_code_and_text() {
        let server = start().await;
        let mut kv = server.kv();
        for key in ["a", "b", "c"] {
            kv.put(put(key, "1")).await.unwrap();
        }
        kv.compact(CompactionRequest { revision: 3, physical: true }).await.unwrap();
        is(kv.put(put("", "1")).await.unwrap_err(), KvError::KeyMissing);
        is(kv.put(PutRequest { ignore_value: true, ..put("x", "") }).await.unwrap_err(), KvError::KeyNotFound);
        is(kv.put(PutRequest { lease: 77, ..put("x", "") }).await.unwrap_err(), KvError::LeaseNotFound);
        is(kv.range(RangeRequest { revision: 2, ..key_range("a", "") }).await.unwrap_err(), KvError::Compacted);
        is(kv.range(RangeRequest { revision: 9, ..key_range("a", "") }).await.unwrap_err(), KvError::FutureRevision);
        is(
            kv.range(RangeRequest { sort_order: 7, ..key_range("a", "") }).await.unwrap_err(),
            KvError::InvalidSortOption,
        );
        is(kv.compact(CompactionRequest { revision: 3, physical: false }).await.unwrap_err(), KvError::Compacted);
        let operation = RequestOp { request: Some(Op::RequestPut(put("a", "1"))) };
        let twice = TxnRequest { success: vec![operation.clone(), operation.clone()], ..Default::default() };
        is(kv.txn(twice).await.unwrap_err(), KvError::DuplicateKey);
        let many = TxnRequest { success: vec![operation; 129], ..Default::default() };
        is(kv.txn(many).await.unwrap_err(), KvError::TooManyOps);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn too_large_requests() {
        let server = start().await;
        let mut kv = server.kv();
        is(kv.put(put("a", &"v".repeat(1600 << 10))).await.unwrap_err(), KvError::RequestTooLarge);
        let status = kv.put(put("a", &"v".repeat(3 << 20))).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("grpc: received message larger than max ("), "{status:?}");
        kv.put(put("a", &"v".repeat(1 << 20))).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_range_in_chunks() {
        let server = start().await;
        let mut kv = server.kv();
        for number in 0..35 {
            kv.put(put(&format!("k{number:02}"), "v")).await.unwrap();
        }
        for (limit, expected) in [(0, 35), (7, 7), (25, 25), (99, 35)] {
            let request = RangeRequest { limit, ..key_range("k", "l") };
            let whole = kv.range(request.clone()).await.unwrap().into_inner();
            let mut chunks = kv.range_stream(request).await.unwrap().into_inner();
            let (mut keys, mut sizes, mut last) = (Vec::new(), Vec::new(), None);
            while let Some(chunk) = chunks.next().await {
                let chunk = chunk.unwrap().range_response.unwrap();
                assert!(last.is_none(), "header, more and count come with the last");
                sizes.push(chunk.kvs.len());
                keys.extend(chunk.kvs);
                last = chunk.header.map(|header| (header, chunk.more, chunk.count));
            }
            assert_eq!(keys.len(), expected);
            assert_eq!(keys, whole.kvs);
            assert_eq!(last, Some((whole.header.unwrap(), whole.more, whole.count)));
            assert_eq!(sizes[0], expected.min(10));
        }
        let counted = RangeRequest { count_only: true, ..key_range("k", "l") };
        let mut chunks = kv.range_stream(counted).await.unwrap().into_inner();
        let only = chunks.next().await.unwrap().unwrap().range_response.unwrap();
        assert_eq!((only.count, only.kvs.len(), only.header.is_some()), (35, 0, true));
        assert!(chunks.next().await.is_none());
        let sorted = RangeRequest { sort_order: 2, ..key_range("k", "l") };
        assert_eq!(kv.range_stream(sorted).await.unwrap_err().code(), Code::Unimplemented);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_a_leader_who_requires_one_is_refused_at_once() {
        let server = start().await;
        server.lose_leader();
        let request = RangeRequest { serializable: true, ..key_range("a", "") };
        is(server.kv().range(with_leader(request.clone())).await.unwrap_err(), KvError::NoLeader);
        server.kv().range(request).await.unwrap();
    }
}

mod watch {
    use super::*;

    fn create(request: WatchCreateRequest) -> WatchRequest {
        WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn events_progress_cancel() {
        let server = start().await;
        let (mut kv, mut watch) = (server.kv(), server.watch().await);
        kv.put(put("a", "1")).await.unwrap();
        watch.send(create(WatchCreateRequest {
            key: "a".into(),
            range_end: "z".into(),
            start_revision: 2,
            prev_kv: true,
            ..Default::default()
        }));
        let created = watch.next().await.unwrap();
        assert!(created.created);
        assert_eq!(created.header.unwrap().cluster_id, server.node.cluster_id());
        let past = watch.next().await.unwrap();
        assert_eq!((past.watch_id, past.events.len(), past.events[0].prev_kv.is_none()), (0, 1, true));
        kv.put(put("a", "2")).await.unwrap();
        let update = watch.next().await.unwrap();
        assert_eq!(update.header.unwrap().revision, 3);
        assert_eq!(update.events[0].kv.as_ref().unwrap().value.as_ref(), b"2");
        assert_eq!(update.events[0].prev_kv.as_ref().unwrap().value.as_ref(), b"1");

        watch.send(WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) });
        let progress = watch.next().await.unwrap();
        assert_eq!((progress.watch_id, progress.events.len(), progress.header.unwrap().revision), (-1, 0, 3));

        let cancel = WatchCancelRequest { watch_id: 0 };
        watch.send(WatchRequest { request_union: Some(RequestUnion::CancelRequest(cancel)) });
        let canceled = watch.next().await.unwrap();
        assert!(canceled.canceled && canceled.watch_id == 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn compacted_history() {
        let server = start().await;
        let (mut kv, mut watch) = (server.kv(), server.watch().await);
        for value in ["1", "2", "3"] {
            kv.put(put("a", value)).await.unwrap();
        }
        kv.compact(CompactionRequest { revision: 3, physical: false }).await.unwrap();
        watch.send(create(WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() }));
        assert!(watch.next().await.unwrap().created);
        let canceled = watch.next().await.unwrap();
        assert_eq!((canceled.canceled, canceled.compact_revision), (true, 3));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn periodic_progress() {
        let options = ServerOptions { progress_notify_interval: Duration::from_millis(1), ..ServerOptions::default() };
        let server = start_with(options).await;
        let mut watch = server.watch().await;
        watch.send(create(WatchCreateRequest { key: "a".into(), progress_notify: true, ..Default::default() }));
        assert!(watch.next().await.unwrap().created);
        let progress = watch.next().await.unwrap();
        assert_eq!((progress.watch_id, progress.events.len(), progress.header.unwrap().revision), (0, 0, 1));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_watchers_on_one_stream_and_a_client_that_has_said_all() {
        let server = start().await;
        let mut watch = server.watch().await;
        for _ in 0..200 {
            watch.send(create(WatchCreateRequest { key: "a".into(), ..Default::default() }));
        }
        watch.finish_sending();
        for id in 0..200 {
            let created = watch.next().await.unwrap();
            assert!(created.created && created.watch_id == id);
        }
        server.kv().put(put("a", "1")).await.unwrap();
        let mut ids: Vec<i64> = Vec::new();
        while ids.len() < 200 {
            let answer = watch.next().await.unwrap();
            assert_eq!(answer.events.len(), 1);
            ids.push(answer.watch_id);
        }
        ids.sort_unstable();
        assert_eq!(ids, (0..200).collect::<Vec<_>>());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn streams_that_require_a_leader_end_without_one_and_others_do_not() {
        let options = ServerOptions { election_timeout: Duration::from_millis(5), ..ServerOptions::default() };
        let server = start_with(options).await;
        let (mut plain, mut strict) = (server.watch().await, server.watch_with(with_leader).await);
        for watch in [&mut plain, &mut strict] {
            watch.send(create(WatchCreateRequest { key: "a".into(), ..Default::default() }));
            assert!(watch.next().await.unwrap().created);
        }
        server.lose_leader();
        is(strict.next().await.unwrap_err(), KvError::NoLeader);
        server.regain_leader();
        server.kv().put(put("a", "1")).await.unwrap();
        assert_eq!(plain.next().await.unwrap().events.len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stopping_server_sends_clients_elsewhere() {
        let server = start().await;
        let mut watch = server.watch().await;
        watch.send(create(WatchCreateRequest { key: "a".into(), ..Default::default() }));
        assert!(watch.next().await.unwrap().created);
        let stopping = tokio::spawn(server.stop());
        is(watch.next().await.unwrap_err(), KvError::Stopped);
        drop(watch);
        stopping.await.unwrap();
    }
}

mod lease {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn grant_keep_alive_time_to_live_revoke() {
        let server = start().await;
        let (mut kv, mut lease) = (server.kv(), server.lease());
        let granted = lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().into_inner();
        assert!(granted.id > 0);
        assert_eq!((granted.ttl, granted.error.as_str()), (60, ""));
        let again = LeaseGrantRequest { ttl: 60, id: granted.id };
        is(lease.lease_grant(again).await.unwrap_err(), KvError::LeaseExists);
        let long = LeaseGrantRequest { ttl: 9_000_000_001, id: 5 };
        is(lease.lease_grant(long).await.unwrap_err(), KvError::LeaseTtlTooLarge);
        for key in ["b", "a"] {
            kv.put(PutRequest { lease: granted.id, ..put(key, "1") }).await.unwrap();
        }

        let ids = [granted.id, 404];
        let asked = tokio_stream::iter(ids).map(|id| LeaseKeepAliveRequest { id });
        let mut answers = lease.lease_keep_alive(asked).await.unwrap().into_inner();
        for (id, ttl) in [(granted.id, 60), (404, 0)] {
            let answer = answers.next().await.unwrap().unwrap();
            assert_eq!((answer.id, answer.ttl, answer.header.unwrap().revision), (id, ttl, 3));
        }
        assert!(answers.next().await.is_none());

        let request = LeaseTimeToLiveRequest { id: granted.id, keys: true };
        let answer = lease.lease_time_to_live(request).await.unwrap().into_inner();
        assert!((55..=60).contains(&answer.ttl));
        assert_eq!((answer.granted_ttl, answer.keys), (60, vec!["a".into(), "b".into()]));
        let missing = LeaseTimeToLiveRequest { id: 404, keys: true };
        let answer = lease.lease_time_to_live(missing).await.unwrap().into_inner();
        assert_eq!((answer.id, answer.ttl, answer.granted_ttl), (404, -1, 0));

        let answer = lease.lease_leases(LeaseLeasesRequest {}).await.unwrap().into_inner();
        assert_eq!(answer.leases.iter().map(|lease| lease.id).collect::<Vec<_>>(), [granted.id]);

        let revoked = lease.lease_revoke(LeaseRevokeRequest { id: granted.id }).await.unwrap().into_inner();
        assert_eq!(revoked.header.unwrap().revision, 4);
        assert_eq!(kv.range(key_range("a", "z")).await.unwrap().into_inner().count, 0);
        let again = LeaseRevokeRequest { id: granted.id };
        is(lease.lease_revoke(again).await.unwrap_err(), KvError::LeaseNotFound);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_expired_lease_takes_its_keys_along() {
        let server = start().await;
        let (mut kv, mut lease, mut watch) = (server.kv(), server.lease(), server.watch().await);
        let granted = lease.lease_grant(LeaseGrantRequest { ttl: 1, id: 9 }).await.unwrap().into_inner();
        assert_eq!(granted.ttl, 1);
        kv.put(PutRequest { lease: 9, ..put("a", "1") }).await.unwrap();
        let request = WatchCreateRequest { key: "a".into(), start_revision: 3, ..Default::default() };
        watch.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) });
        assert!(watch.next().await.unwrap().created);
        let event = watch.next().await.unwrap().events.remove(0);
        assert_eq!((event.r#type, event.kv.unwrap().mod_revision), (1, 3));
        // A keep-alive that comes now waits for nothing and finds nothing.
        let asked = tokio_stream::once(LeaseKeepAliveRequest { id: 9 });
        let mut answers = lease.lease_keep_alive(asked).await.unwrap().into_inner();
        assert_eq!(answers.next().await.unwrap().unwrap().ttl, 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_new_leader_gives_every_lease_its_full_ttl() {
        let server = start().await;
        let mut lease = server.lease();
        lease.lease_grant(LeaseGrantRequest { ttl: 100, id: 9 }).await.unwrap();
        server.lose_leader();
        server.wait_until(|server| server.lessor().running() == 0).await;
        server.regain_leader();
        server.wait_until(|server| server.lessor().running() == 1).await;
        let request = LeaseTimeToLiveRequest { id: 9, keys: false };
        let answer = lease.lease_time_to_live(request).await.unwrap().into_inner();
        assert_eq!((answer.ttl, answer.granted_ttl), (100, 100));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_does_not_lead_asks_the_leader_as_long_as_it_may() {
        let options = ServerOptions { request_timeout: Duration::from_millis(200), ..ServerOptions::default() };
        let server = start_with(options).await;
        let mut lease = server.lease();
        lease.lease_grant(LeaseGrantRequest { ttl: 100, id: 9 }).await.unwrap();
        server.lose_leader();
        server.wait_until(|server| server.lessor().running() == 0).await;
        let request = LeaseTimeToLiveRequest { id: 9, keys: false };
        let status = lease.lease_time_to_live(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        let keep_alive = || tokio_stream::once(LeaseKeepAliveRequest { id: 9 });
        let mut answers = lease.lease_keep_alive(keep_alive()).await.unwrap().into_inner();
        assert_eq!(answers.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        server.regain_leader();
        let mut answers = lease.lease_keep_alive(keep_alive()).await.unwrap().into_inner();
        assert_eq!(answers.next().await.unwrap().unwrap().ttl, 100);
    }
}

mod others {
    use super::*;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    #[tokio::test(flavor = "multi_thread")]
    async fn members_status_alarms_auth() {
        let server = start().await;
        let answer = server.cluster().member_list(MemberListRequest { linearizable: true }).await.unwrap().into_inner();
        assert_eq!(answer.header.unwrap().revision, 0);
        let member = &answer.members[0];
        assert_eq!((member.id, member.name.as_str(), member.is_learner), (server.node.id().0, "default", false));
        assert_eq!((member.client_ur_ls.len(), member.peer_ur_ls.len()), (1, 1));

        server.kv().put(put("a", "1")).await.unwrap();
        let mut maintenance = server.maintenance();
        let status = maintenance.status(StatusRequest {}).await.unwrap().into_inner();
        assert!(status.version.starts_with("3.6."));
        assert!(status.db_size > 0 && status.raft_index > 0 && status.raft_applied_index > 0);
        assert_eq!((status.leader, status.is_learner, status.errors.len()), (server.node.id().0, false, 0));
        assert_eq!((status.storage_version.as_str(), status.db_size_quota), ("3.6.0", 2 << 30));
        assert!(maintenance.alarm(AlarmRequest::default()).await.unwrap().into_inner().alarms.is_empty());
        assert_eq!(maintenance.defragment(DefragmentRequest {}).await.unwrap_err().code(), Code::Unimplemented);
        server.lose_leader();
        let status = maintenance.status(StatusRequest {}).await.unwrap().into_inner();
        assert_eq!((status.leader, status.errors), (0, vec!["etcdserver: no leader".to_owned()]));
        server.regain_leader();

        let mut auth = server.auth();
        assert!(!auth.auth_status(AuthStatusRequest {}).await.unwrap().into_inner().enabled);
        let login = AuthenticateRequest { name: "root".into(), password: "x".into() };
        is(auth.authenticate(login).await.unwrap_err(), KvError::AuthNotEnabled);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn health_and_reflection() {
        let server = start().await;
        let mut health = HealthClient::new(server.channel());
        let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert_eq!(answer.status, 1);
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut reflection = ServerReflectionClient::new(server.channel());
        let mut answers = reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let answer = answers.next().await.unwrap().unwrap().message_response;
        let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
        let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        assert!(names.contains(&"etcdserverpb.KV") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_same_over_tls() {
        let server: Running = serving::start_tls().await;
        server.kv().put(put("a", "1")).await.unwrap();
        let mut watch = server.watch().await;
        let request = WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() };
        watch.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) });
        assert!(watch.next().await.unwrap().created);
        assert_eq!(watch.next().await.unwrap().events.len(), 1);
    }
}

mod http {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_probes_ask_for() {
        let server = start().await;
        for (path, status, body) in [
            ("/health", 200, r#"{"health":"true","reason":""}"#),
            ("/health?serializable=true", 200, r#"{"health":"true","reason":""}"#),
            ("/livez", 200, "ok\n"),
            ("/readyz", 200, "ok\n"),
            ("/livez?verbose", 200, "[+]serializable_read ok\nok\n"),
            ("/readyz/linearizable_read?verbose", 200, "[+]linearizable_read ok\nok\n"),
            ("/readyz/nonsense", 404, "404 page not found\n"),
            ("/livezzz", 404, "404 page not found\n"),
            ("/", 404, "404 page not found\n"),
        ] {
            assert_eq!(server.get(path).await, (status, body.to_owned()), "{path}");
        }
        let (status, body) = server.get("/version").await;
        assert_eq!(status, 200);
        let version: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(version["etcdcluster"], "3.6.0");
        server.lose_leader();
        let (status, body) = server.get("/health").await;
        assert_eq!((status, body.as_str()), (503, "{\"health\":\"false\",\"reason\":\"RAFT NO LEADER\"}\n"));
        assert_eq!(server.get("/health?serializable=true").await.0, 200);
        let (status, body) = server.get("/readyz?verbose&exclude=non_learner").await;
        assert_eq!(status, 200);
        assert!(body.contains("[+]data_corruption ok\n") && !body.contains("non_learner"), "{body}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn metrics() {
        let server = start().await;
        server.kv().put(put("a", "1")).await.unwrap();
        let (status, body) = server.get("/metrics").await;
        assert_eq!(status, 200);
        for line in ["etcd_server_has_leader 1", "etcd_debugging_mvcc_current_revision 2", "etcd_mvcc_put_total 1"] {
            assert!(body.lines().any(|other| other == line), "{line} in {body}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_get() {
        let server = start().await;
        assert_eq!(server.request("POST", "/health").await.0, 405);
    }
}
