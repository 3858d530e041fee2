//! etcdserverpb.Maintenance.

use raft_sqlite::Role;
use tonic::Status;

use super::router::Services;
use crate::error::KvError;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::{AlarmRequest, AlarmResponse, DowngradeInfo, StatusRequest, StatusResponse};

impl Services {
    pub(super) async fn status(&self, _: StatusRequest) -> Result<StatusResponse, Status> {
        let node = self.store.node();
        let (status, leader) = (node.status(), self.leader());
        let statistics = node.database_statistics(crate::server::DATABASE);
        let bytes = |size: u64| i64::try_from(size).unwrap_or(i64::MAX);
        Ok(StatusResponse {
            header: Some(self.store.header()),
            version: self.options.etcd_version.clone(),
            db_size: statistics.as_ref().map_or(0, |statistics| bytes(statistics.size_bytes)),
            db_size_in_use: statistics.as_ref().map_or(0, |statistics| bytes(statistics.in_use_bytes)),
            leader: leader.map_or(0, |leader| leader.0),
            raft_index: status.committed_index,
            raft_applied_index: status.applied_index,
            raft_term: status.term,
            errors: leader.is_none().then(|| KvError::NoLeader.to_string()).into_iter().collect(),
            is_learner: status.role == Role::Learner,
            storage_version: self.options.storage_version(),
            db_size_quota: self.options.quota_bytes,
            downgrade_info: Some(DowngradeInfo::default()),
        })
    }

    /// There are no alarms yet; asking for them is answered so.
    pub(super) async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse, Status> {
        self.refuse_learner()?;
        if request.action() == AlarmAction::Get {
            return Ok(AlarmResponse { header: Some(self.store.header()), alarms: Vec::new() });
        }
        Err(super::router::unimplemented("etcdserverpb.Maintenance", "Alarm"))
    }
}
