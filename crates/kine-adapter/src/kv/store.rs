//! The asynchronous face of the key space.

use super::outcome::Failed;
use super::request::{Write, Written};
use super::route::Inner;
use super::view::{self, Values};
use super::{Event, EventSink, PastEvents, RecentEvents, State, check, past, removal};
use crate::error::KvError;
use crate::index::KeyRange;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
    ResponseHeader, TxnRequest, TxnResponse,
};
use crate::proto::mvccpb;
use bytes::Bytes;
use raft_sqlite::{ApplyObserver, CallHandler, Node, Version};
use std::sync::Arc;
use std::time::Duration;

/// Bounds of a [`Store`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Operations in one txn, counted as etcd does (its --max-txn-ops).
    pub max_txn_ops: usize,
    /// Encoded size of a write request (etcd's --max-request-bytes).
    pub max_request_bytes: usize,
    /// Memory for values that are likely to be read again.
    pub value_cache_bytes: usize,
    /// Memory for recent events, from which watchers catch up.
    pub event_ring_bytes: usize,
    /// Shorter TTLs of leases are raised to this.
    pub min_lease_ttl_seconds: i64,
    /// How long a write may take, waiting for a leader included (etcd: 5 s and two election timeouts).
    pub request_timeout: Duration,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            max_txn_ops: 128,
            max_request_bytes: 1536 * 1024,
            value_cache_bytes: 64 << 20,
            event_ring_bytes: 64 << 20,
            min_lease_ttl_seconds: 2,
            request_timeout: Duration::from_secs(7),
        }
    }
}

/// The key space of a node. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl Store {
    /// An empty store; it fills when the node it is attached to starts.
    #[must_use]
    pub fn new(options: StoreOptions) -> Store {
        Store { inner: Arc::new(Inner::new(options)) }
    }

    /// What the node is to call for each committed entry of the database "etcd".
    #[must_use]
    pub fn observer(&self) -> Arc<dyn ApplyObserver> {
        self.inner.observer()
    }

    /// What the node is to offer as "etcd" to the other nodes.
    #[must_use]
    pub fn handler(&self) -> Arc<dyn CallHandler> {
        self.inner.handler()
    }

    /// To be called once, when the node has started, within a tokio runtime: starts the removal of compacted rows.
    ///
    /// # Panics
    /// When called twice, or outside of a runtime.
    pub fn attach(&self, node: Node) {
        self.inner.attach(node);
        tokio::spawn(removal::run(Arc::downgrade(&self.inner)));
    }

    /// The node this store lives on.
    ///
    /// # Panics
    /// Before [`Store::attach`].
    #[must_use]
    pub fn node(&self) -> &Node {
        self.inner.node()
    }

    /// The bounds it was made with.
    #[must_use]
    pub fn options(&self) -> &StoreOptions {
        self.inner.options()
    }

    /// The committed state as this node has it: cheap, never blocks.
    #[must_use]
    pub fn state(&self) -> Arc<State> {
        self.inner.replica.state()
    }

    /// A header with this node's ids, its term and its committed revision.
    #[must_use]
    pub fn header(&self) -> ResponseHeader {
        self.header_at(self.state().revision())
    }

    /// As [`Store::header`], at the given revision.
    #[must_use]
    pub fn header_at(&self, revision: i64) -> ResponseHeader {
        self.inner.header_at(revision)
    }

    /// When it returns, what was committed before the call shows in [`Store::state`].
    ///
    /// # Errors
    /// `NoLeader` or a timeout; no effect in any case.
    pub async fn linearize(&self) -> Result<(), KvError> {
        self.inner.linearize().await
    }

    /// The keys of a range. Linearizable unless the request says serializable; any node.
    ///
    /// # Errors
    /// See [`KvError`]; no effect in any case.
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, KvError> {
        check::range(&request)?;
        if !request.serializable {
            self.inner.linearize().await?;
        }
        self.inner.range(self.state(), false, request).await
    }

    /// As [`Store::range`], at exactly this state and without asking the leader; the request's revision is relative to
    /// that state. `Compacted` if the values have gone since.
    ///
    /// # Errors
    /// See [`KvError`]; no effect in any case.
    pub async fn range_at(&self, state: &Arc<State>, request: RangeRequest) -> Result<RangeResponse, KvError> {
        check::range(&request)?;
        self.inner.range(Arc::clone(state), true, request).await
    }

    /// Writes a key. Durable on a majority and visible here when it returns; any node.
    ///
    /// # Errors
    /// See [`KvError::class`] for what each says about the effect.
    ///
    /// # Cancellation
    /// A dropped future may leave the write to take place.
    pub async fn put(&self, request: PutRequest) -> Result<PutResponse, KvError> {
        match self.inner.write(Write::Put(request)).await? {
            Written::Put(response) => Ok(response),
            other => Err(mixed_up(&other)),
        }
    }

    /// Deletes the keys of a range. As [`Store::put`].
    ///
    /// # Errors
    /// As [`Store::put`].
    pub async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse, KvError> {
        match self.inner.write(Write::DeleteRange(request)).await? {
            Written::DeleteRange(response) => Ok(response),
            other => Err(mixed_up(&other)),
        }
    }

    /// A txn. One that only reads is answered from this node's state and costs no log entry. As [`Store::put`].
    ///
    /// # Errors
    /// As [`Store::put`].
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, KvError> {
        if !check::is_readonly(&request) {
            return match self.inner.write(Write::Txn(request)).await? {
                Written::Txn(response) => Ok(response),
                other => Err(mixed_up(&other)),
            };
        }
        check::txn(&request, self.options().max_txn_ops)?;
        if !check::is_serializable(&request) {
            self.inner.linearize().await?;
        }
        let read = move |state: &State, values: Values<'_>| view::readonly_txn(&state.contents, values, &request);
        let mut response = self.inner.read(self.state(), false, false, read).await?;
        let revision = response.header.unwrap_or_default().revision;
        response.header = Some(self.header_at(revision));
        Ok(response)
    }

    /// Forgets history before a revision. As [`Store::put`]; with `physical` it also waits until the rows are gone.
    ///
    /// # Errors
    /// As [`Store::put`].
    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse, KvError> {
        match self.inner.write(Write::Compact(request)).await? {
            Written::Compact(response) => {
                if request.physical {
                    self.removed(request.revision).await;
                }
                Ok(response)
            }
            other => Err(mixed_up(&other)),
        }
    }

    /// Waits until the rows that compaction at `revision` made superfluous are gone.
    async fn removed(&self, revision: i64) {
        let mut versions = self.inner.replica.versions();
        let gone = |_: &Version| self.state().contents.removed_revision >= revision;
        let _ = versions.wait_for(gone).await;
    }

    /// Makes a lease. As [`Store::put`]. Id 0 becomes a random one, a TTL below the minimum is raised.
    ///
    /// # Errors
    /// As [`Store::put`]; `LeaseExists`, `LeaseTtlTooLarge`.
    pub async fn lease_grant(&self, mut request: LeaseGrantRequest) -> Result<LeaseGrantResponse, KvError> {
        while request.id == 0 {
            request.id = rand::random::<i64>() & i64::MAX;
        }
        match self.inner.write(Write::Grant(request)).await? {
            Written::Grant(response) => Ok(response),
            other => Err(mixed_up(&other)),
        }
    }

    /// Ends a lease and deletes its keys, in key order and at one revision. As [`Store::put`].
    ///
    /// # Errors
    /// As [`Store::put`]; `LeaseNotFound`.
    pub async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse, KvError> {
        match self.inner.write(Write::Revoke(request)).await? {
            Written::Revoke(response) => Ok(response),
            other => Err(mixed_up(&other)),
        }
    }

    /// Ends leases that have expired: for the leader's own use, never forwarded. Those that are gone already are
    /// passed over. Each lease with keys takes a revision of its own; all of them share Raft entries.
    ///
    /// # Errors
    /// The first error met; `NotLeader` if this node does not lead.
    pub async fn lease_expire(&self, ids: Vec<i64>) -> Result<(), KvError> {
        let ends = ids.into_iter().map(|id| {
            let request = Arc::new(Write::Revoke(LeaseRevokeRequest { id }));
            async move { self.inner.execute_here(&request).await }
        });
        for ended in futures_util::future::join_all(ends).await {
            match ended {
                Ok(_) | Err(Failed::For(KvError::LeaseNotFound)) => {}
                Err(Failed::For(error)) => return Err(error),
                Err(Failed::TryLater | Failed::TryAgain) => return Err(KvError::NotLeader),
            }
        }
        Ok(())
    }

    /// Sends `payload` to the leader's lease handler (see [`Store::set_lease_handler`]), or runs it here if this node
    /// leads.
    ///
    /// # Errors
    /// What the handler refuses with, which must be a [`KvError::encode`]d error; `NoLeader` if there is none, or if
    /// it has no handler yet.
    pub async fn call_lease_leader(&self, payload: Bytes) -> Result<Bytes, KvError> {
        self.inner.call_lease_leader(&payload).await
    }

    /// What [`Store::call_lease_leader`] runs on the leader.
    pub fn set_lease_handler(&self, handler: Arc<dyn CallHandler>) {
        self.inner.set_lease_handler(handler);
    }

    /// Recent committed events after `revision` (exclusive), at most `max_batches` revisions of them. Never blocks.
    #[must_use]
    pub fn events_after(&self, revision: i64, max_batches: usize) -> RecentEvents {
        self.inner.replica.ring.after(revision, max_batches)
    }

    /// Events of a range from the tables, from `start_revision` to `up_to_revision` (both inclusive), at most about
    /// `limit` events: a revision is never split.
    ///
    /// # Errors
    /// `Compacted` if `start_revision` is below the compacted revision by the time the tables are read.
    pub async fn events_from_tables(
        &self,
        range: &KeyRange,
        start_revision: i64,
        up_to_revision: i64,
        limit: usize,
    ) -> Result<PastEvents, KvError> {
        let (range, state) = (range.clone(), self.state());
        let read = move |state: &State, values: Values<'_>| {
            past::between(values.connection, &state.contents, &range, (start_revision, up_to_revision), limit)
        };
        self.inner.read(state, true, false, read).await
    }

    /// A key as it was at a revision of this node's committed state; None if it did not exist.
    ///
    /// # Errors
    /// `Compacted`, `FutureRevision`.
    pub async fn value_at(&self, key: &[u8], revision: i64) -> Result<Option<mvccpb::KeyValue>, KvError> {
        let key = Bytes::copy_from_slice(key);
        let read = move |state: &State, values: Values<'_>| view::key_at(&state.contents, values, &key, revision);
        self.inner.read(self.state(), false, true, read).await
    }

    /// The `prev_kv` of an event if it can be told without reading from disk: `Some(None)` if there is none (a new
    /// key, or compacted), `None` if [`Store::previous`] has to be asked.
    #[must_use]
    pub fn previous_at_hand(&self, event: &Event) -> Option<Option<mvccpb::KeyValue>> {
        let Some(previous) = &event.previous else {
            return Some(None);
        };
        if event.mod_revision - 1 < self.state().compact_revision() {
            return Some(None);
        }
        let value = previous.value.clone().or_else(|| self.inner.replica.cache.get(previous.value_id))?;
        Some(Some(previous.key_value(event.key.clone(), value)))
    }

    /// The `prev_kv` of an event: None for a new key, or if `mod_revision - 1` is compacted.
    ///
    /// # Errors
    /// See [`KvError`].
    pub async fn previous(&self, event: &Event) -> Result<Option<mvccpb::KeyValue>, KvError> {
        if let Some(known) = self.previous_at_hand(event) {
            return Ok(known);
        }
        let Some(previous) = &event.previous else {
            return Ok(None);
        };
        let id = previous.value_id;
        let read = move |_: &State, values: Values<'_>| values.get(id);
        match self.inner.read(self.state(), true, true, read).await {
            Ok(value) => Ok(Some(previous.key_value(event.key.clone(), value))),
            Err(KvError::Compacted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where committed events go from now on; there is one sink.
    pub fn set_sink(&self, sink: Arc<dyn EventSink>) {
        self.inner.replica.set_sink(sink);
    }

    /// Tells of every new committed revision.
    #[must_use]
    pub fn revisions(&self) -> tokio::sync::watch::Receiver<i64> {
        self.inner.replica.revisions()
    }
}

fn mixed_up(answer: &Written) -> KvError {
    KvError::Internal(format!("an answer of another kind: {answer:?}"))
}
