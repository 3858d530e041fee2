//! SQL through the handle, the same on every node: writes are forwarded to the leader, reads run here.

use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;

use serde::de::DeserializeOwned;

use super::row::{Row, RowError, Rows};
use super::statement::Statement;
use super::stream::RowStream;
use super::{Database, LocalDatabase, Way, deadline, remote_sql};
use crate::error::{CallError, ReadError, WriteError};
use crate::network::proto;
use crate::node::Node;
use crate::page::Version;

/// SQLite's own refusal of a statement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("statement {statement}: {message} (SQLite code {extended_code})")]
pub struct SqlError {
    /// SQLite's extended result code.
    pub extended_code: i32,
    /// SQLite's words.
    pub message: String,
    /// Which statement of the batch, from 0. The number of statements stands for the COMMIT after them: it fails when a deferred
    /// constraint does not hold.
    pub statement: usize,
}

/// What a statement did.
#[derive(Clone, Debug, PartialEq)]
pub struct Executed {
    /// Rows inserted, changed or deleted by the statement itself: what triggers and foreign key actions did is not counted.
    pub rows_affected: u64,
    /// SQLite's last_insert_rowid after it; 0 until the batch has inserted a row.
    pub last_insert_rowid: i64,
    /// Rows it gave (RETURNING, or a SELECT in a batch).
    pub rows: Rows,
    /// The version from which on readers see it: read at [`ReadConsistency::AtLeast`] it through any other handle to read your own
    /// write.
    pub version: Version,
}

/// How new the state has to be that a read sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadConsistency {
    /// Everything committed anywhere before the read began (ReadIndex).
    #[default]
    Linearizable,
    /// This node's committed state, whatever its age. No network.
    Local,
    /// At least this version.
    AtLeast(Version),
}

/// How long [`ReadConsistency::AtLeast`] waits.
const VERSION_PATIENCE: Duration = Duration::from_secs(10);

impl Database {
    /// Runs one statement in a transaction of its own, on the leader.
    ///
    /// # Errors
    /// [`WriteError::Closure`] with SQLite's refusal (rolled back), or see [`WriteError::class`].
    ///
    /// # Cancellation
    /// Dropping the future leaves the outcome unknown.
    pub fn execute(
        &self,
        statement: impl Into<Statement>,
    ) -> impl Future<Output = Result<Executed, WriteError<SqlError>>> + Send {
        let statement = statement.into().to_proto();
        async move {
            let mut results = self.run_batch(vec![statement]).await?;
            results.pop().ok_or_else(|| WriteError::OutcomeUnknown("the leader gave no result".into()))
        }
    }

    /// Runs statements in one transaction, on the leader: all of them take effect or none. BEGIN, COMMIT and ROLLBACK are refused:
    /// use savepoints.
    ///
    /// VACUUM is a transaction of its own, so it stands alone, or behind the `PRAGMA auto_vacuum = ...` that it puts into effect. It
    /// must fit `max_transaction_bytes`.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn batch(&self, statements: Vec<Statement>) -> Result<Vec<Executed>, WriteError<SqlError>> {
        self.run_batch(statements.iter().map(Statement::to_proto).collect()).await
    }

    /// Runs statements of one text, separated by semicolons, in one transaction on the leader: all of them take effect or none. For
    /// schemas and scripts; rows are dropped.
    ///
    /// # Errors
    /// As [`Self::execute`]; [`SqlError::statement`] is 0 whichever it was.
    pub async fn execute_batch(&self, sql: &str) -> Result<(), WriteError<SqlError>> {
        let statement = proto::SqlStatement { script: true, ..Statement::new(sql).to_proto() };
        self.run_batch(vec![statement]).await.map(drop)
    }

    async fn run_batch(&self, statements: Vec<proto::SqlStatement>) -> Result<Vec<Executed>, WriteError<SqlError>> {
        let batch = proto::SqlBatch { database: self.name().to_owned(), statements, timeout_ms: 0 }.encode_to_vec();
        let batch = Bytes::from(batch);
        let deadline = self.deadline();
        // Each try has what is left of the time. Two encoded messages behind each other are one with the fields of both.
        let payload = || match deadline {
            None => batch.clone(),
            Some(_) => {
                let bound = proto::SqlBatch { timeout_ms: deadline::left_millis(deadline), ..Default::default() };
                [&*batch, &*bound.encode_to_vec()].concat().into()
            }
        };
        match self.call_leader_until(remote_sql::HANDLER, &payload, deadline).await {
            Ok(reply) => remote_sql::decode_reply(&reply)
                .map_err(|why| WriteError::OutcomeUnknown(format!("the leader's answer could not be read: {why}"))),
            Err(CallError::Handler(error)) => Err(remote_sql::decode_failure(&error)),
            Err(CallError::OutcomeUnknown(why)) => Err(WriteError::OutcomeUnknown(why)),
            Err(CallError::NoLeader | CallError::NotSent(_)) if deadline::is_past(deadline) => {
                Err(WriteError::Timeout("no leader was reached".into()))
            }
            Err(CallError::NoLeader) => Err(WriteError::NotLeader { leader: None }),
            Err(CallError::Stopped) => Err(WriteError::Fatal("it was shut down".into())),
            Err(CallError::NotSent(why)) => {
                // No effect, and the same call may go through later.
                tracing::warn!(database = self.name(), why, "a write did not reach the leader");
                Err(WriteError::NotLeader { leader: None })
            }
        }
    }

    /// Runs a query and gives all its rows: on this node, or on the member that the client is connected to. A large result is better
    /// streamed: [`Self::query_stream`].
    ///
    /// # Errors
    /// See [`ReadError`]; a statement that would write is refused by SQLite.
    pub fn query(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> impl Future<Output = Result<Rows, ReadError>> + Send {
        let statement = statement.into().to_proto();
        async move {
            match self.way() {
                Way::Node(node) => node.query_rows(self.name(), statement, consistency, self.deadline()).await,
                Way::Client(_) => RowStream::open(self, statement, consistency).await?.collect_rows().await,
            }
        }
    }

    /// Runs a query and gives its rows one by one as they are asked for, however many there are. All are of one version; see
    /// [`RowStream`] for what it holds while it is open.
    ///
    /// # Errors
    /// As [`Self::query`]; what goes wrong later is told by the stream.
    pub fn query_stream(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> impl Future<Output = Result<RowStream, ReadError>> + Send {
        let statement = statement.into().to_proto();
        async move { RowStream::open(self, statement, consistency).await }
    }

    /// Runs a query and gives its first row; no more are asked for.
    ///
    /// # Errors
    /// [`ReadError::Row`] when there is none; else as [`Self::query`].
    pub fn query_row(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> impl Future<Output = Result<Row, ReadError>> + Send {
        let first = self.query_optional(statement, consistency);
        async move { first.await?.ok_or(ReadError::Row(RowError::NoRow)) }
    }

    /// Runs a query and gives its first row, if there is one; no more are asked for.
    ///
    /// # Errors
    /// As [`Self::query`].
    pub fn query_optional(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> impl Future<Output = Result<Option<Row>, ReadError>> + Send {
        let statement = proto::SqlStatement { max_rows: 1, ..statement.into().to_proto() };
        async move {
            let rows = match self.way() {
                Way::Node(node) => node.query_rows(self.name(), statement, consistency, self.deadline()).await?,
                Way::Client(_) => RowStream::open(self, statement, consistency).await?.collect_rows().await?,
            };
            Ok(rows.into_iter().next())
        }
    }

    /// Runs a query and gives each row as a type that serde knows; see [`Row::deserialize`].
    ///
    /// # Errors
    /// [`ReadError::Row`] when a row does not fit; else as [`Self::query`].
    pub fn query_as<T: DeserializeOwned>(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> impl Future<Output = Result<Vec<T>, ReadError>> + Send {
        let rows = self.query(statement, consistency);
        async move { Ok(rows.await?.deserialize()?) }
    }
}

impl Node {
    /// A whole result, on one of this node's reader threads.
    pub(crate) async fn query_rows(
        &self,
        database: &str,
        statement: proto::SqlStatement,
        consistency: ReadConsistency,
        deadline: Option<Instant>,
    ) -> Result<Rows, ReadError> {
        let database = self.database(database);
        database.reach(consistency, deadline).await?;
        database
            .read_until(move |connection, _| remote_sql::run_statement(connection, &statement), deadline)
            .await?
            .map(|result| result.rows)
            .map_err(ReadError::Sql)
    }
}

impl LocalDatabase {
    /// Waits until this node's state is as new as `consistency` says.
    pub(super) async fn reach(&self, consistency: ReadConsistency, deadline: Option<Instant>) -> Result<(), ReadError> {
        let reached = async {
            match consistency {
                ReadConsistency::Linearizable => self.node().linearize().await,
                ReadConsistency::Local => Ok(()),
                ReadConsistency::AtLeast(version) => self.wait_for_version(version, VERSION_PATIENCE).await,
            }
        };
        let late = || Err(ReadError::DeadlinePassed("this node's state was not known to be new enough".into()));
        deadline::until(deadline, Duration::ZERO, reached).await.unwrap_or_else(late)
    }
}
