//! What waits to be sent on one watch stream.
//!
//! The hub pushes [`Frame`]s, the gRPC body takes them. An answer's events are bytes that all watchers of the same range
//! share; a frame adds only what is its own (ids, flags, revision), so sending costs one copy into the socket's buffer.
//!
//! The queue is bounded. Events that find it full are refused: the hub then lets the watcher fall back to catching up
//! from history, and is told once the queue has been taken. Control answers (created, canceled, progress) always fit;
//! their number is bounded by reading no more requests while [`Outbox::room`] waits.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::{BufMut, Bytes};
use futures_util::Stream;
use parking_lot::{Mutex, MutexGuard};
use prost::Message;
use tokio::sync::Notify;
use tonic::Status;

use crate::proto::etcdserverpb::{ResponseHeader, WatchResponse};

/// Events waiting on one stream, in bytes, above which no more are taken: a connection that has stalled for some ten
/// milliseconds at full load; what is refused is not lost but sent from history.
pub(super) const MAX_WAITING_BYTES: usize = 1 << 20;
/// Answers waiting on one stream above which no events are taken and no requests are read.
pub(super) const MAX_WAITING_FRAMES: usize = 4096;

/// What all answers of this node say in their headers.
#[derive(Debug)]
pub(crate) struct HeaderSource {
    pub cluster_id: u64,
    pub member_id: u64,
    pub term: AtomicU64,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub(super) watch_id: i64,
    /// For the header.
    pub(super) revision: i64,
    pub(super) content: Content,
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// The watcher exists; its events follow.
    Created,
    /// There will be no such watcher.
    Refused { reason: String },
    /// There will be no more events of this watcher.
    Canceled { compact_revision: i64 },
    /// Everything up to the header's revision has been sent.
    Progress,
    /// Encoded `events` fields of a `WatchResponse`. `more`: the rest of the revision follows.
    Events { encoded: Bytes, more: bool },
}

impl Frame {
    /// Appends the answer as an encoded `WatchResponse`.
    pub(crate) fn encode(&self, header: &HeaderSource, out: &mut impl BufMut) {
        self.head(header).encode_raw(out);
        if let Content::Events { encoded, .. } = &self.content {
            out.put_slice(encoded);
        }
    }

    /// Everything but the events.
    pub(super) fn head(&self, header: &HeaderSource) -> WatchResponse {
        let mut response = WatchResponse {
            header: Some(ResponseHeader {
                cluster_id: header.cluster_id,
                member_id: header.member_id,
                revision: self.revision,
                raft_term: header.term.load(Ordering::Relaxed),
            }),
            watch_id: self.watch_id,
            ..WatchResponse::default()
        };
        match &self.content {
            Content::Created => response.created = true,
            Content::Refused { reason } => {
                response.created = true;
                response.canceled = true;
                response.cancel_reason.clone_from(reason);
            }
            Content::Canceled { compact_revision } => {
                response.canceled = true;
                response.compact_revision = *compact_revision;
            }
            Content::Progress => {}
            Content::Events { more, .. } => response.fragment = *more,
        }
        response
    }

    fn weight_bytes(&self) -> usize {
        match &self.content {
            Content::Events { encoded, .. } => encoded.len(),
            _ => 0,
        }
    }
}

/// The queue of one stream.
#[derive(Debug)]
pub(super) struct Outbox {
    waiting: Mutex<Waiting>,
    /// For whoever waits in [`Outbox::room`] or [`Outbox::closed`].
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
    waker: Option<Waker>,
    /// Events were refused: whoever takes the queue tells the hub.
    refused: bool,
    /// Ends the stream once the frames are out.
    end: Option<Status>,
    /// Nobody takes frames any more.
    closed: bool,
}

impl Outbox {
    pub fn new() -> Arc<Outbox> {
        Arc::new(Outbox { waiting: Mutex::default(), changed: Notify::new() })
    }

    /// Adds a control answer.
    pub fn push_control(&self, frame: Frame) {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return;
        }
        waiting.add(frame);
        wake(waiting);
    }

    /// Adds the answers that carry one run of events to one watcher: all or, if the queue is full, none.
    pub fn push_events(&self, frames: impl IntoIterator<Item = Frame>) -> bool {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return true;
        }
        if waiting.bytes >= MAX_WAITING_BYTES || waiting.frames.len() >= MAX_WAITING_FRAMES {
            waiting.refused = true;
            return false;
        }
        for frame in frames {
            waiting.add(frame);
        }
        wake(waiting);
        true
    }

    /// Ends the stream with `status` after what is waiting.
    pub fn finish(&self, status: Status) {
        let mut waiting = self.waiting.lock();
        if waiting.end.is_none() {
            waiting.end = Some(status);
        }
        wake(waiting);
    }

    /// Waits until there is room for control answers, or the stream is over.
    pub async fn room(&self) {
        self.wait_until(|waiting| waiting.closed || waiting.frames.len() < MAX_WAITING_FRAMES).await;
    }

    /// Waits until nobody takes frames any more.
    pub async fn closed(&self) {
        self.wait_until(|waiting| waiting.closed).await;
    }

    async fn wait_until(&self, condition: impl Fn(&Waiting) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if condition(&self.waiting.lock()) {
                return;
            }
            changed.await;
        }
    }

    fn close(&self) {
        *self.waiting.lock() = Waiting { closed: true, ..Waiting::default() };
        self.changed.notify_waiters();
    }
}

impl Waiting {
    fn add(&mut self, frame: Frame) {
        self.bytes += frame.weight_bytes();
        self.frames.push_back(frame);
    }
}

/// Wakes whoever takes the frames, once the lock has been given back.
fn wake(mut waiting: MutexGuard<'_, Waiting>) {
    let waker = waiting.waker.take();
    drop(waiting);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Takes the frames of one stream; dropping it ends the stream.
pub struct Frames {
    outbox: Arc<Outbox>,
    /// Taken from the outbox and not yet sent: the lock is taken once for many frames.
    taken: VecDeque<Frame>,
    ended: bool,
    /// Called with true when events were refused before and there is room again, with false at the end.
    notice: Box<dyn Fn(Notice) + Send + Sync>,
}

/// What [`Frames`] tells the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// Events were refused, and there is room again.
    Room,
    /// The stream is over.
    Gone,
}

impl std::fmt::Debug for Frames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frames").field("outbox", &self.outbox).finish_non_exhaustive()
    }
}

impl Frames {
    pub(super) fn new(outbox: Arc<Outbox>, notice: impl Fn(Notice) + Send + Sync + 'static) -> Frames {
        Frames { outbox, taken: VecDeque::new(), ended: false, notice: Box::new(notice) }
    }
}

impl Stream for Frames {
    type Item = Result<Frame, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(frame) = this.taken.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if this.ended {
            return Poll::Ready(None);
        }
        let (refused, was_full, end) = {
            let mut waiting = this.outbox.waiting.lock();
            if waiting.frames.is_empty() && waiting.end.is_none() {
                if !waiting.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                    waiting.waker = Some(context.waker().clone());
                }
                return Poll::Pending;
            }
            std::mem::swap(&mut this.taken, &mut waiting.frames);
            waiting.bytes = 0;
            let end = if this.taken.is_empty() { waiting.end.take() } else { None };
            (std::mem::take(&mut waiting.refused), this.taken.len() >= MAX_WAITING_FRAMES, end)
        };
        if refused {
            (this.notice)(Notice::Room);
        }
        if was_full {
            this.outbox.changed.notify_waiters();
        }
        match (this.taken.pop_front(), end) {
            (Some(frame), _) => Poll::Ready(Some(Ok(frame))),
            (None, Some(status)) => {
                this.ended = true;
                Poll::Ready(Some(Err(status)))
            }
            (None, None) => Poll::Pending,
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.outbox.close();
        (self.notice)(Notice::Gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::mvccpb;
    use futures_util::{FutureExt, StreamExt};
    use std::sync::atomic::AtomicUsize;

    fn events(size: usize) -> Frame {
        let encoded = Bytes::from(vec![0; size]);
        Frame { watch_id: 1, revision: 2, content: Content::Events { encoded, more: false } }
    }

    #[test]
    fn a_frame_is_a_watch_response() {
        let header = HeaderSource { cluster_id: 7, member_id: 8, term: AtomicU64::new(9) };
        let event = mvccpb::Event {
            r#type: 0,
            kv: Some(mvccpb::KeyValue { key: "k".into(), mod_revision: 5, ..Default::default() }),
            prev_kv: None,
        };
        let mut encoded = Vec::new();
        prost::encoding::message::encode(11, &event, &mut encoded);
        let head = ResponseHeader { cluster_id: 7, member_id: 8, revision: 5, raft_term: 9 };
        for (content, expected) in [
            (Content::Created, WatchResponse { created: true, ..Default::default() }),
            (
                Content::Refused { reason: "no".into() },
                WatchResponse { created: true, canceled: true, cancel_reason: "no".into(), ..Default::default() },
            ),
            (
                Content::Canceled { compact_revision: 4 },
                WatchResponse { canceled: true, compact_revision: 4, ..Default::default() },
            ),
            (Content::Progress, WatchResponse::default()),
            (
                Content::Events { encoded: encoded.into(), more: true },
                WatchResponse { fragment: true, events: vec![event], ..Default::default() },
            ),
        ] {
            let mut out = Vec::new();
            Frame { watch_id: -1, revision: 5, content }.encode(&header, &mut out);
            let expected = WatchResponse { header: Some(head), watch_id: -1, ..expected };
            assert_eq!(WatchResponse::decode(out.as_slice()).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn refuses_events_when_full_and_says_when_there_is_room() {
        let outbox = Outbox::new();
        let rooms = Arc::new(AtomicUsize::new(0));
        let count = rooms.clone();
        let mut frames = Frames::new(outbox.clone(), move |notice| {
            count.fetch_add(usize::from(notice == Notice::Room), Ordering::SeqCst);
        });
        assert!(outbox.push_events([events(MAX_WAITING_BYTES)]));
        assert!(!outbox.push_events([events(1)]));
        outbox.push_control(Frame { watch_id: -1, revision: 2, content: Content::Progress });
        assert!(matches!(frames.next().await, Some(Ok(frame)) if frame.watch_id == 1));
        assert_eq!(rooms.load(Ordering::SeqCst), 1);
        assert!(outbox.push_events([events(1)]));
        assert!(matches!(frames.next().await, Some(Ok(frame)) if frame.watch_id == -1));
        assert!(matches!(frames.next().await, Some(Ok(frame)) if frame.watch_id == 1));
        assert!(frames.next().now_or_never().is_none());
    }

    #[tokio::test]
    async fn ends_after_what_is_waiting() {
        let outbox = Outbox::new();
        let mut frames = Frames::new(outbox.clone(), |_| {});
        outbox.push_events([events(1)]);
        outbox.finish(Status::unavailable("over"));
        assert!(frames.next().await.unwrap().is_ok());
        assert_eq!(frames.next().await.unwrap().unwrap_err().message(), "over");
        assert!(frames.next().await.is_none());
        drop(frames);
        outbox.closed().await;
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_not_read_from() {
        let outbox = Outbox::new();
        let mut frames = Frames::new(outbox.clone(), |_| {});
        for revision in 0..i64::try_from(MAX_WAITING_FRAMES).unwrap() {
            outbox.push_control(Frame { watch_id: -1, revision, content: Content::Progress });
        }
        assert!(outbox.room().now_or_never().is_none());
        let _ = frames.next().await;
        outbox.room().await;
    }
}
