//! Answers peers.

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _};
use openraft::entry::RaftEntry as _;
use openraft::errors::{Fatal, RaftError};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument as _;

use super::NodeInner;
use super::read_index::local_round;
use crate::consensus::machine::{ReceivedFiles, SnapshotData, position};
use crate::consensus::types::{SnapshotMeta, StoredMembership, TypeConfig, decode_membership};
use crate::consensus::wire;
use crate::network::identity::Anonymous;
use crate::network::proto;
use crate::network::proto::peer_server::Peer;
use crate::state_machine::snapshot::{Chunk, Incoming, ReceivedSnapshot};

/// Answers to appends made ahead of the network.
const ANSWERS_AHEAD: usize = 64;

/// The service on the peer port.
#[derive(Clone)]
pub(super) struct PeerService {
    node: std::sync::Weak<NodeInner>,
}

impl PeerService {
    pub fn new(node: std::sync::Weak<NodeInner>) -> Self {
        Self { node }
    }

    fn node(&self) -> Result<std::sync::Arc<NodeInner>, Status> {
        self.node.upgrade().ok_or_else(|| Status::unavailable("this member is stopping"))
    }

    /// The node, for a call that said which cluster and member it means.
    fn node_for<T>(&self, request: &Request<T>) -> Result<std::sync::Arc<NodeInner>, Status> {
        if request.extensions().get::<Anonymous>().is_some() {
            return Err(Status::failed_precondition(
                "the call does not say which cluster and member it is for: is the caller a raft-sqlite member?",
            ));
        }
        let node = self.node()?;
        // INV-VOTER-REMEMBERS
        if !node.takes_part.load(std::sync::atomic::Ordering::Acquire) {
            return Err(Status::unavailable("this member has no log, and does not know yet whether it may take part"));
        }
        Ok(node)
    }
}

fn bad(error: std::io::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

fn fatal(error: &Fatal<TypeConfig>) -> Status {
    Status::unavailable(format!("raft has stopped on this member: {error}"))
}

fn raft_error<E: std::error::Error>(error: RaftError<TypeConfig, E>) -> Status {
    Status::unavailable(error.to_string())
}

type AppendStream = Pin<Box<dyn Stream<Item = Result<proto::AppendResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for PeerService {
    type AppendStream = AppendStream;

    async fn append(
        &self,
        request: Request<Streaming<proto::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let node = self.node_for(&request)?;
        let mut requests = request.into_inner();
        let (sender, receiver) = tokio::sync::mpsc::channel(ANSWERS_AHEAD);
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                let request = match request.and_then(|request| wire::from_append(request).map_err(bad)) {
                    Ok(request) => request,
                    Err(status) => {
                        tracing::debug!(%status, "a stream of appends ended");
                        return;
                    }
                };
                if sender.send(request).await.is_err() {
                    return;
                }
            }
        });
        let (storage, contact) = (node.storage.clone(), node.contact.clone());
        let answers = node.raft.stream_append(ReceiverStream::new(receiver)).then(move |answer| {
            let storage = storage.clone();
            if let Ok(Ok(_)) = &answer {
                contact.heard();
            }
            async move {
                if let Ok(Ok(Some(acknowledged))) = &answer {
                    storage.written(acknowledged.index).await;
                }
                match answer {
                    Ok(result) => Ok(wire::to_append_result(result)),
                    Err(error) => Err(fatal(&error)),
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn heartbeat(
        &self,
        request: Request<proto::AppendRequest>,
    ) -> Result<Response<proto::AppendResponse>, Status> {
        let node = self.node_for(&request)?;
        let request = wire::from_append(request.into_inner()).map_err(bad)?;
        let answer = match request.entries.last() {
            None => heartbeat(&node, request).await?,
            Some(last) => {
                let last = last.log_id().index;
                let answer = node.raft.append_entries(request).await.map_err(raft_error)?;
                node.storage.written(last).await;
                answer
            }
        };
        if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
            node.contact.heard();
        }
        Ok(Response::new(wire::to_append_response(answer)))
    }

    async fn vote(&self, request: Request<proto::VoteRequest>) -> Result<Response<proto::VoteResponse>, Status> {
        let node = self.node_for(&request)?;
        let request = wire::from_vote_request(request.into_inner()).map_err(bad)?;
        let answer = node.raft.vote(request).await.map_err(raft_error)?;
        Ok(Response::new(wire::to_vote_response(&answer)))
    }

    async fn pre_vote(&self, request: Request<proto::VoteRequest>) -> Result<Response<proto::VoteResponse>, Status> {
        let node = self.node_for(&request)?;
        let request = wire::from_vote_request(request.into_inner()).map_err(bad)?;
        let answer = node.raft.pre_vote(request).await.map_err(raft_error)?;
        Ok(Response::new(wire::to_vote_response(&answer)))
    }

    async fn transfer_leader(
        &self,
        request: Request<proto::TransferLeaderRequest>,
    ) -> Result<Response<proto::TransferLeaderResponse>, Status> {
        let node = self.node_for(&request)?;
        let request = wire::from_transfer(request.into_inner()).map_err(bad)?;
        let answer = node.raft.handle_transfer_leader(request).await.map_err(|error| fatal(&error))?;
        Ok(Response::new(match answer {
            Ok(()) => proto::TransferLeaderResponse { accepted: true, reason: String::new() },
            Err(error) => proto::TransferLeaderResponse { accepted: false, reason: error.to_string() },
        }))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<proto::SnapshotChunk>>,
    ) -> Result<Response<proto::SnapshotResponse>, Status> {
        let node = self.node_for(&request)?;
        let mut chunks = request.into_inner();
        let header = match chunks.message().await?.and_then(|chunk| chunk.chunk) {
            Some(proto::snapshot_chunk::Chunk::Header(header)) => header,
            _ => {
                return Err(Status::invalid_argument("a snapshot begins with its header"));
            }
        };
        let vote = wire::from_vote(header.vote).map_err(bad)?;
        let last_log_id = header.last_log_id.map(wire::from_log_id);
        let membership = StoredMembership::new(
            header.membership_log_id.map(wire::from_log_id),
            decode_membership(&header.membership).map_err(bad)?,
        );
        let recorder = node.machine.recorder();
        let index = last_log_id.as_ref().map_or(0, |last| last.index);
        let span = tracing::info_span!("receive_snapshot", index, databases = header.databases);
        let snapshot = match receive(&node, chunks, header.databases as usize).instrument(span).await {
            Ok(snapshot) => snapshot,
            Err(status) => {
                recorder.snapshots_receive_failed.add(1);
                return Err(status);
            }
        };
        recorder.snapshots_received.add(1);
        if let Some(last) = &last_log_id {
            let position = position(last);
            tracing::info!(index = position.index, term = position.term, "a snapshot was received");
        }
        let meta = SnapshotMeta { last_log_id, last_membership: membership };
        let snapshot = openraft::type_config::alias::SnapshotOf::<TypeConfig, SnapshotData> {
            meta,
            snapshot: SnapshotData::Received(ReceivedFiles(snapshot)),
        };
        let answer = node.raft.install_full_snapshot(vote, snapshot).await.map_err(|error| fatal(&error))?;
        Ok(Response::new(proto::SnapshotResponse { vote: Some(wire::to_vote(&answer.vote)) }))
    }

    async fn read_index(
        &self,
        request: Request<proto::ReadIndexRequest>,
    ) -> Result<Response<proto::ReadIndexResponse>, Status> {
        let node = self.node_for(&request)?;
        // Through the node's own rounds, so that readers of all members share them.
        let answer = match local_round_shared(&node).await {
            Some((index, term)) => proto::ReadIndexResponse { leading: true, index, term },
            None => proto::ReadIndexResponse::default(),
        };
        Ok(Response::new(answer))
    }

    async fn call(&self, request: Request<proto::CallRequest>) -> Result<Response<proto::CallResponse>, Status> {
        use proto::call_response::Outcome;
        let node = self.node_for(&request)?;
        let request = request.into_inner();
        if request.handler == super::membership::FORWARD_HANDLER {
            return Ok(Response::new(forward_membership(node, request.payload).await));
        }
        let outcome = match node.call_local(&request.handler, request.payload).await {
            super::LocalCall::Answered(Ok(reply)) => Outcome::Reply(reply),
            super::LocalCall::Answered(Err(error)) => Outcome::Error(error),
            super::LocalCall::NotLeading => {
                let leader = node.leadership.borrow().leader.map_or(0, |leader| leader.0);
                Outcome::NotLeading(proto::NotLeading { leader })
            }
            super::LocalCall::NoHandler => Outcome::NoHandler(proto::NoHandler {}),
        };
        Ok(Response::new(proto::CallResponse { outcome: Some(outcome) }))
    }

    async fn identify(
        &self,
        request: Request<proto::IdentifyRequest>,
    ) -> Result<Response<proto::IdentifyResponse>, Status> {
        let node = self.node()?;
        let initialized = node.raft.is_initialized().await.map_err(|error| fatal(&error))?;
        Ok(Response::new(proto::IdentifyResponse {
            cluster_id: node.identity.cluster_id,
            node_id: node.identity.node_id.0,
            name: node.identity.name.clone(),
            program_version: env!("CARGO_PKG_VERSION").into(),
            has_leader: node.leadership.borrow().leader.is_some(),
            initialized,
            you: super::admission::about(&node, request.get_ref()),
            disk_full: node.storage.is_full(),
            protocol_version: crate::network::PROTOCOL_VERSION,
        }))
    }
}

/// Answers a heartbeat. openraft answers once all entries before are written: on a full disk never, and the leader could confirm no
/// read. A heartbeat acknowledges no entry, only that this node follows the leader's vote: so while entries wait for room, that is
/// asked of Raft's core, after it has taken the heartbeat.
async fn heartbeat(
    node: &NodeInner,
    request: AppendEntriesRequest<TypeConfig>,
) -> Result<AppendEntriesResponse<TypeConfig>, Status> {
    if !node.storage.is_full() {
        return node.raft.append_entries(request).await.map_err(raft_error);
    }
    let vote = request.vote;
    let mut answer = std::pin::pin!(node.raft.append_entries(request));
    // In this order: the core takes its messages in turn, and an answer that is there counts.
    let followed = tokio::select! {
        biased;
        answer = &mut answer => return answer.map_err(raft_error),
        followed = node.raft.with_raft_state(move |state| *state.vote_ref() == vote) => followed,
    };
    match followed {
        Ok(true) => Ok(AppendEntriesResponse::Success),
        Ok(false) => answer.await.map_err(raft_error),
        Err(error) => Err(fatal(&error)),
    }
}

/// Passes a membership change of a node that does not know the leader on to it.
async fn forward_membership(node: std::sync::Arc<NodeInner>, payload: bytes::Bytes) -> proto::CallResponse {
    use proto::call_response::Outcome;
    let outcome = match (super::Node { inner: node }).call_leader(super::membership::HANDLER, payload).await {
        Ok(reply) => Outcome::Reply(reply),
        Err(crate::error::CallError::Handler(error)) => Outcome::Error(error),
        Err(error) => {
            Outcome::Error(super::calls::BuiltInFailure { unknown: true, message: error.to_string() }.encode())
        }
    };
    proto::CallResponse { outcome: Some(outcome) }
}

/// (index, term), when this node leads.
async fn local_round_shared(node: &NodeInner) -> Option<(u64, u64)> {
    if !node.raft.is_leader() {
        return None;
    }
    match node.read_index.confirm().await {
        Some(Ok(confirmed)) => confirmed.own_term.map(|term| (confirmed.index, term)),
        _ => local_round(&node.raft).await.ok()?.and_then(|c| c.own_term.map(|term| (c.index, term))),
    }
}

async fn receive(
    node: &NodeInner,
    mut chunks: Streaming<proto::SnapshotChunk>,
    databases: usize,
) -> Result<ReceivedSnapshot, Status> {
    let directory = node.machine.incoming_directory();
    let disk = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::InvalidData => bad(error),
        _ => Status::resource_exhausted(format!("the snapshot could not be written: {error}")),
    };
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Chunk>(4);
    let writer = tokio::task::spawn_blocking(move || {
        let mut incoming = Incoming::new(directory, databases)?;
        while let Some(chunk) = receiver.blocking_recv() {
            incoming.accept(chunk)?;
        }
        incoming.finish()
    });
    while let Some(chunk) = chunks.message().await? {
        let chunk = from_chunk(chunk)?;
        if let Chunk::Pages { images, .. } = &chunk {
            node.machine.recorder().snapshot_received_bytes.add(images.len() as u64);
        }
        if sender.send(chunk).await.is_err() {
            break;
        }
    }
    drop(sender);
    writer.await.map_err(|error| Status::internal(error.to_string()))?.map_err(disk)
}

fn from_chunk(chunk: proto::SnapshotChunk) -> Result<Chunk, Status> {
    use proto::snapshot_chunk::Chunk as Wire;
    match chunk.chunk {
        Some(Wire::Begin(begin)) => {
            let state_hash: [u8; 16] = begin
                .state_hash
                .as_ref()
                .try_into()
                .map_err(|_| Status::invalid_argument("a state hash has 16 bytes"))?;
            Ok(Chunk::Begin {
                name: begin.name,
                page_size: begin.page_size,
                page_count: begin.page_count,
                version: begin.version,
                state_hash: u128::from_le_bytes(state_hash),
            })
        }
        Some(Wire::Pages(pages)) => Ok(Chunk::Pages {
            first_page: pages.first_page,
            page_count: pages.page_count,
            images: pages.images,
            lz4: pages.lz4,
            crc32c: pages.crc32c,
        }),
        Some(Wire::End(_)) => Ok(Chunk::End),
        Some(Wire::Header(_)) => Err(Status::invalid_argument("a second snapshot header")),
        None => Err(Status::invalid_argument("an empty snapshot chunk")),
    }
}
