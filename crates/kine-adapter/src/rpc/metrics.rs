//! Calls counted, for /metrics.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use tonic::Code;

/// gRPC codes.
const CODES: usize = 17;

/// The methods that are counted: service, method, type.
const METHODS: &[(&str, &str, &str)] = &[
    ("etcdserverpb.KV", "Range", "unary"),
    ("etcdserverpb.KV", "RangeStream", "server_stream"),
    ("etcdserverpb.KV", "Put", "unary"),
    ("etcdserverpb.KV", "DeleteRange", "unary"),
    ("etcdserverpb.KV", "Txn", "unary"),
    ("etcdserverpb.KV", "Compact", "unary"),
    ("etcdserverpb.Watch", "Watch", "bidi_stream"),
    ("etcdserverpb.Lease", "LeaseGrant", "unary"),
    ("etcdserverpb.Lease", "LeaseRevoke", "unary"),
    ("etcdserverpb.Lease", "LeaseKeepAlive", "bidi_stream"),
    ("etcdserverpb.Lease", "LeaseTimeToLive", "unary"),
    ("etcdserverpb.Lease", "LeaseLeases", "unary"),
    ("etcdserverpb.Cluster", "MemberAdd", "unary"),
    ("etcdserverpb.Cluster", "MemberRemove", "unary"),
    ("etcdserverpb.Cluster", "MemberUpdate", "unary"),
    ("etcdserverpb.Cluster", "MemberList", "unary"),
    ("etcdserverpb.Cluster", "MemberRemove", "unary"),
    ("etcdserverpb.Cluster", "MemberPromote", "unary"),
    ("etcdserverpb.Maintenance", "Alarm", "unary"),
    ("etcdserverpb.Maintenance", "Status", "unary"),
    ("etcdserverpb.Maintenance", "Defragment", "unary"),
    ("etcdserverpb.Maintenance", "Hash", "unary"),
    ("etcdserverpb.Maintenance", "HashKV", "unary"),
    ("etcdserverpb.Maintenance", "Snapshot", "server_stream"),
    ("etcdserverpb.Maintenance", "MoveLeader", "unary"),
    ("etcdserverpb.Maintenance", "Downgrade", "unary"),
    ("etcdserverpb.Auth", "AuthEnable", "unary"),
    ("etcdserverpb.Auth", "AuthDisable", "unary"),
    ("etcdserverpb.Auth", "AuthStatus", "unary"),
    ("etcdserverpb.Auth", "Authenticate", "unary"),
];

/// Counts of one method.
#[derive(Debug, Default)]
struct Method {
    started: AtomicU64,
    handled: [AtomicU64; CODES],
}

/// Counts of all methods.
#[derive(Debug)]
pub struct Metrics {
    methods: Vec<Method>,
    by_path: HashMap<String, usize>,
    leader_changes: AtomicU64,
}

/// A call that has been counted as started.
#[derive(Debug, Clone, Copy)]
pub struct Started(Option<usize>);

impl Default for Metrics {
    fn default() -> Metrics {
        let by_path =
            METHODS.iter().enumerate().map(|(at, (service, method, _))| (format!("/{service}/{method}"), at)).collect();
        Metrics {
            methods: METHODS.iter().map(|_| Method::default()).collect(),
            by_path,
            leader_changes: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// A call of this path begins.
    pub fn started(&self, path: &str) -> Started {
        let at = self.by_path.get(path).copied();
        if let Some(at) = at {
            self.methods[at].started.fetch_add(1, Ordering::Relaxed);
        }
        Started(at)
    }

    /// It has been answered; a stream counts as answered when it begins.
    pub fn handled(&self, started: Started, code: Code) {
        if let Some(at) = started.0
            && let Some(count) = self.methods[at].handled.get(code as usize)
        {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// There is another leader than before.
    pub fn leader_changed(&self) {
        self.leader_changes.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was.
    #[must_use]
    pub fn leader_changes(&self) -> u64 {
        self.leader_changes.load(Ordering::Relaxed)
    }

    /// Calls that were answered without an error.
    #[must_use]
    pub fn succeeded(&self, path: &str) -> u64 {
        self.by_path.get(path).map_or(0, |at| self.methods[*at].handled[Code::Ok as usize].load(Ordering::Relaxed))
    }

    /// In the text format of Prometheus.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "# TYPE grpc_server_started_total counter");
        for (method, (service, name, kind)) in self.methods.iter().zip(METHODS) {
            let count = method.started.load(Ordering::Relaxed);
            let _ = writeln!(
                out,
                "grpc_server_started_total{{grpc_method=\"{name}\",grpc_service=\"{service}\",grpc_type=\"{kind}\"}} {count}"
            );
        }
        let _ = writeln!(out, "# TYPE grpc_server_handled_total counter");
        for (method, (service, name, kind)) in self.methods.iter().zip(METHODS) {
            for (code, count) in method.handled.iter().enumerate() {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    let code = code_name(code);
                    let _ = writeln!(
                        out,
                        "grpc_server_handled_total{{grpc_code=\"{code}\",grpc_method=\"{name}\",grpc_service=\"{service}\",grpc_type=\"{kind}\"}} {count}"
                    );
                }
            }
        }
        out
    }
}

/// As grpc-go writes them.
fn code_name(code: usize) -> &'static str {
    const NAMES: [&str; CODES] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    NAMES.get(code).copied().unwrap_or("Unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_method_and_code() {
        let metrics = Metrics::default();
        let started = metrics.started("/etcdserverpb.KV/Put");
        metrics.handled(started, Code::Unavailable);
        metrics.handled(metrics.started("/unknown/Method"), Code::Unimplemented);
        let text = metrics.render();
        let labels = "grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"";
        assert!(text.contains(&format!("grpc_server_started_total{{{labels}}} 1\n")));
        assert!(text.contains(&format!("grpc_server_handled_total{{grpc_code=\"Unavailable\",{labels}}} 1\n")));
        assert_eq!(metrics.succeeded("/etcdserverpb.KV/Put"), 0);
    }
}
