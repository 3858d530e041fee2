//! Calls of named handlers on the leader, from any node.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

/// Answers calls on the leader. The answer and the error are the application's own bytes.
pub trait CallHandler: Send + Sync {
    /// Runs one call. It is run on a node that leads when it begins; whether it still does is the handler's business (a write through
    /// [`crate::LocalDatabase::write`] checks it).
    ///
    /// # Cancellation
    /// The future may be dropped at any await when the caller goes away.
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>>;
}

/// Handlers by name.
pub(crate) type Handlers = HashMap<String, Arc<dyn CallHandler>>;

/// The error bytes of a built-in handler: a JSON object, so that peers of other versions can add fields.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct BuiltInFailure {
    /// The outcome is not known (else: no effect).
    pub unknown: bool,
    pub message: String,
}

impl BuiltInFailure {
    pub fn encode(&self) -> Bytes {
        Bytes::from(serde_json::to_vec(self).expect("invariant: plain JSON"))
    }

    pub fn decode(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_else(|error| Self {
            unknown: true,
            message: format!("a peer's error could not be read: {error}"),
        })
    }
}
