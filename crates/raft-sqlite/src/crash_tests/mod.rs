//! Log, checkpoints and catalog as a whole, on one simulated disk: power failures, a full disk, failing operations.
//!
//! [`script`] is what a leader would send; [`node`] does with it what a node does with its storage (append, wait for the sync, apply;
//! checkpoint, purge; the vote), and checks what a restart finds.

mod crash;
mod disk;
mod faulty;
mod full;
mod node;
mod script;

/// Set to run every point instead of a sample.
fn is_exhaustive() -> bool {
    std::env::var_os("RAFT_SQLITE_EXHAUSTIVE").is_some()
}
