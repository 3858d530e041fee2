//! The database handle a program uses.

pub(crate) mod remote_sql;
mod sql;

use std::time::Duration;

use tokio::sync::oneshot;

pub use sql::{Executed, ReadConsistency, Row, Rows, SqlError, Statement, Value};

use crate::database::DatabaseError;
use crate::database::job::{ClosureJob, Effect, JobReply, WriteContext};
use crate::database::reader_pool::Read;
use crate::error::{ReadError, WriteError};
use crate::node::Node;
use crate::page::Version;
use crate::state_machine::command::{Command, check_database_name};

/// A handle to one replicated database, on any node. Clones are cheap.
#[derive(Clone, Debug)]
pub struct Database {
    node: Node,
    name: String,
}

impl Database {
    pub(crate) fn new(node: Node, name: &str) -> Self {
        Self { node, name: name.to_owned() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
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
    /// Dropping the future does not undo the write: its outcome is then unknown.
    pub async fn write<T, E, F>(&self, closure: F) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run(closure, true).await
    }

    /// As [`Self::write`], without a transaction around it: for VACUUM alone, which is one of its own.
    pub(crate) async fn write_without_transaction<T, E, F>(&self, closure: F) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.run(closure, false).await
    }

    async fn run<T, E, F>(&self, closure: F, needs_transaction: bool) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let inner = &self.node.inner;
        let (mut job, reply) = ClosureJob::boxed(closure, needs_transaction);
        if inner.storage.is_full() {
            return Err(WriteError::DiskFull);
        }
        // Twice: for the database that the first turn made.
        for _ in 0..2 {
            match inner.machine.submit(&self.name, job) {
                Ok(()) => return self.finish(reply).await,
                Err(back) => {
                    job = back;
                    self.create().await?;
                }
            }
        }
        Err(WriteError::Rejected(format!("database {:?} was dropped at the same moment", self.name)))
    }

    async fn finish<T, E>(&self, reply: oneshot::Receiver<JobReply<T, E>>) -> Result<T, WriteError<E>> {
        let leader = self.node.inner.leadership.borrow().leader;
        let (result, outcome) = reply.await.map_err(|_| WriteError::Fatal("the writer has ended".into()))?;
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
        check_database_name(&self.name).map_err(WriteError::Rejected)?;
        let inner = &self.node.inner;
        let now = inner.leadership.borrow().clone();
        if !now.writable_here {
            return Err(WriteError::NotLeader { leader: now.leader });
        }
        let command = Command::CreateDatabase { database: self.name.clone() };
        let command = crate::consensus::types::CommandBytes(command.encode());
        match inner.raft.client_write(command).await {
            Ok(_) => {}
            Err(openraft::errors::RaftError::Fatal(fatal)) => {
                return Err(WriteError::Fatal(fatal.to_string()));
            }
            // Creating a database twice does nothing: as good as never tried.
            Err(openraft::errors::RaftError::APIError(_)) => {
                return Err(WriteError::NotLeader { leader: now.leader });
            }
        }
        inner.machine.open_writers(now.term).await.map_err(|error| WriteError::Rejected(error.to_string()))
    }

    /// Reads this node's committed state: `closure` runs on a reader thread with a read transaction open, at the version it is given.
    /// For a linearizable read call [`Node::linearize`] before.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read<T, F>(&self, closure: F) -> Result<T, ReadError>
    where
        F: FnOnce(&rusqlite::Connection, Version) -> T + Send + 'static,
        T: Send + 'static,
    {
        let inner = &self.node.inner;
        if let Some(why) = inner.machine.broken() {
            return Err(ReadError::Fatal(why));
        }
        let state = inner.machine.database(&self.name).ok_or_else(|| ReadError::NoSuchDatabase(self.name.clone()))?;
        let (sender, receiver) = oneshot::channel();
        let read: Read = Box::new(move |opened| {
            let value = opened.map(|(connection, version)| closure(connection, version));
            Box::new(move |ended| {
                // What the closure gives may be an error that only says that a page could not be read.
                let answer = match ended {
                    Err(error @ (DatabaseError::ReaderTooOld { .. } | DatabaseError::ReaderHoldsTooMuch { .. })) => {
                        Err(error)
                    }
                    _ => value,
                };
                let _ = sender.send(answer);
            })
        });
        if !inner.machine.readers().submit(state.replica.clone(), read) {
            return Err(ReadError::Overloaded);
        }
        match receiver.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(DatabaseError::ReaderTooOld { max_age })) => Err(ReadError::TooOld { max_age }),
            Ok(Err(DatabaseError::ReaderHoldsTooMuch { max_bytes })) => Err(ReadError::HoldsTooMuch { max_bytes }),
            Ok(Err(error)) => Err(ReadError::Fatal(error.to_string())),
            Err(_) => Err(ReadError::Fatal("the read panicked or the node stops".into())),
        }
    }

    /// Waits until this node has applied at least `version` of the database (one that a write on any node returned).
    ///
    /// # Errors
    /// [`ReadError::Timeout`] after `patience`.
    pub async fn wait_for_version(&self, version: Version, patience: Duration) -> Result<(), ReadError> {
        let machine = &self.node.inner.machine;
        let reached = || machine.database(&self.name).is_some_and(|state| state.replica.committed() >= version);
        let mut applied = machine.applied_index();
        match tokio::time::timeout(patience, applied.wait_for(|_| reached())).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ReadError::Fatal("the node stops".into())),
            Err(_) => Err(ReadError::Timeout(format!(
                "version {version} was not applied here within {} ms",
                patience.as_millis()
            ))),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }
}
