//! Watches: committed events to those who asked for them.
//!
//! [`Hub`] is the way in: the store's [`EventSink`](crate::kv::EventSink) hands it what is committed, rpc/watch.rs opens
//! streams and creates watchers, and each stream's answers are taken from its [`Frames`].

mod catch_up;
mod dispatch;
mod history;
mod hub;
mod outbox;
mod range_index;
#[cfg(test)]
mod tests;
mod watchers;

pub use hub::{CreateRequest, Hub, Statistics, StreamHandle};
pub(crate) use outbox::HeaderSource;
pub use outbox::{Frame, Frames};
