//! The asynchronous face of the key space: where requests are checked, run here or sent to the leader, and where reads
//! find a state to answer from.
//!
//! A write is retried as long as it provably had no effect (no leader yet, leadership lost before anything was appended),
//! within [`StoreOptions::request_timeout`]; once it may have had one, its outcome is what the caller is told.

use super::outcome::{self, Failed};
use super::replica::Replica;
use super::request::{self, Write, Written};
use super::transaction::Transaction;
use super::view::{self, Fault, Values};
use super::writer::{Refusal, Writer, from_sql};
use super::{Event, EventSink, PastEvents, RecentEvents, State, check, past, removal};
use crate::error::KvError;
use crate::index::KeyRange;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse,
};
use crate::proto::mvccpb;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use raft_sqlite::{ApplyObserver, CallHandler, Database, Node, Version};
use rusqlite::Connection;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

/// The database the etcd layer lives in, and the name of its handler.
pub const DATABASE: &str = "etcd";
/// Answers of more keys than this are put together on a reader thread, not on the caller's.
const MAX_KEYS_INLINE: usize = 1000;
/// How often a read is repeated on a newer state after compaction has passed it by.
const MAX_READ_ATTEMPTS: usize = 8;
/// How often a write is repeated at once, after one before it turned out not to have taken place.
const MAX_IMMEDIATE_RETRIES: usize = 4;
/// How long to wait for a leader before looking again, at most.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

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

pub(super) struct Inner {
    options: StoreOptions,
    pub(super) node: OnceLock<Node>,
    database: OnceLock<Database>,
    pub(super) replica: Replica,
    /// Used on the writer thread only.
    writer: Mutex<Writer>,
    lease_handler: RwLock<Option<Arc<dyn CallHandler>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("options", &self.options)
            .field("replica", &self.replica)
            .finish_non_exhaustive()
    }
}

/// What the node calls. It does not keep the store alive.
struct Observer(Weak<Inner>);

impl ApplyObserver for Observer {
    fn restored(&self, database: &str, version: Version, connection: &Connection) {
        if let Some(inner) = self.0.upgrade().filter(|_| database == DATABASE) {
            inner.replica.restored(version, connection);
        }
    }

    fn applied(&self, database: &str, version: Version, sidecars: &[Bytes]) {
        if let Some(inner) = self.0.upgrade().filter(|_| database == DATABASE) {
            inner.replica.applied(version, sidecars);
        }
    }

    fn writer_reset(&self, database: &str) {
        if let Some(inner) = self.0.upgrade().filter(|_| database == DATABASE) {
            inner
                .writer
                .lock()
                .reset(inner.replica.state().contents.clone());
        }
    }
}

/// What this node does for others while it leads.
struct Handler(Weak<Inner>);

impl CallHandler for Handler {
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>> {
        let Some(inner) = self.0.upgrade() else {
            return futures_util::future::ready(Err(KvError::Stopped.encode())).boxed();
        };
        if payload.first() == Some(&request::LEASE) {
            let handler = inner.lease_handler.read().clone();
            return match handler {
                Some(handler) => handler.call(payload.slice(1..)),
                None => futures_util::future::ready(Err(KvError::NotLeader.encode())).boxed(),
            };
        }
        async move { inner.serve(payload).await.map_err(|error| error.encode()) }.boxed()
    }
}

impl Inner {
    fn node(&self) -> &Node {
        self.node
            .get()
            .expect("invariant: the store is attached before it is used")
    }

    fn database(&self) -> &Database {
        self.database
            .get()
            .expect("invariant: the store is attached before it is used")
    }

    /// Runs a change on this node's writer. Nothing if it does not lead.
    pub(super) async fn write_here<T: Send + 'static>(
        self: &Arc<Inner>,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Failed> {
        self.write_sized(0, body).await
    }

    async fn write_sized<T: Send + 'static>(
        self: &Arc<Inner>,
        size_hint: usize,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Failed> {
        self.replica.check().map_err(Failed::For)?;
        let inner = Arc::clone(self);
        let written = self.database().write(move |context| {
            let mut writer = inner.writer.lock();
            let run = writer.run(context.connection(), &inner.replica.cache, size_hint, body);
            let (answer, sidecar) = run?;
            if let Some(sidecar) = sidecar {
                context.push_sidecar(sidecar);
            }
            Ok::<T, Refusal>(answer)
        });
        written.await.map_err(outcome::of_write)
    }

    /// Runs a request on this node's writer.
    async fn execute_here(self: &Arc<Inner>, request: &Arc<Write>) -> Result<Written, Failed> {
        let inner = Arc::clone(self);
        let request = Arc::clone(request);
        self.write_sized(request.message_bytes(), move |transaction| {
            request.execute(transaction, &inner.options)
        })
        .await
    }

    /// Answers another node.
    async fn serve(self: &Arc<Inner>, payload: Bytes) -> Result<Bytes, KvError> {
        let request = Arc::new(Write::decode(payload)?);
        for _ in 0..MAX_IMMEDIATE_RETRIES {
            match self.execute_here(&request).await {
                Ok(written) => return Ok(written.encode(self.replica.state().version())),
                Err(Failed::TryAgain) => {}
                Err(Failed::TryLater) => return Err(KvError::NotLeader),
                Err(Failed::For(error)) => return Err(error),
            }
        }
        Err(KvError::Internal(
            "the writer's state keeps differing from the tables".into(),
        ))
    }

    /// Runs a request on the leader's writer, wherever that is.
    async fn execute(self: &Arc<Inner>, request: &Arc<Write>) -> Result<Written, Failed> {
        match self.execute_here(request).await {
            Err(Failed::TryLater) => {}
            done => return done,
        }
        let answer = self
            .node()
            .call_leader(DATABASE, request.encode())
            .await
            .map_err(outcome::of_call)?;
        let (written, version) = Written::decode(request, answer).map_err(Failed::For)?;
        // What the leader did shows here too when the caller is told.
        let mut versions = self.replica.versions();
        let _ = versions.wait_for(|here| *here >= version).await;
        Ok(written)
    }

    async fn write(self: &Arc<Inner>, request: Write) -> Result<Written, KvError> {
        request.check(&self.options)?;
        let request = Arc::new(request);
        // Whether there is an attempt that may have an effect.
        let under_way = AtomicBool::new(false);
        let attempts = async {
            let mut immediate = 0;
            loop {
                let mut leadership = self.node().leadership();
                leadership.mark_unchanged();
                under_way.store(true, Ordering::Relaxed);
                let done = self.execute(&request).await;
                match done {
                    Ok(mut written) => {
                        let header = written.header();
                        *header = self.header_at(header.revision);
                        return Ok(written);
                    }
                    Err(Failed::For(error)) => return Err(error),
                    Err(Failed::TryAgain) if immediate < MAX_IMMEDIATE_RETRIES => immediate += 1,
                    Err(Failed::TryAgain | Failed::TryLater) => {
                        under_way.store(false, Ordering::Relaxed);
                        let _ = tokio::time::timeout(RETRY_PAUSE, leadership.changed()).await;
                    }
                }
            }
        };
        match tokio::time::timeout(self.options.request_timeout, attempts).await {
            Ok(done) => done,
            Err(_) if under_way.load(Ordering::Relaxed) => Err(KvError::Timeout),
            Err(_) => Err(KvError::NoLeader),
        }
    }

    fn header_at(&self, revision: i64) -> ResponseHeader {
        let status = self.node().status();
        ResponseHeader {
            cluster_id: status.cluster_id,
            member_id: status.id.0,
            revision,
            raft_term: status.term,
        }
    }

    async fn linearize(&self) -> Result<(), KvError> {
        self.node().linearize().await.map_err(outcome::of_read)
    }

    /// Runs `read` on a committed state: here if the cache has all values and there is not too much to do, else on a
    /// reader thread. When compaction has removed a row that was to be read, again on a newer state, unless `fixed`.
    async fn read<T: Send + 'static>(
        self: &Arc<Inner>,
        mut state: Arc<State>,
        fixed: bool,
        inline: bool,
        read: impl Fn(&State, Values<'_>) -> Result<T, Fault> + Clone + Send + 'static,
    ) -> Result<T, KvError> {
        self.replica.check()?;
        if inline {
            match read(
                &state,
                Values {
                    cache: &self.replica.cache,
                    connection: None,
                    committed: true,
                },
            ) {
                Ok(answer) => return Ok(answer),
                Err(Fault::Refused(error)) => return Err(error),
                Err(Fault::NotCached | Fault::Gone | Fault::Sql(_)) => {}
            }
        }
        for _ in 0..MAX_READ_ATTEMPTS {
            let (inner, run, on) = (Arc::clone(self), read.clone(), Arc::clone(&state));
            let done = self.database().read(move |connection, _| {
                run(
                    &on,
                    Values {
                        cache: &inner.replica.cache,
                        connection: Some(connection),
                        committed: true,
                    },
                )
            });
            match done.await.map_err(outcome::of_read)? {
                Ok(answer) => return Ok(answer),
                Err(Fault::Refused(error)) => return Err(error),
                Err(Fault::Sql(error)) => return Err(from_sql(&error)),
                Err(Fault::Gone | Fault::NotCached) if fixed => return Err(KvError::Compacted),
                Err(Fault::Gone | Fault::NotCached) => state = self.replica.state(),
            }
        }
        Err(KvError::TimeoutWaitAppliedIndex)
    }

    async fn range(
        self: &Arc<Inner>,
        state: Arc<State>,
        fixed: bool,
        request: RangeRequest,
    ) -> Result<RangeResponse, KvError> {
        let inline = is_small(&state, &request);
        let read =
            move |state: &State, values: Values<'_>| view::range(&state.contents, values, &request);
        let mut response = self.read(state, fixed, inline, read).await?;
        let revision = response.header.unwrap_or_default().revision;
        response.header = Some(self.header_at(revision));
        Ok(response)
    }
}

/// Whether an answer can be put together without holding up the thread for long. At an old revision counting looks at
/// the keys that have changed since.
fn is_small(state: &State, request: &RangeRequest) -> bool {
    if request.range_end.is_empty() {
        return true;
    }
    let range = check::key_range(&request.key, &request.range_end);
    let keys = state.contents.keys.count(&range, state.contents.revision);
    let returned = match usize::try_from(request.limit) {
        _ if request.count_only => 0,
        Ok(limit @ 1..) => limit.min(keys),
        _ => keys,
    };
    let behind = if request.revision > 0 {
        state.contents.revision.saturating_sub(request.revision)
    } else {
        0
    };
    returned + keys.min(usize::try_from(behind).unwrap_or(0)) <= MAX_KEYS_INLINE
}

impl Store {
    /// An empty store; it fills when the node it is attached to starts.
    #[must_use]
    pub fn new(options: StoreOptions) -> Store {
        let replica = Replica::new(options.value_cache_bytes, options.event_ring_bytes);
        let inner = Inner {
            options,
            node: OnceLock::new(),
            database: OnceLock::new(),
            replica,
            writer: Mutex::default(),
            lease_handler: RwLock::new(None),
        };
        Store {
            inner: Arc::new(inner),
        }
    }

    /// What the node is to call for each committed entry of the database "etcd".
    #[must_use]
    pub fn observer(&self) -> Arc<dyn ApplyObserver> {
        Arc::new(Observer(Arc::downgrade(&self.inner)))
    }

    /// What the node is to offer as "etcd" to the other nodes.
    #[must_use]
    pub fn handler(&self) -> Arc<dyn CallHandler> {
        Arc::new(Handler(Arc::downgrade(&self.inner)))
    }

    /// To be called once, when the node has started, within a tokio runtime: starts the removal of compacted rows.
    ///
    /// # Panics
    /// When called twice, or outside of a runtime.
    pub fn attach(&self, node: Node) {
        let first = self.inner.database.set(node.database(DATABASE)).is_ok()
            && self.inner.node.set(node).is_ok();
        assert!(first, "invariant: a store is attached once");
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
        &self.inner.options
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
    pub async fn range_at(
        &self,
        state: &Arc<State>,
        request: RangeRequest,
    ) -> Result<RangeResponse, KvError> {
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
    pub async fn delete_range(
        &self,
        request: DeleteRangeRequest,
    ) -> Result<DeleteRangeResponse, KvError> {
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
        let read = move |state: &State, values: Values<'_>| {
            view::readonly_txn(&state.contents, values, &request)
        };
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
    pub async fn lease_grant(
        &self,
        mut request: LeaseGrantRequest,
    ) -> Result<LeaseGrantResponse, KvError> {
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
    pub async fn lease_revoke(
        &self,
        request: LeaseRevokeRequest,
    ) -> Result<LeaseRevokeResponse, KvError> {
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
        let mut framed = BytesMut::with_capacity(1 + payload.len());
        framed.put_u8(request::LEASE);
        framed.put_slice(&payload);
        let answer = self.node().call_leader(DATABASE, framed.freeze()).await;
        answer.map_err(|error| match outcome::of_call(error) {
            Failed::For(error) => error,
            Failed::TryLater | Failed::TryAgain => KvError::NoLeader,
        })
    }

    /// What [`Store::call_lease_leader`] runs on the leader.
    pub fn set_lease_handler(&self, handler: Arc<dyn CallHandler>) {
        *self.inner.lease_handler.write() = Some(handler);
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
            let connection = values.connection.ok_or(Fault::NotCached)?;
            past::between(
                connection,
                &state.contents,
                &range,
                (start_revision, up_to_revision),
                limit,
            )
        };
        self.inner.read(state, true, false, read).await
    }

    /// A key as it was at a revision of this node's committed state; None if it did not exist.
    ///
    /// # Errors
    /// `Compacted`, `FutureRevision`.
    pub async fn value_at(
        &self,
        key: &[u8],
        revision: i64,
    ) -> Result<Option<mvccpb::KeyValue>, KvError> {
        let key = Bytes::copy_from_slice(key);
        let read = move |state: &State, values: Values<'_>| {
            view::key_at(&state.contents, values, &key, revision)
        };
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
        let value = previous
            .value
            .clone()
            .or_else(|| self.inner.replica.cache.get(previous.value_id))?;
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
