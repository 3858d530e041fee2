//! Where requests run: a write on the leader's writer, wherever that is, a read on this node's committed state.
//!
//! A write is tried again as long as it provably had no effect (no leader yet, leadership lost before anything was
//! appended), within [`StoreOptions::request_timeout`]; once it may have had one, its outcome is what the caller is told.
//! A node that does not lead sends it on, and answers when what the leader did shows here too.

use super::outcome::{self, Failed};
use super::replica::Replica;
use super::request::{self, Write, Written};
use super::transaction::Transaction;
use super::view::{self, Fault, Values};
use super::writer::{Refusal, Writer, from_sql};
use super::{State, StoreOptions, check};
use crate::error::KvError;
use crate::proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::{Mutex, RwLock};
use raft_sqlite::{ApplyObserver, CallHandler, LocalDatabase, Node, Version};
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

/// What the clones of a [`super::Store`] share.
pub(super) struct Inner {
    options: StoreOptions,
    node: OnceLock<Node>,
    database: OnceLock<LocalDatabase>,
    pub(super) replica: Replica,
    /// Used on the writer thread only.
    writer: Mutex<Writer>,
    lease_handler: RwLock<Option<Arc<dyn CallHandler>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("options", &self.options).field("replica", &self.replica).finish_non_exhaustive()
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
            inner.writer.lock().reset(inner.replica.state().contents.clone());
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
    pub(super) fn new(options: StoreOptions) -> Inner {
        Inner {
            replica: Replica::new(options.value_cache_bytes, options.event_ring_bytes),
            options,
            node: OnceLock::new(),
            database: OnceLock::new(),
            writer: Mutex::default(),
            lease_handler: RwLock::new(None),
        }
    }

    pub(super) fn observer(self: &Arc<Inner>) -> Arc<dyn ApplyObserver> {
        Arc::new(Observer(Arc::downgrade(self)))
    }

    pub(super) fn handler(self: &Arc<Inner>) -> Arc<dyn CallHandler> {
        Arc::new(Handler(Arc::downgrade(self)))
    }

    pub(super) fn attach(&self, node: Node) {
        let first = self.database.set(node.database(DATABASE)).is_ok() && self.node.set(node).is_ok();
        assert!(first, "invariant: a store is attached once");
    }

    pub(super) fn options(&self) -> &StoreOptions {
        &self.options
    }

    pub(super) fn set_lease_handler(&self, handler: Arc<dyn CallHandler>) {
        *self.lease_handler.write() = Some(handler);
    }

    /// Sends a call of the lease layer to the leader, or runs it here if this node leads.
    pub(super) async fn call_lease_leader(&self, payload: &[u8]) -> Result<Bytes, KvError> {
        let mut framed = Vec::with_capacity(1 + payload.len());
        framed.push(request::LEASE);
        framed.extend_from_slice(payload);
        let answer = self.node().call_leader(DATABASE, framed.into()).await;
        answer.map_err(|error| match outcome::of_call(error) {
            Failed::For(error) => error,
            Failed::TryLater | Failed::TryAgain => KvError::NoLeader,
        })
    }

    pub(super) fn node(&self) -> &Node {
        self.node.get().expect("invariant: the store is attached before it is used")
    }

    fn database(&self) -> &LocalDatabase {
        self.database.get().expect("invariant: the store is attached before it is used")
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
    pub(super) async fn execute_here(self: &Arc<Inner>, request: &Arc<Write>) -> Result<Written, Failed> {
        let inner = Arc::clone(self);
        let request = Arc::clone(request);
        self.write_sized(request.message_bytes(), move |transaction| request.execute(transaction, &inner.options)).await
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
        Err(KvError::Internal("the writer's state keeps differing from the tables".into()))
    }

    /// Runs a request on the leader's writer, wherever that is.
    async fn execute(self: &Arc<Inner>, request: &Arc<Write>) -> Result<Written, Failed> {
        match self.execute_here(request).await {
            // Without a leader there is nobody to wait for within a call that may or may not be sent.
            Err(Failed::TryLater) if self.node().leadership().borrow().leader.is_some() => {}
            done => return done,
        }
        let answer = self.node().call_leader(DATABASE, request.encode()).await.map_err(outcome::of_call)?;
        let (written, version) = Written::decode(request, answer).map_err(Failed::For)?;
        // What the leader did shows here too when the caller is told.
        let mut versions = self.replica.versions();
        let _ = versions.wait_for(|here| *here >= version).await;
        Ok(written)
    }

    pub(super) async fn write(self: &Arc<Inner>, request: Write) -> Result<Written, KvError> {
        request.check(&self.options)?;
        let request = Arc::new(request);
        // Whether there is an attempt that may have an effect.
        let under_way = AtomicBool::new(false);
        let attempts = async {
            let mut immediate = 0;
            loop {
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
                        let mut leadership = self.node().leadership();
                        leadership.mark_unchanged();
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

    pub(super) fn header_at(&self, revision: i64) -> ResponseHeader {
        let status = self.node().status();
        ResponseHeader { cluster_id: status.cluster_id, member_id: status.id.0, revision, raft_term: status.term }
    }

    pub(super) async fn linearize(&self) -> Result<(), KvError> {
        self.node().linearize().await.map_err(outcome::of_read)
    }

    /// Runs `read` on a committed state: here if the cache has all values and there is not too much to do, else on a
    /// reader thread. When compaction has removed a row that was to be read, again on a newer state, unless `fixed`.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Inner>,
        mut state: Arc<State>,
        fixed: bool,
        inline: bool,
        read: impl Fn(&State, Values<'_>) -> Result<T, Fault> + Clone + Send + 'static,
    ) -> Result<T, KvError> {
        self.replica.check()?;
        if inline {
            match read(&state, Values { cache: &self.replica.cache, connection: None, committed: true }) {
                Ok(answer) => return Ok(answer),
                Err(Fault::Refused(error)) => return Err(error),
                Err(Fault::NotCached | Fault::Gone | Fault::Sql(_)) => {}
            }
        }
        for _ in 0..MAX_READ_ATTEMPTS {
            let (inner, run, on) = (Arc::clone(self), read.clone(), Arc::clone(&state));
            let done = self.database().read(move |connection, _| {
                run(&on, Values { cache: &inner.replica.cache, connection: Some(connection), committed: true })
            });
            let done = match done.await {
                // Nothing has ever been written, so there is no value to be read.
                Err(error) if outcome::is_absent(&error) => {
                    read(&state, Values { cache: &self.replica.cache, connection: None, committed: true })
                }
                done => done.map_err(outcome::of_read)?,
            };
            match done {
                Ok(answer) => return Ok(answer),
                Err(Fault::Refused(error)) => return Err(error),
                Err(Fault::Sql(error)) => return Err(from_sql(&error)),
                Err(Fault::Gone | Fault::NotCached) if fixed => return Err(KvError::Compacted),
                Err(Fault::Gone | Fault::NotCached) => state = self.replica.state(),
            }
        }
        Err(KvError::TimeoutWaitAppliedIndex)
    }

    pub(super) async fn range(
        self: &Arc<Inner>,
        state: Arc<State>,
        fixed: bool,
        request: RangeRequest,
    ) -> Result<RangeResponse, KvError> {
        let inline = is_small(&state, &request);
        let read = move |state: &State, values: Values<'_>| view::range(&state.contents, values, &request);
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
    let behind = if request.revision > 0 { state.contents.revision.saturating_sub(request.revision) } else { 0 };
    returned + keys.min(usize::try_from(behind).unwrap_or(0)) <= MAX_KEYS_INLINE
}
