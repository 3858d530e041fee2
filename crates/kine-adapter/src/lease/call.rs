//! Lease requests that a node sends to the leader, whose clock they need.
//!
//! ```text
//! request:  byte 0 = format (1), byte 1 = kind (1 keep alive, 2 time to live), then the API's request message (protobuf)
//! answer:   the API's response message (protobuf); refused: KvError::encode
//! ```

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use crate::error::KvError;
use crate::proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseTimeToLiveRequest};

const FORMAT: u8 = 1;
const KEEP_ALIVE: u8 = 1;
const TIME_TO_LIVE: u8 = 2;

/// A request to the leader.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum LeaseCall {
    KeepAlive(LeaseKeepAliveRequest),
    TimeToLive(LeaseTimeToLiveRequest),
}

impl LeaseCall {
    pub fn encode(&self) -> Bytes {
        let (kind, body) = match self {
            LeaseCall::KeepAlive(request) => (KEEP_ALIVE, request.encode_to_vec()),
            LeaseCall::TimeToLive(request) => (TIME_TO_LIVE, request.encode_to_vec()),
        };
        let mut out = BytesMut::with_capacity(2 + body.len());
        out.put_u8(FORMAT);
        out.put_u8(kind);
        out.put_slice(&body);
        out.freeze()
    }

    /// # Errors
    /// `Internal` for what another version sent and this one does not know.
    pub fn decode(bytes: &Bytes) -> Result<LeaseCall, KvError> {
        let unknown = || KvError::Internal("lease request of an unknown kind".into());
        let (Some(&FORMAT), Some(&kind)) = (bytes.first(), bytes.get(1)) else {
            return Err(unknown());
        };
        let body = bytes.slice(2..);
        let malformed = |error: prost::DecodeError| KvError::Internal(format!("malformed lease request: {error}"));
        match kind {
            KEEP_ALIVE => LeaseKeepAliveRequest::decode(body).map(LeaseCall::KeepAlive).map_err(malformed),
            TIME_TO_LIVE => LeaseTimeToLiveRequest::decode(body).map(LeaseCall::TimeToLive).map_err(malformed),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let keep_alive = LeaseCall::KeepAlive(LeaseKeepAliveRequest { id: 300 });
        assert_eq!(keep_alive.encode().as_ref(), [1, 1, 8, 0xac, 2]);
        let time_to_live = LeaseCall::TimeToLive(LeaseTimeToLiveRequest { id: 1, keys: true });
        assert_eq!(time_to_live.encode().as_ref(), [1, 2, 8, 1, 16, 1]);
        for call in [keep_alive, time_to_live] {
            assert_eq!(LeaseCall::decode(&call.encode()).unwrap(), call);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for bytes in [&b""[..], b"\x01", b"\x02\x01", b"\x01\x07", b"\x01\x01\xff"] {
            assert!(LeaseCall::decode(&Bytes::copy_from_slice(bytes)).is_err());
        }
    }
}
