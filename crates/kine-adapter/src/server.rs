//! A node's client side: listeners in, services wired to the store.
//!
//! One port speaks gRPC over HTTP/2 and plain HTTP/1 and HTTP/2 (probes, metrics); which of them a connection speaks
//! shows in its first bytes, which of them a request wants in its content type.
//!
//! [`Server::serve`] also runs what belongs to serving: the watch hub, the lessor, the eye on leadership. When it is
//! told to stop, streams end with "server stopped" (clients go to another node), requests in flight may finish, and
//! what has not within [`ServerOptions::drain_timeout`] is dropped.

use std::convert::Infallible;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use raft_sqlite::{Leadership, Node};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::error::KvError;
use crate::kv::{EventBatch, EventSink, LeaseChange, Store};
use crate::lease::{Lessor, LessorOptions};
use crate::rpc::{Body, OVERHEAD_BYTES, Router, Services};
use crate::watch::Hub;

/// The database that holds the etcd key space.
pub const DATABASE: &str = "etcd";

/// Flow control of HTTP/2: what a client may send before we have read it, for one request and for a connection. The
/// first holds the largest request, so that none waits for a window update.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Streams that a client may reset before we have looked at them, per connection: kube-apiserver drops hundreds of
/// watches at once, and hyper's default of 20 would cost it the connection.
const MAX_RESET_STREAMS: usize = 4096;
/// Pause after a failure to accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a [`Server`] goes by. The defaults are etcd's.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The version reported to clients; kube-apiserver derives features from it.
    pub etcd_version: String,
    /// How long followers wait for a leader before they elect one.
    pub election_timeout: Duration,
    /// How long a request may take before "request timed out" is its answer.
    pub request_timeout: Duration,
    /// How often watchers that want it are told how far they have got, with up to a tenth added at random.
    pub progress_notify_interval: Duration,
    /// How often a silent connection is pinged; zero: never.
    pub keepalive_interval: Duration,
    /// How long the answer to a ping may take.
    pub keepalive_timeout: Duration,
    /// Requests and watches at the same time on one connection.
    pub max_concurrent_streams: u32,
    /// Size of the database at which writes are refused, in bytes.
    pub quota_bytes: i64,
    /// Time for requests in flight when the server stops.
    pub drain_timeout: Duration,
    /// Without it, connections are not encrypted.
    pub tls: Option<TlsOptions>,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            etcd_version: "3.6.6".to_owned(),
            election_timeout: Duration::from_secs(1),
            request_timeout: Duration::from_secs(7),
            progress_notify_interval: Duration::from_secs(600),
            keepalive_interval: Duration::from_secs(2 * 3600),
            keepalive_timeout: Duration::from_secs(20),
            max_concurrent_streams: u32::MAX,
            quota_bytes: 2 << 30,
            drain_timeout: Duration::from_secs(5),
            tls: None,
        }
    }
}

impl ServerOptions {
    /// Major and minor version with a zero behind, as etcd reports its cluster's version.
    #[must_use]
    pub fn cluster_version(&self) -> String {
        let (major, minor) = self.major_minor();
        format!("{major}.{minor}.0")
    }

    /// As [`ServerOptions::cluster_version`]: the version of the storage format that clients are told.
    #[must_use]
    pub fn storage_version(&self) -> String {
        self.cluster_version()
    }

    fn major_minor(&self) -> (&str, &str) {
        let mut parts = self.etcd_version.split('.');
        (parts.next().unwrap_or("3"), parts.next().unwrap_or("6"))
    }
}

/// Certificates of the client port, in PEM.
#[derive(Debug, Clone)]
pub struct TlsOptions {
    /// This node's certificate, with what leads to its authority.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
    /// The authority of clients' certificates; without it, clients show none.
    pub client_authority: Option<Vec<u8>>,
}

/// Why a server could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates cannot be used.
    #[error("TLS: {0}")]
    Tls(#[source] tonic::transport::Error),
    /// A fault of the build.
    #[error("{0}")]
    Build(#[source] KvError),
}

/// The etcd API of a node.
#[derive(Debug)]
pub struct Server {
    services: Arc<Services>,
    leadership: watch::Receiver<Leadership>,
}

impl Server {
    /// A server for this node's store, which must be attached to the node. Watches and leases begin here: the store has
    /// one server.
    #[must_use]
    pub fn new(node: Node, store: Store, options: ServerOptions) -> Server {
        let leadership = node.leadership();
        Server::following(node, store, options, leadership)
    }

    /// As [`Server::new`], with this view of who leads: a seam for tests.
    pub(crate) fn following(
        node: Node,
        store: Store,
        options: ServerOptions,
        leadership: watch::Receiver<Leadership>,
    ) -> Server {
        debug_assert_eq!(node.id(), store.node().id());
        let max_fragment_bytes = store.options().max_request_bytes + OVERHEAD_BYTES;
        let hub = Hub::of_store(&store, max_fragment_bytes);
        let lessor_options =
            LessorOptions { extension: options.election_timeout, request_timeout: options.request_timeout };
        let lessor = Lessor::new(store.clone(), lessor_options);
        store.set_sink(Arc::new(Sink { hub: Arc::downgrade(&hub), lessor: Arc::downgrade(&lessor) }));
        hub.begin();
        Server { services: Services::new(store, hub, lessor, options, leadership.clone()), leadership }
    }

    /// The keeper of the leases' deadlines.
    #[must_use]
    pub fn lessor(&self) -> &Arc<Lessor> {
        &self.services.lessor
    }

    /// Serves these listeners until `shutdown` is ready and what was in flight has ended.
    ///
    /// # Errors
    /// If it could not begin to serve. A broken connection is no error.
    ///
    /// # Cancellation
    /// Dropping the future drops all connections.
    pub async fn serve(
        self,
        listeners: Vec<TcpListener>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let Server { services, leadership } = self;
        let router = Arc::new(Router::new(services.clone()).await.map_err(ServeError::Build)?);
        let app = App { services: services.clone(), router };
        let tls = services.options.tls.as_ref().map(tls_config);
        if let Some(tls) = &tls {
            // Faults show now rather than at the first connection.
            tonic::transport::Server::builder().tls_config(tls.clone()).map_err(ServeError::Tls)?;
        }

        let mut background = JoinSet::new();
        background.spawn(services.hub.clone().run());
        background.spawn(services.lessor.clone().run(leadership));
        let follower = services.clone();
        background.spawn(async move { follower.follow_leadership().await });

        let (stop, stopping) = watch::channel(false);
        let mut serving = JoinSet::new();
        for listener in listeners {
            match &tls {
                None => serving.spawn(serve_plain(app.clone(), listener, stopping.clone())),
                Some(tls) => serving.spawn(serve_tls(app.clone(), tls.clone(), listener, stopping.clone())),
            };
        }
        shutdown.await;
        services.stop();
        stop.send_replace(true);
        let drained = async { while serving.join_next().await.is_some() {} };
        if tokio::time::timeout(services.options.drain_timeout, drained).await.is_err() {
            tracing::warn!("requests in flight were dropped");
        }
        Ok(())
    }
}

/// What answers requests.
#[derive(Debug, Clone)]
struct App {
    services: Arc<Services>,
    router: Arc<Router>,
}

impl App {
    async fn answer<B>(self, request: Request<B>) -> Result<Response<Body>, Infallible>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        Ok(if is_grpc(request.headers()) {
            self.router.handle(request).await
        } else {
            crate::http::handle(&self.services, request.method(), request.uri()).await
        })
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(rest) = headers.get(CONTENT_TYPE).and_then(|kind| kind.as_bytes().strip_prefix(b"application/grpc"))
    else {
        return false;
    };
    matches!(rest.first(), None | Some(b'+' | b';'))
}

async fn serve_plain(app: App, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    let builder = Arc::new(connection_builder(&app.services.options));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(serve_connection(app.clone(), builder.clone(), socket, stopping.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            _ = connections.join_next(), if !connections.is_empty() => {}
            () = stopped(&mut stopping) => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Waits for the word to stop; a sender that is gone means the same.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

fn connection_builder(options: &ServerOptions) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    let mut http2 = builder.http2();
    http2
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(options.max_concurrent_streams)
        .max_pending_accept_reset_streams(MAX_RESET_STREAMS)
        .keep_alive_timeout(options.keepalive_timeout);
    if !options.keepalive_interval.is_zero() {
        http2.keep_alive_interval(options.keepalive_interval);
    }
    builder
}

async fn serve_connection(
    app: App,
    builder: Arc<auto::Builder<TokioExecutor>>,
    socket: TcpStream,
    mut stopping: watch::Receiver<bool>,
) {
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY not set");
    }
    let service = hyper::service::service_fn(move |request| app.clone().answer(request));
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(socket), service));
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = stopped(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended");
    }
}

fn tls_config(options: &TlsOptions) -> ServerTlsConfig {
    let config = ServerTlsConfig::new().identity(Identity::from_pem(&options.certificate, &options.key));
    match &options.client_authority {
        Some(authority) => config.client_ca_root(Certificate::from_pem(authority)),
        None => config,
    }
}

/// Encrypted connections are accepted by tonic, which brings rustls; requests take the same way from there.
async fn serve_tls(app: App, tls: ServerTlsConfig, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    let options = &app.services.options;
    let interval = (!options.keepalive_interval.is_zero()).then_some(options.keepalive_interval);
    let builder = tonic::transport::Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(options.max_concurrent_streams)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESET_STREAMS))
        .http2_keepalive_interval(interval)
        .http2_keepalive_timeout(Some(options.keepalive_timeout))
        .tls_config(tls);
    let mut builder = match builder {
        Ok(builder) => builder,
        Err(error) => return tracing::error!(%error, "TLS cannot be served"),
    };
    let service = tower::service_fn(move |request| app.clone().answer(request));
    let routes = tonic::service::Routes::from(axum::Router::new().fallback_service(service));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let stop = async move { stopped(&mut stopping).await };
    if let Err(error) = builder.add_routes(routes).serve_with_incoming_shutdown(incoming, stop).await {
        tracing::error!(%error, "TLS listener ended");
    }
}

/// Where the store's events go. Weak: the store holds the sink, hub and lessor hold the store.
#[derive(Debug)]
struct Sink {
    hub: Weak<Hub>,
    lessor: Weak<Lessor>,
}

impl EventSink for Sink {
    fn committed(&self, batches: &[Arc<EventBatch>]) {
        if let Some(hub) = self.hub.upgrade() {
            hub.committed(batches);
        }
    }

    fn leases_changed(&self, changes: &[LeaseChange]) {
        if let Some(lessor) = self.lessor.upgrade() {
            lessor.leases_changed(changes);
        }
    }

    fn restored(&self, revision: i64) {
        if let Some(hub) = self.hub.upgrade() {
            hub.restored(revision);
        }
        if let Some(lessor) = self.lessor.upgrade() {
            lessor.restored();
        }
    }

    fn compacted(&self, _revision: i64) {
        if let Some(hub) = self.hub.upgrade() {
            hub.compacted();
        }
    }
}
