//! The lessor: deadlines on the leader, and the way to them from everywhere else.
//!
//! A renewal is answered only after the leader has confirmed that it still leads, so that a leader that was deposed
//! without knowing it cannot keep alive what the new one lets expire. A renewal of a lease whose deadline has passed
//! waits for the outcome of its revoke (INV-LEASE-RENEW-OR-END: never "renewed" and then gone).
//!
//! Sources: etcd server/lease/lessor.go, server/etcdserver/v3_server.go (LeaseRenew, LeaseTimeToLive).

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message;
use raft_sqlite::{CallHandler, Leadership, ReadError, Role};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::call::LeaseCall;
use super::deadlines::{Deadlines, Renewal};
use crate::error::KvError;
use crate::kv::{LeaseChange, Store};
use crate::proto::etcdserverpb::{
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};

/// How often the leader looks for leases that are due, as etcd does.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(500);
/// Leases ended by one write.
const MAX_EXPIRED_AT_ONCE: usize = 512;
/// Pause before the leader is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What a [`Lessor`] goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LessorOptions {
    /// What a new leader adds to each lease's TTL: etcd's election timeout.
    pub extension: Duration,
    /// How long a request may wait for a leader, or for the end of a lease.
    pub request_timeout: Duration,
}

/// See the module.
pub struct Lessor {
    store: Store,
    options: LessorOptions,
    /// None while this node does not lead.
    deadlines: Mutex<Option<Deadlines>>,
    /// A lease ended, or leadership did.
    ended: Notify,
}

impl std::fmt::Debug for Lessor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lessor").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Lessor {
    /// A lessor that keeps no deadlines until [`Lessor::run`] sees that this node leads. Answers the leases' calls of
    /// other nodes from now on.
    #[must_use]
    pub fn new(store: Store, options: LessorOptions) -> Arc<Lessor> {
        let lessor = Arc::new(Lessor { store, options, deadlines: Mutex::new(None), ended: Notify::new() });
        lessor.store.set_lease_handler(Arc::new(Handler(Arc::downgrade(&lessor))));
        lessor
    }

    /// Follows leadership and ends leases that are due, until dropped.
    pub async fn run(self: Arc<Self>, mut leadership: watch::Receiver<Leadership>) {
        let mut ticks = tokio::time::interval(EXPIRY_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut leading_in = None;
        loop {
            let term = {
                let now = leadership.borrow_and_update();
                now.writable_here.then_some(now.term)
            };
            if term != leading_in {
                leading_in = term;
                self.lead(term.is_some());
            }
            tokio::select! {
                changed = leadership.changed() => if changed.is_err() { return },
                _ = ticks.tick(), if term.is_some() => self.end_due_leases().await,
            }
        }
    }

    /// Part of the store's sink: see [`crate::kv::EventSink::leases_changed`].
    pub fn leases_changed(&self, changes: &[LeaseChange]) {
        let mut ended = false;
        if let Some(deadlines) = self.deadlines.lock().as_mut() {
            let now = Instant::now();
            for change in changes {
                match change {
                    LeaseChange::Granted(lease) => deadlines.add(*lease, now, Duration::ZERO),
                    LeaseChange::Ended(id) => {
                        deadlines.remove(*id);
                        ended = true;
                    }
                }
            }
        }
        if ended {
            self.ended.notify_waiters();
        }
    }

    /// Part of the store's sink: the leases are those of the store's state now.
    pub fn restored(&self) {
        let leading = self.deadlines.lock().is_some();
        if leading {
            self.lead(true);
        }
    }

    /// Number of leases with a deadline here: 0 on nodes that do not lead.
    #[must_use]
    pub fn running(&self) -> usize {
        self.deadlines.lock().as_ref().map_or(0, Deadlines::len)
    }

    /// Renews a lease; any node. The answer's TTL is 0 if there is no such lease.
    ///
    /// # Errors
    /// `NoLeader`, `Timeout`; the lease may have been renewed all the same.
    pub async fn keep_alive(&self, request: LeaseKeepAliveRequest) -> Result<LeaseKeepAliveResponse, KvError> {
        // Taken before the renewal: a client must not see a renewal at a revision after the lease's end.
        let header = self.store.header();
        let id = request.id;
        let renewed = if self.leads() { Some(self.renew_here(id).await) } else { None };
        let ttl = match renewed {
            Some(Ok(ttl)) => Ok(ttl),
            None | Some(Err(KvError::NotLeader | KvError::NoLeader | KvError::LeaderChanged)) => {
                let answer = self.ask_leader(LeaseCall::KeepAlive(request)).await;
                answer.and_then(|bytes| decode::<LeaseKeepAliveResponse>(&bytes)).map(|answer| answer.ttl)
            }
            Some(Err(error)) => Err(error),
        };
        match ttl {
            Ok(ttl) => Ok(LeaseKeepAliveResponse { header: Some(header), id, ttl }),
            Err(KvError::LeaseNotFound) => Ok(LeaseKeepAliveResponse { header: Some(header), id, ttl: 0 }),
            Err(error) => Err(error),
        }
    }

    /// How long a lease still runs, and its keys if asked for; any node. The answer's TTL is -1 if there is no such
    /// lease.
    ///
    /// # Errors
    /// `NoLeader`, `Timeout`, `LeaderChanged`; no effect.
    pub async fn time_to_live(&self, request: LeaseTimeToLiveRequest) -> Result<LeaseTimeToLiveResponse, KvError> {
        let id = request.id;
        let here = if self.leads() { Some(self.time_to_live_here(&request).await) } else { None };
        let answer = match here {
            Some(Ok(answer)) => Ok(answer),
            None | Some(Err(KvError::NotLeader | KvError::NoLeader)) => {
                let answer = self.ask_leader(LeaseCall::TimeToLive(request)).await;
                answer.and_then(|bytes| decode::<LeaseTimeToLiveResponse>(&bytes))
            }
            Some(Err(error)) => Err(error),
        };
        let header = Some(self.store.header());
        match answer {
            Ok(answer) => Ok(LeaseTimeToLiveResponse { header, ..answer }),
            Err(KvError::LeaseNotFound) => Ok(LeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() }),
            Err(error) => Err(error),
        }
    }

    /// All leases: on the leader the one that ends first in front, elsewhere by id.
    #[must_use]
    pub fn leases(&self) -> Vec<LeaseStatus> {
        let by_deadline = self.deadlines.lock().as_ref().map(Deadlines::ids_by_deadline);
        let ids = by_deadline.unwrap_or_else(|| self.store.state().leases().map(|lease| lease.id).collect());
        ids.into_iter().map(|id| LeaseStatus { id }).collect()
    }

    fn leads(&self) -> bool {
        self.deadlines.lock().is_some()
    }

    /// Starts or stops keeping deadlines. The lock is held while the state is read: what is applied afterwards comes by
    /// `leases_changed`.
    fn lead(&self, leading: bool) {
        let mut deadlines = self.deadlines.lock();
        *deadlines = leading.then(|| {
            let now = Instant::now();
            let mut fresh = Deadlines::default();
            for lease in self.store.state().leases() {
                fresh.add(lease, now, self.options.extension);
            }
            tracing::info!(leases = fresh.len(), "keeping the deadlines of leases");
            fresh
        });
        drop(deadlines);
        self.ended.notify_waiters();
    }

    /// Proposes the end of leases that are due.
    async fn end_due_leases(&self) {
        loop {
            let due = match self.deadlines.lock().as_mut() {
                Some(deadlines) => deadlines.take_due(Instant::now(), MAX_EXPIRED_AT_ONCE),
                None => return,
            };
            if due.is_empty() {
                return;
            }
            let outcome = self.store.lease_expire(due.clone()).await;
            if let Some(deadlines) = self.deadlines.lock().as_mut() {
                // Read under the lock: what is applied later comes by `leases_changed` after this.
                let state = self.store.state();
                for id in &due {
                    if state.lease(*id).is_some() {
                        deadlines.give_back(*id);
                    } else {
                        deadlines.remove(*id);
                    }
                }
            }
            self.ended.notify_waiters();
            match outcome {
                Ok(()) => tracing::debug!(leases = due.len(), "leases expired"),
                Err(error) => {
                    tracing::warn!(%error, leases = due.len(), "expired leases could not be ended yet");
                    return;
                }
            }
        }
    }

    /// On the leader.
    async fn renew_here(&self, id: i64) -> Result<i64, KvError> {
        self.confirm_leadership().await?;
        let deadline = Instant::now() + self.options.request_timeout;
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            let renewal = {
                let mut deadlines = self.deadlines.lock();
                let Some(deadlines) = deadlines.as_mut() else {
                    return Err(KvError::NotLeader);
                };
                let now = Instant::now();
                match (deadlines.renew(id, now), self.store.state().lease(id)) {
                    // Applied, and on its way to `leases_changed`.
                    (Renewal::Missing, Some(lease)) => {
                        deadlines.add(lease, now, Duration::ZERO);
                        Renewal::Renewed(lease.ttl_seconds)
                    }
                    (renewal, _) => renewal,
                }
            };
            match renewal {
                Renewal::Renewed(ttl) => return Ok(ttl),
                Renewal::Missing => return Err(KvError::LeaseNotFound),
                Renewal::Expiring => {
                    if tokio::time::timeout_at(deadline, ended).await.is_err() {
                        return Err(KvError::Timeout);
                    }
                }
            }
        }
    }

    /// On the leader.
    async fn time_to_live_here(&self, request: &LeaseTimeToLiveRequest) -> Result<LeaseTimeToLiveResponse, KvError> {
        self.confirm_leadership().await?;
        let (state, lease, remaining) = {
            let mut deadlines = self.deadlines.lock();
            let Some(deadlines) = deadlines.as_mut() else {
                return Err(KvError::LeaderChanged);
            };
            let state = self.store.state();
            let lease = state.lease(request.id).ok_or(KvError::LeaseNotFound)?;
            let now = Instant::now();
            deadlines.add(lease, now, Duration::ZERO);
            (state, lease, deadlines.remaining(request.id, now))
        };
        Ok(LeaseTimeToLiveResponse {
            header: None,
            id: request.id,
            ttl: remaining.map_or(0, |remaining| remaining.seconds),
            granted_ttl: lease.ttl_seconds,
            keys: if request.keys { state.lease_keys(request.id).collect() } else { Vec::new() },
        })
    }

    /// That this node still leads. A leader that was deposed while it asked shows as a follower afterwards; what it
    /// renews before that has shown here is covered by the new leader's extension.
    async fn confirm_leadership(&self) -> Result<(), KvError> {
        let node = self.store.node();
        match node.linearize().await {
            Ok(()) if node.status().role == Role::Leader => Ok(()),
            Ok(()) => Err(KvError::NotLeader),
            Err(ReadError::Fatal(reason)) => Err(KvError::Internal(reason)),
            Err(_) => Err(KvError::NoLeader),
        }
    }

    /// Tries until a leader has answered, or the time is over.
    async fn ask_leader(&self, call: LeaseCall) -> Result<Bytes, KvError> {
        let payload = call.encode();
        let deadline = Instant::now() + self.options.request_timeout;
        loop {
            let failure = match tokio::time::timeout_at(deadline, self.store.call_lease_leader(payload.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error @ (KvError::NoLeader | KvError::NotLeader | KvError::LeaderChanged))) => error,
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(KvError::Timeout),
            };
            if Instant::now() + RETRY_PAUSE >= deadline {
                return Err(if failure == KvError::NoLeader { KvError::NoLeader } else { KvError::Timeout });
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// The leader's side of [`Lessor::ask_leader`].
    async fn answer(&self, payload: Bytes) -> Result<Bytes, KvError> {
        match LeaseCall::decode(&payload)? {
            LeaseCall::KeepAlive(request) => {
                let ttl = self.renew_here(request.id).await?;
                Ok(LeaseKeepAliveResponse { header: None, id: request.id, ttl }.encode_to_vec().into())
            }
            LeaseCall::TimeToLive(request) => Ok(self.time_to_live_here(&request).await?.encode_to_vec().into()),
        }
    }
}

fn decode<M: Message + Default>(bytes: &Bytes) -> Result<M, KvError> {
    M::decode(bytes.clone()).map_err(|error| KvError::Internal(format!("malformed answer of the leader: {error}")))
}

/// Holds the lessor weakly, since the store holds the handler.
struct Handler(Weak<Lessor>);

impl CallHandler for Handler {
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>> {
        let lessor = self.0.upgrade();
        Box::pin(async move {
            match lessor {
                Some(lessor) => lessor.answer(payload).await.map_err(|error| error.encode()),
                None => Err(KvError::Stopped.encode()),
            }
        })
    }
}
