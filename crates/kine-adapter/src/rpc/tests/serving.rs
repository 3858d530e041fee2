//! A server for a test, and clients of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::Server;
use crate::kv::{Store, StoreOptions};
use crate::lease::Lessor;
use crate::proto::etcdserverpb::auth_client::AuthClient;
use crate::proto::etcdserverpb::cluster_client::ClusterClient;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::etcdserverpb::lease_client::LeaseClient;
use crate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::proto::etcdserverpb::watch_client::WatchClient;
use crate::proto::etcdserverpb::{PutRequest, RangeRequest, WatchRequest, WatchResponse};
use crate::server::{ServerOptions, TlsOptions};
use raft_sqlite::{Leadership, Node, NodeConfig};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that runs.
pub struct Running {
    pub node: Node,
    lessor: Arc<Lessor>,
    address: SocketAddr,
    channel: Channel,
    /// What the server is told of who leads; the node itself leads all the time.
    leadership: watch::Sender<Leadership>,
    stop: oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<()>,
    _data: tempfile::TempDir,
}

/// The only place where a node is made: one that leads a cluster of one.
async fn node(store: &Store) -> (Node, tempfile::TempDir) {
    let data = tempfile::tempdir().unwrap();
    let mut config = NodeConfig::single(data.path());
    config.name = "default".into();
    config.advertise_client_urls = vec!["http://127.0.0.1:2379".into()];
    config.heartbeat_interval = Duration::from_millis(20);
    config.election_timeout = Duration::from_millis(100);
    let builder = Node::builder(config).observer(store.observer()).handler("etcd", store.handler());
    let node = builder.start().await.unwrap();
    store.attach(node.clone());
    let mut leadership = node.leadership();
    let leading = leadership.wait_for(|leadership| leadership.writable_here);
    tokio::time::timeout(PATIENCE, leading).await.expect("a node alone comes to lead").unwrap();
    (node, data)
}

pub async fn start() -> Running {
    start_with(ServerOptions::default()).await
}

pub async fn start_tls() -> Running {
    let tls = TlsOptions {
        certificate: include_bytes!("../testdata/server.pem").to_vec(),
        key: include_bytes!("../testdata/server.key").to_vec(),
        client_authority: None,
    };
    start_with(ServerOptions { tls: Some(tls), ..ServerOptions::default() }).await
}

pub async fn start_with(options: ServerOptions) -> Running {
    let store = Store::new(StoreOptions { min_lease_ttl_seconds: 1, ..StoreOptions::default() });
    let (node, data) = node(&store).await;
    let leadership = watch::Sender::new(node.leadership().borrow().clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = options.tls.is_some();
    let server = Server::following(node.clone(), store, options, leadership.subscribe());
    let lessor = server.lessor().clone();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        let shutdown = async {
            let _ = stopped.await;
        };
        server.serve(vec![listener], shutdown).await.unwrap();
    });
    let endpoint = if tls {
        let authority = Certificate::from_pem(include_bytes!("../testdata/ca.pem"));
        let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name("localhost");
        Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap()
    } else {
        Endpoint::from_shared(format!("http://{address}")).unwrap()
    };
    let channel = endpoint.connect().await.unwrap();
    Running { node, lessor, address, channel, leadership, stop, serving, _data: data }
}

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() }
}

pub fn key_range(key: &str, end: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), range_end: end.to_owned().into(), ..Default::default() }
}

impl Running {
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel())
    }

    pub fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel())
    }

    pub fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel())
    }

    pub fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel())
    }

    pub fn auth(&self) -> AuthClient<Channel> {
        AuthClient::new(self.channel())
    }

    pub fn lessor(&self) -> &Lessor {
        &self.lessor
    }

    pub async fn watch(&self) -> Watching {
        self.watch_with(Request::new).await
    }

    pub async fn watch_with(
        &self,
        metadata: impl FnOnce(UnboundedReceiverStream<WatchRequest>) -> Request<UnboundedReceiverStream<WatchRequest>>,
    ) -> Watching {
        let (requests, queue) = mpsc::unbounded_channel();
        let request = metadata(UnboundedReceiverStream::new(queue));
        let answers = WatchClient::new(self.channel()).watch(request).await.unwrap().into_inner();
        Watching { requests: Some(requests), answers }
    }

    pub fn lose_leader(&self) {
        self.leadership.send_modify(|leadership| {
            leadership.leader = None;
            leadership.writable_here = false;
        });
    }

    pub fn regain_leader(&self) {
        self.leadership.send_modify(|leadership| {
            leadership.term += 1;
            leadership.leader = Some(self.node.id());
            leadership.writable_here = true;
        });
    }

    /// Waits for something that cannot be waited for otherwise.
    pub async fn wait_until(&self, condition: impl Fn(&Running) -> bool) {
        let waiting = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("what must happen has happened");
    }

    /// The server stops; the future is ready when it has. Returns what must outlive it.
    pub fn stop(self) -> impl Future<Output = tempfile::TempDir> {
        let Running { stop, serving, channel, _data, .. } = self;
        drop(channel);
        let _ = stop.send(());
        async move {
            tokio::time::timeout(PATIENCE, serving).await.expect("the server stops").unwrap();
            _data
        }
    }

    pub async fn get(&self, path: &str) -> (u16, String) {
        self.request("GET", path).await
    }

    /// Plain HTTP/1.1, by hand.
    pub async fn request(&self, method: &str, path: &str) -> (u16, String) {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }
}

/// A watch stream from the client's side.
pub struct Watching {
    requests: Option<mpsc::UnboundedSender<WatchRequest>>,
    answers: Streaming<WatchResponse>,
}

impl Watching {
    pub fn send(&self, request: WatchRequest) {
        self.requests.as_ref().unwrap().send(request).unwrap();
    }

    pub fn finish_sending(&mut self) {
        self.requests = None;
    }

    pub async fn next(&mut self) -> Result<WatchResponse, Status> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.next()).await.expect("an answer comes");
        answer.expect("the stream does not just end")
    }
}
