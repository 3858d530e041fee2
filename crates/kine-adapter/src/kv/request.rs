//! Requests that change something, as they go to the leader and run on its writer.
//!
//! On the way to the leader (through raft-sqlite's `call_leader`, which frames and protects them):
//!
//! ```text
//! request: 1 byte kind (1 PUT, 2 DELETE RANGE, 3 TXN, 4 COMPACT, 5 GRANT, 6 REVOKE), then the protobuf message
//!          or 7 LEASE, then whatever the lease layer sends
//! answer:  8 bytes database version, little endian: it shows what was done; then the protobuf message (LEASE: no version)
//! refusal: `KvError::encode`
//! ```

use super::transaction::Transaction;
use super::view::Fault;
use super::{StoreOptions, check};
use crate::error::KvError;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, PutRequest, PutResponse, ResponseHeader, TxnRequest,
    TxnResponse,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use raft_sqlite::Version;

/// The kind of a call for the lease layer.
pub(super) const LEASE: u8 = 7;

/// A request that changes something.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Write {
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    Grant(LeaseGrantRequest),
    Revoke(LeaseRevokeRequest),
}

/// The answer to a [`Write`], of the same kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Written {
    Put(PutResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    Compact(CompactionResponse),
    Grant(LeaseGrantResponse),
    Revoke(LeaseRevokeResponse),
}

impl Write {
    /// What can be refused without asking the leader.
    pub(super) fn check(&self, options: &StoreOptions) -> Result<(), KvError> {
        match self {
            Write::Put(request) => check::put(request)?,
            Write::DeleteRange(request) => check::delete_range(request)?,
            Write::Txn(request) => check::txn(request, options.max_txn_ops)?,
            Write::Compact(_) | Write::Grant(_) | Write::Revoke(_) => {}
        }
        if self.message_bytes() > options.max_request_bytes { Err(KvError::RequestTooLarge) } else { Ok(()) }
    }

    pub(super) fn message_bytes(&self) -> usize {
        match self {
            Write::Put(request) => request.encoded_len(),
            Write::DeleteRange(request) => request.encoded_len(),
            Write::Txn(request) => request.encoded_len(),
            Write::Compact(request) => request.encoded_len(),
            Write::Grant(request) => request.encoded_len(),
            Write::Revoke(request) => request.encoded_len(),
        }
    }

    pub(super) fn execute(&self, transaction: &mut Transaction<'_>, options: &StoreOptions) -> Result<Written, Fault> {
        Ok(match self {
            Write::Put(request) => Written::Put(transaction.put(request)?),
            Write::DeleteRange(request) => Written::DeleteRange(transaction.delete_range(request)?),
            Write::Txn(request) => Written::Txn(transaction.txn(request)?),
            Write::Compact(request) => Written::Compact(transaction.compact(request)?),
            Write::Grant(request) => Written::Grant(transaction.grant(request, options.min_lease_ttl_seconds)?),
            Write::Revoke(request) => Written::Revoke(transaction.revoke(request)?),
        })
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(1 + self.message_bytes());
        match self {
            Write::Put(request) => encode_message(&mut out, 1, request),
            Write::DeleteRange(request) => encode_message(&mut out, 2, request),
            Write::Txn(request) => encode_message(&mut out, 3, request),
            Write::Compact(request) => encode_message(&mut out, 4, request),
            Write::Grant(request) => encode_message(&mut out, 5, request),
            Write::Revoke(request) => encode_message(&mut out, 6, request),
        }
        out.freeze()
    }

    pub(super) fn decode(mut bytes: Bytes) -> Result<Write, KvError> {
        let kind = if bytes.has_remaining() { bytes.get_u8() } else { 0 };
        Ok(match kind {
            1 => Write::Put(decode_message(bytes)?),
            2 => Write::DeleteRange(decode_message(bytes)?),
            3 => Write::Txn(decode_message(bytes)?),
            4 => Write::Compact(decode_message(bytes)?),
            5 => Write::Grant(decode_message(bytes)?),
            6 => Write::Revoke(decode_message(bytes)?),
            _ => return Err(KvError::NotCapable),
        })
    }
}

fn encode_message(out: &mut BytesMut, kind: u8, message: &impl Message) {
    out.put_u8(kind);
    out.reserve(message.encoded_len());
    message.encode_raw(out);
}

fn decode_message<M: Message + Default>(bytes: Bytes) -> Result<M, KvError> {
    M::decode(bytes).map_err(|error| KvError::Internal(format!("a message between nodes cannot be read: {error}")))
}

impl Written {
    /// The header, whatever the kind.
    pub(super) fn header(&mut self) -> &mut ResponseHeader {
        let header = match self {
            Written::Put(response) => &mut response.header,
            Written::DeleteRange(response) => &mut response.header,
            Written::Txn(response) => &mut response.header,
            Written::Compact(response) => &mut response.header,
            Written::Grant(response) => &mut response.header,
            Written::Revoke(response) => &mut response.header,
        };
        header.get_or_insert_default()
    }

    pub(super) fn encode(&self, version: Version) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u64_le(version.0);
        match self {
            Written::Put(response) => append(&mut out, response),
            Written::DeleteRange(response) => append(&mut out, response),
            Written::Txn(response) => append(&mut out, response),
            Written::Compact(response) => append(&mut out, response),
            Written::Grant(response) => append(&mut out, response),
            Written::Revoke(response) => append(&mut out, response),
        }
        out.freeze()
    }

    /// The answer to `request`.
    pub(super) fn decode(request: &Write, mut bytes: Bytes) -> Result<(Written, Version), KvError> {
        if bytes.remaining() < size_of::<u64>() {
            return Err(KvError::Internal("an answer of the leader is cut off".into()));
        }
        let version = Version(bytes.get_u64_le());
        let written = match request {
            Write::Put(_) => Written::Put(decode_message(bytes)?),
            Write::DeleteRange(_) => Written::DeleteRange(decode_message(bytes)?),
            Write::Txn(_) => Written::Txn(decode_message(bytes)?),
            Write::Compact(_) => Written::Compact(decode_message(bytes)?),
            Write::Grant(_) => Written::Grant(decode_message(bytes)?),
            Write::Revoke(_) => Written::Revoke(decode_message(bytes)?),
        };
        Ok((written, version))
    }
}

fn append(out: &mut BytesMut, message: &impl Message) {
    out.reserve(message.encoded_len());
    message.encode_raw(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_survive_the_way_to_the_leader_and_back() {
        let header = Some(ResponseHeader { revision: 7, ..Default::default() });
        let all = [
            (
                Write::Put(PutRequest { key: "a".into(), value: "b".into(), ..Default::default() }),
                Written::Put(PutResponse { header, prev_kv: None }),
            ),
            (
                Write::DeleteRange(DeleteRangeRequest { key: "a".into(), ..Default::default() }),
                Written::DeleteRange(DeleteRangeResponse { header, deleted: 1, ..Default::default() }),
            ),
            (
                Write::Txn(TxnRequest::default()),
                Written::Txn(TxnResponse { header, succeeded: true, ..Default::default() }),
            ),
            (
                Write::Compact(CompactionRequest { revision: 3, physical: true }),
                Written::Compact(CompactionResponse { header }),
            ),
            (
                Write::Grant(LeaseGrantRequest { ttl: 5, id: -1 }),
                Written::Grant(LeaseGrantResponse { header, id: -1, ttl: 5, ..Default::default() }),
            ),
            (Write::Revoke(LeaseRevokeRequest { id: 9 }), Written::Revoke(LeaseRevokeResponse { header })),
        ];
        for (request, mut answer) in all {
            assert_eq!(Write::decode(request.encode()), Ok(request.clone()));
            assert_eq!(Written::decode(&request, answer.encode(Version(77))), Ok((answer.clone(), Version(77))));
            assert_eq!(answer.header().revision, 7);
        }
    }

    #[test]
    fn golden_bytes() {
        for (request, golden) in [
            (
                Write::Put(PutRequest { key: "a".into(), value: "b".into(), lease: 3, ..Default::default() }),
                &[1, 0x0a, 1, b'a', 0x12, 1, b'b', 0x18, 3][..],
            ),
            (Write::DeleteRange(DeleteRangeRequest { key: "a".into(), ..Default::default() }), &[2, 0x0a, 1, b'a']),
            (Write::Txn(TxnRequest::default()), &[3]),
            (Write::Compact(CompactionRequest { revision: 3, physical: true }), &[4, 0x08, 3, 0x10, 1]),
            (Write::Grant(LeaseGrantRequest { ttl: 5, id: 9 }), &[5, 0x08, 5, 0x10, 9]),
            (Write::Revoke(LeaseRevokeRequest { id: 9 }), &[6, 0x08, 9]),
        ] {
            assert_eq!(request.encode().as_ref(), golden);
            assert_eq!(Write::decode(Bytes::copy_from_slice(golden)), Ok(request));
        }
        let answer =
            Written::Revoke(LeaseRevokeResponse { header: Some(ResponseHeader { revision: 7, ..Default::default() }) });
        assert_eq!(answer.encode(Version(0x0102)).as_ref(), [2, 1, 0, 0, 0, 0, 0, 0, 0x0a, 2, 0x18, 7]);
    }

    proptest::proptest! {
        #[test]
        fn decoding_never_panics(bytes: Vec<u8>, kind in 0u8..9) {
            let _ = Write::decode(Bytes::copy_from_slice(&bytes));
            let _ = Write::decode([&[kind], &bytes[..]].concat().into());
            let _ = Written::decode(&Write::Txn(TxnRequest::default()), bytes.into());
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        assert_eq!(Write::decode(Bytes::new()), Err(KvError::NotCapable));
        assert_eq!(Write::decode(Bytes::from_static(&[99, 1])), Err(KvError::NotCapable));
        assert!(Write::decode(Bytes::from_static(&[1, 0xff])).is_err());
        assert!(Written::decode(&Write::Txn(TxnRequest::default()), Bytes::from_static(&[1, 2])).is_err());
    }
}
