//! SQL through the handle, the same on every node: writes are forwarded to the leader, reads run here.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;

pub use rusqlite::types::Value;

use super::{Database, remote_sql};
use crate::error::{CallError, ReadError, WriteError};
use crate::network::proto;
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

/// A statement with its parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statement {
    sql: String,
    positional: Vec<Value>,
    named: Vec<(String, Value)>,
}

impl Statement {
    /// A statement without parameters.
    pub fn new(sql: impl Into<String>) -> Self {
        Self { sql: sql.into(), ..Self::default() }
    }

    /// Adds the next positional parameter (`?`).
    #[must_use]
    pub fn bind(mut self, value: impl Into<Value>) -> Self {
        self.positional.push(value.into());
        self
    }

    /// Adds a named parameter; `name` with its prefix, such as `:id`.
    #[must_use]
    pub fn bind_named(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.named.push((name.to_owned(), value.into()));
        self
    }

    pub(super) fn to_proto(&self) -> proto::SqlStatement {
        let positional = self.positional.iter().map(|value| (String::new(), value));
        let named = self.named.iter().map(|(name, value)| (name.clone(), value));
        let parameters = positional
            .chain(named)
            .map(|(name, value)| proto::SqlParameter { name, value: Some(remote_sql::to_proto_value(value)) })
            .collect();
        proto::SqlStatement { sql: self.sql.clone(), parameters }
    }
}

impl From<&str> for Statement {
    fn from(sql: &str) -> Self {
        Self::new(sql)
    }
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
    /// The version from which on readers see it: give it to [`Database::wait_for_version`] on another node to read your own write.
    pub version: Version,
}

/// One row's values, in the order of [`Rows::columns`].
pub type Row = Vec<Value>;

/// A whole result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Column names.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
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
    pub async fn execute(&self, statement: impl Into<Statement>) -> Result<Executed, WriteError<SqlError>> {
        let mut results = self.batch(vec![statement.into()]).await?;
        results.pop().ok_or_else(|| WriteError::OutcomeUnknown("the leader gave no result".into()))
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
        let batch = proto::SqlBatch {
            database: self.name().to_owned(),
            statements: statements.iter().map(Statement::to_proto).collect(),
        };
        let payload = Bytes::from(batch.encode_to_vec());
        match self.node().call_leader(remote_sql::HANDLER, payload).await {
            Ok(reply) => remote_sql::decode_reply(&reply)
                .map_err(|why| WriteError::OutcomeUnknown(format!("the leader's answer could not be read: {why}"))),
            Err(CallError::Handler(error)) => Err(remote_sql::decode_failure(&error)),
            Err(CallError::OutcomeUnknown(why)) => Err(WriteError::OutcomeUnknown(why)),
            Err(CallError::NoLeader) => Err(WriteError::NotLeader { leader: None }),
            Err(CallError::NotSent(why)) => {
                // No effect, and the same call may go through later.
                tracing::warn!(database = self.name(), why, "a write did not reach the leader");
                Err(WriteError::NotLeader { leader: None })
            }
        }
    }

    /// Runs a query on this node and gives all its rows.
    ///
    /// # Errors
    /// See [`ReadError`]; a statement that would write is refused by SQLite.
    pub async fn query(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> Result<Rows, ReadError> {
        match consistency {
            ReadConsistency::Linearizable => self.node().linearize().await?,
            ReadConsistency::Local => {}
            ReadConsistency::AtLeast(version) => self.wait_for_version(version, VERSION_PATIENCE).await?,
        }
        let statement = statement.into().to_proto();
        self.read(move |connection, _| remote_sql::run_statement(connection, &statement))
            .await?
            .map(|result| result.rows)
            .map_err(ReadError::Sql)
    }
}
