//! The types openraft is instantiated with, and their bytes in the log.
//!
//! A log entry is (term, index, kind, payload). Kinds: 0 blank (no payload), 1 a command (its own encoding), 2 a membership
//! (JSON: small, rare, and readable in a hex dump). docs/formats.md, "Log entries".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::entry::RaftEntry as _;
use serde::{Deserialize, Serialize};

use crate::log;
use crate::state_machine::{CommandOutcome, invalid};

/// What a member is and where it is reached; part of the replicated membership.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerNode {
    /// The member's name, unique in the cluster.
    pub name: String,
    /// Addresses for peers, `http://HOST:PORT` or `https://HOST:PORT`.
    pub peer_urls: Vec<String>,
    /// Addresses that the member advertises to clients.
    pub client_urls: Vec<String>,
    /// It has taken part in the cluster: it may have voted and acknowledged entries, and must not come back without its log.
    #[serde(default)]
    pub started: bool,
}

/// One entry's application data: an encoded [`crate::state_machine::command::Command`], decoded only where it is applied.
#[derive(Clone, PartialEq, Eq)]
pub struct CommandBytes(pub Bytes);

impl fmt::Debug for CommandBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.0.len())
    }
}

impl fmt::Display for CommandBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

openraft::declare_raft_types!(
    /// The instance of openraft this crate runs on.
    pub TypeConfig:
        D = CommandBytes,
        R = CommandOutcome,
        NodeId = u64,
        Node = PeerNode,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<Self::Term, Self::NodeId>,
);

pub type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub type RaftEntry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub type Membership = openraft::Membership<u64, PeerNode>;
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub type Raft = openraft::Raft<TypeConfig, super::machine::StateMachine>;

/// Kind of a log entry without payload.
pub const KIND_BLANK: u8 = 0;
/// Kind of a log entry with a command.
pub const KIND_COMMAND: u8 = 1;
/// Kind of a log entry with a membership.
pub const KIND_MEMBERSHIP: u8 = 2;

/// A log id from its numbers.
pub fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(openraft::vote::RaftLeaderId::to_committed(&LeaderId { term, voted_for: 0 }), index)
}

/// The term of a log id.
pub fn term_of(id: &LogId) -> u64 {
    **id.committed_leader_id()
}

#[derive(Serialize, Deserialize)]
struct MembershipJson {
    /// One set of voters, two while the cluster is between two configurations.
    voters: Vec<BTreeSet<u64>>,
    nodes: BTreeMap<u64, PeerNode>,
}

/// The bytes of a membership as in a log entry of kind 2.
pub fn encode_membership(membership: &Membership) -> Bytes {
    let json = MembershipJson {
        voters: membership.get_joint_config().clone(),
        nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
    };
    Bytes::from(serde_json::to_vec(&json).expect("invariant: a membership has string keys and plain values"))
}

/// Reads what [`encode_membership`] wrote.
///
/// # Errors
/// `InvalidData` when the bytes are not a membership.
pub fn decode_membership(bytes: &[u8]) -> io::Result<Membership> {
    let json: MembershipJson =
        serde_json::from_slice(bytes).map_err(|error| invalid(format!("not a membership: {error}")))?;
    if json.voters.is_empty() && json.nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(json.voters, json.nodes).map_err(|error| invalid(format!("membership refused: {error}")))
}

/// An openraft entry as a log record.
pub fn to_log_entry(entry: &RaftEntry) -> log::Entry {
    let id = entry.log_id();
    let (kind, payload) = match &entry.payload {
        EntryPayload::Blank => (KIND_BLANK, Bytes::new()),
        EntryPayload::Normal(command) => (KIND_COMMAND, command.0.clone()),
        EntryPayload::Membership(membership) => (KIND_MEMBERSHIP, encode_membership(membership)),
    };
    log::Entry { id: log::EntryId { term: term_of(&id), index: id.index }, kind, payload }
}

/// A log record as an openraft entry.
///
/// # Errors
/// `InvalidData` for an unknown kind or a payload that does not decode.
pub fn from_log_parts(term: u64, index: u64, kind: u8, payload: Bytes) -> io::Result<RaftEntry> {
    let payload = match kind {
        KIND_BLANK => EntryPayload::Blank,
        KIND_COMMAND => EntryPayload::Normal(CommandBytes(payload)),
        KIND_MEMBERSHIP => EntryPayload::Membership(decode_membership(&payload)?),
        other => {
            return Err(invalid(format!(
                "log entry {term}.{index} has the unknown kind {other}: written by a newer version?"
            )));
        }
    };
    Ok(RaftEntry::new(log_id(term, index), payload))
}

/// The bytes of a vote in the log's vote file: term, node id, committed; little endian, 17 bytes.
pub fn encode_vote(vote: &Vote) -> [u8; 17] {
    let mut bytes = [0; 17];
    bytes[..8].copy_from_slice(&vote.leader_id.term.to_le_bytes());
    bytes[8..16].copy_from_slice(&vote.leader_id.voted_for.to_le_bytes());
    bytes[16] = u8::from(vote.committed);
    bytes
}

/// Reads what [`encode_vote`] wrote.
///
/// # Errors
/// `InvalidData` when the length is not 17 bytes.
pub fn decode_vote(bytes: &[u8]) -> io::Result<Vote> {
    let bytes: &[u8; 17] =
        bytes.try_into().map_err(|_| invalid(format!("a vote has 17 bytes, this one {}", bytes.len())))?;
    let number =
        |range: std::ops::Range<usize>| u64::from_le_bytes(bytes[range].try_into().expect("invariant: eight bytes"));
    Ok(Vote { leader_id: LeaderId { term: number(0..8), voted_for: number(8..16) }, committed: bytes[16] != 0 })
}
