//! etcdserverpb.Watch: requests to the hub, the hub's frames to the client.
//!
//! The task that reads a stream's requests lives as long as somebody takes the stream's answers: a client that has
//! said all it has to say goes on getting events.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Status, Streaming};
use tonic_prost::ProstDecoder;

use super::router::{LeaderLoss, Services};
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::{WatchCreateRequest, WatchRequest};
use crate::watch::{CreateRequest, Frame, Frames, HeaderSource, StreamHandle};

/// Shorter intervals of periodic progress are raised to this.
const MIN_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Buffers that an idle stream keeps; there are thousands of them.
const BUFFER_BYTES: usize = 1024;
/// Answers are gathered up to this before they are handed to the connection.
const GATHER_BYTES: usize = 32 << 10;

impl Services {
    /// Opens a stream; its requests are read by a task of their own.
    pub(super) fn watch(self: Arc<Self>, requests: Streaming<WatchRequest>, leader_loss: LeaderLoss) -> Frames {
        let (stream, frames) = self.hub.open();
        tokio::spawn(self.read_watch_requests(stream, requests, leader_loss));
        frames
    }

    async fn read_watch_requests(
        self: Arc<Self>,
        stream: StreamHandle,
        mut requests: Streaming<WatchRequest>,
        mut leader_loss: LeaderLoss,
    ) {
        let interval = self.options.progress_notify_interval.max(MIN_PROGRESS_INTERVAL);
        // Streams opened together shall not report together.
        let interval = interval + rand::rng().random_range(Duration::ZERO..interval / 10);
        let mut progress = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reading = true;
        // Tells whether any watcher of the stream ever asked for periodic progress.
        let progress_wanted = AtomicBool::new(false);
        loop {
            tokio::select! {
                request = next_request(&stream, &mut requests), if reading => match request {
                    Ok(Some(request)) => self.take_watch_request(&stream, request, &progress_wanted),
                    Ok(None) => reading = false,
                    Err(status) => return stream.finish(status),
                },
                _ = progress.tick(), if progress_wanted.load(Ordering::Relaxed) => {
                    self.hub.periodic_progress(&stream);
                }
                status = leader_loss.lost() => return stream.finish(status),
                () = stream.closed() => return,
            }
        }
    }

    fn take_watch_request(&self, stream: &StreamHandle, request: WatchRequest, progress_wanted: &AtomicBool) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => {
                if request.progress_notify {
                    progress_wanted.store(true, Ordering::Relaxed);
                }
                self.hub.create(stream, create_request(request));
            }
            Some(RequestUnion::CancelRequest(request)) => self.hub.cancel(stream, request.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.hub.request_progress(stream),
            None => tracing::debug!("watch request of an unknown kind passed over"),
        }
    }
}

async fn next_request(
    stream: &StreamHandle,
    requests: &mut Streaming<WatchRequest>,
) -> Result<Option<WatchRequest>, Status> {
    stream.room().await;
    requests.message().await
}

fn create_request(request: WatchCreateRequest) -> CreateRequest {
    let (mut no_put, mut no_delete) = (false, false);
    for filter in request.filters() {
        match filter {
            FilterType::Noput => no_put = true,
            FilterType::Nodelete => no_delete = true,
        }
    }
    CreateRequest {
        key: request.key,
        range_end: request.range_end,
        start_revision: request.start_revision,
        progress_notify: request.progress_notify,
        no_put,
        no_delete,
        previous: request.prev_kv,
        watch_id: request.watch_id,
        fragment: request.fragment,
    }
}

/// Requests as protobuf, answers as the hub's frames.
#[derive(Debug, Clone)]
pub(super) struct WatchCodec(pub Arc<HeaderSource>);

impl Codec for WatchCodec {
    type Encode = Frame;
    type Decode = WatchRequest;
    type Encoder = FrameEncoder;
    type Decoder = RequestDecoder;

    fn encoder(&mut self) -> FrameEncoder {
        FrameEncoder(self.0.clone())
    }

    fn decoder(&mut self) -> RequestDecoder {
        RequestDecoder(ProstDecoder::new(settings()))
    }
}

fn settings() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, GATHER_BYTES)
}

/// See [`WatchCodec`].
#[derive(Debug)]
pub(super) struct FrameEncoder(Arc<HeaderSource>);

impl Encoder for FrameEncoder {
    type Item = Frame;
    type Error = Status;

    fn encode(&mut self, frame: Frame, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        frame.encode(&self.0, out);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}

/// See [`WatchCodec`].
#[derive(Debug)]
pub(super) struct RequestDecoder(ProstDecoder<WatchRequest>);

impl Decoder for RequestDecoder {
    type Item = WatchRequest;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<WatchRequest>, Status> {
        self.0.decode(source)
    }

    fn buffer_settings(&self) -> BufferSettings {
        settings()
    }
}
