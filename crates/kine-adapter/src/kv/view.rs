//! Reading a state: range, compare, and the checks that a txn must pass. As etcd's server/etcdserver/txn.
//!
//! Everything but values comes from the key index. Where values come from is the caller's: the cache alone (so that the
//! caller need not leave its thread), or the cache and a connection.

use super::ValueId;
use super::cache::ValueCache;
use super::check::key_range;
use super::contents::Contents;
use crate::error::KvError;
use crate::index::{KeyEntry, Record};
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{
    Compare, PutRequest, RangeRequest, RangeResponse, RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
    response_op::Response,
};
use crate::proto::mvccpb::KeyValue;
use crate::schema;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension};
use std::cmp::Ordering;
use std::sync::Arc;

/// Why a state could not be read.
#[derive(Debug)]
pub(super) enum Fault {
    /// The request asks for what cannot be.
    Refused(KvError),
    /// A value is not in the cache, and there is no connection to ask.
    NotCached,
    /// A row that the index names does not exist: compaction has passed by, or the index is not that of the tables.
    Gone,
    /// SQLite failed.
    Sql(rusqlite::Error),
}

impl From<KvError> for Fault {
    fn from(error: KvError) -> Fault {
        Fault::Refused(error)
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Fault {
        Fault::Sql(error)
    }
}

/// Where values come from.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    pub(super) cache: &'a ValueCache,
    pub(super) connection: Option<&'a Connection>,
    /// Whether what the connection sees is committed, so that it may be cached.
    pub(super) committed: bool,
}

impl Values<'_> {
    pub(super) fn get(&self, id: ValueId) -> Result<Bytes, Fault> {
        if let Some(value) = self.cache.get(id) {
            return Ok(value);
        }
        let connection = self.connection.ok_or(Fault::NotCached)?;
        let mut statement = connection.prepare_cached(schema::VALUE)?;
        let value = statement
            .query_row([id.0], |row| Ok(Bytes::copy_from_slice(row.get_ref(0)?.as_blob()?)))
            .optional()?
            .ok_or(Fault::Gone)?;
        if self.committed {
            self.cache.insert(id, &value, value.len());
        }
        Ok(value)
    }
}

/// A key and its state, with the value.
pub(super) fn key_value(key: Bytes, record: &Record, value: Bytes) -> KeyValue {
    KeyValue {
        key,
        create_revision: record.create_revision,
        mod_revision: record.mod_revision,
        version: record.version,
        value,
        lease: record.lease,
    }
}

pub(super) fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

/// The revision to read at, if it can be.
fn readable(contents: &Contents, revision: i64) -> Result<i64, KvError> {
    if revision > contents.revision {
        return Err(KvError::FutureRevision);
    }
    let revision = if revision <= 0 { contents.revision } else { revision };
    if revision < contents.compact_revision { Err(KvError::Compacted) } else { Ok(revision) }
}

/// A key as it was at a revision.
pub(super) fn key_at(contents: &Contents, values: Values<'_>, key: &[u8], at: i64) -> Result<Option<KeyValue>, Fault> {
    let revision = readable(contents, at)?;
    let Some(record) = contents.keys.get(key).and_then(|entry| entry.live_at(revision)) else {
        return Ok(None);
    };
    let value = values.get(record.value_id)?;
    Ok(Some(key_value(Bytes::copy_from_slice(key), record, value)))
}

/// Answers a range request. The header holds the current revision only.
pub(super) fn range(contents: &Contents, values: Values<'_>, request: &RangeRequest) -> Result<RangeResponse, Fault> {
    let revision = readable(contents, request.revision)?;
    let range = key_range(&request.key, &request.range_end);
    let mut response = RangeResponse { header: header(contents.revision), ..RangeResponse::default() };
    if request.count_only {
        response.count = length(contents.keys.count(&range, revision));
        return Ok(response);
    }
    let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
    // One more than asked for tells whether there is more. What is sorted or filtered is looked at as a whole.
    let take = match limit {
        Some(limit) if sorted_by_key(request) && !is_filtered(request) => limit.saturating_add(1),
        _ => usize::MAX,
    };
    let mut found = contents.keys.list(&range, revision, take);
    let all = found.len() < take || range.is_single();
    response.count = length(if all { found.len() } else { contents.keys.count(&range, revision) });
    if is_filtered(request) {
        found.retain(|(_, record)| passes(record, request));
    }
    response.more = limit.is_some_and(|limit| found.len() > limit);
    let kept = limit.unwrap_or(usize::MAX);
    let key = |key: &Arc<[u8]>| {
        if range.is_single() { request.key.clone() } else { Bytes::copy_from_slice(key) }
    };
    if sort_target(request) == SortTarget::Value {
        let mut full = Vec::with_capacity(found.len());
        for (k, record) in found {
            full.push(key_value(key(k), record, values.get(record.value_id)?));
        }
        sort(request, &mut full, |a, b| a.value.cmp(&b.value));
        full.truncate(kept);
        if request.keys_only {
            full.iter_mut().for_each(|kv| kv.value = Bytes::new());
        }
        response.kvs = full;
        return Ok(response);
    }
    match sort_target(request) {
        SortTarget::Key | SortTarget::Value => sort(request, &mut found, |a, b| a.0.cmp(b.0)),
        SortTarget::Version => sort(request, &mut found, |a, b| a.1.version.cmp(&b.1.version)),
        SortTarget::Create => sort(request, &mut found, |a, b| a.1.create_revision.cmp(&b.1.create_revision)),
        SortTarget::Mod => sort(request, &mut found, |a, b| a.1.mod_revision.cmp(&b.1.mod_revision)),
    }
    found.truncate(kept);
    response.kvs.reserve_exact(found.len());
    for (k, record) in found {
        response.kvs.push(if request.keys_only {
            // As etcd 3.7 has it: the lease is left out too.
            key_value(key(k), &Record { lease: 0, ..*record }, Bytes::new())
        } else {
            key_value(key(k), record, values.get(record.value_id)?)
        });
    }
    Ok(response)
}

fn length(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn sort_target(request: &RangeRequest) -> SortTarget {
    SortTarget::try_from(request.sort_target).unwrap_or(SortTarget::Key)
}

/// As etcd decides it: with no order given a limit cuts off by key first, and what is left is sorted then.
fn sorted_by_key(request: &RangeRequest) -> bool {
    let order = SortOrder::try_from(request.sort_order).unwrap_or(SortOrder::None);
    order == SortOrder::None || (order == SortOrder::Ascend && sort_target(request) == SortTarget::Key)
}

fn sort<T>(request: &RangeRequest, items: &mut [T], by: impl Fn(&T, &T) -> Ordering) {
    match SortOrder::try_from(request.sort_order).unwrap_or(SortOrder::None) {
        SortOrder::None | SortOrder::Ascend if sort_target(request) == SortTarget::Key => {}
        SortOrder::None | SortOrder::Ascend => items.sort_by(by),
        SortOrder::Descend => items.sort_by(|a, b| by(b, a)),
    }
}

fn is_filtered(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

fn passes(record: &Record, request: &RangeRequest) -> bool {
    let within = |n: i64, least: i64, greatest: i64| (least == 0 || n >= least) && (greatest == 0 || n <= greatest);
    within(record.mod_revision, request.min_mod_revision, request.max_mod_revision)
        && within(record.create_revision, request.min_create_revision, request.max_create_revision)
}

/// Which branch of a txn, and of each txn nested in the branches taken, is to be executed, in the order in which they
/// are met. Everything is compared with the state before the txn.
pub(super) fn path(contents: &Contents, values: Values<'_>, txn: &TxnRequest) -> Result<Vec<bool>, Fault> {
    let mut path = Vec::with_capacity(1);
    extend_path(contents, values, txn, &mut path)?;
    Ok(path)
}

fn extend_path(contents: &Contents, values: Values<'_>, txn: &TxnRequest, path: &mut Vec<bool>) -> Result<(), Fault> {
    let mut holds = true;
    for compare in &txn.compare {
        if !compare_holds(contents, values, compare)? {
            holds = false;
            break;
        }
    }
    path.push(holds);
    for op in branch(txn, holds) {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            extend_path(contents, values, nested, path)?;
        }
    }
    Ok(())
}

/// The branch to execute.
pub(super) fn branch(txn: &TxnRequest, holds: bool) -> &[RequestOp] {
    if holds { &txn.success } else { &txn.failure }
}

fn compare_holds(contents: &Contents, values: Values<'_>, compare: &Compare) -> Result<bool, Fault> {
    const ABSENT: Record = Record { create_revision: 0, mod_revision: 0, version: 0, lease: 0, value_id: ValueId(0) };
    let by_value = compare.target == CompareTarget::Value as i32;
    if compare.range_end.is_empty() {
        let record = contents.keys.get(&compare.key).and_then(KeyEntry::live);
        return match record {
            Some(record) => holds(values, compare, record),
            None => Ok(!by_value && holds(values, compare, &ABSENT)?),
        };
    }
    let found = contents.keys.list(&key_range(&compare.key, &compare.range_end), contents.revision, usize::MAX);
    if found.is_empty() {
        return Ok(!by_value && holds(values, compare, &ABSENT)?);
    }
    for (_, record) in found {
        if !holds(values, compare, record)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// As in etcd, what is compared with is 0 if the request gives it for another target, and an unknown target equals.
fn holds(values: Values<'_>, compare: &Compare, record: &Record) -> Result<bool, Fault> {
    let union = compare.target_union.as_ref();
    let ordering = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Version) => {
            record.version.cmp(&if let Some(TargetUnion::Version(n)) = union { *n } else { 0 })
        }
        Ok(CompareTarget::Create) => {
            record.create_revision.cmp(&if let Some(TargetUnion::CreateRevision(n)) = union { *n } else { 0 })
        }
        Ok(CompareTarget::Mod) => {
            record.mod_revision.cmp(&if let Some(TargetUnion::ModRevision(n)) = union { *n } else { 0 })
        }
        Ok(CompareTarget::Lease) => record.lease.cmp(&if let Some(TargetUnion::Lease(n)) = union { *n } else { 0 }),
        Ok(CompareTarget::Value) => {
            let other = if let Some(TargetUnion::Value(value)) = union { value.as_ref() } else { &[] };
            values.get(record.value_id)?.as_ref().cmp(other)
        }
        Err(_) => Ordering::Equal,
    };
    Ok(match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Err(_) => true,
    })
}

/// Whether the branches of `path` can be executed: leases and keys that puts need exist, revisions can be read.
pub(super) fn check_path(contents: &Contents, txn: &TxnRequest, path: &mut &[bool]) -> Result<(), KvError> {
    for op in branch(txn, step(path)) {
        match &op.request {
            Some(Request::RequestRange(range)) if range.revision != 0 => {
                if range.revision > contents.revision {
                    return Err(KvError::FutureRevision);
                }
                if range.revision < contents.compact_revision {
                    return Err(KvError::Compacted);
                }
            }
            Some(Request::RequestPut(put)) => check_put(contents, put)?,
            Some(Request::RequestTxn(nested)) => check_path(contents, nested, path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Takes the next step of a path.
pub(super) fn step(path: &mut &[bool]) -> bool {
    let (first, rest) = path.split_first().expect("invariant: a path has a step for each txn on it");
    *path = rest;
    *first
}

/// Whether what a put needs exists.
pub(super) fn check_put(contents: &Contents, put: &PutRequest) -> Result<(), KvError> {
    if put.lease != 0 && contents.leases.get(&put.lease).is_none() {
        return Err(KvError::LeaseNotFound);
    }
    let needs_key = put.ignore_value || put.ignore_lease;
    if needs_key && contents.keys.get(&put.key).and_then(KeyEntry::live).is_none() {
        return Err(KvError::KeyNotFound);
    }
    Ok(())
}

/// Executes a txn that only reads (see [`super::check::is_readonly`]).
pub(super) fn readonly_txn(contents: &Contents, values: Values<'_>, txn: &TxnRequest) -> Result<TxnResponse, Fault> {
    let path = path(contents, values, txn)?;
    check_path(contents, txn, &mut path.as_slice())?;
    let mut responses = Vec::new();
    for op in branch(txn, path[0]) {
        if let Some(Request::RequestRange(request)) = &op.request {
            let response = range(contents, values, request)?;
            responses.push(ResponseOp { response: Some(Response::ResponseRange(response)) });
        }
    }
    Ok(TxnResponse { header: header(contents.revision), succeeded: path[0], responses })
}
