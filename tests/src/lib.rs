//! What the tests of the real program share: clusters of processes, waiting for conditions, a small etcd client.
//!
//! - [`cluster`]: starts, stops and kills nodes;
//! - [`ledger`]: what was acknowledged, and whether it is all there;
//! - [`disk`]: small disks, filled and freed;
//! - [`wait`]: conditions with a deadline, never a bare sleep;
//! - [`etcd`]: calls of the etcd API without a client library in between.

pub mod cluster;
pub mod disk;
pub mod etcd;
pub mod ledger;
pub mod wait;
