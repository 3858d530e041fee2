//! Is this node alive, is it ready.

use std::sync::Arc;

use http::{Response, StatusCode};

use super::{Query, text};
use crate::error::KvError;
use crate::proto::etcdserverpb::RangeRequest;
use crate::rpc::{Body, Services};

/// Something that can be wrong with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    SerializableRead,
    LinearizableRead,
    DataCorruption,
    NonLearner,
}

const LIVENESS: &[Check] = &[Check::SerializableRead];
const READINESS: &[Check] =
    &[Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::DataCorruption => "data_corruption",
            Check::NonLearner => "non_learner",
        }
    }

    async fn run(self, services: &Services) -> Result<(), String> {
        match self {
            Check::SerializableRead => read(services, true).await.map_err(|error| error.to_string()),
            Check::LinearizableRead => read(services, false).await.map_err(|error| error.to_string()),
            // There are no alarms yet that could say so.
            Check::DataCorruption => Ok(()),
            Check::NonLearner if services.store.node().status().role == raft_sqlite::Role::Learner => {
                Err("not supported for learner".into())
            }
            Check::NonLearner => Ok(()),
        }
    }
}

/// `/health`.
pub(super) async fn health(services: &Arc<Services>, query: &Query<'_>) -> Response<Body> {
    let serializable = query.all("serializable").next() == Some("true");
    let leaderless = services.leader().is_none();
    let reason = if !serializable && leaderless {
        "RAFT NO LEADER".to_owned()
    } else {
        match read(services, serializable).await {
            Ok(()) => String::new(),
            Err(error) => format!("RANGE ERROR:{error}"),
        }
    };
    let healthy = reason.is_empty();
    let body = serde_json::json!({ "health": healthy.to_string(), "reason": reason }).to_string();
    if healthy { super::json(StatusCode::OK, body) } else { text(StatusCode::SERVICE_UNAVAILABLE, body + "\n") }
}

/// `/livez`, `/readyz` and what is below them.
pub(super) async fn checks(services: &Arc<Services>, path: &str, query: &Query<'_>) -> Response<Body> {
    let (root, name) = match path[1..].split_once('/') {
        Some((root, name)) => (root, Some(name)),
        None => (&path[1..], None),
    };
    let all = if root == "livez" { LIVENESS } else { READINESS };
    let chosen: Vec<Check> = match name {
        Some(name) => all.iter().copied().filter(|check| check.name() == name).collect(),
        None => {
            let excluded: Vec<&str> = query.all("exclude").collect();
            all.iter().copied().filter(|check| !excluded.contains(&check.name())).collect()
        }
    };
    if chosen.is_empty() && name.is_some() {
        return text(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    let (mut report, mut healthy) = (String::new(), true);
    for check in chosen {
        match check.run(services).await {
            Ok(()) => report.push_str(&format!("[+]{} ok\n", check.name())),
            Err(reason) => {
                healthy = false;
                report.push_str(&format!("[-]{} failed: {reason}\n", check.name()));
            }
        }
    }
    if !healthy {
        return text(StatusCode::SERVICE_UNAVAILABLE, report);
    }
    if !query.has("verbose") {
        report.clear();
    }
    text(StatusCode::OK, report + "ok\n")
}

/// As etcd's probes read: the first key there is.
async fn read(services: &Services, serializable: bool) -> Result<(), KvError> {
    let request = RangeRequest {
        key: bytes::Bytes::from_static(b"\0"),
        keys_only: true,
        limit: 1,
        serializable,
        ..RangeRequest::default()
    };
    match tokio::time::timeout(services.options.request_timeout, services.store.range(request)).await {
        Ok(answer) => answer.map(|_| ()),
        Err(_) => Err(KvError::Timeout),
    }
}
