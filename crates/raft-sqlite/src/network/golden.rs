//! The peer protocol's bytes, written by hand: a change of them is a change of [`super::PROTOCOL_VERSION`], unless a peer of the present
//! version may do without what is new.

use bytes::Bytes;
use proptest::prelude::*;
use prost::Message;

use super::proto::*;

fn same<M: Message + Default + PartialEq + std::fmt::Debug>(message: M, golden: &[u8]) {
    assert_eq!(message.encode_to_vec(), golden, "{message:?}");
    assert_eq!(M::decode(golden).unwrap(), message);
}

fn id(term: u64, index: u64) -> Option<LogId> {
    Some(LogId { term, index })
}

fn vote() -> Option<BallotVote> {
    Some(BallotVote { term: 3, node_id: 300, committed: true })
}

/// term 3, node 300, committed.
const VOTE: [u8; 7] = [0x08, 3, 0x10, 0xac, 0x02, 0x18, 1];

fn with_vote(tag: u8, rest: &[u8]) -> Vec<u8> {
    [&[tag, VOTE.len() as u8], &VOTE[..], rest].concat()
}

#[test]
fn replication() {
    let entry = LogEntry { id: id(3, 9), kind: 1, payload: Bytes::from_static(b"xy") };
    let request = AppendRequest { vote: vote(), previous: id(2, 8), entries: vec![entry], leader_commit: id(2, 7) };
    let golden = [
        &[0x12, 4, 0x08, 2, 0x10, 8][..],
        &[0x1a, 12, 0x0a, 4, 0x08, 3, 0x10, 9, 0x10, 1, 0x1a, 2, b'x', b'y'],
        &[0x22, 4, 0x08, 2, 0x10, 7],
    ]
    .concat();
    same(request, &with_vote(0x0a, &golden));
    same(AppendResponse { outcome: 0, log_id: id(3, 9), vote: None }, &[0x12, 4, 0x08, 3, 0x10, 9]);
    same(AppendResponse { outcome: 1, log_id: id(3, 9), vote: None }, &[0x08, 1, 0x12, 4, 0x08, 3, 0x10, 9]);
    same(AppendResponse { outcome: 2, log_id: None, vote: vote() }, &[&[0x08, 2][..], &with_vote(0x1a, &[])].concat());
}

#[test]
fn votes() {
    let request = VoteRequest { vote: vote(), last_log_id: id(2, 8), leadership_transfer: true };
    same(request, &with_vote(0x0a, &[0x12, 4, 0x08, 2, 0x10, 8, 0x18, 1]));
    let response = VoteResponse { vote: vote(), granted: true, last_log_id: id(2, 8) };
    same(response, &with_vote(0x0a, &[0x10, 1, 0x1a, 4, 0x08, 2, 0x10, 8]));
    let request = TransferLeaderRequest { from_leader: vote(), to_node_id: 5, last_log_id: id(2, 8) };
    same(request, &with_vote(0x0a, &[0x10, 5, 0x1a, 4, 0x08, 2, 0x10, 8]));
    same(TransferLeaderResponse { accepted: true, reason: "r".into() }, &[0x08, 1, 0x12, 1, b'r']);
}

#[test]
fn reads_and_calls() {
    same(ReadIndexRequest {}, &[]);
    same(ReadIndexResponse { leading: true, index: 300, term: 3 }, &[0x08, 1, 0x10, 0xac, 0x02, 0x18, 3]);
    let request = CallRequest { handler: "h".into(), payload: Bytes::from_static(b"p") };
    same(request, &[0x0a, 1, b'h', 0x12, 1, b'p']);
    use call_response::Outcome;
    for (outcome, golden) in [
        (Outcome::Reply(Bytes::from_static(b"r")), &[0x0a, 1, b'r'][..]),
        (Outcome::Error(Bytes::from_static(b"e")), &[0x12, 1, b'e']),
        (Outcome::NotLeading(NotLeading { leader: 5 }), &[0x1a, 2, 0x08, 5]),
        (Outcome::NoHandler(NoHandler {}), &[0x22, 0]),
    ] {
        same(CallResponse { outcome: Some(outcome) }, golden);
    }
}

/// These two have to be read by every version there will be: they tell versions apart.
#[test]
fn who_is_there() {
    same(IdentifyRequest { node_id: 5, peer_urls: vec!["u".into()] }, &[0x08, 5, 0x12, 1, b'u']);
    let response = IdentifyResponse {
        cluster_id: 1,
        node_id: 2,
        name: "n".into(),
        program_version: "v".into(),
        has_leader: true,
        initialized: true,
        you: Some(KnownMember { node_id: 5, started: true }),
        disk_full: true,
        protocol_version: 1,
        damaged: true,
    };
    let golden = [
        &[0x08, 1, 0x10, 2, 0x1a, 1, b'n', 0x22, 1, b'v', 0x28, 1, 0x30, 1][..],
        &[0x3a, 4, 0x08, 5, 0x10, 1, 0x40, 1, 0x48, 1, 0x50, 1],
    ]
    .concat();
    same(response, &golden);
}

#[test]
fn sql() {
    use sql_value::Value;
    let values = [
        (Value::Null(true), &[0x08, 1][..]),
        (Value::Integer(-1), &[0x10, 1]),
        (Value::Real(1.0), &[0x19, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]),
        (Value::Text("t".into()), &[0x22, 1, b't']),
        (Value::Blob(Bytes::from_static(b"b")), &[0x2a, 1, b'b']),
    ];
    for (value, golden) in values {
        same(SqlValue { value: Some(value) }, golden);
    }
    let parameter = SqlParameter { name: ":a".into(), value: Some(SqlValue { value: Some(Value::Integer(1)) }) };
    same(parameter.clone(), &[0x0a, 2, b':', b'a', 0x12, 2, 0x10, 2]);
    same(
        SqlStatement { sql: "S".into(), parameters: vec![parameter], refused: "r".into(), max_rows: 1, script: true },
        &[0x0a, 1, b'S', 0x12, 8, 0x0a, 2, b':', b'a', 0x12, 2, 0x10, 2, 0x1a, 1, b'r', 0x20, 1, 0x28, 1],
    );
}

proptest! {
    #[test]
    fn decoding_never_panics(bytes: Vec<u8>) {
        let _ = AppendRequest::decode(&bytes[..]);
        let _ = VoteRequest::decode(&bytes[..]);
        let _ = SnapshotChunk::decode(&bytes[..]);
        let _ = CallResponse::decode(&bytes[..]);
        let _ = IdentifyResponse::decode(&bytes[..]);
        let _ = SqlBatch::decode(&bytes[..]);
        let _ = SqlBatchReply::decode(&bytes[..]);
    }
}
