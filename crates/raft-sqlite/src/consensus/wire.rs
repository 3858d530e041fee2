//! openraft's messages as peer-protocol messages and back.

use std::io;

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    VoteRequest, VoteResponse,
};

use super::types::{LeaderId, LogId, RaftEntry, TypeConfig, Vote, from_log_parts, log_id, term_of, to_log_entry};
use crate::network::proto;
use crate::state_machine::invalid;

pub fn to_vote(vote: &Vote) -> proto::BallotVote {
    proto::BallotVote { term: vote.leader_id.term, node_id: vote.leader_id.voted_for, committed: vote.committed }
}

pub fn from_vote(vote: Option<proto::BallotVote>) -> io::Result<Vote> {
    let vote = vote.ok_or_else(|| invalid("a peer message has no vote".into()))?;
    Ok(Vote { leader_id: LeaderId { term: vote.term, voted_for: vote.node_id }, committed: vote.committed })
}

pub fn to_log_id(id: &LogId) -> proto::LogId {
    proto::LogId { term: term_of(id), index: id.index }
}

pub fn from_log_id(id: proto::LogId) -> LogId {
    log_id(id.term, id.index)
}

fn to_entry(entry: &RaftEntry) -> proto::LogEntry {
    let entry = to_log_entry(entry);
    proto::LogEntry {
        id: Some(proto::LogId { term: entry.id.term, index: entry.id.index }),
        kind: u32::from(entry.kind),
        payload: entry.payload,
    }
}

fn from_entry(entry: proto::LogEntry) -> io::Result<RaftEntry> {
    let id = entry.id.ok_or_else(|| invalid("a log entry has no id".into()))?;
    let kind = u8::try_from(entry.kind).map_err(|_| invalid(format!("a log entry has the kind {}", entry.kind)))?;
    from_log_parts(id.term, id.index, kind, entry.payload)
}

pub fn to_append(request: &AppendEntriesRequest<TypeConfig>) -> proto::AppendRequest {
    proto::AppendRequest {
        vote: Some(to_vote(&request.vote)),
        previous: request.prev_log_id.as_ref().map(to_log_id),
        entries: request.entries.iter().map(to_entry).collect(),
        leader_commit: request.leader_commit.as_ref().map(to_log_id),
    }
}

pub fn from_append(request: proto::AppendRequest) -> io::Result<AppendEntriesRequest<TypeConfig>> {
    Ok(AppendEntriesRequest {
        vote: from_vote(request.vote)?,
        prev_log_id: request.previous.map(from_log_id),
        entries: request.entries.into_iter().map(from_entry).collect::<io::Result<_>>()?,
        leader_commit: request.leader_commit.map(from_log_id),
    })
}

pub fn to_append_result(result: StreamAppendResult<TypeConfig>) -> proto::AppendResponse {
    use proto::append_response::Outcome;
    let (outcome, log_id, vote) = match &result {
        Ok(matching) => (Outcome::Success, matching.as_ref().map(to_log_id), None),
        Err(StreamAppendError::Conflict(at)) => (Outcome::Conflict, Some(to_log_id(at)), None),
        Err(StreamAppendError::HigherVote(vote)) => (Outcome::HigherVote, None, Some(to_vote(vote))),
    };
    proto::AppendResponse { outcome: outcome.into(), log_id, vote }
}

pub fn from_append_result(response: proto::AppendResponse) -> io::Result<StreamAppendResult<TypeConfig>> {
    use proto::append_response::Outcome;
    let at = response.log_id.map(from_log_id);
    match Outcome::try_from(response.outcome) {
        Ok(Outcome::Success) => Ok(Ok(at)),
        Ok(Outcome::Conflict) => {
            let at = at.ok_or_else(|| invalid("a conflict without a log id".into()))?;
            Ok(Err(StreamAppendError::Conflict(at)))
        }
        Ok(Outcome::HigherVote) => Ok(Err(StreamAppendError::HigherVote(from_vote(response.vote)?))),
        Err(_) => Err(invalid(format!("an append was answered with the unknown outcome {}", response.outcome))),
    }
}

/// The answer to a single append (a heartbeat): partial success cannot be told apart from success in our protocol's unary form, since
/// a heartbeat carries no entries.
pub fn to_append_response(response: AppendEntriesResponse<TypeConfig>) -> proto::AppendResponse {
    use proto::append_response::Outcome;
    let (outcome, log_id, vote) = match response {
        AppendEntriesResponse::Success => (Outcome::Success, None, None),
        AppendEntriesResponse::PartialSuccess(matching) => (Outcome::Success, matching.as_ref().map(to_log_id), None),
        AppendEntriesResponse::Conflict => (Outcome::Conflict, None, None),
        AppendEntriesResponse::HigherVote(vote) => (Outcome::HigherVote, None, Some(to_vote(&vote))),
    };
    proto::AppendResponse { outcome: outcome.into(), log_id, vote }
}

pub fn from_append_response(response: proto::AppendResponse) -> io::Result<AppendEntriesResponse<TypeConfig>> {
    use proto::append_response::Outcome;
    match Outcome::try_from(response.outcome) {
        Ok(Outcome::Success) => Ok(match response.log_id {
            None => AppendEntriesResponse::Success,
            Some(matching) => AppendEntriesResponse::PartialSuccess(Some(from_log_id(matching))),
        }),
        Ok(Outcome::Conflict) => Ok(AppendEntriesResponse::Conflict),
        Ok(Outcome::HigherVote) => Ok(AppendEntriesResponse::HigherVote(from_vote(response.vote)?)),
        Err(_) => Err(invalid(format!("an append was answered with the unknown outcome {}", response.outcome))),
    }
}

pub fn to_vote_request(request: &VoteRequest<TypeConfig>) -> proto::VoteRequest {
    proto::VoteRequest {
        vote: Some(to_vote(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(to_log_id),
        leadership_transfer: request.leadership_transfer,
    }
}

pub fn from_vote_request(request: proto::VoteRequest) -> io::Result<VoteRequest<TypeConfig>> {
    let mut vote = VoteRequest::new(from_vote(request.vote)?, request.last_log_id.map(from_log_id));
    vote.leadership_transfer = request.leadership_transfer;
    Ok(vote)
}

pub fn to_vote_response(response: &VoteResponse<TypeConfig>) -> proto::VoteResponse {
    proto::VoteResponse {
        vote: Some(to_vote(&response.vote)),
        granted: response.vote_granted,
        last_log_id: response.last_log_id.as_ref().map(to_log_id),
    }
}

pub fn from_vote_response(response: proto::VoteResponse) -> io::Result<VoteResponse<TypeConfig>> {
    Ok(VoteResponse::new(from_vote(response.vote)?, response.last_log_id.map(from_log_id), response.granted))
}

pub fn to_transfer(request: &TransferLeaderRequest<TypeConfig>) -> proto::TransferLeaderRequest {
    proto::TransferLeaderRequest {
        from_leader: Some(to_vote(request.from_leader())),
        to_node_id: *request.to_node_id(),
        last_log_id: request.last_log_id().map(to_log_id),
    }
}

pub fn from_transfer(request: proto::TransferLeaderRequest) -> io::Result<TransferLeaderRequest<TypeConfig>> {
    Ok(TransferLeaderRequest::new(
        from_vote(request.from_leader)?,
        request.to_node_id,
        request.last_log_id.map(from_log_id),
    ))
}
