//! `/metrics`, under the names that dashboards for etcd use.

use std::fmt::{Display, Write};

use raft_sqlite::Role;

use crate::rpc::Services;

/// What etcd has under a name of its own, with the same meaning.
const RENAMED: &[(&str, &str)] = &[
    ("raft_sqlite_log_fsync_duration_seconds", "etcd_disk_wal_fsync_duration_seconds"),
    ("raft_sqlite_log_written_bytes_total", "etcd_disk_wal_write_bytes_total"),
    ("raft_sqlite_checkpoint_duration_seconds", "etcd_disk_backend_commit_duration_seconds"),
    ("raft_sqlite_apply_duration_seconds", "etcd_server_apply_duration_seconds"),
    ("raft_sqlite_proposals_pending", "etcd_server_proposals_pending"),
    ("raft_sqlite_proposals_failed_total", "etcd_server_proposals_failed_total"),
];

/// Everything in the text format of Prometheus.
pub(super) fn render(services: &Services) -> String {
    let node = services.store.node();
    let (status, state) = (node.status(), services.store.state());
    let watch = services.hub.statistics();
    let mut out = String::with_capacity(16 << 10);
    let mut metric = |name: &str, kind: &str, value: &dyn Display| {
        let _ = writeln!(out, "# TYPE {name} {kind}\n{name} {value}");
    };
    metric("etcd_server_has_leader", "gauge", &u8::from(services.leader().is_some()));
    metric("etcd_server_is_leader", "gauge", &u8::from(status.role == Role::Leader));
    metric("etcd_server_is_learner", "gauge", &u8::from(status.role == Role::Learner));
    metric("etcd_server_leader_changes_seen_total", "counter", &services.metrics.leader_changes());
    metric("etcd_server_proposals_committed_total", "gauge", &status.committed_index);
    metric("etcd_server_proposals_applied_total", "gauge", &status.applied_index);
    metric("etcd_server_quota_backend_bytes", "gauge", &services.options.quota_bytes);
    if let Some(statistics) = node.database_statistics(crate::server::DATABASE) {
        metric("etcd_mvcc_db_total_size_in_bytes", "gauge", &statistics.size_bytes);
        metric("etcd_mvcc_db_total_size_in_use_in_bytes", "gauge", &statistics.in_use_bytes);
    }
    for (name, method) in [("range", "Range"), ("put", "Put"), ("delete", "DeleteRange"), ("txn", "Txn")] {
        let count = services.metrics.succeeded(&format!("/etcdserverpb.KV/{method}"));
        metric(&format!("etcd_mvcc_{name}_total"), "counter", &count);
    }
    metric("etcd_debugging_mvcc_keys_total", "gauge", &state.key_count());
    metric("etcd_debugging_mvcc_current_revision", "gauge", &state.revision());
    metric("etcd_debugging_mvcc_compact_revision", "gauge", &state.compact_revision().max(0));
    metric("etcd_debugging_mvcc_watcher_total", "gauge", &watch.watchers);
    metric("etcd_debugging_mvcc_watch_stream_total", "gauge", &watch.streams);
    metric("etcd_debugging_mvcc_slow_watcher_total", "gauge", &watch.behind);
    metric("etcd_debugging_lease_running_total", "gauge", &services.lessor.running());
    let version = &services.options.etcd_version;
    let _ = writeln!(out, "# TYPE etcd_server_version gauge\netcd_server_version{{server_version=\"{version}\"}} 1");
    out.push_str(&services.metrics.render());
    let own = node.metrics();
    for (ours, etcds) in RENAMED {
        if let Some(family) = own.get(ours) {
            let _ = write!(out, "{}", family.renamed(etcds));
        }
    }
    let _ = write!(out, "{own}");
    out
}
