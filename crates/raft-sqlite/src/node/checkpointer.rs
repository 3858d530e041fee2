//! When a checkpoint is due: after so many entries or so many bytes of page images in memory, and at once for a new database or a dropped
//! one. And what is purged of the log: all but the newest checkpointed entries, and those that a member being sent a snapshot will need.
//! A leader whose disk is full, or whose files are damaged, hands over.

use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver as _;

use super::NodeInner;
use crate::NodeId;
use crate::network::channels::Purpose;
use crate::network::proto;

/// How often it is looked whether a checkpoint is due.
const INTERVAL: Duration = Duration::from_millis(500);
/// Pause after a checkpoint that failed: its disk is full, most likely.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Entries that are purged together, at least.
const PURGE_BATCH: u64 = 256;

/// Lets Raft drop what nobody needs of the log.
async fn purge(node: &NodeInner, checkpointed: u64) -> Result<(), ()> {
    let log = node.log.statistics();
    if (log.segment_bytes > node.config.snapshot_log_bytes || node.storage.is_full())
        && node.storage.release_holds() > 0
    {
        tracing::warn!(bytes = log.segment_bytes, "the log is kept no longer for the member that is sent a snapshot");
    }
    let purged = node.log.state().purged.map_or(0, |purged| purged.index);
    let upto = checkpointed.saturating_sub(node.config.log_entries_to_keep).min(node.storage.unheld());
    if upto >= purged + PURGE_BATCH {
        return node.raft.trigger().purge_log(upto).await.map_err(drop);
    }
    Ok(())
}

/// Asks Raft for a snapshot whenever one is due; the state machine makes a checkpoint of it. Runs until the node stops.
pub(super) async fn run(node: std::sync::Weak<NodeInner>) {
    let mut was_full = false;
    let mut asked: Option<(tokio::time::Instant, u64)> = None;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Some(node) = node.upgrade() else { return };
        let full = node.storage.is_full();
        // Only when it lasts: until then the followers, whose logs are alike, have found out whether they have room.
        if full && was_full && node.raft.is_leader() {
            hand_over(&node).await;
        }
        was_full = full;
        if node.machine.damage().is_some() && node.raft.is_leader() {
            hand_over_damaged(&node).await;
        }
        let applied = *node.machine.applied_index().borrow();
        let checkpointed = node.machine.checkpointed().load(Ordering::Acquire);
        node.receiver.tidy(&node.config.data_dir.join("incoming"), applied);
        if purge(&node, checkpointed).await.is_err() {
            return;
        }
        let entries = applied.saturating_sub(checkpointed);
        let memory_bytes = node.machine.memory_bytes();
        let due = entries >= node.config.checkpoint_entries
            || memory_bytes >= node.config.checkpoint_bytes
            || node.machine.has_database_without_file()
            || node.machine.has_dropped_files();
        let failed_lately = asked.is_some_and(|(at, before)| before == checkpointed && at.elapsed() < RETRY_INTERVAL);
        if due && entries > 0 && !failed_lately {
            asked = Some((tokio::time::Instant::now(), checkpointed));
            if node.raft.trigger().snapshot().await.is_err() {
                return;
            }
        }
    }
}

/// Hands the leadership to a member that has room, provided that a majority has: else nobody could commit anything, not even the first
/// entry of a new leadership, without which there are no linearizable reads.
async fn hand_over(node: &std::sync::Arc<NodeInner>) {
    let voters: Vec<u64> = {
        let metrics = node.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().voter_ids().collect()
    };
    let majority = voters.len() / 2 + 1;
    let others = voters.into_iter().filter(|id| *id != node.identity.node_id.0);
    let asked = futures_util::future::join_all(others.map(|id| async move { (id, has_room(node, id).await) })).await;
    let with_room: Vec<u64> = asked.into_iter().filter(|(_, room)| *room).map(|(id, _)| id).collect();
    if with_room.len() < majority {
        return;
    }
    tracing::warn!("no space is left for the log on this node, but on others: handing the leadership over");
    let node = super::Node { inner: node.clone() };
    let to = node.furthest(|id| with_room.contains(&id));
    if let Err(error) = node.transfer_leader(to).await {
        tracing::warn!(%error, "nobody took it over");
    }
}

/// Hands the leadership to a member whose files are whole, as far as it knows: what this one cannot read, nobody could write.
async fn hand_over_damaged(node: &std::sync::Arc<NodeInner>) {
    let others: Vec<u64> = {
        let metrics = node.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let voters = metrics.membership_config.membership().voter_ids();
        voters.filter(|id| *id != node.identity.node_id.0).collect()
    };
    let asked = futures_util::future::join_all(others.iter().map(|id| identify(node, *id))).await;
    let whole: Vec<u64> = others
        .into_iter()
        .zip(asked)
        .filter_map(|(id, answer)| answer.is_some_and(|answer| !answer.damaged && !answer.disk_full).then_some(id))
        .collect();
    let node = super::Node { inner: node.clone() };
    let Some(to) = node.furthest(|id| whole.contains(&id)) else { return };
    tracing::warn!("a page of this node's files is damaged: handing the leadership over");
    if let Err(error) = node.transfer_leader(Some(to)).await {
        tracing::warn!(%error, "nobody took it over");
    }
}

/// Whether a member answers and has room for its log.
async fn has_room(node: &NodeInner, id: u64) -> bool {
    identify(node, id).await.is_some_and(|answer| !answer.disk_full)
}

/// What a member says of itself; None: it does not answer.
async fn identify(node: &NodeInner, id: u64) -> Option<proto::IdentifyResponse> {
    let urls = node.peer_urls(NodeId(id));
    let Some(Ok(mut client)) = urls.first().map(|url| node.channels.client(id, url, Purpose::Heartbeat)) else {
        return None;
    };
    let answer = client.identify(proto::IdentifyRequest::default());
    match tokio::time::timeout(node.config.election_timeout, answer).await {
        Ok(Ok(answer)) => Some(answer.into_inner()),
        _ => None,
    }
}
