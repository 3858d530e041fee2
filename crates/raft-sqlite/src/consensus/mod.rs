//! The thin layer over openraft: everything that touches its types stands here.
//!
//! - [`types`]: the type configuration, log entries as bytes;
//! - [`storage`]: openraft's log storage on [`crate::log`];
//! - [`machine`]: openraft's state machine on [`crate::state_machine`];
//! - [`transport`]: openraft's network on [`crate::network`]; [`wire`]: its messages;
//! - [`snapshot`]: the sending of snapshots; [`snapshot_wire`]: its messages.
//!
//! Nothing outside this folder and `node/` names openraft, so that a change of its pre-release interface stays here.

pub mod machine;
pub mod snapshot;
pub mod snapshot_wire;
pub mod storage;
pub mod transport;
pub mod types;
pub mod wire;

#[cfg(test)]
mod suite;
