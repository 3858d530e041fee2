//! From the path of a request to the service that answers it, and what all services share.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use raft_sqlite::{Leadership, NodeId};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::server::{Grpc, ServerStreamingService, StreamingService};
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;

use super::body::Body;
use super::metrics::Metrics;
use super::unary::{refuse, unary};
use super::watch::WatchCodec;
use crate::error::KvError;
use crate::kv::Store;
use crate::lease::Lessor;
use crate::proto::etcdserverpb::{
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, RangeRequest, RangeStreamResponse, WatchRequest,
};
use crate::server::ServerOptions;
use crate::watch::{Frame, Frames, Hub};

/// Etcd lets gRPC messages be this much larger than the largest request.
pub(crate) const OVERHEAD_BYTES: usize = 512 << 10;
/// Election timeouts without a leader after which streams that require one end.
const LEADERLESS_ELECTIONS: u32 = 3;

/// What the services work with.
#[derive(Debug)]
pub(crate) struct Services {
    pub store: Store,
    pub hub: Arc<Hub>,
    pub lessor: Arc<Lessor>,
    pub options: ServerOptions,
    pub metrics: Metrics,
    leadership: watch::Receiver<Leadership>,
    /// Counts the times that a leader was missing for too long.
    leaderless: watch::Sender<u64>,
    stop: watch::Sender<bool>,
}

/// Tells a stream with `hasleader` that there has been no leader for too long.
#[derive(Debug)]
pub(super) struct LeaderLoss(Option<watch::Receiver<u64>>);

impl LeaderLoss {
    /// Waits for it, for ever if the stream does not care.
    pub async fn lost(&mut self) -> Status {
        if let Some(leaderless) = &mut self.0
            && leaderless.changed().await.is_ok()
        {
            return KvError::NoLeader.into();
        }
        std::future::pending().await
    }
}

impl Services {
    pub fn new(
        store: Store,
        hub: Arc<Hub>,
        lessor: Arc<Lessor>,
        options: ServerOptions,
        leadership: watch::Receiver<Leadership>,
    ) -> Arc<Services> {
        let (leaderless, stop) = (watch::Sender::new(0), watch::Sender::new(false));
        Arc::new(Services { store, hub, lessor, options, metrics: Metrics::default(), leadership, leaderless, stop })
    }

    /// Who leads, as far as this node knows.
    pub fn leader(&self) -> Option<NodeId> {
        self.leadership.borrow().leader
    }

    /// Follows leadership, until dropped: the term for watch headers, and the end of streams that require a leader.
    pub async fn follow_leadership(&self) {
        let mut leadership = self.leadership.clone();
        let patience = self.options.election_timeout * LEADERLESS_ELECTIONS;
        let (mut known, mut leaderless_since) = (None, Instant::now());
        loop {
            let leader = {
                let now = leadership.borrow_and_update();
                self.hub.set_term(now.term);
                now.leader
            };
            if leader.is_some() {
                leaderless_since = Instant::now();
                if leader != known {
                    known = leader;
                    self.metrics.leader_changed();
                }
            }
            // Terms come and go while there is no leader: it is the time without one that counts.
            let changed = tokio::select! {
                changed = leadership.changed() => changed.is_ok(),
                () = tokio::time::sleep_until(leaderless_since + patience), if leader.is_none() => {
                    leaderless_since = Instant::now();
                    self.leaderless.send_modify(|count| *count += 1);
                    true
                }
            };
            if !changed {
                // The node is gone, and we soon are.
                return;
            }
            if leader.is_some() {
                leaderless_since = Instant::now();
            }
        }
    }

    /// Ends all streams.
    pub fn stop(&self) {
        self.stop.send_replace(true);
        self.hub.stop();
    }

    /// Waits for [`Services::stop`].
    pub(super) async fn stopped(&self) {
        let mut stop = self.stop.subscribe();
        // The sender lives as long as self.
        let _ = stop.wait_for(|stop| *stop).await;
    }

    /// A learner serves only Status and serializable ranges.
    pub(super) fn refuse_learner(&self) -> Result<(), Status> {
        if self.store.node().status().role == raft_sqlite::Role::Learner {
            return Err(KvError::NotSupportedForLearner.into());
        }
        Ok(())
    }

    /// Waits until all that was committed before is applied here.
    pub async fn linearize(&self) -> Result<(), KvError> {
        self.store.node().linearize().await.map_err(|error| match error {
            raft_sqlite::ReadError::NoLeader(_) => KvError::NoLeader,
            raft_sqlite::ReadError::Timeout(_) => KvError::Timeout,
            other => KvError::Internal(other.to_string()),
        })
    }

    /// What etcd's metadata asks for.
    fn check_metadata(&self, headers: &HeaderMap) -> Result<bool, Status> {
        if headers.get("client-api-version").is_some_and(|version| std::str::from_utf8(version.as_bytes()).is_err()) {
            return Err(KvError::InvalidClientApiVersion.into());
        }
        let requires_leader = headers.get("hasleader").is_some_and(|value| value == "true");
        if requires_leader && self.leader().is_none() {
            return Err(KvError::NoLeader.into());
        }
        Ok(requires_leader)
    }

    fn leader_loss(&self, required: bool) -> LeaderLoss {
        LeaderLoss(required.then(|| self.leaderless.subscribe()))
    }
}

/// What is answered to a method that is known and not there yet.
pub(super) fn unimplemented(service: &str, method: &str) -> Status {
    Status::unimplemented(format!("method {method} of service {service} is not implemented"))
}

/// Answers every gRPC request of a server.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    services: Arc<Services>,
    /// Health and reflection, which tonic brings.
    standard: tonic::service::Routes,
}

impl Router {
    /// # Errors
    /// `Internal` if the descriptors for reflection cannot be read: a fault of the build.
    pub async fn new(services: Arc<Services>) -> Result<Router, KvError> {
        let health = tonic_health::server::HealthReporter::new();
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        let health = tonic_health::server::HealthService::from_health_reporter(health);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(crate::proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let unreadable = |error: tonic_reflection::server::Error| KvError::Internal(error.to_string());
        let standard = tonic::service::Routes::new(tonic_health::pb::health_server::HealthServer::new(health))
            .add_service(reflection().build_v1().map_err(unreadable)?)
            .add_service(reflection().build_v1alpha().map_err(unreadable)?);
        Ok(Router { services, standard })
    }

    /// Answers one request. Whoever drops the future gives the request up: a write may take place all the same.
    pub async fn handle<B>(&self, request: Request<B>) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let started = self.services.metrics.started(request.uri().path());
        let response = match self.services.check_metadata(request.headers()) {
            Ok(requires_leader) => self.route(request, requires_leader).await,
            Err(status) => refuse(&status),
        };
        let code =
            response.headers().get(Status::GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
        self.services.metrics.handled(started, code);
        response
    }

    async fn route<B>(&self, request: Request<B>, requires_leader: bool) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let s = &self.services;
        let limit = s.store.options().max_request_bytes.saturating_add(OVERHEAD_BYTES);
        let Some((service, method)) = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'))
        else {
            return refuse(&Status::unimplemented("malformed method name"));
        };
        match (service, method) {
            ("etcdserverpb.KV", "Range") => unary(request, limit, |q| s.range(q)).await,
            ("etcdserverpb.KV", "Put") => unary(request, limit, |q| s.put(q)).await,
            ("etcdserverpb.KV", "Txn") => unary(request, limit, |q| s.txn(q)).await,
            ("etcdserverpb.KV", "DeleteRange") => unary(request, limit, |q| s.delete_range(q)).await,
            ("etcdserverpb.KV", "Compact") => unary(request, limit, |q| s.compact(q)).await,
            ("etcdserverpb.KV", "RangeStream") => self.range_stream(request, limit).await,

            ("etcdserverpb.Watch", "Watch") => self.watch(request, limit, requires_leader).await,

            ("etcdserverpb.Lease", "LeaseGrant") => unary(request, limit, |q| s.lease_grant(q)).await,
            ("etcdserverpb.Lease", "LeaseRevoke") => unary(request, limit, |q| s.lease_revoke(q)).await,
            ("etcdserverpb.Lease", "LeaseTimeToLive") => unary(request, limit, |q| s.lease_time_to_live(q)).await,
            ("etcdserverpb.Lease", "LeaseLeases") => unary(request, limit, |q| s.lease_leases(q)).await,
            ("etcdserverpb.Lease", "LeaseKeepAlive") => self.lease_keep_alive(request, limit, requires_leader).await,

            ("etcdserverpb.Cluster", "MemberList") => unary(request, limit, |q| s.member_list(q)).await,
            ("etcdserverpb.Cluster", "MemberRemove") => unary(request, limit, |q| s.member_remove(q)).await,
            ("etcdserverpb.Maintenance", "Status") => unary(request, limit, |q| s.status(q)).await,
            ("etcdserverpb.Maintenance", "Alarm") => unary(request, limit, |q| s.alarm(q)).await,
            ("etcdserverpb.Auth", "AuthStatus") => unary(request, limit, |q| s.auth_status(q)).await,
            ("etcdserverpb.Auth", "Authenticate") => unary(request, limit, |q| s.authenticate(q)).await,

            (
                "grpc.health.v1.Health"
                | "grpc.reflection.v1.ServerReflection"
                | "grpc.reflection.v1alpha.ServerReflection",
                _,
            ) => self.standard(request).await,
            (service, method) => refuse(&unimplemented(service, method)),
        }
    }

    async fn standard<B>(&self, request: Request<B>) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let mut routes = self.standard.clone();
        let Ok(response) = routes.call(request.map(tonic::body::Body::new)).await;
        response.map(Body::from)
    }

    async fn watch<B>(&self, request: Request<B>, limit: usize, requires_leader: bool) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        if let Err(status) = self.services.refuse_learner() {
            return refuse(&status);
        }
        let leader_loss = self.services.leader_loss(requires_leader);
        let service = WatchService { services: self.services.clone(), leader_loss: Some(leader_loss) };
        let codec = WatchCodec(self.services.hub.header());
        Grpc::new(codec).max_decoding_message_size(limit).streaming(service, request).await.map(Body::from)
    }

    async fn lease_keep_alive<B>(&self, request: Request<B>, limit: usize, requires_leader: bool) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        if let Err(status) = self.services.refuse_learner() {
            return refuse(&status);
        }
        let leader_loss = self.services.leader_loss(requires_leader);
        let service = KeepAliveService { services: self.services.clone(), leader_loss: Some(leader_loss) };
        let codec = ProstCodec::default();
        Grpc::new(codec).max_decoding_message_size(limit).streaming(service, request).await.map(Body::from)
    }

    async fn range_stream<B>(&self, request: Request<B>, limit: usize) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let service = RangeStreamService(self.services.clone());
        let codec = ProstCodec::default();
        Grpc::new(codec).max_decoding_message_size(limit).server_streaming(service, request).await.map(Body::from)
    }
}

type BoxStream<T> = std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<T, Status>> + Send>>;

struct WatchService {
    services: Arc<Services>,
    leader_loss: Option<LeaderLoss>,
}

impl StreamingService<WatchRequest> for WatchService {
    type Response = Frame;
    type ResponseStream = Frames;
    type Future = std::future::Ready<Result<tonic::Response<Frames>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<WatchRequest>>) -> Self::Future {
        let leader_loss = self.leader_loss.take().unwrap_or(LeaderLoss(None));
        let frames = self.services.clone().watch(request.into_inner(), leader_loss);
        std::future::ready(Ok(tonic::Response::new(frames)))
    }
}

struct KeepAliveService {
    services: Arc<Services>,
    leader_loss: Option<LeaderLoss>,
}

impl StreamingService<LeaseKeepAliveRequest> for KeepAliveService {
    type Response = LeaseKeepAliveResponse;
    type ResponseStream = BoxStream<LeaseKeepAliveResponse>;
    type Future = std::future::Ready<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<LeaseKeepAliveRequest>>) -> Self::Future {
        let leader_loss = self.leader_loss.take().unwrap_or(LeaderLoss(None));
        let answers = self.services.clone().lease_keep_alive(request.into_inner(), leader_loss);
        std::future::ready(Ok(tonic::Response::new(Box::pin(answers))))
    }
}

struct RangeStreamService(Arc<Services>);

impl ServerStreamingService<RangeRequest> for RangeStreamService {
    type Response = RangeStreamResponse;
    type ResponseStream = BoxStream<RangeStreamResponse>;
    type Future = futures_util::future::BoxFuture<'static, Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<RangeRequest>) -> Self::Future {
        let services = self.0.clone();
        Box::pin(async move {
            let chunks = services.range_stream(request.into_inner()).await?;
            Ok(tonic::Response::new(Box::pin(chunks) as Self::ResponseStream))
        })
    }
}
