//! A node's metrics: every name, its meaning and where its value comes from. docs/operations.md says what to be alarmed by.

use std::sync::atomic::Ordering;

use openraft::async_runtime::watch::WatchReceiver as _;

use super::{Node, Role};
use crate::NodeId;
use crate::log::SYNC_LATENCY_BUCKETS;
use crate::metrics::family::{HistogramValue, MetricFamily, MetricKind, MetricValue, Metrics};
use crate::metrics::recorder::Histogram;

use MetricKind::{Counter, Gauge};

fn gauge(name: &str, help: &'static str, value: impl Into<Number>) -> MetricFamily {
    MetricFamily::new(&format!("raft_sqlite_{name}"), Gauge, help).number(&[], value.into().0)
}

fn counter(name: &str, help: &'static str, value: impl Into<Number>) -> MetricFamily {
    MetricFamily::new(&format!("raft_sqlite_{name}"), Counter, help).number(&[], value.into().0)
}

fn histogram(name: &str, help: &'static str, value: HistogramValue) -> MetricFamily {
    let mut family = MetricFamily::new(&format!("raft_sqlite_{name}"), MetricKind::Histogram, help);
    family.push(&[], MetricValue::Histogram(value));
    family
}

/// Whole numbers are exact up to 2^53.
struct Number(f64);

impl From<u64> for Number {
    fn from(number: u64) -> Self {
        Self(number as f64)
    }
}

impl From<usize> for Number {
    fn from(number: usize) -> Self {
        Self(number as f64)
    }
}

impl From<bool> for Number {
    fn from(yes: bool) -> Self {
        Self(f64::from(u8::from(yes)))
    }
}

impl Node {
    /// Everything worth watching, now. Takes some microseconds for each database; meant to be called once a second at most.
    pub fn metrics(&self) -> Metrics {
        let mut families = self.raft_metrics();
        families.extend(self.log_metrics());
        families.extend(self.work_metrics());
        families.extend(self.database_metrics());
        families.extend(self.peer_metrics());
        Metrics { families }
    }

    fn raft_metrics(&self) -> Vec<MetricFamily> {
        let status = self.status();
        let recorder = self.inner.machine.recorder();
        let checkpointed = self.inner.machine.checkpointed().load(Ordering::Acquire);
        let pending: usize = self.inner.machine.named_states().iter().map(|(_, state)| state.pipeline.len()).sum();
        vec![
            gauge("has_leader", "1: a leader is known.", status.leader.is_some()),
            gauge("is_leader", "1: this node leads.", status.role == Role::Leader),
            gauge("is_voter", "1: this node has a vote.", status.role != Role::Learner),
            gauge("writable", "1: this node leads and takes writes.", self.inner.leadership.borrow().writable_here),
            gauge("broken", "1: this node serves no more; its log and its status say why.", status.broken.is_some()),
            gauge("term", "The Raft term.", status.term),
            gauge("log_last_index", "The newest entry of this node's log.", status.last_log_index),
            gauge("commit_index", "The newest entry that this node knows to be committed.", status.committed_index),
            gauge("applied_index", "The newest entry that this node has applied.", status.applied_index),
            gauge("checkpoint_index", "The newest entry that this node's last checkpoint contains.", checkpointed),
            counter("leader_changes_total", "Another leader than before became known.", recorder.leader_changes.get()),
            counter("elections_total", "Elections that this node stood for.", recorder.elections.get()),
            gauge("proposals_pending", "Entries proposed here and not applied.", pending),
            counter("proposals_total", "Entries proposed here.", recorder.proposals.get()),
            counter("proposals_failed_total", "Entries proposed here in vain.", recorder.proposals_failed.get()),
            histogram(
                "proposal_duration_seconds",
                "From an entry's proposal to its being applied here.",
                recorder.proposal_time.value(),
            ),
            histogram("entry_transactions", "Transactions that share an entry.", recorder.entry_transactions.value()),
            histogram("entry_bytes", "Bytes of an entry.", recorder.entry_bytes.value()),
            histogram("apply_duration_seconds", "Applying an entry.", recorder.apply_time.value()),
            counter(
                "state_hash_mismatches_total",
                "This replica differed from the leader: it serves no more.",
                recorder.hash_mismatches.get(),
            ),
            counter(
                "refused_entries_total",
                "Entries without effect, since another leader came first.",
                recorder.base_mismatches.get(),
            ),
        ]
    }

    fn log_metrics(&self) -> Vec<MetricFamily> {
        let log = self.log_statistics();
        let bounds = SYNC_LATENCY_BUCKETS.iter().map(|microseconds| *microseconds as f64 / 1e6).collect();
        let syncs = HistogramValue { bounds, counts: log.sync_latency.to_vec(), sum: log.sync_time.as_secs_f64() };
        let recorder = self.inner.machine.recorder();
        vec![
            histogram("log_fsync_duration_seconds", "Syncing the log or the vote.", syncs),
            histogram(
                "log_append_duration_seconds",
                "From giving entries to the log to their being on the disk.",
                recorder.append_time.value(),
            ),
            counter("log_written_bytes_total", "Bytes written to the log.", log.written_bytes),
            counter("log_written_entries_total", "Entries written to the log.", log.written_entries),
            gauge("log_entries", "Entries in the log.", log.entries),
            gauge("log_bytes", "Length of the log's files.", log.segment_bytes),
            gauge("log_cached_bytes", "Entries in memory.", log.cached_bytes),
            gauge("log_queued_bytes", "Entries that wait to be written.", log.queued_bytes),
            gauge("log_disk_full", "1: entries wait for room on the disk.", self.inner.storage.is_full()),
        ]
    }

    fn work_metrics(&self) -> Vec<MetricFamily> {
        let recorder = self.inner.machine.recorder();
        let classes = |name: &str, help, values: &crate::metrics::recorder::ByClass| {
            let family = MetricFamily::new(&format!("raft_sqlite_{name}"), Counter, help);
            values.values().fold(family, |family, (class, count)| family.number(&[("class", class)], count as f64))
        };
        let times = |name: &str, help, times: &Histogram| histogram(name, help, times.value());
        vec![
            counter("writes_total", "Write transactions that ended well on this node.", recorder.writes.get()),
            classes("write_errors_total", "Write transactions that did not, by class.", &recorder.write_errors),
            times("write_duration_seconds", "From a write's call to its answer.", &recorder.write_time),
            times("writer_wait_seconds", "From a write's call to the writer's turn.", &recorder.queue_time),
            times("transaction_duration_seconds", "A transaction on the writer's thread.", &recorder.transaction_time),
            counter("reads_total", "Reads that were run.", recorder.reads.get()),
            counter("read_errors_total", "Reads that were not.", recorder.read_errors.get()),
            times("read_duration_seconds", "From a read's call to its answer.", &recorder.read_time),
            gauge("readers_queued", "Reads that wait for a thread.", self.inner.machine.readers().queued()),
            counter("calls_forwarded_total", "Calls sent to the leader.", recorder.calls.get()),
            classes("call_errors_total", "Calls that the leader did not answer, by class.", &recorder.call_errors),
            counter("checkpoints_failed_total", "Checkpoints that failed.", recorder.checkpoints_failed.get()),
            times("checkpoint_duration_seconds", "Checkpoints that went well.", &recorder.checkpoint_time),
            counter("checkpoint_pages_total", "Pages written by checkpoints.", recorder.checkpoint_pages.get()),
            counter("checkpoint_bytes_total", "The same in bytes.", recorder.checkpoint_bytes.get()),
            counter("scrubs_total", "Times that all files of databases were read and checked.", recorder.scrubs.get()),
            counter("scrubs_failed_total", "Databases that were not whole when read.", recorder.scrubs_failed.get()),
            counter("scrubbed_pages_total", "Pages read and checked.", recorder.scrubbed_pages.get()),
            counter("snapshots_sent_total", "Snapshots sent.", recorder.snapshots_sent.get()),
            counter("snapshots_send_failed_total", "Snapshots not sent.", recorder.snapshots_send_failed.get()),
            counter(
                "snapshot_sent_bytes_total",
                "Bytes of snapshots sent.",
                self.inner.machine.send_counters().sent_bytes.load(Ordering::Relaxed),
            ),
            counter("snapshots_received_total", "Snapshots received.", recorder.snapshots_received.get()),
            counter(
                "snapshots_receive_failed_total",
                "Snapshots not received.",
                recorder.snapshots_receive_failed.get(),
            ),
            counter(
                "snapshot_received_bytes_total",
                "Bytes of snapshots received.",
                recorder.snapshot_received_bytes.get(),
            ),
        ]
    }

    /// With the label `database`.
    fn database_metrics(&self) -> Vec<MetricFamily> {
        let family = |name: &str, help| MetricFamily::new(&format!("raft_sqlite_database_{name}"), Gauge, help);
        let mut version = family("version", "The newest committed version.");
        let mut size = family("bytes", "Size of the database.");
        let mut in_use = family("in_use_bytes", "Of these, in pages that are not free.");
        let mut memory = family(
            "memory_bytes",
            "Page images in memory; of these, unwritten: by no checkpoint; pinned: older ones that readers hold.",
        );
        let mut readers = family("readers", "Read transactions, and others that hold a version.");
        let mut oldest = family("oldest_reader_seconds", "How long the oldest of them has.");
        let mut damaged = family("damaged_pages", "Pages of its file that were found to be damaged.");
        let mut queued = family("writers_queued", "Writes that wait for the writer.");
        let mut in_flight = family("entries_in_flight", "Entries proposed here and not applied.");
        for (name, state) in self.inner.machine.named_states() {
            let now = state.replica.statistics();
            let page_size = now.page_size as f64;
            let label = ("database", name.as_str());
            let number = |family: &mut MetricFamily, value: f64| family.push(&[label], MetricValue::Number(value));
            number(&mut version, now.version.0 as f64);
            number(&mut size, f64::from(now.page_count) * page_size);
            number(&mut in_use, f64::from(now.page_count.saturating_sub(now.free_pages)) * page_size);
            for (kind, bytes) in
                [("all", now.memory_bytes), ("unwritten", now.unwritten_bytes), ("pinned", now.held_bytes)]
            {
                memory.push(&[label, ("kind", kind)], MetricValue::Number(bytes as f64));
            }
            number(&mut readers, now.readers as f64);
            number(&mut oldest, now.oldest_reader.unwrap_or_default().as_secs_f64());
            number(&mut damaged, now.damaged_pages as f64);
            number(&mut queued, state.writer.queued() as f64);
            number(&mut in_flight, state.pipeline.len() as f64);
        }
        vec![version, size, in_use, memory, readers, oldest, damaged, queued, in_flight]
    }

    /// On the leader, with the labels `peer` and `name`.
    fn peer_metrics(&self) -> Vec<MetricFamily> {
        let help = "Entries of the leader's log that a peer has not acknowledged; on the leader only.";
        let mut lag = MetricFamily::new("raft_sqlite_peer_lag_entries", Gauge, help);
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log_index.unwrap_or(0);
        for (id, matched) in metrics.replication.iter().flatten().filter(|(id, _)| **id != self.id().0) {
            let behind = last.saturating_sub(matched.as_ref().map_or(0, |matched| matched.index));
            let name = metrics.membership_config.membership().get_node(id).map_or("", |node| node.name.as_str());
            let peer = NodeId(*id).to_string();
            lag.push(&[("peer", &peer), ("name", name)], MetricValue::Number(behind as f64));
        }
        vec![lag]
    }
}
