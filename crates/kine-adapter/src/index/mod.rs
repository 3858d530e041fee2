//! The key index in memory: what exists, at which revisions, and where its value is stored. No SQL, no network.
//!
//! Every node holds one for the committed state, and the leader's writer one that is ahead of it. Both are persistent
//! trees: readers keep a clone, which costs nothing and never changes.
//!
//! - `tree`: the persistent ordered tree with summaries;
//! - `heads`: how a node of it is searched;
//! - `history`: the older states of one key;
//! - `keys`: the key index made of the two;
//! - `range`: ranges as etcd's requests name them.

mod heads;
mod history;
mod keys;
mod range;
pub(crate) mod tree;

pub(crate) use keys::{KeyEntry, KeyIndex};
pub use keys::{Record, ValueId};
pub use range::{KeyRange, RangeEnd};

#[cfg(test)]
mod tests;
