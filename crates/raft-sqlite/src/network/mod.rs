//! The peer protocol: tonic over HTTP/2, messages in proto/peer.proto; and beside it what programs say that are no members.
//!
//! - [`proto`], [`client_proto`]: the generated messages, client and server: of peers, and of programs that are none;
//! - [`identity`]: every call says which cluster and which member it means, and is refused by any other;
//! - [`channels`]: connections to peers, kept and found again by address;
//! - [`listener`], [`tls`]: where their connections come from, and how they are encrypted.
//!
//! What the calls mean to Raft stands in `consensus::transport` (sending) and `node::peer_service` (answering).

pub mod channels;
pub mod identity;
pub mod listener;
pub mod tls;

#[cfg(test)]
mod golden;

/// Generated from proto/peer.proto.
#[allow(missing_docs, missing_debug_implementations, clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod proto {
    tonic::include_proto!("raftsqlite.peer.v1");
}

/// Generated from proto/client.proto.
#[allow(missing_docs, missing_debug_implementations, clippy::all, clippy::unwrap_used, unreachable_pub)]
pub mod client_proto {
    tonic::include_proto!("raftsqlite.client.v1");
}

/// Version of the client protocol, proto/client.proto.
pub const CLIENT_PROTOCOL_VERSION: u32 = 1;

/// Version of the peer protocol: of proto/peer.proto, and of the byte strings that its messages carry (docs/formats.md).
pub const PROTOCOL_VERSION: u32 = 1;
/// The oldest version that this program still understands.
pub const OLDEST_PROTOCOL_VERSION: u32 = 1;

/// Whether this program understands a peer.
///
/// # Errors
/// A sentence that says what to do. `program`: the peer's program version, empty when it does not say.
pub fn check_protocol(version: u32, program: &str) -> Result<(), String> {
    if (OLDEST_PROTOCOL_VERSION..=PROTOCOL_VERSION).contains(&version) {
        return Ok(());
    }
    let newer = version > PROTOCOL_VERSION;
    let known = match OLDEST_PROTOCOL_VERSION == PROTOCOL_VERSION {
        true => PROTOCOL_VERSION.to_string(),
        false => format!("{OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"),
    };
    Err(format!(
        "incompatible versions: the peer (raft-sqlite {}) speaks version {version} of the peer protocol, this member (raft-sqlite {}) \
         {known}: upgrade {} first, step by step through versions that understand each other",
        if program.is_empty() { "of an unknown version" } else { program },
        env!("CARGO_PKG_VERSION"),
        if newer { "this member" } else { "the peer" },
    ))
}

/// Largest message between peers, in bytes: the largest PageSet with its sidecars, and room for framing.
pub const MAX_MESSAGE_BYTES: usize = 384 * 1024 * 1024;
