//! The database handle a program uses.

pub(crate) mod changes;
pub(crate) mod deadline;
pub(crate) mod migrate;
mod remote;
pub(crate) mod remote_sql;
mod row;
mod row_serde;
mod sql;
mod statement;
pub(crate) mod stream;
mod transaction;
pub(crate) mod transaction_host;

use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use tokio::sync::oneshot;
use tracing::Instrument as _;

pub use changes::{Change, Changes};
pub use migrate::{Migrated, Migration, MigrationError};
pub use remote::{Client, ClientBuilder, ConnectError};
pub use row::{ColumnIndex, Row, RowError, Rows};
pub use sql::{Executed, ReadConsistency, SqlError};
pub use statement::{Parameters, Statement};
pub use stream::RowStream;
pub use transaction::{EndReason, Transaction, TransactionError, TransactionOptions};

use crate::database::DatabaseError;
use crate::database::job::{ClosureJob, Effect, Job, JobReply, WriteContext};
use crate::database::reader_pool::Read;
use crate::database::ticket::{AbandonOnDrop, CancelOnDrop, Ticket};
use crate::error::{CallError, ReadError, WriteError};
use crate::network::proto::database_change::Kind;
use crate::node::Node;
use crate::page::Version;

/// A handle to one replicated database: the same from a node and from a program that is none. Clones are cheap.
#[derive(Clone, Debug)]
pub struct Database {
    way: Way,
    name: Arc<str>,
    timeout: Option<Duration>,
}

/// How a handle reaches its cluster.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    Node(Node),
    Client(Client),
}

impl Database {
    pub(crate) fn new(way: Way, name: &str) -> Self {
        Self { way, name: name.into(), timeout: None }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn way(&self) -> &Way {
        &self.way
    }

    /// Waits until this node, or the member that the client is connected to, has applied at least `version` of the database (one that
    /// a write through any handle returned).
    ///
    /// # Errors
    /// [`ReadError::Timeout`] after `patience`.
    pub async fn wait_for_version(&self, version: Version, patience: Duration) -> Result<(), ReadError> {
        let late = || {
            let patience = patience.as_millis();
            ReadError::Timeout(format!("version {version} was not applied here within {patience} ms"))
        };
        let node = match &self.way {
            Way::Node(node) => node,
            Way::Client(_) => {
                let read = Box::pin(self.query("SELECT 1", ReadConsistency::AtLeast(version)));
                return tokio::time::timeout(patience, read).await.map_err(|_| late())?.map(drop);
            }
        };
        let machine = &node.inner.machine;
        let reached = || machine.database(&self.name).is_some_and(|state| state.replica.committed() >= version);
        let mut applied = machine.applied_index();
        match tokio::time::timeout(patience, applied.wait_for(|_| reached())).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ReadError::Fatal("the node stops".into())),
            Err(_) => Err(late()),
        }
    }

    /// Calls a built-in handler on the leader.
    pub(crate) async fn call_leader(&self, handler: &str, payload: Bytes) -> Result<Bytes, CallError> {
        self.call_leader_until(handler, &|| payload.clone(), None).await
    }

    /// Calls a built-in handler on the leader; after `deadline` nothing is tried again. `payload`: called for each try.
    async fn call_leader_until(
        &self,
        handler: &str,
        payload: &(dyn Fn() -> Bytes + Send + Sync),
        deadline: Option<Instant>,
    ) -> Result<Bytes, CallError> {
        let call = async {
            match &self.way {
                Way::Node(node) => node.call_leader_until(handler, payload, deadline).await,
                Way::Client(client) => client.call_leader(handler, payload, deadline).await,
            }
        };
        let late = || Err(CallError::OutcomeUnknown("no answer came before the deadline".into()));
        deadline::until(deadline, deadline::ANSWER_GRACE, call).await.unwrap_or_else(late)
    }
}

/// How long past its deadline a write that has begun is waited for: it is being interrupted, or on its way through Raft.
const LATE_ANSWER_PATIENCE: Duration = Duration::from_millis(500);

/// A [`Database`] on a node in this process: beside what every handle offers, closures on the node's own connections.
#[derive(Clone, Debug)]
pub struct LocalDatabase {
    database: Database,
    node: Node,
}

impl Deref for LocalDatabase {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.database
    }
}

impl From<LocalDatabase> for Database {
    fn from(local: LocalDatabase) -> Self {
        local.database
    }
}

impl LocalDatabase {
    pub(crate) fn new(node: Node, name: &str) -> Self {
        Self { database: Database::new(Way::Node(node.clone()), name), node }
    }

    /// As [`Database::with_timeout`].
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { node: self.node.clone(), database: self.database.with_timeout(timeout) }
    }

    /// Runs `closure` on this node's writer thread, inside an SQLite transaction of its own; only on the leader.
    ///
    /// The transaction is committed if the closure gives Ok, rolled back if it gives Err or panics. The future ends when everything
    /// that the closure did or read is committed by Raft (on the disks of a majority) and applied on this node; so is its error. A
    /// closure that changes nothing makes no log entry: its result is given once a quorum has confirmed that this node still leads.
    ///
    /// The first write makes the database. The closure must not block for long: all writers of the database wait for it.
    ///
    /// # Errors
    /// See [`WriteError`]; [`WriteError::class`] says what became of the transaction.
    ///
    /// # Cancellation
    /// Dropped before the closure has begun, it is not run. Later, dropping the future does not undo the write: its outcome is unknown.
    pub async fn write<T, E, F>(&self, closure: F) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.counted(self.run(closure, true)).await
    }

    /// As [`Self::write`], without a transaction around it: for VACUUM alone, which is one of its own.
    pub(crate) async fn write_without_transaction<T, E, F>(&self, closure: F) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.counted(self.run(closure, false)).await
    }

    /// Counted, and in a span of its own: `write` goes from the call to the answer, and the closure runs in it, too.
    async fn counted<T, E>(&self, write: impl Future<Output = Result<T, WriteError<E>>>) -> Result<T, WriteError<E>> {
        let began = Instant::now();
        let span = tracing::debug_span!("write", database = &*self.name, outcome = tracing::field::Empty);
        let outcome = write.instrument(span.clone()).await;
        let recorder = self.node.inner.machine.recorder();
        match &outcome {
            Ok(_) => {
                span.record("outcome", "ok");
                recorder.writes.add(1);
            }
            Err(error) => {
                span.record("outcome", tracing::field::debug(error.class()));
                recorder.write_errors.count(error.class());
            }
        }
        recorder.write_time.time(began.elapsed());
        outcome
    }

    async fn run<T, E, F>(&self, closure: F, needs_transaction: bool) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let ticket = Ticket::new(self.deadline());
        let _cancel = CancelOnDrop(ticket.clone());
        let (job, reply) = ClosureJob::boxed(closure, needs_transaction, ticket.clone());
        self.submit_job(job).await?;
        self.finish(reply, &ticket).await
    }

    /// Queues a job on this node's writer; makes the database if there is none.
    async fn submit_job<E>(&self, mut job: Box<dyn Job>) -> Result<(), WriteError<E>> {
        let inner = &self.node.inner;
        if inner.storage.is_full() {
            return Err(WriteError::DiskFull);
        }
        // Twice: for the database that the first turn made.
        for _ in 0..2 {
            match inner.machine.submit(&self.name, job) {
                Ok(()) => return Ok(()),
                Err(back) => {
                    job = back;
                    self.create().await?;
                }
            }
        }
        Err(WriteError::Rejected(format!("database {:?} was dropped at the same moment", self.name)))
    }

    async fn finish<T, E>(
        &self,
        mut reply: oneshot::Receiver<JobReply<T, E>>,
        ticket: &Ticket,
    ) -> Result<T, WriteError<E>> {
        let leader = self.node.inner.leadership.borrow().leader;
        let answer = match deadline::until(ticket.deadline(), Duration::ZERO, &mut reply).await {
            Some(answer) => answer,
            None if ticket.cancel() => return Err(WriteError::Timeout("it waited for its turn to write".into())),
            None => tokio::time::timeout(LATE_ANSWER_PATIENCE, reply)
                .await
                .map_err(|_| WriteError::OutcomeUnknown("it had begun when its deadline passed".into()))?,
        };
        let (result, outcome) = answer.map_err(|_| WriteError::Fatal("the writer has ended".into()))?;
        match outcome {
            Err(refusal) => return Err(refusal.into_error(leader)),
            Ok(Effect::Committed(_)) => {}
            Ok(Effect::None { term }) => {
                let confirmed = self.node.inner.confirm().await.ok();
                if confirmed.and_then(|confirmed| confirmed.own_term) != Some(term) {
                    return Err(WriteError::NotLeader { leader: self.node.inner.leadership.borrow().leader });
                }
            }
        }
        match result {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => Err(WriteError::Closure(error)),
            None => Err(WriteError::Fatal("the writer gave no result".into())),
        }
    }

    /// Makes the database through Raft.
    async fn create<E>(&self) -> Result<(), WriteError<E>> {
        match self.node.inner.apply_database_change(&self.name, Kind::Create).await {
            Ok(_) => Ok(()),
            // Creating a database twice does nothing: as good as never tried.
            Err(WriteError::OutcomeUnknown(_)) => {
                Err(WriteError::NotLeader { leader: self.node.inner.leadership.borrow().leader })
            }
            Err(error) => Err(error.map_closure(|never| match never {})),
        }
    }

    /// Reads this node's committed state: `closure` runs on a reader thread with a read transaction open, at the version it is given.
    /// For a linearizable read call [`Node::linearize`] before.
    ///
    /// # Errors
    /// See [`ReadError`].
    ///
    /// # Cancellation
    /// Dropping the future interrupts it, and so does the deadline of [`Self::with_timeout`].
    pub async fn read<T, F>(&self, closure: F) -> Result<T, ReadError>
    where
        F: FnOnce(&rusqlite::Connection, Version) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.read_until(closure, self.deadline()).await
    }

    /// As [`Self::read`], with a deadline that the caller's call has brought.
    pub(super) async fn read_until<T, F>(&self, closure: F, deadline: Option<Instant>) -> Result<T, ReadError>
    where
        F: FnOnce(&rusqlite::Connection, Version) -> T + Send + 'static,
        T: Send + 'static,
    {
        let began = Instant::now();
        let read = self.read_here(closure, deadline).await;
        let recorder = self.node.inner.machine.recorder();
        match &read {
            Ok(_) => recorder.reads.add(1),
            Err(_) => recorder.read_errors.add(1),
        }
        recorder.read_time.time(began.elapsed());
        read
    }

    async fn read_here<T, F>(&self, closure: F, deadline: Option<Instant>) -> Result<T, ReadError>
    where
        F: FnOnce(&rusqlite::Connection, Version) -> T + Send + 'static,
        T: Send + 'static,
    {
        let inner = &self.node.inner;
        if let Some(why) = inner.machine.broken() {
            return Err(ReadError::Fatal(why));
        }
        let state =
            inner.machine.database(&self.name).ok_or_else(|| ReadError::NoSuchDatabase(self.name.to_string()))?;
        let (sender, receiver) = oneshot::channel();
        let read: Read = Box::new(move |opened| {
            let run = |(connection, version)| catch_unwind(AssertUnwindSafe(|| closure(connection, version)));
            let value = match opened.map(run) {
                Ok(Ok(value)) => Ok(value),
                Err(error) => Err(error),
                Ok(Err(panic)) => {
                    let _ = sender.send(Err(None));
                    // The thread gives up the connection.
                    resume_unwind(panic);
                }
            };
            Box::new(move |ended| {
                // What the closure gives may be an error that only says that a page could not be read.
                let answer = match ended {
                    Err(
                        error @ (DatabaseError::ReaderTooOld { .. }
                        | DatabaseError::ReaderHoldsTooMuch { .. }
                        | DatabaseError::DamagedPage(_)),
                    ) => Err(error),
                    _ => value,
                };
                let _ = sender.send(answer.map_err(Some));
            })
        });
        let ticket = Ticket::new(deadline);
        let _abandon = AbandonOnDrop(ticket.clone());
        if !inner.machine.readers().submit(state.replica.clone(), read, ticket.clone()) {
            return Err(match inner.machine.readers().is_stopped() {
                true => ReadError::Fatal("it was shut down".into()),
                false => ReadError::Overloaded,
            });
        }
        let late = || ReadError::DeadlinePassed("the read was interrupted, or its turn had not come".into());
        let answer = deadline::until(deadline, Duration::ZERO, receiver).await.ok_or_else(late)?;
        if ticket.was_interrupted() {
            return Err(late());
        }
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(None)) => Err(ReadError::Panicked),
            Ok(Err(Some(DatabaseError::ReaderTooOld { max_age }))) => Err(ReadError::TooOld { max_age }),
            Ok(Err(Some(DatabaseError::ReaderHoldsTooMuch { max_bytes }))) => {
                Err(ReadError::HoldsTooMuch { max_bytes })
            }
            Ok(Err(Some(DatabaseError::DamagedPage(damage)))) => Err(ReadError::Damaged(damage)),
            Ok(Err(Some(DatabaseError::Prepare(error)))) => Err(ReadError::Prepare(error)),
            Ok(Err(Some(error))) => Err(ReadError::Fatal(error.to_string())),
            Err(_) => Err(ReadError::Fatal("it stops".into())),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }
}
