//! etcdserverpb.Lease.

use std::sync::Arc;

use futures_util::Stream;
use tonic::{Status, Streaming};

use super::router::{LeaderLoss, Services};
use crate::error::KvError;
use crate::proto::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};

impl Services {
    pub(super) async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.store.lease_grant(request)).await
    }

    pub(super) async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.store.lease_revoke(request)).await
    }

    pub(super) async fn lease_time_to_live(
        &self,
        request: LeaseTimeToLiveRequest,
    ) -> Result<LeaseTimeToLiveResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.lessor.time_to_live(request)).await
    }

    pub(super) async fn lease_leases(&self, _: LeaseLeasesRequest) -> Result<LeaseLeasesResponse, Status> {
        self.refuse_learner()?;
        Ok(LeaseLeasesResponse { header: Some(self.store.header()), leases: self.lessor.leases() })
    }

    /// One answer to each request of the stream, in order.
    pub(super) fn lease_keep_alive(
        self: Arc<Self>,
        requests: Streaming<LeaseKeepAliveRequest>,
        leader_loss: LeaderLoss,
    ) -> impl Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send {
        let state = Some((self, requests, leader_loss));
        futures_util::stream::unfold(state, |state| async move {
            let (services, mut requests, mut leader_loss) = state?;
            let request = tokio::select! {
                request = requests.message() => request,
                status = leader_loss.lost() => Err(status),
                () = services.stopped() => Err(KvError::Stopped.into()),
            };
            let request = match request {
                Ok(Some(request)) => request,
                Ok(None) => return None,
                Err(status) => return Some((Err(status), None)),
            };
            match services.in_time(services.lessor.keep_alive(request)).await {
                Ok(answer) => Some((Ok(answer), Some((services, requests, leader_loss)))),
                Err(status) => Some((Err(status), None)),
            }
        })
    }
}
