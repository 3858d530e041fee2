//! One caller's transaction on the writer thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rusqlite::Connection;

use super::ticket::Ticket;
use crate::NodeId;
use crate::error::WriteError;
use crate::page::{PageDamage, Version};
use crate::vfs::stop::StopCheck;

/// What a caller's closure is given: the writer connection, inside an SQLite transaction of its own.
///
/// Whatever it reads is ahead of Raft; the library withholds the closure's result until all of it is committed.
pub struct WriteContext<'a> {
    pub(super) connection: &'a Connection,
    pub(super) sidecars: Vec<Bytes>,
    pub(super) term: u64,
    pub(super) closing: &'a AtomicBool,
    pub(super) stop: &'a StopCheck,
}

impl std::fmt::Debug for WriteContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteContext").field("sidecars", &self.sidecars.len()).finish_non_exhaustive()
    }
}

impl WriteContext<'_> {
    /// The writer connection. Do not begin or end transactions on it: use savepoints.
    pub fn connection(&self) -> &Connection {
        self.connection
    }

    /// The leadership it runs in.
    pub(crate) fn term(&self) -> u64 {
        self.term
    }

    /// Asked by SQLite while it works for this caller; taken back at the end.
    pub(crate) fn stop_when(&self, check: impl Fn() -> bool + Send + 'static) {
        self.stop.set(check);
    }

    /// The writer is to close: whatever waits on its thread must end at once.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Adds opaque bytes that reach every node's [`crate::ApplyObserver`] together with the transaction's pages.
    ///
    /// Dropped when the transaction is rolled back or changes nothing.
    pub fn push_sidecar(&mut self, bytes: Bytes) {
        self.sidecars.push(bytes);
    }
}

/// How a committed job took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It changed pages; they are visible from this version on.
    Committed(Version),
    /// It changed nothing, and all that it saw is committed. Before the caller is answered, the leadership of `term` has to be
    /// confirmed: else it may have read a state that another leader has already left behind.
    None { term: u64 },
}

/// Why a job ended without effect or without a known one.
#[derive(Debug)]
pub(crate) enum Refusal {
    NotLeader,
    Overloaded,
    TooLarge { limit_bytes: u64 },
    Timeout(String),
    Sql(rusqlite::Error),
    Rejected(String),
    OutcomeUnknown(String),
    Damaged(PageDamage),
    Fatal(String),
}

impl Refusal {
    pub fn into_error<E>(self, leader: Option<NodeId>) -> WriteError<E> {
        match self {
            Refusal::NotLeader => WriteError::NotLeader { leader },
            Refusal::Overloaded => WriteError::Overloaded,
            Refusal::TooLarge { limit_bytes } => WriteError::TooLarge { limit_bytes },
            Refusal::Timeout(text) => WriteError::Timeout(text),
            Refusal::Sql(error) => WriteError::Sql(error),
            Refusal::Rejected(text) => WriteError::Rejected(text),
            Refusal::OutcomeUnknown(text) => WriteError::OutcomeUnknown(text),
            Refusal::Damaged(damage) => WriteError::Damaged(damage),
            Refusal::Fatal(text) => WriteError::Fatal(text),
        }
    }
}

/// A caller's work, without its types.
pub(crate) trait Job: Send {
    /// False: it runs as it is, for VACUUM, which is a transaction of its own.
    fn needs_transaction(&self) -> bool;
    /// True: it shows its caller what it reads before it ends, so it begins only when everything captured is committed.
    fn needs_committed_state(&self) -> bool {
        false
    }
    /// Its place in the queue.
    fn ticket(&self) -> &Arc<Ticket>;
    /// Runs inside an open SQLite transaction. True: COMMIT; false: ROLLBACK.
    fn run(&mut self, context: &mut WriteContext<'_>) -> bool;
    /// Called exactly once, from any thread.
    fn finish(self: Box<Self>, outcome: Result<Effect, Refusal>);
}

/// What the caller's future receives: the closure's result (if it ran) and what became of the transaction.
pub(crate) type JobReply<T, E> = (Option<Result<T, E>>, Result<Effect, Refusal>);

/// A closure as a job.
pub(crate) struct ClosureJob<T, E, F> {
    closure: Option<F>,
    result: Option<Result<T, E>>,
    reply: tokio::sync::oneshot::Sender<JobReply<T, E>>,
    needs_transaction: bool,
    /// The caller's.
    span: tracing::Span,
    ticket: Arc<Ticket>,
}

impl<T, E, F> ClosureJob<T, E, F>
where
    F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    pub fn boxed(
        closure: F,
        needs_transaction: bool,
        ticket: Arc<Ticket>,
    ) -> (Box<dyn Job>, tokio::sync::oneshot::Receiver<JobReply<T, E>>) {
        let (reply, receiver) = tokio::sync::oneshot::channel();
        let span = tracing::Span::current();
        (Box::new(Self { closure: Some(closure), result: None, reply, needs_transaction, span, ticket }), receiver)
    }
}

impl<T, E, F> Job for ClosureJob<T, E, F>
where
    F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    fn needs_transaction(&self) -> bool {
        self.needs_transaction
    }

    fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket
    }

    fn run(&mut self, context: &mut WriteContext<'_>) -> bool {
        let closure = self.closure.take().expect("invariant: a job runs once");
        let result = self.span.in_scope(|| closure(context));
        let commit = result.is_ok();
        self.result = Some(result);
        commit
    }

    fn finish(self: Box<Self>, outcome: Result<Effect, Refusal>) {
        // The caller may have gone away: then nobody needs the answer.
        let _ = self.reply.send((self.result, outcome));
    }
}
