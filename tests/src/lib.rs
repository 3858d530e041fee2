//! What the tests of the real program share: clusters of processes, waiting for conditions, a small etcd client.
//!
//! - [`cluster`]: starts, stops and kills nodes;
//! - [`wait`]: conditions with a deadline, never a bare sleep;
//! - [`etcd`]: calls of the etcd API without a client library in between.

pub mod cluster;
pub mod etcd;
pub mod wait;
