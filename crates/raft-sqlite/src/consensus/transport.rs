//! openraft's network on [`crate::network`].
//!
//! Appends are pipelined: one bidirectional stream carries requests as fast as openraft makes them, the answers come back in order
//! (openraft's default would wait for each). Votes, heartbeats and snapshots are calls of their own; heartbeats and snapshots run over
//! connections of their own, so that they never wait behind log entries.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::RPCTypes;
use openraft::network::{RPCOption, RaftNetworkFactory, v2::RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use parking_lot::Mutex;
use tracing::Instrument as _;

use super::machine::{PinnedSnapshot, SnapshotData};
use super::snapshot::{Ended, SnapshotSender, Source};
use super::types::{PeerNode, TypeConfig, Vote, encode_membership};
use super::wire;
use crate::metrics::recorder::Recorder;
use crate::network::channels::{Channels, Client, Purpose};
use crate::network::proto;
use crate::state_machine::snapshot::send::Target;

type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>;
type AppendResults<'a> = BoxStream<'a, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>;

/// Makes connections to peers.
#[derive(Clone, Debug)]
pub struct Transport {
    channels: Channels,
    /// How long an append or a vote may go unanswered.
    answer_timeout: Duration,
    recorder: Arc<Recorder>,
    source: Source,
}

impl Transport {
    pub(crate) fn new(channels: Channels, answer_timeout: Duration, recorder: Arc<Recorder>, source: Source) -> Self {
        Self { channels, answer_timeout, recorder, source }
    }

    fn peer(&self, target: u64, node: &PeerNode, purpose: Purpose) -> Peer {
        Peer {
            target,
            urls: node.peer_urls.clone(),
            next_url: 0,
            purpose,
            channels: self.channels.clone(),
            answer_timeout: self.answer_timeout,
            recorder: self.recorder.clone(),
            answers: true,
            source: self.source.clone(),
            snapshots: None,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Transport {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &PeerNode) -> Peer {
        self.peer(target, node, Purpose::Log)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &PeerNode) -> Peer {
        self.peer(target, node, Purpose::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &PeerNode) -> Peer {
        self.peer(target, node, Purpose::Snapshot)
    }
}

/// One peer, for one purpose.
#[derive(Debug)]
pub struct Peer {
    target: u64,
    urls: Vec<String>,
    /// Which address to use: moves on when one does not answer.
    next_url: usize,
    purpose: Purpose,
    channels: Channels,
    answer_timeout: Duration,
    recorder: Arc<Recorder>,
    /// Whether the last call was answered.
    answers: bool,
    source: Source,
    /// Goes on from one call to the next.
    snapshots: Option<SnapshotSender>,
}

impl Peer {
    fn client(&self) -> Result<Client, RPCError<TypeConfig>> {
        let url = self.urls.get(self.next_url % self.urls.len().max(1)).ok_or_else(|| {
            unreachable(&io::Error::other(format!("member {:016x} has no peer address", self.target)))
        })?;
        self.channels.client(self.target, url, self.purpose).map_err(|text| unreachable(&io::Error::other(text)))
    }

    /// One call with a time-out.
    async fn call<T>(
        &mut self,
        timeout: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, RPCError<TypeConfig>> {
        let answer = match tokio::time::timeout(timeout, call).await {
            Ok(answer) => answer,
            Err(_) => Err(tonic::Status::deadline_exceeded("the peer did not answer in time")),
        };
        self.tell_changes(answer.as_ref().err());
        match answer {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => {
                self.next_url = self.next_url.wrapping_add(1);
                Err(from_status(&status, self.target))
            }
        }
    }

    /// Logs that a follower is lost, or back: once each, which heartbeats notice first.
    fn tell_changes(&mut self, failure: Option<&tonic::Status>) {
        let answers = failure.is_none();
        if self.purpose != Purpose::Heartbeat || answers == self.answers {
            return;
        }
        self.answers = answers;
        let (member, urls) = (format!("{:016x}", self.target), self.urls.join(","));
        match failure {
            None => tracing::info!(member, urls, "the peer answers again"),
            Some(status) => {
                let why = format!("{}: {}", status.code(), innermost(status));
                tracing::warn!(member, urls, why, "the peer does not answer heartbeats: trying on");
            }
        }
    }
}

/// The innermost cause, which tells people most.
pub fn innermost(status: &tonic::Status) -> String {
    let mut cause: &dyn std::error::Error = match std::error::Error::source(status) {
        Some(source) => source,
        None => return status.message().to_owned(),
    };
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn unreachable(error: &io::Error) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(error))
}

/// A peer that does not answer is left alone for a while (back-off); one that answers with an error is asked again.
fn from_status(status: &tonic::Status, target: u64) -> RPCError<TypeConfig> {
    let error = io::Error::other(format!("member {target:016x}: {}: {}", status.code(), innermost(status)));
    match status.code() {
        tonic::Code::FailedPrecondition => {
            tracing::warn!("{error}");
            unreachable(&error)
        }
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => unreachable(&error),
        _ => RPCError::Network(NetworkError::new(&error)),
    }
}

fn undecodable(error: io::Error) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(&error))
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client()?;
        let message = wire::to_append(&request);
        let answer = self.call(self.answer_timeout, client.heartbeat(message)).await?;
        wire::from_append_response(answer).map_err(undecodable)
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<AppendResults<'s>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        if self.purpose == Purpose::Heartbeat {
            return openraft::network::stream_append_sequential(self, input, option);
        }
        Box::pin(async move {
            // The first request before the connection: after an error openraft holds it back for a while, and without that a peer that
            // is down would be tried without a pause.
            let Some(first) = input.next().await else {
                return Ok(Box::pin(futures_util::stream::empty()) as AppendResults<'s>);
            };
            let input = futures_util::stream::once(std::future::ready(first)).chain(input);
            let mut client = self.client()?;
            let sent = Arc::new(SendTimes::default());
            let clock = sent.clone();
            let requests = input.map(move |request| {
                clock.sent();
                wire::to_append(&request)
            });
            let timeout = self.answer_timeout;
            let responses = self.call(timeout, client.append(requests)).await?;
            let target = self.target;
            let results = futures_util::stream::unfold(Some(responses), move |responses| {
                let sent = sent.clone();
                async move {
                    let mut responses = responses?;
                    let answer = match sent.next_answer(&mut responses, timeout).await {
                        None => return None,
                        Some(Ok(answer)) => wire::from_append_result(answer).map_err(undecodable),
                        Some(Err(status)) => Err(from_status(&status, target)),
                    };
                    let go_on = matches!(answer, Ok(Ok(_)));
                    Some((answer, go_on.then_some(responses)))
                }
            });
            Ok(Box::pin(results) as AppendResults<'s>)
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client()?;
        let answer = self.call(self.answer_timeout, client.vote(wire::to_vote_request(&request))).await?;
        wire::from_vote_response(answer).map_err(undecodable)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client()?;
        let answer = self.call(self.answer_timeout, client.pre_vote(wire::to_vote_request(&request))).await?;
        wire::from_vote_response(answer).map_err(undecodable)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let client = self.client().map_err(StreamingError::from)?;
        let index = snapshot.meta.last_log_id.as_ref().map_or(0, |last| last.index);
        let span = tracing::info_span!("send_snapshot", to = format!("{:016x}", self.target), index);
        let target = match snapshot.snapshot {
            // Pinned no longer than until here.
            SnapshotData::Pinned(PinnedSnapshot(state)) => Target::new(&state),
            SnapshotData::Received(_) => {
                let error = io::Error::other("a received snapshot cannot be sent on");
                return Err(StreamingError::from(undecodable(error)));
            }
        };
        let header = proto::SnapshotHeader {
            vote: Some(wire::to_vote(&vote)),
            last_log_id: snapshot.meta.last_log_id.as_ref().map(wire::to_log_id),
            membership_log_id: snapshot.meta.last_membership.log_id().as_ref().map(wire::to_log_id),
            membership: encode_membership(snapshot.meta.last_membership.membership()),
            databases: target.databases() as u32,
            transfer: 0,
        };
        let sender = self.snapshots.get_or_insert_with(|| SnapshotSender::new(self.source.clone()));
        match sender.send(client, header, target, cancel).instrument(span).await {
            Ended::Answered(vote) => {
                self.recorder.snapshots_sent.add(1);
                let vote = wire::from_vote(vote).map_err(|error| StreamingError::from(undecodable(error)))?;
                Ok(SnapshotResponse::new(vote))
            }
            Ended::Closed(closed) => Err(StreamingError::Closed(closed)),
            // After a time-out openraft asks for another snapshot without a pause.
            Ended::Newer => Err(StreamingError::Timeout(Timeout {
                action: RPCTypes::InstallSnapshot,
                id: vote.leader_id.voted_for,
                target: self.target,
                timeout: Duration::ZERO,
            })),
            Ended::Failed(status) => {
                self.recorder.snapshots_send_failed.add(1);
                self.next_url = self.next_url.wrapping_add(1);
                Err(StreamingError::from(from_status(&status, self.target)))
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client()?;
        let from_leader = *request.from_leader();
        let answer = self.call(self.answer_timeout, client.transfer_leader(wire::to_transfer(&request))).await?;
        if answer.accepted {
            return Ok(Ok(()));
        }
        tracing::warn!(target = self.target, "the peer did not take over the leadership: {}", answer.reason);
        Ok(Err(TransferLeaderError::VoteChanged { expected: from_leader, actual: from_leader }))
    }
}

/// When the requests on their way were sent: a stream that makes no progress is given up, an idle one is not.
#[derive(Debug, Default)]
struct SendTimes {
    unanswered: Mutex<VecDeque<Instant>>,
}

impl SendTimes {
    fn sent(&self) {
        self.unanswered.lock().push_back(Instant::now());
    }

    async fn next_answer(
        &self,
        responses: &mut tonic::Streaming<proto::AppendResponse>,
        timeout: Duration,
    ) -> Option<Result<proto::AppendResponse, tonic::Status>> {
        let mut last_progress = Instant::now();
        let answer = loop {
            match tokio::time::timeout(timeout / 4, responses.next()).await {
                Ok(answer) => break answer,
                Err(_) => {
                    let oldest = self.unanswered.lock().front().copied();
                    match oldest {
                        None => last_progress = Instant::now(),
                        Some(oldest) if oldest.max(last_progress).elapsed() > timeout => {
                            return Some(Err(tonic::Status::deadline_exceeded("the peer does not answer appends")));
                        }
                        Some(_) => {}
                    }
                }
            }
        };
        self.unanswered.lock().pop_front();
        answer
    }
}
