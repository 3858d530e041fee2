//! etcdserverpb.Cluster. Its headers carry no revision.

use raft_sqlite::{MembershipError, NodeId};
use tonic::Status;

use super::router::Services;
use crate::error::KvError;
use crate::proto::etcdserverpb::{
    Member, MemberListRequest, MemberListResponse, MemberRemoveRequest, MemberRemoveResponse, ResponseHeader,
};

impl Services {
    pub(super) async fn member_list(&self, request: MemberListRequest) -> Result<MemberListResponse, Status> {
        self.refuse_learner()?;
        if request.linearizable {
            self.in_time(self.linearize()).await?;
        }
        Ok(MemberListResponse { header: Some(self.cluster_header()), members: self.members() })
    }

    pub(super) async fn member_remove(&self, request: MemberRemoveRequest) -> Result<MemberRemoveResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.linearize()).await?;
        let id = NodeId(request.id);
        let members = self.store.node().members();
        let Some(removed) = members.iter().find(|member| member.id == id) else {
            return Err(KvError::MemberNotFound.into());
        };
        if !removed.learner && members.iter().filter(|member| !member.learner).count() == 1 {
            return Err(KvError::MemberNotEnoughStarted.into());
        }
        self.store.node().remove_member(id).await.map_err(|error| match error {
            MembershipError::NoLeader(_) => KvError::NoLeader,
            MembershipError::OutcomeUnknown(_) => KvError::Timeout,
            other => KvError::Internal(other.to_string()),
        })?;
        Ok(MemberRemoveResponse { header: Some(self.cluster_header()), members: self.members() })
    }

    fn cluster_header(&self) -> ResponseHeader {
        ResponseHeader { revision: 0, ..self.store.header() }
    }

    fn members(&self) -> Vec<Member> {
        let members = self.store.node().members().into_iter().map(|member| Member {
            id: member.id.0,
            name: member.name,
            peer_ur_ls: member.peer_urls,
            client_ur_ls: member.client_urls,
            is_learner: member.learner,
        });
        members.collect()
    }
}
