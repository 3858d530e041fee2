//! The peer protocol: tonic over HTTP/2, one service, messages in proto/peer.proto.
//!
//! - [`proto`]: the generated messages, client and server;
//! - [`identity`]: every call says which cluster and which member it means, and is refused by any other;
//! - [`channels`]: connections to peers, kept and found again by address.
//!
//! What the calls mean to Raft stands in `consensus::transport` (sending) and `node::peer_service` (answering).

pub mod channels;
pub mod identity;

/// Generated from proto/peer.proto.
#[allow(missing_docs, missing_debug_implementations, clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod proto {
    tonic::include_proto!("raftsqlite.peer.v1");
}

/// Largest message between peers, in bytes: the largest PageSet with its sidecars, and room for framing.
pub const MAX_MESSAGE_BYTES: usize = 384 * 1024 * 1024;
