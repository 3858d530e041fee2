//! From a configuration to a running node.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{InitializeError, RaftError};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::rustls;
use tonic::transport::Server;

use super::admission::{self, Asker, Verdict};
use super::calls::{CallHandler, Handlers};
use super::client_service::ClientService;
use super::databases::{self, DatabasesHandler};
use super::identity::Identity;
use super::leadership::{self, Leadership};
use super::membership::{self, MembershipHandler};
use super::peer_service::PeerService;
use super::proposer::proposal_queue;
use super::read_index::{AskLeader, ReadIndex, RoundError};
use super::snapshot_service::Receiver;
use super::{Node, NodeInner, checkpointer, scrubber};
use crate::NodeId;
use crate::client::migrate::{self, MigrationHandler};
use crate::client::remote_sql::{self, SqlHandler};
use crate::config::{ClusterStart, NodeConfig, member_id};
use crate::consensus::machine::StateMachine;
use crate::consensus::snapshot::Source;
use crate::consensus::storage::LogStorage;
use crate::consensus::transport::Transport;
use crate::consensus::types::{PeerNode, Raft};
use crate::database::prepare::{ConnectionPurpose, Preparation, PrepareFailure};
use crate::database::reader_pool::ReaderPool;
use crate::database::replica::ReplicaOptions;
use crate::error::StartError;
use crate::log::{Log, LogOptions};
use crate::metrics::recorder::Recorder;
use crate::network::MAX_MESSAGE_BYTES;
use crate::network::channels::{Channels, Purpose};
use crate::network::identity::Incoming;
use crate::network::listener::{self, Connection, Connections};
use crate::network::proto;
use crate::network::proto::peer_server::PeerServer;
use crate::network::tls::Tls;
use crate::page::PageSize;
use crate::state_machine::observer::ApplyObserver;
use crate::state_machine::{Machine, MachineSetup};

/// Newest log entries kept in memory, in bytes: what followers that keep up are sent from.
const LOG_CACHE_BYTES: usize = 2 * 1024 * 1024;
/// Most results streamed at once.
const MAX_STREAMS: usize = 64;
/// How long a node that joins waits for some contact to answer.
const JOIN_PATIENCE: Duration = Duration::from_secs(30);

/// Prepares a node: what is registered here is there before the first entry is applied.
pub struct NodeBuilder {
    config: NodeConfig,
    observers: Vec<Arc<dyn ApplyObserver>>,
    handlers: Handlers,
    preparation: Preparation,
    peers: Peers,
    tls: Option<Tls>,
}

impl std::fmt::Debug for NodeBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl NodeBuilder {
    pub(super) fn new(config: NodeConfig) -> Self {
        let (observers, handlers, preparation) = (Vec::new(), Handlers::new(), Preparation::default());
        Self { config, observers, handlers, preparation, peers: Peers::default(), tls: None }
    }

    /// Adds an observer; they are told in the order in which they were added.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn ApplyObserver>) -> Self {
        self.observers.push(observer);
        self
    }

    /// Adds a handler for [`Node::call_leader`]. Every member must have it.
    #[must_use]
    pub fn handler(mut self, name: &str, handler: Arc<dyn CallHandler>) -> Self {
        self.handlers.insert(name.to_owned(), handler);
        self
    }

    /// Adds what is done to each connection that this node opens, before anybody uses it: the writer's and the readers' of every
    /// database. Give it functions, collations, virtual table modules, extensions that the program links; PRAGMAs that stay on the
    /// connection, temporary objects and `ATTACH ':memory:'` for scratch tables are fine, too. It is called again whenever a connection
    /// is opened anew: after a change of leadership, for a caller that left something on its connection, after a snapshot.
    ///
    /// Every member must be given the same. Writes run on the leader alone and the others get its pages, so a function may give
    /// anything (the time, a random number): all members store what the leader got. But collations, and functions in indexes,
    /// generated columns, CHECK constraints and views, have to mean the same on every member and in every version of the program: a
    /// follower reads through an index that the leader built. A column's collation that is missing on a member makes reads there fail.
    ///
    /// It runs with everything in place that the library rests on and cannot change it: hooks and the authorizer are set through
    /// `&mut Connection` only, PRAGMAs such as journal_mode are refused, and until it has ended the database is read-only for it.
    /// Through `Connection::handle` (unsafe) it could break all of this: register functions and modules by it, and nothing else.
    ///
    /// An error or a panic is told as [`PrepareError`](crate::PrepareError): by [`Self::start`], which tries it on one connection of
    /// each role, and later by the call that needed the connection ([`ReadError::Prepare`](crate::ReadError::Prepare), or
    /// [`WriteError::Rejected`](crate::WriteError::Rejected) with its words); the next call tries again.
    ///
    /// Use [`raft_sqlite::rusqlite`](crate::rusqlite): features that this crate does not switch on (`load_extension`, `array`, `csvtab`)
    /// a program adds by naming `rusqlite` in its own Cargo.toml, at the same version; Cargo refuses to link a second SQLite.
    ///
    /// ```no_run
    /// # use raft_sqlite::{Node, NodeConfig, rusqlite::functions::FunctionFlags};
    /// # fn build(config: NodeConfig) -> raft_sqlite::NodeBuilder {
    /// Node::builder(config).prepare_connection(|connection, _| {
    ///     connection.create_collation("by_length", |a, b| a.len().cmp(&b.len()))?;
    ///     let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
    ///     connection.create_scalar_function("double", 1, flags, |context| Ok(context.get::<i64>(0)? * 2))?;
    ///     Ok(())
    /// })
    /// # }
    /// ```
    #[must_use]
    pub fn prepare_connection<F>(mut self, prepare: F) -> Self
    where
        F: Fn(&rusqlite::Connection, &ConnectionPurpose<'_>) -> Result<(), PrepareFailure> + Send + Sync + 'static,
    {
        self.preparation.push(Arc::new(prepare));
        self
    }

    /// Takes peers' connections from a listener that the program has bound (a socket that was handed over, say), instead of binding
    /// [`NodeConfig::listen_peers`]. May be called several times. A tokio listener: `into_std`.
    #[must_use]
    pub fn peer_listener(mut self, listener: std::net::TcpListener) -> Self {
        self.peers.listeners.push(listener);
        self
    }

    /// Takes peers' connections from a stream (Unix sockets, an in-memory network, a server that listens for others, too), instead of
    /// binding [`NodeConfig::listen_peers`]. They are encrypted as others are, if there are certificates for peers. May be called
    /// several times; a stream that ends is a listener that is closed.
    #[must_use]
    pub fn peer_connections<S, C>(mut self, connections: S) -> Self
    where
        S: futures_util::Stream<Item = C> + Send + 'static,
        C: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
    {
        use futures_util::StreamExt as _;
        self.peers.streams.push(Box::pin(connections.map(Connection::new)));
        self
    }

    /// Encrypts peers' connections with the program's own rustls configurations, instead of [`NodeConfig::peer_tls`]: certificates from
    /// a hardware module or rotated by a resolver, other authorities, other ciphers. Who may be a peer is what their verifiers say:
    /// without client authentication everybody is. HTTP/2 is added to the protocols they name.
    #[must_use]
    pub fn peer_rustls(mut self, server: rustls::ServerConfig, client: rustls::ClientConfig) -> Self {
        self.tls = Some(Tls::from_configs(server, client));
        self
    }

    /// Starts the node: recovers what is on its disk, listens for peers, and takes part in its cluster. Returns before a leader is
    /// elected. Must be called inside a multi-threaded tokio runtime.
    ///
    /// # Errors
    /// See [`StartError`]; nothing was changed on disk that a later start would not find in order.
    pub async fn start(self) -> Result<Node, StartError> {
        let NodeBuilder { config, observers, mut handlers, preparation, peers, tls } = self;
        std::fs::create_dir_all(&config.data_dir)
            .map_err(|source| StartError::Io { path: config.data_dir.clone(), source })?;
        let tls = match (tls, &config.peer_tls) {
            (Some(tls), None) => tls,
            (Some(_), Some(_)) => {
                return Err(StartError::Configuration(
                    "peer TLS is given twice, as PEM (NodeConfig::peer_tls) and as rustls configurations: give one"
                        .into(),
                ));
            }
            (None, Some(pem)) => Tls::from_pem(pem).map_err(StartError::Configuration)?,
            (None, None) => Tls::default(),
        };
        check_schemes(&config, &tls)?;
        let peers = peers.into_connections(&config.listen_peers).await?;
        let kept = Identity::read(&config.data_dir)?;
        let configured = Identity::of_config(&config)?;
        let fresh = kept.is_none();
        let identity = match (kept, configured) {
            (Some(kept), configured) => {
                if let Some(configured) = configured {
                    kept.check(&configured, &config.data_dir)?;
                }
                kept
            }
            (None, Some(configured)) => configured,
            (None, None) => identity_from_contacts(&config, &tls).await?,
        };
        // Before anything is written: the data may be of another cluster.
        let verdict = match fresh {
            true => Verdict::Wait(String::new()),
            false => admission::ask(&config, &tls, &identity, true).await,
        };
        if let Verdict::Refuse(why) = verdict {
            return Err(StartError::Refused(why));
        }
        let log = Log::open(
            &config.data_dir.join("log"),
            &LogOptions { sync: config.log_sync, cache_bytes: LOG_CACHE_BYTES, ..LogOptions::default() },
        )?;
        if fresh {
            identity.write(&config.data_dir)?;
        }
        let (proposals, proposal_receiver) = proposal_queue();
        let recorder = Arc::<Recorder>::default();
        let options = ReplicaOptions { preparation, recorder: recorder.clone(), ..ReplicaOptions::default() };
        let machine = open_machine(&config, &identity, observers, options, proposals)?;
        let channels = Channels::new(identity.cluster_id, tls.clone());
        let storage = LogStorage::new(log.clone(), machine.checkpointed()).counting(recorder.clone());
        let raft = start_raft(&config, &identity, storage.clone(), &machine, &channels, recorder).await?;
        let has_log = raft.is_initialized().await.map_err(|error| StartError::Raft(error.to_string()))?;

        let (leadership_sender, leadership_receiver) = watch::channel(Leadership::default());
        let patience = config.election_timeout * 5;
        let contact = Arc::new(leadership::Contact::new(config.election_timeout));
        let weak: Arc<OnceLock<std::sync::Weak<NodeInner>>> = Arc::default();
        let ask = AskPeer { node: weak.clone() };
        let read_index = ReadIndex::start(raft.clone(), ask, patience);
        let (stop, stopped) = watch::channel(false);
        let inner = Arc::new_cyclic(|node| {
            handlers.insert(membership::HANDLER.into(), Arc::new(MembershipHandler { node: node.clone() }));
            handlers.insert(databases::HANDLER.into(), Arc::new(DatabasesHandler { node: node.clone() }));
            handlers.insert(migrate::HANDLER.into(), Arc::new(MigrationHandler::new(node.clone())));
            handlers.insert(remote_sql::HANDLER.into(), Arc::new(SqlHandler::new(node.clone())));
            NodeInner {
                identity: identity.clone(),
                raft: raft.clone(),
                machine: machine.clone(),
                log,
                storage,
                channels,
                handlers,
                read_index,
                leadership: leadership_receiver,
                contact: contact.clone(),
                receiver: Receiver::new(&machine),
                takes_part: AtomicBool::new(has_log),
                refused: OnceLock::new(),
                streams: Arc::new(tokio::sync::Semaphore::new(MAX_STREAMS)),
                tasks: parking_lot::Mutex::default(),
                stop,
                config,
            }
        });
        let _ = weak.set(Arc::downgrade(&inner));
        let node = Node { inner };
        let mut tasks = vec![
            tokio::spawn(proposal_receiver.run(raft.clone(), machine.clone())),
            tokio::spawn(leadership::run(raft, machine, identity.node_id, contact, leadership_sender)),
            tokio::spawn(checkpointer::run(Arc::downgrade(&node.inner))),
        ];
        if let Some(interval) = node.inner.config.scrub_interval {
            let speed = node.inner.config.scrub_bytes_per_second;
            tasks.push(tokio::spawn(scrubber::run(Arc::downgrade(&node.inner), interval, speed)));
        }
        tasks.extend(peers.into_iter().map(|peers| tokio::spawn(serve_peers(&node.inner, peers, stopped.clone()))));
        *node.inner.tasks.lock() = tasks;
        match enter_cluster(&node, has_log, verdict).await {
            Ok(task) => {
                let publish = tokio::spawn(leadership::publish_own_addresses(Arc::downgrade(&node.inner)));
                node.inner.tasks.lock().extend(task.into_iter().chain([publish]));
                Ok(node)
            }
            Err(error) => {
                if let Err(error) = node.shutdown().await {
                    tracing::warn!(%error, "the node that was not started did not stop cleanly");
                }
                Err(error)
            }
        }
    }
}

/// Where peers' connections come from, unless from the configured addresses.
#[derive(Default)]
struct Peers {
    listeners: Vec<std::net::TcpListener>,
    streams: Vec<Connections>,
}

impl Peers {
    async fn into_connections(self, addresses: &[String]) -> Result<Vec<Connections>, StartError> {
        let mut connections = self.streams;
        let given = !connections.is_empty() || !self.listeners.is_empty();
        for listener in self.listeners {
            let address = listener.local_addr().map_or_else(|_| "the program's listener".into(), |at| at.to_string());
            let taken = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
            let taken = taken.map_err(|source| StartError::Listen { address, source })?;
            connections.push(listener::of_listener(taken));
        }
        for address in addresses.iter().filter(|_| !given) {
            let listen = |source| StartError::Listen { address: address.clone(), source };
            let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address).await.map_err(listen)?.collect();
            connections.push(listener::of_listener(TcpListener::bind(&resolved[..]).await.map_err(listen)?));
        }
        Ok(connections)
    }
}

/// What this node advertises must be what it speaks: a peer that connects in the clear to an encrypted port only sees a hang-up.
fn check_schemes(config: &NodeConfig, tls: &Tls) -> Result<(), StartError> {
    let wrong = config.advertise_peer_urls.iter().find(|url| url.starts_with("https://") != tls.is_on());
    match wrong {
        None => Ok(()),
        Some(url) => Err(StartError::Configuration(match tls.is_on() {
            true => format!("this node has certificates for peers, and advertises {url}: make it https://"),
            false => format!("this node advertises {url}, and has no certificates for peers: give it some (peer_tls)"),
        })),
    }
}

fn open_machine(
    config: &NodeConfig,
    identity: &Identity,
    observers: Vec<Arc<dyn ApplyObserver>>,
    options: ReplicaOptions,
    proposals: super::proposer::ProposalQueue,
) -> Result<Machine, StartError> {
    let page_size = PageSize::new(config.page_size).ok_or_else(|| {
        StartError::Configuration(format!("page size {} is not a power of two from 512 to 65536", config.page_size))
    })?;
    let threads = match config.reader_threads {
        0 => std::thread::available_parallelism().map_or(2, |n| n.get()).min(4),
        threads => threads,
    };
    let readers =
        ReaderPool::start(threads).map_err(|source| StartError::Io { path: config.data_dir.clone(), source })?;
    let options = ReplicaOptions {
        page_size,
        max_transaction_bytes: config.max_transaction_bytes as usize,
        max_reader_age: config.max_reader_age,
        max_reader_bytes: config.max_reader_bytes as usize,
        track_tables: config.track_tables,
        ..options
    };
    Ok(Machine::open(MachineSetup {
        node: identity.node_id.0,
        directory: config.data_dir.join("db"),
        options,
        observers,
        proposer: Arc::new(proposals),
        readers: Arc::new(readers),
    })?)
}

async fn start_raft(
    config: &NodeConfig,
    identity: &Identity,
    storage: LogStorage,
    machine: &Machine,
    channels: &Channels,
    recorder: Arc<Recorder>,
) -> Result<Raft, StartError> {
    let election = config.election_timeout.as_millis() as u64;
    let raft_config = openraft::Config {
        cluster_name: format!("{:016x}", identity.cluster_id),
        heartbeat_interval: config.heartbeat_interval.as_millis() as u64,
        // A follower stands for election after openraft's lease (its largest time-out) and a random time-out: together between 1.2 and
        // 1.6 times what was configured.
        election_timeout_min: election * 2 / 5,
        election_timeout_max: election * 4 / 5,
        enable_pre_vote: Some(true),
        // A restarted leader must be elected again: it would else serve before it knows what is committed.
        enable_leader_restore: Some(false),
        // A member whose disk went back to an older state must not stop the leader: it is fed again, with a warning in the log.
        allow_log_reversion: Some(true),
        // The checkpointer decides when, and what is purged of the log.
        snapshot_policy: openraft::SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        replication_lag_threshold: u64::MAX,
        max_payload_entries: 512,
        purge_batch_size: 256,
        install_snapshot_timeout: 600_000,
        broadcast_submitted_on_append: Some(true),
        backoff: "50ms 100ms 200ms ..500ms".into(),
        ..Default::default()
    };
    let raft_config =
        raft_config.validate().map_err(|error| StartError::Configuration(format!("raft's time-outs: {error}")))?;
    let source = Source { machine: machine.clone(), storage: storage.clone() };
    let transport = Transport::new(channels.clone(), config.election_timeout, recorder, source);
    Raft::new(identity.node_id.0, Arc::new(raft_config), transport, storage, StateMachine::new(machine.clone()))
        .await
        .map_err(|error| StartError::Raft(error.to_string()))
}

/// Serves connections of peers until the node stops.
fn serve_peers(
    node: &Arc<NodeInner>,
    connections: Connections,
    mut stopped: watch::Receiver<bool>,
) -> impl Future<Output = ()> + Send + use<> {
    let identity = Incoming { cluster_id: node.identity.cluster_id, node_id: node.identity.node_id.0 };
    let service = PeerServer::new(PeerService::new(Arc::downgrade(node)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let service = tonic::service::interceptor::InterceptedService::new(service, identity);
    let router = Server::builder()
        .initial_stream_window_size(8 * 1024 * 1024)
        .initial_connection_window_size(16 * 1024 * 1024)
        .add_service(service)
        .add_service(ClientService::server(node));
    let connections = listener::encrypted(connections, node.channels.tls().clone());
    async move {
        // Connections are tasks of their own: this is what ends them. Left open, a peer would go on talking to a node that has stopped
        // in a process that has not.
        let stop = async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        };
        if let Err(error) = router.serve_with_incoming_shutdown(connections, stop).await {
            tracing::error!(%error, "the peer listener has ended");
        }
    }
}

/// Asks the present leader for its read index.
struct AskPeer {
    node: Arc<OnceLock<std::sync::Weak<NodeInner>>>,
}

impl AskLeader for AskPeer {
    async fn ask(&self) -> Result<u64, RoundError> {
        let node = self.node.get().and_then(std::sync::Weak::upgrade).ok_or("the node starts or stops")?;
        let leader = { node.raft.server_metrics().borrow_watched().current_leader };
        let leader = leader.filter(|leader| *leader != node.identity.node_id.0).ok_or("no leader is known")?;
        let urls = node.peer_urls(NodeId(leader));
        let url = urls.first().ok_or("the leader has no peer address")?;
        let mut client = node.channels.client(leader, url, Purpose::Heartbeat)?;
        let timeout = node.config.election_timeout;
        let answer = tokio::time::timeout(timeout, client.read_index(proto::ReadIndexRequest {}))
            .await
            .map_err(|_| "the leader did not answer in time".to_owned())?
            .map_err(|status| status.to_string())?
            .into_inner();
        if answer.leading { Ok(answer.index) } else { Err("the one asked does not lead".into()) }
    }
}

/// A node that joins learns its cluster from any contact.
async fn identity_from_contacts(config: &NodeConfig, tls: &Tls) -> Result<Identity, StartError> {
    let ClusterStart::Join { contacts, .. } = &config.cluster else {
        return Err(StartError::Configuration("this node has no data and no cluster to start or join".into()));
    };
    let mut last = "no contact was given".to_owned();
    let mut told = false;
    let deadline = tokio::time::Instant::now() + JOIN_PATIENCE;
    while tokio::time::Instant::now() < deadline {
        for contact in contacts {
            let asker = Asker { node_id: 0, peer_urls: &config.advertise_peer_urls };
            match admission::identify(contact, tls, Some(asker)).await {
                Ok(proto::IdentifyResponse { you: Some(you), .. }) if you.started => {
                    return Err(StartError::Refused(admission::lost_its_data(&config.data_dir, you.node_id)));
                }
                Ok(answer) => {
                    let unique = format!("{:016x}-{:016x}", answer.cluster_id, rand::random::<u64>());
                    return Ok(Identity {
                        cluster_id: answer.cluster_id,
                        node_id: member_id(&config.advertise_peer_urls, &unique),
                        name: config.name.clone(),
                    });
                }
                Err(why) => last = format!("{contact}: {why}"),
            }
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!("no member of the cluster to join answers yet: {last}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Err(StartError::Configuration(format!("no member of the cluster to join was reached: {last}")))
}

/// Makes the cluster of the initial members. Nothing to do if a peer was faster.
pub(super) async fn initialize(node: &NodeInner) -> Result<(), StartError> {
    let ClusterStart::Static { members, token } = &node.config.cluster else { return Ok(()) };
    let nodes: BTreeMap<u64, PeerNode> = members
        .iter()
        .map(|member| {
            let id = member_id(&member.peer_urls, token).0;
            // Alone, it needs no entry of its own to tell others.
            let alone = id == node.identity.node_id.0 && members.len() == 1;
            let client_urls = if alone { node.config.advertise_client_urls.clone() } else { Vec::new() };
            let (name, peer_urls) = (member.name.clone(), member.peer_urls.clone());
            (id, PeerNode { name, peer_urls, client_urls, started: alone })
        })
        .collect();
    match node.raft.initialize(nodes).await {
        Ok(()) => Ok(()),
        // A peer was faster: its log came in.
        Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
        Err(error) => Err(StartError::Raft(error.to_string())),
    }
}

/// Comes to the cluster: a node with a log just takes part; one without makes the cluster, or asks to be added to it, once its peers
/// have said that it may. The task goes on asking where that takes time.
async fn enter_cluster(
    node: &Node,
    has_log: bool,
    known: Verdict,
) -> Result<Option<tokio::task::JoinHandle<()>>, StartError> {
    let inner = &node.inner;
    let ask_on = || Ok(Some(tokio::spawn(admission::run(Arc::downgrade(inner), has_log))));
    if has_log {
        return if matches!(known, Verdict::Wait(_)) { ask_on() } else { Ok(None) };
    }
    let made_here = matches!(inner.config.cluster, ClusterStart::Static { .. });
    match admission::ask(&inner.config, inner.channels.tls(), &inner.identity, false).await {
        Verdict::Refuse(why) => return Err(StartError::Refused(why)),
        Verdict::TakePart { runs } if made_here => admission::take_part(inner, runs).await?,
        Verdict::Wait(_) if made_here => return ask_on(),
        // To be added, this node must answer its leader.
        Verdict::TakePart { .. } | Verdict::Wait(_) => {
            inner.takes_part.store(true, std::sync::atomic::Ordering::Release);
            if let ClusterStart::Join { contacts, voter } = &inner.config.cluster {
                membership::join(node, contacts, *voter).await.map_err(|error| StartError::Raft(error.to_string()))?;
            }
        }
    }
    Ok(None)
}
