//! etcdserverpb.KV. Requests are checked in the store.

use tonic::Status;

use super::router::Services;
use crate::error::KvError;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, RangeResponse, TxnRequest, TxnResponse,
};

impl Services {
    pub(super) async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status> {
        if !request.serializable {
            self.refuse_learner()?;
        }
        self.in_time(self.store.range(request)).await
    }

    pub(super) async fn put(&self, request: PutRequest) -> Result<PutResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.store.put(request)).await
    }

    pub(super) async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.store.delete_range(request)).await
    }

    pub(super) async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        self.refuse_learner()?;
        self.in_time(self.store.txn(request)).await
    }

    pub(super) async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse, Status> {
        self.refuse_learner()?;
        if request.physical {
            // As long as it takes.
            return Ok(self.store.compact(request).await?);
        }
        self.in_time(self.store.compact(request)).await
    }

    /// Bounds a call by the request timeout: etcd's answer is then that nobody knows.
    pub(super) async fn in_time<A>(&self, call: impl Future<Output = Result<A, KvError>>) -> Result<A, Status> {
        match tokio::time::timeout(self.options.request_timeout, call).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(KvError::Timeout.into()),
        }
    }
}
