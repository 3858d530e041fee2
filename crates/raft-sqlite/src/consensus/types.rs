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

/// Version of the bytes of a membership.
const MEMBERSHIP_VERSION: u32 = 1;

/// What every version has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct MembershipJson {
    version: u32,
    /// One set of voters, two while the cluster is between two configurations.
    voters: Vec<BTreeSet<u64>>,
    nodes: BTreeMap<u64, PeerNode>,
}

/// The bytes of a membership as in a log entry of kind 2.
pub fn encode_membership(membership: &Membership) -> Bytes {
    let json = MembershipJson {
        version: MEMBERSHIP_VERSION,
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
    let not_one = |error: serde_json::Error| invalid(format!("not a membership: {error}"));
    // First: a newer one may have other fields.
    let Versioned { version } = serde_json::from_slice(bytes).map_err(not_one)?;
    if version > MEMBERSHIP_VERSION {
        return Err(invalid(format!(
            "a membership has format version {version}, this program knows {MEMBERSHIP_VERSION}: run the version that wrote it, or a \
             newer one"
        )));
    }
    let json: MembershipJson = serde_json::from_slice(bytes).map_err(not_one)?;
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
                "log entry {term}.{index} has the unknown kind {other}: run the version that wrote it, or a newer one"
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
    let bytes: &[u8; 17] = bytes.try_into().map_err(|_| {
        invalid(format!("a vote has 17 bytes, this one {}: run the version that wrote it, or a newer one", bytes.len()))
    })?;
    let number =
        |range: std::ops::Range<usize>| u64::from_le_bytes(bytes[range].try_into().expect("invariant: eight bytes"));
    Ok(Vote { leader_id: LeaderId { term: number(0..8), voted_for: number(8..16) }, committed: bytes[16] != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOLDEN: &str = concat!(
        r#"{"version":1,"voters":[[1,2],[2]],"nodes":{"1":{"name":"a","peer_urls":["http://a:1"],"#,
        r#""client_urls":["http://a:2"],"started":true},"2":{"name":"b","peer_urls":["http://b:1"],"client_urls":[],"#,
        r#""started":false}}}"#
    );

    fn membership() -> Membership {
        let a = PeerNode {
            name: "a".into(),
            peer_urls: vec!["http://a:1".into()],
            client_urls: vec!["http://a:2".into()],
            started: true,
        };
        let b = PeerNode { name: "b".into(), peer_urls: vec!["http://b:1".into()], ..PeerNode::default() };
        let voters = vec![BTreeSet::from([1, 2]), BTreeSet::from([2])];
        Membership::new(voters, BTreeMap::from([(1, a), (2, b)])).unwrap()
    }

    #[test]
    fn golden_bytes_of_a_membership() {
        assert_eq!(std::str::from_utf8(&encode_membership(&membership())).unwrap(), GOLDEN);
        assert_eq!(decode_membership(GOLDEN.as_bytes()).unwrap(), membership());
        assert_eq!(decode_membership(&encode_membership(&Membership::default())).unwrap(), Membership::default());
    }

    #[test]
    fn golden_bytes_of_a_vote() {
        let vote = Vote { leader_id: LeaderId { term: 0x0102, voted_for: 0x0a0b_0c0d_0e0f_1011 }, committed: true };
        let bytes = *b"\x02\x01\0\0\0\0\0\0\x11\x10\x0f\x0e\x0d\x0c\x0b\x0a\x01";
        assert_eq!(encode_vote(&vote), bytes);
        assert_eq!(decode_vote(&bytes).unwrap(), vote);
    }

    #[test]
    fn what_a_newer_version_wrote_is_refused_with_advice() {
        for error in [
            decode_membership(br#"{"version":2,"members":[]}"#).unwrap_err(),
            from_log_parts(1, 2, 3, Bytes::new()).unwrap_err(),
            decode_vote(&[0; 18]).unwrap_err(),
        ] {
            assert!(error.to_string().contains("run the version that wrote it, or a newer one"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes: Vec<u8>, at in 0..GOLDEN.len(), byte: u8) {
            let _ = decode_membership(&bytes);
            let _ = decode_vote(&bytes);
            let mut changed = GOLDEN.as_bytes().to_vec();
            changed[at] = byte;
            let _ = decode_membership(&changed);
        }
    }
}
