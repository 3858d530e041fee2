//! Answers peers.

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _};
use openraft::entry::RaftEntry as _;
use openraft::errors::{Fatal, RaftError};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::read_index::local_round;
use super::{NodeInner, snapshot_service};
use crate::consensus::types::TypeConfig;
use crate::consensus::wire;
use crate::network::identity::Anonymous;
use crate::network::proto;
use crate::network::proto::peer_server::Peer;

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

pub(super) fn bad(error: std::io::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

pub(super) fn fatal(error: &Fatal<TypeConfig>) -> Status {
    Status::unavailable(format!("raft has stopped on this member: {error}"))
}

fn raft_error<E: std::error::Error>(error: RaftError<TypeConfig, E>) -> Status {
    Status::unavailable(error.to_string())
}

type AppendStream = Pin<Box<dyn Stream<Item = Result<proto::AppendResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for PeerService {
    type AppendStream = AppendStream;
    type SnapshotStream = snapshot_service::AnswerStream;

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
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let node = self.node_for(&request)?;
        Ok(Response::new(snapshot_service::answer(node, request.into_inner())))
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
            damaged: node.machine.damage().is_some(),
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
