//! etcdserverpb.Auth: authentication is off, and says so.

use tonic::Status;

use super::router::Services;
use crate::error::KvError;
use crate::proto::etcdserverpb::{AuthStatusRequest, AuthStatusResponse, AuthenticateRequest, AuthenticateResponse};

/// The revision of etcd's auth store before anything was changed in it.
const FIRST_AUTH_REVISION: u64 = 1;

impl Services {
    pub(super) async fn auth_status(&self, _: AuthStatusRequest) -> Result<AuthStatusResponse, Status> {
        self.refuse_learner()?;
        let header = Some(self.store.header());
        Ok(AuthStatusResponse { header, enabled: false, auth_revision: FIRST_AUTH_REVISION })
    }

    /// clientv3 goes on without a token on this error.
    pub(super) async fn authenticate(&self, _: AuthenticateRequest) -> Result<AuthenticateResponse, Status> {
        self.refuse_learner()?;
        Err(KvError::AuthNotEnabled.into())
    }
}
