//! Whether a request is well formed: what can be told without looking at the store. As etcd's api/v3rpc/key.go.

use crate::error::KvError;
use crate::index::KeyRange;
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, range_request::SortOrder,
    range_request::SortTarget,
};
use std::collections::BTreeSet;

pub(super) fn range(request: &RangeRequest) -> Result<(), KvError> {
    if request.key.is_empty() {
        return Err(KvError::KeyMissing);
    }
    let known = SortOrder::try_from(request.sort_order).is_ok() && SortTarget::try_from(request.sort_target).is_ok();
    if known { Ok(()) } else { Err(KvError::InvalidSortOption) }
}

pub(super) fn put(request: &PutRequest) -> Result<(), KvError> {
    if request.key.is_empty() {
        Err(KvError::KeyMissing)
    } else if request.ignore_value && !request.value.is_empty() {
        Err(KvError::ValueProvided)
    } else if request.ignore_lease && request.lease != 0 {
        Err(KvError::LeaseProvided)
    } else {
        Ok(())
    }
}

pub(super) fn delete_range(request: &DeleteRangeRequest) -> Result<(), KvError> {
    if request.key.is_empty() { Err(KvError::KeyMissing) } else { Ok(()) }
}

/// A txn and all within it: its size, its parts, and that no key is written twice.
pub(super) fn txn(request: &TxnRequest, max_ops: usize) -> Result<(), KvError> {
    parts(request, max_ops)?;
    if is_plain(&request.success) && is_plain(&request.failure) {
        return Ok(());
    }
    written(&request.success)?;
    written(&request.failure)?;
    Ok(())
}

/// Nested txns share what the levels above leave of the budget, which also bounds the depth.
fn parts(request: &TxnRequest, max_ops: usize) -> Result<(), KvError> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    let left = max_ops.checked_sub(ops).ok_or(KvError::TooManyOps)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(KvError::KeyMissing);
    }
    request.success.iter().chain(&request.failure).try_for_each(|op| match &op.request {
        Some(Request::RequestRange(request)) => range(request),
        Some(Request::RequestPut(request)) => put(request),
        Some(Request::RequestDeleteRange(request)) => delete_range(request),
        Some(Request::RequestTxn(request)) => parts(request, left),
        None => Err(KvError::KeyNotFound), // sic
    })
}

/// A branch of a single step that is no txn cannot write a key twice.
fn is_plain(ops: &[RequestOp]) -> bool {
    match ops {
        [] => true,
        [op] => !matches!(op.request, Some(Request::RequestTxn(_))),
        _ => false,
    }
}

/// What a branch writes, if it is not refused.
#[derive(Default)]
struct Written<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Vec<Deleted<'a>>,
}

/// A range that is deleted: [start, end). As in etcd, an end of "\0" is taken literally here, so that such a delete is
/// never found to overlap with a put.
struct Deleted<'a> {
    start: &'a [u8],
    end: Option<&'a [u8]>,
}

impl Written<'_> {
    fn deletes(&self, key: &[u8]) -> bool {
        self.deletes.iter().any(|d| d.end.map_or(key == d.start, |end| d.start <= key && key < end))
    }
}

/// Puts of one key in both branches of a nested txn are one put; deletes may overlap with deletes.
fn written(ops: &[RequestOp]) -> Result<Written<'_>, KvError> {
    let mut all = Written::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(request)) = &op.request {
            let end = Some(request.range_end.as_ref()).filter(|end| !end.is_empty());
            all.deletes.push(Deleted { start: &request.key, end });
        }
    }
    for op in ops {
        let Some(Request::RequestTxn(nested)) = &op.request else {
            continue;
        };
        let (success, failure) = (written(&nested.success)?, written(&nested.failure)?);
        let twice = success.puts.iter().chain(&failure.puts).any(|key| all.puts.contains(key) || all.deletes(key));
        if twice {
            return Err(KvError::DuplicateKey);
        }
        all.puts.extend(success.puts.iter().chain(&failure.puts));
        all.deletes.extend(success.deletes.into_iter().chain(failure.deletes));
    }
    for op in ops {
        if let Some(Request::RequestPut(request)) = &op.request
            && (all.deletes(&request.key) || !all.puts.insert(&request.key))
        {
            return Err(KvError::DuplicateKey);
        }
    }
    Ok(all)
}

/// Whether a txn only reads: then it needs no log entry. A nested txn counts as writing, as in etcd.
pub(super) fn is_readonly(request: &TxnRequest) -> bool {
    let mut ops = request.success.iter().chain(&request.failure);
    ops.all(|op| matches!(op.request, Some(Request::RequestRange(_))))
}

/// Whether a txn that only reads may be answered from what this node has.
pub(super) fn is_serializable(request: &TxnRequest) -> bool {
    let mut ops = request.success.iter().chain(&request.failure);
    ops.all(|op| matches!(&op.request, Some(Request::RequestRange(range)) if range.serializable))
}

/// The range of keys that a request names.
pub(super) fn key_range(key: &bytes::Bytes, range_end: &bytes::Bytes) -> KeyRange {
    KeyRange::new(key.clone(), range_end.clone())
}
