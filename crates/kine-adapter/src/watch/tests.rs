//! The hub's rules on a history made by hand, and a random history against a model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use parking_lot::Mutex;
use proptest::prelude::*;
use prost::Message;

use super::history::History;
use super::hub::{CreateRequest, Hub, StreamHandle};
use super::outbox::{Content, Frames};
use crate::error::KvError;
use crate::index::KeyRange;
use crate::kv::{Event, EventBatch, EventKind, PastEvents, RecentEvents};
use crate::proto::etcdserverpb::WatchResponse;
use crate::proto::mvccpb;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A key space of which only the events are kept.
#[derive(Clone, Default)]
struct Past(Arc<Mutex<Kept>>, Arc<AtomicBool>);

#[derive(Default)]
struct Kept {
    batches: Vec<Arc<EventBatch>>,
    compacted: i64,
    /// The ring starts after this revision.
    ring_after: i64,
    live: BTreeMap<Bytes, Event>,
    table_reads: usize,
}

/// `Some` puts, `None` deletes.
type Change<'a> = (&'a str, Option<&'a str>);

impl Past {
    fn revision_of(kept: &Kept) -> i64 {
        kept.batches.last().map_or(1, |batch| batch.revision)
    }

    /// One revision.
    fn commit(&self, changes: &[Change<'_>]) -> Arc<EventBatch> {
        let mut kept = self.0.lock();
        let revision = Past::revision_of(&kept) + 1;
        let events = changes.iter().map(|(key, value)| {
            let key = Bytes::copy_from_slice(key.as_bytes());
            let before = kept.live.get(&key).cloned();
            let blank = Event {
                kind: EventKind::Delete,
                key: key.clone(),
                value: Bytes::new(),
                create_revision: 0,
                mod_revision: revision,
                version: 0,
                lease: 0,
                previous: None,
            };
            match value {
                Some(value) => {
                    let event = Event {
                        kind: EventKind::Put,
                        value: Bytes::copy_from_slice(value.as_bytes()),
                        create_revision: before.as_ref().map_or(revision, |event| event.create_revision),
                        version: before.as_ref().map_or(0, |event| event.version) + 1,
                        ..blank
                    };
                    kept.live.insert(key, event.clone());
                    event
                }
                None => {
                    kept.live.remove(&key);
                    blank
                }
            }
        });
        let batch = Arc::new(EventBatch { revision, events: events.collect() });
        kept.batches.push(batch.clone());
        batch
    }

    fn find_previous(&self, event: &Event) -> Option<mvccpb::KeyValue> {
        let kept = self.0.lock();
        if event.mod_revision - 1 < kept.compacted {
            return None;
        }
        let before = kept.batches.iter().rev().filter(|batch| batch.revision < event.mod_revision);
        let mut events = before.flat_map(|batch| batch.events.iter().rev());
        events.find(|other| other.key == event.key).filter(|e| e.kind == EventKind::Put).map(Event::key_value)
    }
}

impl History for Past {
    fn revision(&self) -> i64 {
        Past::revision_of(&self.0.lock())
    }
    fn compact_revision(&self) -> i64 {
        self.0.lock().compacted
    }
    fn recent(&self, revision: i64, max_batches: usize) -> RecentEvents {
        let kept = self.0.lock();
        if revision < kept.ring_after {
            return RecentEvents::Gone { after: kept.ring_after };
        }
        let newer = kept.batches.iter().filter(|batch| batch.revision > revision);
        RecentEvents::Batches(newer.take(max_batches).cloned().collect())
    }
    fn stored(
        &self,
        range: KeyRange,
        start: i64,
        up_to: i64,
        limit: usize,
    ) -> BoxFuture<'_, Result<PastEvents, KvError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            let mut kept = self.0.lock();
            kept.table_reads += 1;
            if start < kept.compacted {
                return Err(KvError::Compacted);
            }
            let (mut batches, mut events, mut complete_to) = (Vec::new(), 0, up_to);
            for batch in kept.batches.iter().filter(|batch| (start..=up_to).contains(&batch.revision)) {
                // The hub asks for 1000, which is more than these tests have.
                if events >= limit.min(3) {
                    complete_to = batch.revision - 1;
                    break;
                }
                let of_range: Box<[Event]> = batch.events.iter().filter(|e| range.contains(&e.key)).cloned().collect();
                events += of_range.len();
                if !of_range.is_empty() {
                    batches.push(Arc::new(EventBatch { revision: batch.revision, events: of_range }));
                }
            }
            Ok(PastEvents { batches, complete_to })
        })
    }
    fn previous_at_hand(&self, event: &Event) -> Option<Option<mvccpb::KeyValue>> {
        (!self.1.load(Ordering::SeqCst)).then(|| self.find_previous(event))
    }
    fn previous<'a>(&'a self, event: &'a Event) -> BoxFuture<'a, Result<Option<mvccpb::KeyValue>, KvError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            Ok(self.find_previous(event))
        })
    }
}

/// A hub, its history and its task.
struct Scene {
    past: Past,
    hub: Arc<Hub>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One client stream.
struct Client {
    hub: Arc<Hub>,
    stream: StreamHandle,
    frames: Frames,
}

impl Scene {
    fn new() -> Scene {
        let past = Past::default();
        Scene::on(past)
    }

    fn on(past: Past) -> Scene {
        let hub = Hub::new(Box::new(past.clone()), 7, 8, 1000);
        hub.set_term(9);
        hub.begin();
        let task = tokio::spawn(hub.clone().run());
        Scene { past, hub, task }
    }

    fn commit(&self, changes: &[Change<'_>]) -> i64 {
        let batch = self.past.commit(changes);
        let revision = batch.revision;
        self.hub.committed(&[batch]);
        revision
    }

    fn client(&self) -> Client {
        let (stream, frames) = self.hub.open();
        Client { hub: self.hub.clone(), stream, frames }
    }

    /// Lets the hub do all it can.
    async fn settle(&self) {
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }
}

fn all() -> CreateRequest {
    CreateRequest { key: "a".into(), range_end: "z".into(), ..CreateRequest::default() }
}

fn from(start_revision: i64) -> CreateRequest {
    CreateRequest { start_revision, ..all() }
}

impl Client {
    fn create(&self, request: CreateRequest) {
        self.hub.create(&self.stream, request);
    }

    async fn next(&mut self) -> WatchResponse {
        let frame = tokio::time::timeout(PATIENCE, self.frames.next()).await.expect("an answer comes");
        let frame = frame.expect("the stream goes on").expect("no error");
        let mut bytes = Vec::new();
        frame.encode(&self.hub.header(), &mut bytes);
        WatchResponse::decode(bytes.as_slice()).unwrap()
    }

    fn nothing(&mut self) -> bool {
        self.frames.next().now_or_never().is_none()
    }

    async fn created(&mut self, request: CreateRequest) -> i64 {
        self.create(request);
        let answer = self.next().await;
        assert!(answer.created && !answer.canceled && answer.events.is_empty(), "{answer:?}");
        answer.watch_id
    }

    /// Revisions and keys of the next answer.
    async fn events(&mut self) -> Vec<(i64, String)> {
        let answer = self.next().await;
        assert!(!answer.created && !answer.canceled, "{answer:?}");
        told(&answer)
    }
}

fn told(answer: &WatchResponse) -> Vec<(i64, String)> {
    let kvs = answer.events.iter().map(|event| event.kv.clone().unwrap());
    kvs.map(|kv| (kv.mod_revision, String::from_utf8(kv.key.to_vec()).unwrap())).collect()
}

fn list(expected: &[(i64, &str)]) -> Vec<(i64, String)> {
    expected.iter().map(|(revision, key)| (*revision, (*key).to_owned())).collect()
}

#[tokio::test]
async fn from_now_on() {
    let scene = Scene::new();
    scene.commit(&[("b", Some("1"))]);
    let mut client = scene.client();
    assert_eq!(client.created(all()).await, 0);
    scene.commit(&[("b", Some("2")), ("c", None)]);
    let answer = client.next().await;
    let header = answer.header.unwrap();
    assert_eq!((header.cluster_id, header.member_id, header.revision, header.raft_term), (7, 8, 3, 9));
    assert_eq!(told(&answer), list(&[(3, "b"), (3, "c")]));
    let put = answer.events[0].kv.clone().unwrap();
    assert_eq!((put.create_revision, put.mod_revision, put.version, put.value.as_ref()), (2, 3, 2, &b"2"[..]));
    // Of a delete only key and revision.
    let delete = mvccpb::KeyValue { key: "c".into(), mod_revision: 3, ..Default::default() };
    assert_eq!(answer.events[1], mvccpb::Event { r#type: 1, kv: Some(delete), prev_kv: None });
}

#[tokio::test]
async fn what_the_hub_has_not_delivered_yet_is_still_the_past() {
    let scene = Scene::new();
    // Committed, but the hub's task has not run.
    scene.commit(&[("b", Some("1"))]);
    let mut client = scene.client();
    client.create(all());
    let created = client.next().await;
    assert_eq!(created.header.unwrap().revision, 2);
    scene.commit(&[("b", Some("2"))]);
    assert_eq!(client.events().await, list(&[(3, "b")]));
}

#[tokio::test]
async fn from_the_past_then_live() {
    let scene = Scene::new();
    for key in ["b", "c", "d"] {
        scene.commit(&[(key, Some("1"))]);
    }
    scene.settle().await;
    let mut client = scene.client();
    client.created(from(3)).await;
    assert_eq!(client.events().await, list(&[(3, "c"), (4, "d")]));
    scene.commit(&[("e", Some("1"))]);
    assert_eq!(client.events().await, list(&[(5, "e")]));
}

#[tokio::test]
async fn a_future_start_waits_for_it() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.created(from(4)).await;
    for key in ["b", "c", "d"] {
        scene.commit(&[(key, Some("1"))]);
    }
    assert_eq!(client.events().await, list(&[(4, "d")]));
}

#[tokio::test]
async fn beyond_the_ring_the_tables_are_read() {
    let past = Past::default();
    for number in 0..20 {
        past.commit(&[(if number % 2 == 0 { "b" } else { "c" }, Some("1"))]);
    }
    past.0.lock().ring_after = 18;
    let scene = Scene::on(past);
    let mut client = scene.client();
    client.created(CreateRequest { key: "c".into(), start_revision: 1, ..Default::default() }).await;
    let mut seen = Vec::new();
    while seen.len() < 10 {
        seen.extend(client.events().await);
    }
    assert_eq!(seen, (1..=10).map(|n| (2 * n + 1, "c".to_owned())).collect::<Vec<_>>());
    assert!(scene.past.0.lock().table_reads > 1);
    scene.commit(&[("c", Some("2"))]);
    assert_eq!(client.events().await, list(&[(22, "c")]));
}

#[tokio::test]
async fn one_far_behind_does_not_starve_the_others() {
    let past = Past::default();
    for _ in 0..1000 {
        past.commit(&[("b", Some("1"))]);
    }
    past.0.lock().ring_after = 999;
    let scene = Scene::on(past);
    let (mut far, mut near) = (scene.client(), scene.client());
    far.created(from(2)).await;
    near.created(from(990)).await;
    let mut seen = 0;
    while seen < 12 {
        seen += near.events().await.len();
    }
    // The history here gives three events at a time, and each pass makes two yields at least.
    let far_so_far = scene.hub.statistics();
    assert_eq!(far_so_far.behind, 1, "the far one is still on its way");
}

#[tokio::test]
async fn compacted_starts_are_canceled_after_created() {
    let scene = Scene::new();
    for key in ["b", "c", "d"] {
        scene.commit(&[(key, Some("1"))]);
    }
    scene.settle().await;
    scene.past.0.lock().compacted = 3;
    let mut client = scene.client();
    let id = client.created(from(2)).await;
    let answer = client.next().await;
    assert!(answer.canceled && !answer.created);
    assert_eq!((answer.watch_id, answer.compact_revision, answer.header.unwrap().revision), (id, 3, 0));
    // At the compacted revision itself history is whole.
    client.created(from(3)).await;
    assert_eq!(client.events().await, list(&[(3, "c"), (4, "d")]));
    assert_eq!(scene.hub.statistics().watchers, 1);
}

#[tokio::test]
async fn what_cannot_be_watched_is_created_and_canceled_with_id_minus_one() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.created(CreateRequest { watch_id: 5, ..all() }).await;
    for (request, reason) in [
        (from(-1), "etcdserver: mvcc: required revision has been compacted"),
        (CreateRequest { range_end: "a".into(), ..all() }, "mvcc: watcher range is empty"),
        (CreateRequest { range_end: "B".into(), ..all() }, "mvcc: watcher range is empty"),
        (CreateRequest { watch_id: 5, ..all() }, "mvcc: duplicate watch ID provided on the WatchStream"),
    ] {
        client.create(request);
        let answer = client.next().await;
        assert!(answer.created && answer.canceled);
        assert_eq!((answer.watch_id, answer.cancel_reason.as_str()), (-1, reason));
    }
}

#[tokio::test]
async fn ids_count_from_zero_and_pass_over_those_in_use() {
    let scene = Scene::new();
    let mut client = scene.client();
    assert_eq!(client.created(all()).await, 0);
    assert_eq!(client.created(CreateRequest { watch_id: 1, ..all() }).await, 1);
    assert_eq!(client.created(all()).await, 2);
    client.hub.cancel(&client.stream, 0);
    assert!(client.next().await.canceled);
    assert_eq!(client.created(all()).await, 3);
    let mut other = scene.client();
    assert_eq!(other.created(all()).await, 0);
}

#[tokio::test]
async fn the_empty_key_is_the_smallest_and_a_null_end_is_none() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.created(CreateRequest { range_end: Bytes::from_static(b"\0"), ..Default::default() }).await;
    client.created(CreateRequest { key: "c".into(), range_end: Bytes::from_static(b"\0"), ..Default::default() }).await;
    scene.commit(&[("b", Some("1"))]);
    let answer = client.next().await;
    assert_eq!((answer.watch_id, told(&answer)), (0, list(&[(2, "b")])));
    scene.settle().await;
    assert!(client.nothing());
}

#[tokio::test]
async fn no_events_after_the_answer_to_cancel() {
    let scene = Scene::new();
    let mut client = scene.client();
    let id = client.created(all()).await;
    scene.commit(&[("b", Some("1"))]);
    assert_eq!(client.events().await, list(&[(2, "b")]));
    client.hub.cancel(&client.stream, id);
    client.hub.cancel(&client.stream, 77);
    scene.commit(&[("b", Some("2"))]);
    let answer = client.next().await;
    assert!(answer.canceled && answer.compact_revision == 0 && answer.watch_id == id);
    scene.settle().await;
    assert!(client.nothing());
}

#[tokio::test]
async fn filters() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.created(CreateRequest { no_put: true, ..all() }).await;
    client.created(CreateRequest { no_delete: true, ..all() }).await;
    client.created(CreateRequest { no_put: true, no_delete: true, ..all() }).await;
    scene.commit(&[("b", Some("1")), ("c", None)]);
    let mut seen = BTreeMap::new();
    for _ in 0..2 {
        let answer = client.next().await;
        seen.insert(answer.watch_id, told(&answer));
    }
    assert_eq!(seen, BTreeMap::from([(0, list(&[(2, "c")])), (1, list(&[(2, "b")]))]));
    scene.settle().await;
    assert!(client.nothing());
}

#[tokio::test]
async fn previous_values_at_hand_or_read() {
    for slow in [false, true] {
        let scene = Scene::new();
        scene.past.1.store(slow, Ordering::SeqCst);
        let (mut client, mut plain) = (scene.client(), scene.client());
        client.created(CreateRequest { previous: true, ..all() }).await;
        plain.created(all()).await;
        scene.commit(&[("b", Some("1"))]);
        scene.commit(&[("b", Some("2"))]);
        scene.commit(&[("b", None)]);
        scene.commit(&[("b", None)]);
        let mut events = Vec::new();
        let mut without = Vec::new();
        while events.len() < 4 {
            events.extend(client.next().await.events);
        }
        while without.len() < 4 {
            without.extend(plain.next().await.events);
        }
        let previous: Vec<Option<(i64, Bytes)>> =
            events.into_iter().map(|e| e.prev_kv.map(|kv| (kv.mod_revision, kv.value))).collect();
        assert_eq!(previous, [None, Some((2, "1".into())), Some((3, "2".into())), None]);
        assert!(without.iter().all(|event| event.prev_kv.is_none()));
    }
}

#[tokio::test]
async fn watchers_of_a_range_share_the_encoded_events() {
    let scene = Scene::new();
    let (mut one, mut two) = (scene.client(), scene.client());
    one.created(all()).await;
    two.created(all()).await;
    scene.commit(&[("b", Some("1"))]);
    let mut parts = Vec::new();
    for client in [&mut one, &mut two] {
        let frame = client.frames.next().await.unwrap().unwrap();
        let Content::Events { encoded, .. } = frame.content else { panic!("{frame:?}") };
        parts.push(encoded.as_ptr());
    }
    assert_eq!(parts[0], parts[1]);
}

#[tokio::test]
async fn only_those_who_take_fragments_get_them() {
    let scene = Scene::new();
    let (mut whole, mut pieces) = (scene.client(), scene.client());
    whole.created(all()).await;
    pieces.created(CreateRequest { fragment: true, ..all() }).await;
    let value = "v".repeat(300);
    let keys: Vec<String> = (0..7).map(|n| format!("k{n}")).collect();
    let changes: Vec<Change<'_>> = keys.iter().map(|key| (key.as_str(), Some(value.as_str()))).collect();
    scene.commit(&changes);
    assert_eq!(whole.next().await.events.len(), 7);
    let mut seen = Vec::new();
    loop {
        let answer = pieces.next().await;
        assert!(answer.encoded_len() < 1000);
        seen.extend(told(&answer));
        if !answer.fragment {
            break;
        }
        assert!(seen.len() < 7);
    }
    assert_eq!(
        seen,
        told(&{
            let mut again = scene.client();
            again.created(from(2)).await;
            again.next().await
        })
    );
}

#[tokio::test]
async fn a_client_that_does_not_take_its_events_gets_all_of_them_later() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.created(all()).await;
    let value = "v".repeat(200 << 10);
    for _ in 0..20 {
        scene.commit(&[("b", Some(&value)), ("c", Some("small"))]);
        scene.settle().await;
    }
    assert_eq!(scene.hub.statistics().behind, 1);
    let mut seen = Vec::new();
    while seen.len() < 40 {
        let events = client.events().await;
        assert_eq!(events.len() % 2, 0, "revisions stay whole");
        seen.extend(events);
    }
    let expected: Vec<(i64, String)> =
        (2..22).flat_map(|revision| [(revision, "b".to_owned()), (revision, "c".to_owned())]).collect();
    assert_eq!(seen, expected);
    scene.settle().await;
    assert_eq!(scene.hub.statistics().behind, 0);
    scene.commit(&[("d", Some("1"))]);
    assert_eq!(client.events().await, list(&[(22, "d")]));
}

#[tokio::test]
async fn after_the_state_was_replaced_watchers_catch_up_from_the_tables() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.created(all()).await;
    client.created(from(9)).await;
    scene.commit(&[("b", Some("1"))]);
    assert_eq!(client.events().await, list(&[(2, "b")]));
    // A snapshot brings revisions 3 to 6.
    for _ in 0..4 {
        scene.past.commit(&[("c", Some("1"))]);
    }
    scene.past.0.lock().ring_after = 6;
    scene.hub.restored(6);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        seen.extend(client.events().await);
    }
    assert_eq!(seen, list(&[(3, "c"), (4, "c"), (5, "c"), (6, "c")]));
    scene.settle().await;
    assert_eq!(scene.hub.statistics().behind, 0);
    for _ in 0..3 {
        scene.commit(&[("d", Some("1"))]);
    }
    let mut by_id: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    while by_id.values().map(Vec::len).sum::<usize>() < 4 {
        let answer = client.next().await;
        by_id.entry(answer.watch_id).or_default().extend(told(&answer).iter().map(|(revision, _)| *revision));
    }
    assert_eq!(by_id, BTreeMap::from([(0, vec![7, 8, 9]), (1, vec![9])]));
}

mod progress {
    use super::*;

    async fn is_progress(client: &mut Client, id: i64, revision: i64) {
        let answer = client.next().await;
        assert!(answer.events.is_empty() && !answer.created && !answer.canceled, "{answer:?}");
        assert_eq!((answer.watch_id, answer.header.unwrap().revision), (id, revision));
    }

    #[tokio::test]
    async fn comes_after_every_event_up_to_its_revision() {
        let scene = Scene::new();
        let mut client = scene.client();
        client.created(all()).await;
        scene.commit(&[("b", Some("1"))]);
        // Asked before the hub has delivered the event.
        client.hub.request_progress(&client.stream);
        client.hub.request_progress(&client.stream);
        assert_eq!(client.events().await, list(&[(2, "b")]));
        is_progress(&mut client, -1, 2).await;
        scene.settle().await;
        assert!(client.nothing(), "requests that waited are answered together");
        client.hub.request_progress(&client.stream);
        is_progress(&mut client, -1, 2).await;
    }

    #[tokio::test]
    async fn waits_for_every_watcher_of_the_stream() {
        let past = Past::default();
        for _ in 0..30 {
            past.commit(&[("b", Some("1"))]);
        }
        past.0.lock().ring_after = 30;
        let scene = Scene::on(past);
        let mut client = scene.client();
        client.created(all()).await;
        client.created(from(2)).await;
        client.hub.request_progress(&client.stream);
        let mut seen = 0;
        while seen < 30 {
            seen += client.events().await.len();
        }
        is_progress(&mut client, -1, 31).await;
    }

    #[tokio::test]
    async fn waits_for_a_start_in_the_future() {
        let scene = Scene::new();
        let mut client = scene.client();
        client.created(from(3)).await;
        client.hub.request_progress(&client.stream);
        scene.commit(&[("b", Some("1"))]);
        scene.settle().await;
        assert!(client.nothing());
        scene.commit(&[("c", Some("1"))]);
        assert_eq!(client.events().await, list(&[(3, "c")]));
        is_progress(&mut client, -1, 3).await;
    }

    #[tokio::test]
    async fn none_for_a_stream_without_watchers_and_none_older_than_created() {
        let scene = Scene::new();
        let mut client = scene.client();
        client.hub.request_progress(&client.stream);
        scene.settle().await;
        assert!(client.nothing());
        scene.commit(&[("B", Some("1"))]);
        client.create(CreateRequest { progress_notify: true, ..all() });
        client.hub.request_progress(&client.stream);
        client.hub.periodic_progress(&client.stream);
        assert_eq!(client.next().await.header.unwrap().revision, 2);
        is_progress(&mut client, -1, 2).await;
    }

    #[tokio::test]
    async fn periodic_to_those_who_asked_and_had_no_events() {
        let scene = Scene::new();
        let mut client = scene.client();
        client.created(CreateRequest { progress_notify: true, ..all() }).await;
        client.created(all()).await;
        client.created(CreateRequest { key: "Z".into(), progress_notify: true, ..Default::default() }).await;
        scene.commit(&[("b", Some("1"))]);
        client.events().await;
        client.events().await;
        client.hub.periodic_progress(&client.stream);
        is_progress(&mut client, 2, 2).await;
        assert!(client.nothing());
        client.hub.periodic_progress(&client.stream);
        let mut ids = vec![client.next().await.watch_id, client.next().await.watch_id];
        ids.sort_unstable();
        assert_eq!(ids, [0, 2]);
        assert!(client.nothing());
    }
}

#[tokio::test]
async fn closed_streams_leave_nothing_behind_and_a_stopped_hub_ends_the_others() {
    let scene = Scene::new();
    let (one, mut two) = (scene.client(), scene.client());
    one.create(all());
    two.created(all()).await;
    let Client { stream, frames, .. } = one;
    drop(frames);
    stream.closed().await;
    assert_eq!((scene.hub.statistics().streams, scene.hub.statistics().watchers), (1, 1));
    scene.hub.create(&stream, all());
    scene.commit(&[("b", Some("1"))]);
    assert_eq!(two.events().await.len(), 1);
    scene.hub.stop();
    let status = two.frames.next().await.unwrap().unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, "etcdserver: server stopped"));
    let mut late = scene.client();
    assert!(late.frames.next().await.unwrap().is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Commit(Vec<(u8, bool)>),
    Watch { stream: usize, low: u8, high: u8, back: i64, previous: bool, fragment: bool },
    Read(usize),
    Progress(usize),
    Jump,
    RingStartsNow,
    SlowPrevious(bool),
    Let(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let change = (0u8..6, prop::bool::weighted(0.8));
    prop_oneof![
        8 => proptest::collection::vec(change, 1..4).prop_map(Step::Commit),
        4 => (0usize..3, 0u8..6, 1u8..7, -3i64..12, any::<bool>(), any::<bool>()).prop_map(
            |(stream, low, high, back, previous, fragment)| Step::Watch { stream, low, high, back, previous, fragment }
        ),
        4 => (0usize..3).prop_map(Step::Read),
        2 => (0usize..3).prop_map(Step::Progress),
        1 => Just(Step::Jump),
        1 => Just(Step::RingStartsNow),
        1 => any::<bool>().prop_map(Step::SlowPrevious),
        6 => (1u8..6).prop_map(Step::Let),
    ]
}

/// What a watcher must see: everything of its range from its first revision on.
struct Expected {
    range: KeyRange,
    first: i64,
    previous: bool,
    seen: Vec<mvccpb::Event>,
    created: bool,
    progress: i64,
}

/// Checks one answer against the rules that hold at any time.
fn take(answer: &WatchResponse, watchers: &mut BTreeMap<i64, Expected>) {
    let revision = answer.header.as_ref().unwrap().revision;
    if answer.events.is_empty() && !answer.created {
        assert_eq!(answer.watch_id, -1);
        // Who is created later has not been told.
        for watcher in watchers.values_mut().filter(|watcher| watcher.created) {
            assert!(revision >= watcher.first - 1, "progress {revision} before the start {}", watcher.first);
            watcher.progress = watcher.progress.max(revision);
        }
        return;
    }
    let watcher = watchers.get_mut(&answer.watch_id).unwrap();
    assert_ne!(watcher.created, answer.created, "created comes first, and once");
    watcher.created = true;
    for event in &answer.events {
        let at = event.kv.as_ref().unwrap().mod_revision;
        assert!(at > watcher.progress, "an event of revision {at} after progress {}", watcher.progress);
        assert!(at <= revision);
        watcher.seen.push(event.clone());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    /// INV-WATCH-ORDER, -ONCE, -COMPLETE, -PROGRESS: whatever happens, each watcher sees exactly the history of its
    /// range, in order, and progress never runs ahead of it.
    #[test]
    fn each_watcher_sees_the_history_of_its_range(steps in proptest::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let scene = Scene::new();
            let mut clients = [scene.client(), scene.client(), scene.client()];
            let mut expected: [BTreeMap<i64, Expected>; 3] = Default::default();
            let value = "v".repeat(400);
            for step in steps {
                match step {
                    Step::Commit(changes) => {
                        let mut by_key: BTreeMap<String, Option<&str>> = BTreeMap::new();
                        for (key, put) in changes {
                            by_key.insert(char::from(b'a' + key).to_string(), put.then_some(value.as_str()));
                        }
                        let changes: Vec<Change<'_>> = by_key.iter().map(|(key, put)| (key.as_str(), *put)).collect();
                        scene.commit(&changes);
                    }
                    Step::Watch { stream, low, high, back, previous, fragment } => {
                        let (low, high) = (char::from(b'a' + low).to_string(), char::from(b'a' + high).to_string());
                        let now = scene.past.revision();
                        let start_revision = if back < 0 { 0 } else { (now + 2 - back).max(1) };
                        let watch_id = i64::try_from(expected[stream].len()).unwrap() + 1;
                        let request = CreateRequest {
                            key: low.clone().into(), range_end: high.clone().into(), start_revision, previous,
                            fragment, watch_id, ..CreateRequest::default()
                        };
                        let range = KeyRange::new(low.into(), high.into());
                        if range.is_empty() {
                            continue;
                        }
                        let first = if start_revision == 0 { now + 1 } else { start_revision };
                        expected[stream].insert(watch_id, Expected {
                            range, first, previous, seen: Vec::new(), created: false, progress: 0,
                        });
                        clients[stream].create(request);
                    }
                    Step::Read(stream) => {
                        while let Some(frame) = clients[stream].frames.next().now_or_never() {
                            let mut bytes = Vec::new();
                            frame.unwrap().unwrap().encode(&scene.hub.header(), &mut bytes);
                            let answer = WatchResponse::decode(bytes.as_slice()).unwrap();
                            take(&answer, &mut expected[stream]);
                        }
                    }
                    Step::Progress(stream) => {
                        clients[stream].hub.request_progress(&clients[stream].stream);
                    }
                    Step::Jump => scene.hub.restored(scene.past.revision()),
                    Step::RingStartsNow => {
                        let now = scene.past.revision();
                        scene.past.0.lock().ring_after = now;
                    }
                    Step::SlowPrevious(slow) => scene.past.1.store(slow, Ordering::SeqCst),
                    Step::Let(turns) => for _ in 0..turns {
                        tokio::task::yield_now().await;
                    },
                }
            }
            for _ in 0..2000 {
                tokio::task::yield_now().await;
            }
            let history: Vec<Event> =
                scene.past.0.lock().batches.iter().flat_map(|batch| batch.events.to_vec()).collect();
            for (client, watchers) in clients.iter_mut().zip(&mut expected) {
                while let Some(frame) = client.frames.next().now_or_never() {
                    let mut bytes = Vec::new();
                    frame.unwrap().unwrap().encode(&scene.hub.header(), &mut bytes);
                    take(&WatchResponse::decode(bytes.as_slice()).unwrap(), watchers);
                }
                for (id, watcher) in watchers {
                    let of_range = history.iter().filter(|e| {
                        e.mod_revision >= watcher.first && watcher.range.contains(&e.key)
                    });
                    let model: Vec<mvccpb::Event> = of_range.map(|event| mvccpb::Event {
                        r#type: i32::from(event.kind == EventKind::Delete),
                        kv: Some(event.key_value()),
                        prev_kv: if watcher.previous { scene.past.find_previous(event) } else { None },
                    }).collect();
                    assert_eq!(watcher.seen.len(), model.len(), "watcher {id}");
                    assert_eq!(watcher.seen, model, "watcher {id}");
                }
            }
            assert_eq!(scene.hub.statistics().behind, 0);
        });
    }
}
