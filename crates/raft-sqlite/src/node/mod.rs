//! A running node: wiring of log, state machine, consensus, network and databases, and the handle that a program holds.
//!
//! - `start`: from a configuration to a running node;
//! - `admission`: whether this node may take part in its cluster;
//! - `leadership`: opens the writers when this node leads, closes them when it does not;
//! - `proposer`: sealed groups to Raft;
//! - `read_index`: linearizable reads;
//! - `peer_service`: what peers ask of this node; `snapshot_service`: a snapshot from the leader;
//! - `client_service`: what programs ask of it that are no members;
//! - `membership`: adding, removing, promoting members;
//! - `databases`: making and dropping databases;
//! - `checkpointer`: when a checkpoint is due;
//! - `scrubber`: reads what lies on the disk, and compares.

mod admission;
mod calls;
mod checkpointer;
mod client_service;
mod databases;
mod identity;
mod leadership;
mod membership;
mod metrics;
mod peer_service;
mod proposer;
mod read_index;
mod scrubber;
mod snapshot_service;
mod start;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver as _;
use tokio::sync::watch;

pub use calls::CallHandler;
pub use leadership::Leadership;
pub use membership::Member;
pub use start::NodeBuilder;

use calls::Handlers;
use identity::Identity;
use read_index::{Confirmed, ReadIndex, wait_applied};

use crate::NodeId;
use crate::client::LocalDatabase;
use crate::config::NodeConfig;
use crate::consensus::types::{Raft, term_of};
use crate::database::replica::ReplicaStatistics;
use crate::error::{CallError, ErrorClass, ReadError};
use crate::network::channels::{Channels, Purpose};
use crate::network::proto;
use crate::page::PageDamage;
use crate::state_machine::Machine;

/// What part a node plays in its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads.
    Leader,
    /// It follows, with a vote.
    Follower,
    /// It stands for election.
    Candidate,
    /// It follows, without a vote.
    Learner,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Leader => "leader",
            Role::Follower => "follower",
            Role::Candidate => "candidate",
            Role::Learner => "learner",
        })
    }
}

/// A node at one moment, as it sees itself.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// This member.
    pub id: NodeId,
    /// Its cluster.
    pub cluster_id: u64,
    /// The newest Raft term it knows.
    pub term: u64,
    /// Who leads, as far as it knows.
    pub leader: Option<NodeId>,
    /// What part it plays.
    pub role: Role,
    /// The last entry of its log; 0 = none.
    pub last_log_index: u64,
    /// The last entry it knows to be committed; 0 = none.
    pub committed_index: u64,
    /// The last entry it has applied; 0 = none.
    pub applied_index: u64,
    /// Why it serves no more, if so.
    pub broken: Option<String>,
    /// What was found to be damaged on its disk: the first page. It serves what is whole, and leads only if nobody else can.
    pub damaged: Option<PageDamage>,
}

/// A database at one moment.
#[derive(Clone, Debug)]
pub struct DatabaseStatistics {
    /// Newest committed version.
    pub version: u64,
    /// Hash of the whole database at that version: equal on all nodes.
    pub state_hash: u128,
    /// Size of the database, in bytes.
    pub size_bytes: u64,
    /// Of these, bytes of pages not on the free list.
    pub in_use_bytes: u64,
    /// Page images held in memory, in bytes.
    pub memory_bytes: u64,
    /// Of these, what only readers of older versions need, in bytes.
    pub held_bytes: u64,
    /// How long the oldest reader has held its version.
    pub oldest_reader: Option<Duration>,
}

/// What a node has sent of snapshots to members that the log no longer reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotStatistics {
    /// Snapshots that a member has received.
    pub completed: u64,
    /// Bytes sent: pages, compressed, hashes and PageSets.
    pub sent_bytes: u64,
    /// Pages sent.
    pub sent_pages: u64,
    /// Pages hashed to find out whether they have to be sent.
    pub compared_pages: u64,
}

pub(crate) struct NodeInner {
    pub(crate) config: NodeConfig,
    pub(crate) identity: Identity,
    pub(crate) raft: Raft,
    pub(crate) machine: Machine,
    pub(crate) log: crate::log::Log,
    pub(crate) storage: crate::consensus::storage::LogStorage,
    pub(crate) channels: Channels,
    pub(crate) handlers: Handlers,
    pub(crate) read_index: ReadIndex,
    pub(crate) leadership: watch::Receiver<Leadership>,
    contact: Arc<leadership::Contact>,
    receiver: snapshot_service::Receiver,
    /// Peers are answered; false: it is not known yet whether this node may vote.
    takes_part: std::sync::atomic::AtomicBool,
    /// Why this node must not take part.
    refused: std::sync::OnceLock<String>,
    /// Results that are being streamed: each has a thread and a connection.
    pub(crate) streams: Arc<tokio::sync::Semaphore>,
    tasks: parking_lot::Mutex<Vec<tokio::task::JoinHandle<()>>>,
    stop: watch::Sender<bool>,
}

/// How a call went on this node.
pub(crate) enum LocalCall {
    Answered(Result<Bytes, Bytes>),
    NotLeading,
    NoHandler,
}

impl NodeInner {
    /// How long an operation waits for a leader to be elected and to confirm: several elections.
    pub(crate) fn patience(&self) -> Duration {
        self.config.election_timeout * 5
    }

    /// This node takes no part in its cluster; whoever runs it is told by [`NodeStatus::broken`].
    fn refuse(&self, why: String) {
        tracing::error!("{why}");
        let _ = self.refused.set(why);
    }

    pub(crate) async fn call_local(&self, handler: &str, payload: Bytes) -> LocalCall {
        if !self.leadership.borrow().writable_here {
            return LocalCall::NotLeading;
        }
        match self.handlers.get(handler) {
            Some(handler) => LocalCall::Answered(handler.call(payload).await),
            None => LocalCall::NoHandler,
        }
    }

    /// A round of ReadIndex that began after this call, and its index applied here.
    pub(crate) async fn confirm(&self) -> Result<Confirmed, ReadError> {
        let confirmed = match self.read_index.confirm().await {
            None => return Err(ReadError::Overloaded),
            Some(Err(why)) => return Err(ReadError::NoLeader(why)),
            Some(Ok(confirmed)) => confirmed,
        };
        let mut applied = self.machine.applied_index();
        wait_applied(&mut applied, confirmed.index, self.patience()).await.map_err(ReadError::Timeout)?;
        Ok(confirmed)
    }

    /// Peer addresses of a member, as the membership in force names them.
    pub(crate) fn peer_urls(&self, id: NodeId) -> Vec<String> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&id.0).map_or_else(Vec::new, |node| node.peer_urls.clone())
    }

    /// One try at calling the handler on `leader`, another node.
    async fn call_remote(&self, leader: NodeId, handler: &str, payload: Bytes) -> Result<Bytes, CallError> {
        use proto::call_response::Outcome;
        let urls = self.peer_urls(leader);
        let url = urls.first().ok_or_else(|| CallError::NotSent(format!("member {leader} has no peer address")))?;
        let mut client = self.channels.client(leader.0, url, Purpose::Call).map_err(CallError::NotSent)?;
        let request = proto::CallRequest { handler: handler.to_owned(), payload };
        self.machine.recorder().calls.add(1);
        let answer = match client.call(request).await {
            Ok(response) => match response.into_inner().outcome {
                Some(Outcome::Reply(reply)) => Ok(reply),
                Some(Outcome::Error(error)) => Err(CallError::Handler(error)),
                Some(Outcome::NotLeading(_)) => Err(CallError::NoLeader),
                Some(Outcome::NoHandler(_)) => Err(CallError::NotSent(format!(
                    "member {leader} has no handler {handler:?}: is it of another version?"
                ))),
                None => Err(CallError::OutcomeUnknown(format!("member {leader} answered without an outcome"))),
            },
            Err(status) if never_sent(&status) => Err(CallError::NotSent(status.message().to_owned())),
            Err(status) => Err(CallError::OutcomeUnknown(format!("{}: {}", status.code(), status.message()))),
        };
        match &answer {
            // The handler's own refusals are answers.
            Ok(_) | Err(CallError::Handler(_)) => {}
            Err(CallError::NoLeader | CallError::NotSent(_) | CallError::Stopped) => {
                self.machine.recorder().call_errors.count(ErrorClass::Retryable);
            }
            Err(CallError::OutcomeUnknown(_)) => {
                self.machine.recorder().call_errors.count(ErrorClass::OutcomeUnknown);
            }
        }
        answer
    }
}

/// Whether a call provably did not reach the peer's handler: no connection, or refused for its identity.
pub(crate) fn never_sent(status: &tonic::Status) -> bool {
    if status.code() == tonic::Code::FailedPrecondition {
        return true;
    }
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// A running node. Clones are handles to the same node; it runs until [`Node::shutdown`].
#[derive(Clone)]
pub struct Node {
    pub(crate) inner: Arc<NodeInner>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.id()).field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Node {
    /// Prepares a node.
    pub fn builder(config: NodeConfig) -> NodeBuilder {
        NodeBuilder::new(config)
    }

    /// Starts a node without observers or handlers. See [`NodeBuilder::start`].
    ///
    /// # Errors
    /// See [`crate::error::StartError`].
    pub async fn start(config: NodeConfig) -> Result<Node, crate::error::StartError> {
        NodeBuilder::new(config).start().await
    }

    /// This member.
    pub fn id(&self) -> NodeId {
        self.inner.identity.node_id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.identity.name
    }

    /// Its cluster.
    pub fn cluster_id(&self) -> u64 {
        self.inner.identity.cluster_id
    }

    /// The node as it sees itself now; no network.
    pub fn status(&self) -> NodeStatus {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let is_voter = metrics.membership_config.membership().voter_ids().any(|id| id == self.id().0);
        let role = match metrics.state {
            openraft::ServerState::Leader => Role::Leader,
            openraft::ServerState::Candidate => Role::Candidate,
            openraft::ServerState::Follower if is_voter => Role::Follower,
            _ => Role::Learner,
        };
        NodeStatus {
            id: self.id(),
            cluster_id: self.cluster_id(),
            term: metrics.current_term,
            leader: self.inner.leadership.borrow().leader,
            role,
            last_log_index: metrics.last_log_index.unwrap_or(0),
            committed_index: metrics.local_committed.as_ref().map_or(0, |id| id.index),
            applied_index: *self.inner.machine.applied_index().borrow(),
            damaged: self.inner.machine.damage(),
            broken: self
                .inner
                .refused
                .get()
                .cloned()
                .or_else(|| self.inner.machine.broken())
                .or_else(|| metrics.running_state.as_ref().err().map(|fatal| fatal.to_string())),
        }
    }

    /// Follows who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// Waits until a leader is known, and returns it.
    ///
    /// # Errors
    /// [`ReadError::NoLeader`] after `patience`.
    pub async fn wait_for_leader(&self, patience: Duration) -> Result<NodeId, ReadError> {
        let mut leadership = self.leadership();
        let found = tokio::time::timeout(patience, async {
            match leadership.wait_for(|now| now.leader.is_some()).await {
                Ok(now) => now.leader,
                Err(_) => None,
            }
        })
        .await;
        match found {
            Ok(Some(leader)) => Ok(leader),
            _ => Err(ReadError::NoLeader(format!("none was elected within {} ms", patience.as_millis()))),
        }
    }

    /// Replaces the certificates for peers, as when they have been rotated: new connections, in and out, use the new ones; connections
    /// that are open stay until they end.
    ///
    /// # Errors
    /// A sentence when they cannot be used, or when the node was started without TLS for peers: what was in force stays.
    pub fn replace_peer_tls(&self, certificates: &crate::config::PeerTls) -> Result<(), String> {
        self.inner.channels.tls().replace_pem(certificates)
    }

    /// As [`Self::replace_peer_tls`], with rustls configurations of the program's own.
    ///
    /// # Errors
    /// A sentence when the node was started without TLS for peers.
    pub fn replace_peer_rustls(
        &self,
        server: tokio_rustls::rustls::ServerConfig,
        client: tokio_rustls::rustls::ClientConfig,
    ) -> Result<(), String> {
        self.inner.channels.tls().replace(server, client)
    }

    /// A handle to a database; it need not exist yet: the first write makes it.
    pub fn database(&self, name: &str) -> LocalDatabase {
        LocalDatabase::new(self.clone(), name)
    }

    /// Names of the databases at this node's applied index.
    pub fn database_names(&self) -> Vec<String> {
        self.inner.machine.database_names()
    }

    /// Figures about a database on this node; None: it has no such database.
    pub fn database_statistics(&self, name: &str) -> Option<DatabaseStatistics> {
        let state = self.inner.machine.database(name)?;
        let ReplicaStatistics {
            version,
            state_hash,
            page_count,
            free_pages,
            page_size,
            memory_bytes,
            held_bytes,
            oldest_reader,
            ..
        } = state.replica.statistics();
        let page_size = page_size as u64;
        Some(DatabaseStatistics {
            version: version.0,
            state_hash: state_hash.0,
            size_bytes: u64::from(page_count) * page_size,
            in_use_bytes: u64::from(page_count.saturating_sub(free_pages)) * page_size,
            memory_bytes: memory_bytes as u64,
            held_bytes: held_bytes as u64,
            oldest_reader,
        })
    }

    /// What this node has sent of snapshots since it started.
    pub fn snapshot_statistics(&self) -> SnapshotStatistics {
        let counters = self.inner.machine.send_counters();
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
        SnapshotStatistics {
            completed: read(&counters.completed),
            sent_bytes: read(&counters.sent_bytes),
            sent_pages: read(&counters.sent_pages),
            compared_pages: read(&counters.compared_pages),
        }
    }

    /// Figures about the Raft log on this node.
    pub fn log_statistics(&self) -> crate::log::LogStatistics {
        self.inner.log.statistics()
    }

    /// Returns when everything that was committed anywhere before the call is applied on this node.
    ///
    /// # Errors
    /// [`ReadError::NoLeader`] when no leader could confirm it in time (several election time-outs).
    pub async fn linearize(&self) -> Result<(), ReadError> {
        self.inner.confirm().await.map(drop)
    }

    /// Runs a handler on the leader: here if this node leads, else over the peer connection. Waits for an election to end, and tries
    /// again whatever provably had no effect, for several election time-outs.
    ///
    /// # Errors
    /// See [`CallError`].
    ///
    /// # Cancellation
    /// Dropping the future leaves the outcome unknown.
    pub async fn call_leader(&self, handler: &str, payload: Bytes) -> Result<Bytes, CallError> {
        self.call_leader_until(handler, &|| payload.clone(), None).await
    }

    /// As [`Self::call_leader`]; after `deadline` nothing is tried again. `payload`: called for each try.
    pub(crate) async fn call_leader_until(
        &self,
        handler: &str,
        payload: &(dyn Fn() -> Bytes + Send + Sync),
        deadline: Option<Instant>,
    ) -> Result<Bytes, CallError> {
        let patience = Instant::now() + self.inner.patience();
        let deadline = deadline.map_or(patience, |deadline| deadline.min(patience));
        let mut leadership = self.inner.leadership.clone();
        loop {
            let now = leadership.borrow_and_update().clone();
            let failed = match now.leader {
                Some(leader) if leader == self.id() => match self.inner.call_local(handler, payload()).await {
                    LocalCall::Answered(answer) => return answer.map_err(CallError::Handler),
                    LocalCall::NoHandler => {
                        return Err(CallError::NotSent(format!("this node has no handler {handler:?}")));
                    }
                    LocalCall::NotLeading => CallError::NoLeader,
                },
                Some(leader) => match self.inner.call_remote(leader, handler, payload()).await {
                    Err(error @ (CallError::NoLeader | CallError::NotSent(_))) => error,
                    answer => return answer,
                },
                None => CallError::NoLeader,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed);
            }
            // Until the leadership changes, or soon: the leader may be opening its writers.
            let pause = left.min(Duration::from_millis(20));
            if let Ok(Err(_)) = tokio::time::timeout(pause, leadership.changed()).await {
                return Err(CallError::Stopped);
            }
        }
    }

    /// Stops the node: hands a leadership over, stops Raft, writes the last checkpoint. Afterwards each database is a plain SQLite file.
    ///
    /// # Errors
    /// The last checkpoint could not be written: nothing is lost, the next start replays the log.
    pub async fn shutdown(&self) -> Result<(), crate::database::DatabaseError> {
        if let Err(error) = self.transfer_leader(None).await {
            tracing::info!(%error, "the leadership was not handed over");
        }
        self.inner.machine.begin_stop();
        self.inner.machine.close_writers("the node stops").await;
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
        // Only now: until here peers had to be answered, to take over the leadership.
        let _ = self.inner.stop.send(true);
        let tasks = std::mem::take(&mut *self.inner.tasks.lock());
        for task in tasks {
            task.abort();
            let _ = task.await;
        }
        let closed = self.inner.machine.close().await;
        self.inner.log.shutdown();
        closed
    }

    /// The term of the newest applied entry and its index; None before any.
    pub fn applied_position(&self) -> Option<(u64, u64)> {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.last_applied.as_ref().map(|id| (term_of(id), id.index))
    }
}
