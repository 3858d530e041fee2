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
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, ClientTlsConfig, Identity as TlsIdentity, Server, ServerTlsConfig};

use super::admission::{self, Asker, Verdict};
use super::calls::{CallHandler, Handlers};
use super::identity::Identity;
use super::leadership::{self, Leadership};
use super::membership::{self, MembershipHandler};
use super::peer_service::PeerService;
use super::proposer::proposal_queue;
use super::read_index::{AskLeader, ReadIndex, RoundError};
use super::snapshot_service::Receiver;
use super::{Node, NodeInner, checkpointer};
use crate::NodeId;
use crate::client::remote_sql::{self, SqlHandler};
use crate::config::{ClusterStart, NodeConfig, member_id};
use crate::consensus::machine::StateMachine;
use crate::consensus::snapshot::Source;
use crate::consensus::storage::LogStorage;
use crate::consensus::transport::Transport;
use crate::consensus::types::{PeerNode, Raft};
use crate::database::reader_pool::ReaderPool;
use crate::database::replica::ReplicaOptions;
use crate::error::StartError;
use crate::log::{Log, LogOptions};
use crate::network::MAX_MESSAGE_BYTES;
use crate::network::channels::{Channels, Purpose};
use crate::network::identity::Incoming;
use crate::network::proto;
use crate::network::proto::peer_server::PeerServer;
use crate::page::PageSize;
use crate::state_machine::observer::ApplyObserver;
use crate::state_machine::{Machine, MachineSetup};

/// Newest log entries kept in memory, in bytes: what followers that keep up are sent from.
const LOG_CACHE_BYTES: usize = 2 * 1024 * 1024;
/// How long a node that joins waits for some contact to answer.
const JOIN_PATIENCE: Duration = Duration::from_secs(30);

/// Prepares a node: what is registered here is there before the first entry is applied.
pub struct NodeBuilder {
    config: NodeConfig,
    observers: Vec<Arc<dyn ApplyObserver>>,
    handlers: Handlers,
}

impl std::fmt::Debug for NodeBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl NodeBuilder {
    pub(super) fn new(config: NodeConfig) -> Self {
        Self { config, observers: Vec::new(), handlers: Handlers::new() }
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

    /// Starts the node: recovers what is on its disk, listens for peers, and takes part in its cluster. Returns before a leader is
    /// elected. Must be called inside a multi-threaded tokio runtime.
    ///
    /// # Errors
    /// See [`StartError`]; nothing was changed on disk that a later start would not find in order.
    pub async fn start(self) -> Result<Node, StartError> {
        let NodeBuilder { config, observers, mut handlers } = self;
        std::fs::create_dir_all(&config.data_dir)
            .map_err(|source| StartError::Io { path: config.data_dir.clone(), source })?;
        let listeners = listen(&config.listen_peers).await?;
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
            (None, None) => identity_from_contacts(&config).await?,
        };
        // Before anything is written: the data may be of another cluster.
        let verdict = match fresh {
            true => Verdict::Wait(String::new()),
            false => admission::ask(&config, &identity, true).await,
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
        let machine = open_machine(&config, &identity, observers, proposals)?;
        let channels = Channels::new(identity.cluster_id, client_tls(&config));
        let storage = LogStorage::new(log.clone(), machine.checkpointed());
        let raft = start_raft(&config, &identity, storage.clone(), &machine, &channels).await?;
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
                tasks: parking_lot::Mutex::default(),
                stop,
                config,
            }
        });
        let _ = weak.set(Arc::downgrade(&inner));
        let node = Node { inner };
        let mut tasks = vec![
            tokio::spawn(proposal_receiver.run(raft.clone())),
            tokio::spawn(leadership::run(raft, machine, identity.node_id, contact, leadership_sender)),
            tokio::spawn(checkpointer::run(Arc::downgrade(&node.inner))),
        ];
        for listener in listeners {
            tasks.push(tokio::spawn(serve_peers(node.clone().inner, listener, stopped.clone())?));
        }
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

async fn listen(addresses: &[String]) -> Result<Vec<TcpListener>, StartError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let listen = |source| StartError::Listen { address: address.clone(), source };
        let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address).await.map_err(listen)?.collect();
        listeners.push(TcpListener::bind(&resolved[..]).await.map_err(listen)?);
    }
    Ok(listeners)
}

fn open_machine(
    config: &NodeConfig,
    identity: &Identity,
    observers: Vec<Arc<dyn ApplyObserver>>,
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
        ..ReplicaOptions::default()
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
    let transport = Transport::new(channels.clone(), config.election_timeout, source);
    Raft::new(identity.node_id.0, Arc::new(raft_config), transport, storage, StateMachine::new(machine.clone()))
        .await
        .map_err(|error| StartError::Raft(error.to_string()))
}

pub(super) fn client_tls(config: &NodeConfig) -> Option<ClientTlsConfig> {
    config.peer_tls.as_ref().map(|tls| {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&tls.authority_pem))
            .identity(TlsIdentity::from_pem(&tls.certificate_pem, &tls.key_pem))
    })
}

/// The future that serves one peer listener until the node stops.
fn serve_peers(
    node: Arc<NodeInner>,
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
) -> Result<impl Future<Output = ()> + Send + 'static, StartError> {
    let identity = Incoming { cluster_id: node.identity.cluster_id, node_id: node.identity.node_id.0 };
    let service = PeerServer::new(PeerService::new(Arc::downgrade(&node)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let service = tonic::service::interceptor::InterceptedService::new(service, identity);
    let mut server =
        Server::builder().initial_stream_window_size(8 * 1024 * 1024).initial_connection_window_size(16 * 1024 * 1024);
    if let Some(tls) = &node.config.peer_tls {
        let tls = ServerTlsConfig::new()
            .identity(TlsIdentity::from_pem(&tls.certificate_pem, &tls.key_pem))
            .client_ca_root(Certificate::from_pem(&tls.authority_pem));
        server = server.tls_config(tls).map_err(|error| StartError::Configuration(format!("peer TLS: {error}")))?;
    }
    let router = server.add_service(service);
    // Small answers must not wait for the acknowledgement of the ones before.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Ok(async move {
        // Connections are tasks of their own: this is what ends them. Left open, a peer would go on talking to a node that has stopped
        // in a process that has not.
        let stop = async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        };
        if let Err(error) = router.serve_with_incoming_shutdown(incoming, stop).await {
            tracing::error!(%error, "the peer listener has ended");
        }
    })
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
async fn identity_from_contacts(config: &NodeConfig) -> Result<Identity, StartError> {
    let ClusterStart::Join { contacts, .. } = &config.cluster else {
        return Err(StartError::Configuration("this node has no data and no cluster to start or join".into()));
    };
    let mut last = "no contact was given".to_owned();
    let mut told = false;
    let deadline = tokio::time::Instant::now() + JOIN_PATIENCE;
    while tokio::time::Instant::now() < deadline {
        for contact in contacts {
            let asker = Asker { node_id: 0, peer_urls: &config.advertise_peer_urls };
            match admission::identify(contact, config, Some(asker)).await {
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
    match admission::ask(&inner.config, &inner.identity, false).await {
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
