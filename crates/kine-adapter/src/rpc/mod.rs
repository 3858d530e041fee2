//! gRPC: one file a service. Decode, call, encode; what the requests mean is decided in kv, watch and lease.
//!
//! ```text
//! server.rs ──▶ router ──▶ unary   (KV, Lease, Cluster, Maintenance, Auth: one message in, one out)
//!                     ├──▶ watch   (frames of the hub, encoded once)
//!                     └──▶ tonic   (other streams, health, reflection)
//! ```
//!
//! Unary calls, which are nearly all of the load, are decoded and encoded right here rather than through tonic's
//! streaming machinery: one buffer in, one buffer out.

mod auth;
mod body;
mod cluster;
mod kv;
mod lease;
mod maintenance;
pub mod metrics;
mod range_stream;
mod router;
pub mod status;
#[cfg(test)]
mod tests;
mod unary;
mod watch;

pub use body::Body;
pub(crate) use router::{OVERHEAD_BYTES, Router, Services};
