//! etcdserverpb.KV/RangeStream: a range in chunks, so that neither side holds a large list twice.
//!
//! All chunks are of one state. The first is small (its size tells how large the keys are), the next ones are sized
//! towards the largest request. Header, `more` and `count` come with the last.
//!
//! Source: etcd server/etcdserver/v3_server.go (3.7).

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::Stream;
use prost::Message;
use tonic::Status;

use super::router::Services;
use crate::error::KvError;
use crate::kv::State;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader};

/// Keys in the first chunk.
const FIRST_CHUNK: i64 = 10;

/// A stream in the making.
struct Chunks {
    services: Arc<Services>,
    state: Arc<State>,
    request: RangeRequest,
    header: ResponseHeader,
    /// What the client set as its limit, or more than there can be.
    limit: i64,
    sent: i64,
    done: bool,
}

impl Services {
    /// The answers to a RangeStream request.
    pub(super) async fn range_stream(
        self: Arc<Self>,
        mut request: RangeRequest,
    ) -> Result<impl Stream<Item = Result<RangeStreamResponse, Status>> + Send + use<>, Status> {
        self.refuse_learner()?;
        check(&request)?;
        if !request.serializable {
            self.in_time(self.linearize()).await?;
        }
        let state = self.store.state();
        let limit = if request.limit == 0 { i64::MAX } else { request.limit };
        request.limit = limit.min(FIRST_CHUNK);
        let header = self.store.header_at(state.revision());
        let chunks = Chunks { services: self, state, request, header, limit, sent: 0, done: false };
        Ok(futures_util::stream::unfold(chunks, |mut chunks| async move {
            if chunks.done {
                return None;
            }
            let chunk = chunks.next().await;
            chunks.done |= chunk.is_err();
            Some((chunk.map_err(Status::from), chunks))
        }))
    }
}

impl Chunks {
    async fn next(&mut self) -> Result<RangeStreamResponse, KvError> {
        let mut answer = self.services.store.range_at(&self.state, self.request.clone()).await?;
        let size = answer.encoded_len();
        let count = self.sent.saturating_add(answer.count);
        self.sent += i64::try_from(answer.kvs.len()).unwrap_or(i64::MAX);
        self.done = self.request.count_only || !answer.more || self.sent >= self.limit;
        if let Some(last) = answer.kvs.last() {
            self.request.key = after(&last.key);
        }
        if self.done {
            answer.header = Some(self.header);
            answer.count = count;
        } else {
            answer = RangeResponse { kvs: answer.kvs, ..RangeResponse::default() };
            let target = self.services.store.options().max_request_bytes;
            self.request.limit = next_limit(self.request.limit, size, target).min(self.limit - self.sent);
        }
        Ok(RangeStreamResponse { range_response: Some(answer) })
    }
}

/// What a stream cannot do in chunks.
fn check(request: &RangeRequest) -> Result<(), Status> {
    if request.key.is_empty() {
        return Err(KvError::KeyMissing.into());
    }
    let (Ok(order), Ok(target)) = (SortOrder::try_from(request.sort_order), SortTarget::try_from(request.sort_target))
    else {
        return Err(KvError::InvalidSortOption.into());
    };
    if order != SortOrder::None && (target, order) != (SortTarget::Key, SortOrder::Ascend) {
        return Err(Status::unimplemented("RangeStream does not support custom sort orders"));
    }
    let filters =
        [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    if filters.iter().any(|revision| *revision != 0) {
        return Err(Status::unimplemented("RangeStream does not support revision filters"));
    }
    Ok(())
}

/// The first key after `key`.
fn after(key: &[u8]) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.put_slice(key);
    next.put_u8(0);
    next.freeze()
}

/// Doubles or halves only when the last chunk was less than half, or more than twice, the size aimed at.
fn next_limit(limit: i64, size: usize, target: usize) -> i64 {
    if size < target / 2 {
        limit.saturating_mul(2)
    } else if size > target * 2 {
        (limit / 2).max(1)
    } else {
        limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn only_default_order_and_no_filters() {
        let good = RangeRequest { key: "a".into(), ..Default::default() };
        assert!(check(&good).is_ok());
        let ascending = RangeRequest { sort_order: SortOrder::Ascend.into(), ..good.clone() };
        assert!(check(&ascending).is_ok());
        for (bad, code) in [
            (RangeRequest::default(), Code::InvalidArgument),
            (RangeRequest { sort_order: 9, ..good.clone() }, Code::InvalidArgument),
            (RangeRequest { sort_order: SortOrder::Descend.into(), ..good.clone() }, Code::Unimplemented),
            (RangeRequest { sort_target: SortTarget::Mod.into(), ..ascending }, Code::Unimplemented),
            (RangeRequest { max_mod_revision: 1, ..good }, Code::Unimplemented),
        ] {
            assert_eq!(check(&bad).unwrap_err().code(), code);
        }
    }

    #[test]
    fn chunks_grow_towards_the_target() {
        assert_eq!(next_limit(10, 100, 1000), 20);
        assert_eq!(next_limit(10, 900, 1000), 10);
        assert_eq!(next_limit(10, 2001, 1000), 5);
        assert_eq!(next_limit(1, 9999, 1000), 1);
    }
}
