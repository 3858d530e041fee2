//! etcdserverpb.Cluster. Its headers carry no revision.

use tonic::Status;

use super::router::Services;
use crate::proto::etcdserverpb::{Member, MemberListRequest, MemberListResponse, ResponseHeader};

impl Services {
    pub(super) async fn member_list(&self, request: MemberListRequest) -> Result<MemberListResponse, Status> {
        self.refuse_learner()?;
        if request.linearizable {
            self.in_time(self.linearize()).await?;
        }
        let members = self.store.node().members().into_iter().map(|member| Member {
            id: member.id.0,
            name: member.name,
            peer_ur_ls: member.peer_urls,
            client_ur_ls: member.client_urls,
            is_learner: member.learner,
        });
        let header = ResponseHeader { revision: 0, ..self.store.header() };
        Ok(MemberListResponse { header: Some(header), members: members.collect() })
    }
}
