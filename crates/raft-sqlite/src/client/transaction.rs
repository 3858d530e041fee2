//! Interactive transactions: the caller's end.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::mpsc;

use super::deadline::to_millis;
use super::remote_sql::{from_failure, from_result};
use super::{Database, Executed, Row, RowError, Rows, SqlError, Statement, Way};
use crate::error::{ErrorClass, WriteError};
use crate::network::client_proto::transaction_ended::Reason;
use crate::network::client_proto::transaction_reply::Reply;
use crate::network::client_proto::transaction_request::Request;
use crate::network::client_proto::{
    TransactionBegin, TransactionCommit, TransactionReply, TransactionRequest, TransactionRollback,
};
use crate::page::Version;

/// How long an interactive transaction waits for its turn unless told otherwise.
const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

/// The bounds of an interactive transaction. While it is open, no other writer of the database goes on.
#[derive(Clone, Copy, Debug)]
pub struct TransactionOptions {
    /// How long it may wait for its turn; 10 s, or the handle's [`Database::with_timeout`].
    pub queue_timeout: Option<Duration>,
    /// Longest pause between two statements; 5 s. At most `max_transaction_duration` of the leader's configuration.
    pub idle_timeout: Duration,
    /// Longest time from its beginning to COMMIT; 30 s. At most `max_transaction_duration` of the leader's configuration.
    pub total_timeout: Duration,
}

impl Default for TransactionOptions {
    fn default() -> Self {
        Self { queue_timeout: None, idle_timeout: Duration::from_secs(5), total_timeout: Duration::from_secs(30) }
    }
}

/// Why an interactive transaction was rolled back before its COMMIT.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndReason {
    /// By the caller.
    #[error("it was rolled back")]
    RolledBack,
    /// Nothing came from the caller for its idle time-out.
    #[error("nothing was asked of it for longer than its idle time-out")]
    IdleTimeout,
    /// It was open for longer than its total limit.
    #[error("it was open for longer than its total time-out")]
    TotalTimeout,
    /// The node that ran it leads no more, or stops.
    #[error("the node that ran it leads no more")]
    LeadershipLost,
    /// The connection to the leader broke.
    #[error("the connection to the leader broke: {0}")]
    ConnectionLost(String),
    /// A statement ended it: ROLLBACK, COMMIT, ON CONFLICT ROLLBACK, or one that was interrupted.
    #[error("a statement ended it: {0}")]
    ByStatement(String),
    /// The future of a call was dropped before its answer came.
    #[error("a call in it was dropped before its answer came")]
    CallDropped,
}

/// Why a call in an interactive transaction did not go well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactionError {
    /// SQLite refused the statement. It had no effect, and the transaction goes on.
    #[error(transparent)]
    Sql(SqlError),
    /// The query went well, but its result is not what was asked for. The transaction goes on.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The transaction had been rolled back before: nothing of it has taken effect.
    #[error("the transaction is over: {0}")]
    Ended(EndReason),
    /// It could not begin, or its COMMIT did not end well: see [`WriteError::class`].
    #[error(transparent)]
    Write(WriteError<SqlError>),
}

impl TransactionError {
    /// What became of the call; `Retryable`: begin a new transaction.
    pub fn class(&self) -> ErrorClass {
        match self {
            TransactionError::Sql(_)
            | TransactionError::Row(_)
            | TransactionError::Ended(EndReason::RolledBack | EndReason::ByStatement(_)) => ErrorClass::Rejected,
            TransactionError::Ended(_) => ErrorClass::Retryable,
            TransactionError::Write(error) => error.class(),
        }
    }
}

/// Both directions of one transaction.
pub(super) struct Wire {
    pub requests: mpsc::Sender<TransactionRequest>,
    pub replies: BoxStream<'static, Result<TransactionReply, String>>,
}

/// Why a transaction did not begin on the member that was asked.
pub(super) enum NotBegun {
    /// Another may let it begin, or this one later; and what it said.
    TryOn(String),
    Failed(WriteError<SqlError>),
}

/// Sends Begin and waits for the turn.
pub(super) async fn begin_on(mut wire: Wire, begin: TransactionBegin) -> Result<Wire, NotBegun> {
    let request = TransactionRequest { request: Some(Request::Begin(begin)) };
    let gone = || NotBegun::TryOn("the connection ended".into());
    wire.requests.send(request).await.map_err(|_| gone())?;
    match wire.replies.next().await.ok_or_else(gone)?.map_err(NotBegun::TryOn)?.reply {
        Some(Reply::Begun(_)) => Ok(wire),
        Some(Reply::Failed(failure)) => Err(match from_failure(failure) {
            WriteError::NotLeader { .. } => NotBegun::TryOn("it does not lead".into()),
            error => NotBegun::Failed(error),
        }),
        other => Err(NotBegun::Failed(WriteError::Rejected(format!(
            "the transaction did not begin: an unexpected answer, {other:?}; is the member of another version?"
        )))),
    }
}

/// An interactive transaction on the leader. Dropped, it is rolled back.
///
/// It sees everything that was committed before it began, and its own changes. Others wait for it to end; readers do not.
///
/// ```no_run
/// # async fn example(db: raft_sqlite::Database) -> Result<(), raft_sqlite::TransactionError> {
/// let mut tx = db.begin().await?;
/// let balance: i64 = tx.query_row("SELECT balance FROM account WHERE id = 1").await?.get(0)?;
/// tx.execute(("UPDATE account SET balance = ? WHERE id = 1", [balance - 7])).await?;
/// println!("visible from version {} on", tx.commit().await?);
/// # Ok(())
/// # }
/// ```
pub struct Transaction {
    wire: Option<Wire>,
    /// Why there is no wire any more.
    ended: EndReason,
    timeout: Option<Duration>,
}

impl std::fmt::Debug for Transaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transaction").field("open", &self.wire.is_some()).finish_non_exhaustive()
    }
}

impl Transaction {
    /// Runs one statement; `version` of what it gives is 0: nothing is visible yet.
    ///
    /// # Errors
    /// [`TransactionError::Sql`]: refused, the transaction goes on. [`TransactionError::Ended`]: it had been rolled back.
    ///
    /// # Cancellation
    /// Dropping the future before it has ended rolls the transaction back.
    pub async fn execute(&mut self, statement: impl Into<Statement>) -> Result<Executed, TransactionError> {
        match self.call(Request::Statement(statement.into().to_proto())).await? {
            Reply::Result(result) => Ok(from_result(result, Version(0))),
            other => Err(self.end(EndReason::ConnectionLost(format!("an unexpected answer, {other:?}")))),
        }
    }

    /// Runs a query and gives all its rows.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn query(&mut self, statement: impl Into<Statement>) -> Result<Rows, TransactionError> {
        Ok(self.execute(statement).await?.rows)
    }

    /// Runs a query and gives its first row.
    ///
    /// # Errors
    /// As [`Self::execute`]; [`TransactionError::Row`] when there is none.
    pub async fn query_row(&mut self, statement: impl Into<Statement>) -> Result<Row, TransactionError> {
        self.query(statement).await?.into_iter().next().ok_or(TransactionError::Row(RowError::NoRow))
    }

    /// Sets a savepoint.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn savepoint(&mut self, name: &str) -> Result<(), TransactionError> {
        self.execute(format!("SAVEPOINT {}", quoted(name)).as_str()).await.map(drop)
    }

    /// Forgets a savepoint; its changes stay.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn release(&mut self, name: &str) -> Result<(), TransactionError> {
        self.execute(format!("RELEASE {}", quoted(name)).as_str()).await.map(drop)
    }

    /// Undoes what was changed since a savepoint, which stays.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn rollback_to(&mut self, name: &str) -> Result<(), TransactionError> {
        self.execute(format!("ROLLBACK TO {}", quoted(name)).as_str()).await.map(drop)
    }

    /// Commits: on the disks of a majority when it returns. Gives the version from which on readers see it.
    ///
    /// # Errors
    /// [`TransactionError::Ended`]: it had been rolled back. [`TransactionError::Write`]: see [`WriteError::class`].
    ///
    /// # Cancellation
    /// Dropping the future leaves the outcome unknown.
    pub async fn commit(mut self) -> Result<Version, TransactionError> {
        let Some(mut wire) = self.wire.take() else { return Err(TransactionError::Ended(self.ended.clone())) };
        let unknown = |why: String| TransactionError::Write(WriteError::OutcomeUnknown(why));
        let request = TransactionRequest { request: Some(Request::Commit(TransactionCommit {})) };
        // What came unasked for says that it had ended before; it is looked for first.
        let sent = wire.requests.send(request).await;
        match wire.replies.next().await {
            Some(Ok(TransactionReply { reply: Some(reply) })) => match reply {
                Reply::Committed(committed) => Ok(Version(committed.version)),
                Reply::Ended(ended) => Err(TransactionError::Ended(from_ended(ended.reason(), ended.message))),
                Reply::Failed(failure) => Err(TransactionError::Write(from_failure(failure))),
                other => Err(unknown(format!("an unexpected answer, {other:?}"))),
            },
            Some(Err(why)) if sent.is_err() => Err(TransactionError::Ended(EndReason::ConnectionLost(why))),
            Some(Err(why)) => Err(unknown(why)),
            _ if sent.is_err() => Err(TransactionError::Ended(EndReason::ConnectionLost("it was closed".into()))),
            _ => Err(unknown("the connection to the leader ended".into())),
        }
    }

    /// Rolls back; when it returns, the next writer goes on.
    ///
    /// # Errors
    /// [`TransactionError::Ended`]: it had been rolled back before, for another reason.
    pub async fn rollback(mut self) -> Result<(), TransactionError> {
        match self.call(Request::Rollback(TransactionRollback {})).await {
            Err(TransactionError::Ended(EndReason::RolledBack)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Ok(()),
        }
    }

    async fn call(&mut self, request: Request) -> Result<Reply, TransactionError> {
        // Taken: if this future is dropped, so is the wire, and the leader rolls back.
        let Some(mut wire) = self.wire.take() else { return Err(TransactionError::Ended(self.ended.clone())) };
        self.ended = EndReason::CallDropped;
        let exchange = async {
            let _ = wire.requests.send(TransactionRequest { request: Some(request) }).await;
            wire.replies.next().await
        };
        let answer = match self.timeout {
            None => exchange.await,
            Some(timeout) => match tokio::time::timeout(timeout, exchange).await {
                Ok(answer) => answer,
                Err(_) => return Err(self.end(EndReason::ByStatement("its deadline passed".into()))),
            },
        };
        match answer {
            Some(Ok(TransactionReply { reply: Some(reply) })) => match reply {
                Reply::Ended(ended) => Err(self.end(from_ended(ended.reason(), ended.message))),
                Reply::Failed(failure) => {
                    let error = from_failure(failure);
                    self.end(EndReason::ByStatement(error.to_string()));
                    Err(TransactionError::Write(error))
                }
                Reply::Refused(failure) => {
                    self.wire = Some(wire);
                    Err(match from_failure(failure) {
                        WriteError::Closure(error) => TransactionError::Sql(error),
                        other => TransactionError::Write(other),
                    })
                }
                reply => {
                    self.wire = Some(wire);
                    Ok(reply)
                }
            },
            Some(Err(why)) => Err(self.end(EndReason::ConnectionLost(why))),
            _ => Err(self.end(EndReason::ConnectionLost("it was closed".into()))),
        }
    }

    fn end(&mut self, why: EndReason) -> TransactionError {
        self.wire = None;
        self.ended = why.clone();
        TransactionError::Ended(why)
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn from_ended(reason: Reason, message: String) -> EndReason {
    match reason {
        Reason::RolledBack => EndReason::RolledBack,
        Reason::IdleTimeout => EndReason::IdleTimeout,
        Reason::TotalTimeout => EndReason::TotalTimeout,
        Reason::LeadershipLost => EndReason::LeadershipLost,
        Reason::ByStatement => EndReason::ByStatement(message),
    }
}

impl Database {
    /// Begins an interactive transaction on the leader. See [`Self::begin_with`].
    ///
    /// # Errors
    /// As [`Self::begin_with`].
    pub async fn begin(&self) -> Result<Transaction, TransactionError> {
        self.begin_with(TransactionOptions::default()).await
    }

    /// Begins an interactive transaction on the leader: callers get their turn in the order they came. It has the database's writer for
    /// itself until it ends, so keep it short; a [`Self::batch`] holds nobody up.
    ///
    /// # Errors
    /// [`TransactionError::Write`]; [`WriteError::Timeout`] when its turn did not come in time.
    ///
    /// # Cancellation
    /// Dropping the future gives the place in the queue up.
    pub async fn begin_with(&self, options: TransactionOptions) -> Result<Transaction, TransactionError> {
        let queue_timeout = options.queue_timeout.or(self.timeout).unwrap_or(DEFAULT_QUEUE_TIMEOUT);
        let begin = TransactionBegin {
            cluster_id: 0,
            database: self.name().to_owned(),
            queue_timeout_ms: to_millis(Some(queue_timeout)),
            idle_timeout_ms: to_millis(Some(options.idle_timeout)),
            total_timeout_ms: to_millis(Some(options.total_timeout)),
            passed_on: false,
        };
        let begun = async {
            match self.way() {
                Way::Node(node) => super::transaction_host::begin_from(node, begin).await,
                Way::Client(client) => client.begin(begin).await,
            }
        };
        let late = || Err(WriteError::Timeout("no leader let the transaction begin".into()));
        let wire = tokio::time::timeout(queue_timeout + super::deadline::ANSWER_GRACE, begun)
            .await
            .unwrap_or_else(|_| late())
            .map_err(TransactionError::Write)?;
        Ok(Transaction { wire: Some(wire), ended: EndReason::CallDropped, timeout: self.timeout })
    }
}
