//! Changes on the writer's thread: put, delete, txn, compact and leases, each within one SQLite transaction.
//!
//! A change goes to three places at once: a row is appended to the tables, the writer's index is brought forward, and an
//! item is added to the sidecar. If the request fails after all, the changes to the index are undone one by one (they
//! are few, and undoing keeps the tree unshared, so that it can be changed in place); SQLite undoes its own.
//!
//! Revisions as in etcd: all events of a request share one, numbered by sub-revision; a request that changes no key takes
//! none.

use super::contents::{Contents, Undo};
use super::sidecar::Encoder;
use super::view::{self, Fault, Values, header};
use super::{LeaseInfo, ValueId};
use crate::error::KvError;
use crate::index::{KeyEntry, Record};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, PutRequest, PutResponse, ResponseOp, TxnRequest,
    TxnResponse,
};
use crate::schema;
use bytes::Bytes;
use rusqlite::{Connection, params};
use std::sync::Arc;

/// TTLs above this are refused, in seconds.
const MAX_LEASE_TTL_SECONDS: i64 = 9_000_000_000;

/// A request being executed.
pub(super) struct Transaction<'a> {
    pub(super) connection: &'a Connection,
    pub(super) contents: &'a mut Contents,
    pub(super) values: Values<'a>,
    /// How to undo what was done, the last thing last.
    pub(super) undo: &'a mut Vec<Undo>,
    pub(super) sidecar: Encoder,
    /// The store's revision before; events happen at the next one.
    pub(super) base: i64,
    /// Events so far.
    pub(super) events: i64,
    /// The first row appended, as SQLite numbered it.
    pub(super) first_row: Option<i64>,
}

impl Transaction<'_> {
    fn append(&mut self, key: &[u8], record: &Record, value: Option<&[u8]>) -> Result<(), Fault> {
        let mut statement = self.connection.prepare_cached(schema::APPEND)?;
        let Record { create_revision, mod_revision, version, lease, .. } = *record;
        statement.execute(params![mod_revision, self.events, key, create_revision, version, lease, value])?;
        if self.first_row.is_none() {
            let row = self.connection.last_insert_rowid();
            self.first_row = Some(row);
            if ValueId(row) != record.value_id {
                return Err(Fault::Gone);
            }
        }
        self.events += 1;
        Ok(())
    }

    fn write(&mut self, key: &[u8], value: &[u8], lease: i64) -> Result<(), Fault> {
        let changed = self.contents.put(key, lease, self.base + 1);
        let record = changed.record;
        self.undo.push(Undo::Key(changed));
        self.append(key, &record, Some(value))?;
        self.sidecar.put(key, value, record.create_revision, record.version, lease);
        Ok(())
    }

    fn erase(&mut self, key: &[u8]) -> Result<(), Fault> {
        let Some(changed) = self.contents.delete(key, self.base + 1) else {
            return Ok(());
        };
        let record = changed.record;
        self.undo.push(Undo::Key(changed));
        self.append(key, &record, None)?;
        self.sidecar.delete(key);
        Ok(())
    }

    pub(super) fn put(&mut self, request: &PutRequest) -> Result<PutResponse, Fault> {
        view::check_put(self.contents, request)?;
        self.put_checked(request)
    }

    fn put_checked(&mut self, request: &PutRequest) -> Result<PutResponse, Fault> {
        let mut response = PutResponse::default();
        let (mut value, mut lease) = (request.value.clone(), request.lease);
        if request.prev_kv || request.ignore_value || request.ignore_lease {
            let before = self.contents.keys.get(&request.key).and_then(KeyEntry::live).copied();
            if let Some(before) = before {
                if request.ignore_lease {
                    lease = before.lease;
                }
                if request.ignore_value || request.prev_kv {
                    let old = self.values.get(before.value_id)?;
                    if request.ignore_value {
                        value = old.clone();
                    }
                    if request.prev_kv {
                        response.prev_kv = Some(view::key_value(request.key.clone(), &before, old));
                    }
                }
            } else if request.ignore_value || request.ignore_lease {
                return Err(KvError::KeyNotFound.into());
            }
        }
        self.write(&request.key, &value, lease)?;
        response.header = header(self.base + 1);
        Ok(response)
    }

    pub(super) fn delete_range(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Fault> {
        let mut response = DeleteRangeResponse::default();
        if request.range_end.is_empty() {
            let live = self.contents.keys.get(&request.key).and_then(KeyEntry::live).copied();
            if let Some(record) = live {
                self.collect_previous(request, &request.key, &record, &mut response)?;
                self.erase(&request.key)?;
                response.deleted = 1;
            }
        } else {
            let range = super::check::key_range(&request.key, &request.range_end);
            let found = self.contents.keys.list(&range, self.contents.revision, usize::MAX);
            let found: Vec<(Arc<[u8]>, Record)> = found.into_iter().map(|(key, r)| (Arc::clone(key), *r)).collect();
            for (key, record) in &found {
                self.collect_previous(request, key, record, &mut response)?;
            }
            for (key, _) in &found {
                self.erase(key)?;
                response.deleted += 1;
            }
        }
        response.header = header(self.contents.revision);
        Ok(response)
    }

    fn collect_previous(
        &self,
        request: &DeleteRangeRequest,
        key: &[u8],
        record: &Record,
        response: &mut DeleteRangeResponse,
    ) -> Result<(), Fault> {
        if request.prev_kv {
            let value = self.values.get(record.value_id)?;
            response.prev_kvs.push(view::key_value(Bytes::copy_from_slice(key), record, value));
        }
        Ok(())
    }

    pub(super) fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Fault> {
        let path = view::path(self.contents, self.values, request)?;
        view::check_path(self.contents, request, &mut path.as_slice())?;
        let mut response = self.take_path(request, &mut path.as_slice())?;
        response.header = header(self.contents.revision);
        Ok(response)
    }

    /// The header of a nested txn's response stays empty, as in etcd.
    fn take_path(&mut self, request: &TxnRequest, path: &mut &[bool]) -> Result<TxnResponse, Fault> {
        let succeeded = view::step(path);
        let ops = view::branch(request, succeeded);
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            let response = match &op.request {
                Some(Request::RequestRange(range)) => {
                    Response::ResponseRange(view::range(self.contents, self.values, range)?)
                }
                Some(Request::RequestPut(put)) => Response::ResponsePut(self.put_checked(put)?),
                Some(Request::RequestDeleteRange(delete)) => Response::ResponseDeleteRange(self.delete_range(delete)?),
                Some(Request::RequestTxn(nested)) => Response::ResponseTxn(self.take_path(nested, path)?),
                None => return Err(KvError::KeyNotFound.into()),
            };
            responses.push(ResponseOp { response: Some(response) });
        }
        Ok(TxnResponse { header: header(0), succeeded, responses })
    }

    pub(super) fn compact(&mut self, request: &CompactionRequest) -> Result<CompactionResponse, Fault> {
        let revision = request.revision;
        if revision <= self.contents.compact_revision {
            return Err(KvError::Compacted.into());
        }
        if revision > self.contents.revision {
            return Err(KvError::FutureRevision.into());
        }
        self.connection.prepare_cached(schema::SET_COMPACT_REVISION)?.execute([revision])?;
        self.undo.push(Undo::Compacted(self.contents.compact_revision));
        self.contents.compact(revision);
        self.sidecar.compact(revision);
        Ok(CompactionResponse { header: header(self.contents.revision) })
    }

    pub(super) fn grant(
        &mut self,
        request: &LeaseGrantRequest,
        min_ttl_seconds: i64,
    ) -> Result<LeaseGrantResponse, Fault> {
        if request.id == 0 {
            return Err(KvError::LeaseNotFound.into()); // an id has been chosen before
        }
        if request.ttl > MAX_LEASE_TTL_SECONDS {
            return Err(KvError::LeaseTtlTooLarge.into());
        }
        if self.contents.leases.get(&request.id).is_some() {
            return Err(KvError::LeaseExists.into());
        }
        let info = LeaseInfo { id: request.id, ttl_seconds: request.ttl.max(min_ttl_seconds) };
        self.connection.prepare_cached(schema::GRANT)?.execute([info.id, info.ttl_seconds])?;
        self.contents.grant(info);
        self.undo.push(Undo::Granted(info.id));
        self.sidecar.grant(info.id, info.ttl_seconds);
        let header = header(self.contents.revision);
        Ok(LeaseGrantResponse { header, id: info.id, ttl: info.ttl_seconds, error: String::new() })
    }

    pub(super) fn revoke(&mut self, request: &LeaseRevokeRequest) -> Result<LeaseRevokeResponse, Fault> {
        let lease = self.contents.leases.get(&request.id).ok_or(KvError::LeaseNotFound)?;
        let keys: Vec<Arc<[u8]>> = lease.keys.iter().map(|attached| Arc::clone(&attached.0)).collect();
        for key in keys {
            self.erase(&key)?;
        }
        self.connection.prepare_cached(schema::END_LEASE)?.execute([request.id])?;
        if let Some(lease) = self.contents.end_lease(request.id) {
            self.undo.push(Undo::Ended(lease));
        }
        self.sidecar.end_lease(request.id);
        Ok(LeaseRevokeResponse { header: header(self.contents.revision) })
    }

    /// Removes rows that nobody needs any more. No undo: the index forgets them when all of them are gone.
    pub(super) fn remove_rows(&mut self, runs: &[(ValueId, ValueId)]) -> Result<(), Fault> {
        let mut statement = self.connection.prepare_cached(schema::REMOVE)?;
        for (first, last) in runs {
            statement.execute([first.0, last.0])?;
        }
        Ok(())
    }

    /// All rows that nobody needs once history before `revision` is gone have been removed.
    pub(super) fn rows_removed(&mut self, revision: i64) -> Result<(), Fault> {
        if revision <= self.contents.removed_revision {
            return Ok(());
        }
        self.connection.prepare_cached(schema::SET_REMOVED_REVISION)?.execute([revision])?;
        self.undo.push(self.contents.removed(revision));
        self.sidecar.removed(revision);
        Ok(())
    }
}
