//! When a checkpoint is due: after so many entries or so many bytes of page images in memory, and at once for a new database.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::NodeInner;

/// How often it is looked whether a checkpoint is due.
const INTERVAL: Duration = Duration::from_millis(500);

/// Asks Raft for a snapshot whenever one is due; the state machine makes a checkpoint of it. Runs until the node stops.
pub(super) async fn run(node: std::sync::Weak<NodeInner>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Some(node) = node.upgrade() else { return };
        if node.storage.is_full() && node.raft.is_leader() {
            // Others have room, perhaps: this node takes no writes until it has.
            tracing::warn!("no space is left for the log: handing the leadership over");
            if let Err(error) = (super::Node { inner: node.clone() }).transfer_leader(None).await {
                tracing::warn!(%error, "nobody took it over");
            }
        }
        let applied = *node.machine.applied_index().borrow();
        let checkpointed = node.machine.checkpointed().load(Ordering::Acquire);
        let entries = applied.saturating_sub(checkpointed);
        let memory_bytes = node.machine.memory_bytes();
        let due = entries >= node.config.checkpoint_entries
            || memory_bytes >= node.config.checkpoint_bytes
            || node.machine.has_database_without_file();
        if due && entries > 0 && node.raft.trigger().snapshot().await.is_err() {
            return;
        }
    }
}
