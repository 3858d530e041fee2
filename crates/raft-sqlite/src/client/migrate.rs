//! Migrations: numbered SQL texts that bring a database's schema up to what a program expects, each run once in the cluster.
//!
//! Any node may ask, any number of them at once: the list goes to the leader, where the writer thread runs one migration after another,
//! each in a transaction together with its record. Whoever comes second finds the record. So a call that did not end well is simply
//! made again, and [`Database::migrate`] does that by itself.
//!
//! Why not rusqlite_migration or refinery: both begin and commit transactions themselves on a `&mut Connection`; here the writer thread
//! does (INV-WRITER-COMMITS), and followers have no connection that writes. rusqlite_migration keeps nothing but `PRAGMA user_version`,
//! so it cannot tell that a text has changed. Their files of SQL can be used as they are.
//!
//! The record is a table of the database (docs/formats.md, "Migrations"); it is replicated and checkpointed with everything else.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use rusqlite::{Connection, OptionalExtension as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Database;
use crate::database::job::WriteContext;
use crate::database::{explain_refusal, forget_refusal};
use crate::error::{CallError, ErrorClass, ReadError, WriteError};
use crate::node::{CallHandler, Node};
use crate::page::Version;

/// Name of the built-in handler.
pub(crate) const HANDLER: &str = "raft-sqlite.migrate";
/// The table of records.
const TABLE: &str = "_raft_sqlite_migrations";
const CREATE_TABLE: &str = "CREATE TABLE IF NOT EXISTS _raft_sqlite_migrations(
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum BLOB NOT NULL, applied_unix_ms INTEGER NOT NULL)";
/// How long a call goes on asking for a leader.
const PATIENCE: Duration = Duration::from_secs(60);

/// One step of a schema, as SQL.
///
/// The text runs in one transaction, which the library begins and commits. So it has no BEGIN or COMMIT, `VACUUM` is refused, and
/// `PRAGMA foreign_keys` does nothing: to rebuild a table that others refer to, begin with `PRAGMA defer_foreign_keys = ON`. It must fit
/// [`crate::NodeConfig::max_transaction_bytes`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    number: u32,
    name: String,
    sql: String,
}

impl Migration {
    /// `number`: from 1 on, without gaps. `name`: for people.
    pub fn new(number: u32, name: impl Into<String>, sql: impl Into<String>) -> Self {
        Self { number, name: name.into(), sql: sql.into() }
    }

    /// SHA-256 of the text; line ends count as LF, whatever a checkout made of them.
    fn checksum(&self) -> [u8; 32] {
        Sha256::digest(self.sql.replace("\r\n", "\n")).into()
    }
}

/// What a call of [`Database::migrate`] found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// Numbers of the migrations that this call ran; empty: there was nothing to do.
    pub applied: Vec<u32>,
    /// The newest migration in the database; 0: none.
    pub current: u32,
    /// The version from which on readers see all of them.
    pub version: Version,
}

/// Why a database was not migrated. Migrations before the one named are applied and stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MigrationError {
    /// The list is not ascending by one.
    #[error(
        "migration {number} ({name:?}) comes where {expected} is due: number them 1, 2, 3, ... without gaps or repetitions"
    )]
    NotConsecutive {
        /// Of the migration in the wrong place.
        number: u32,
        /// Its name.
        name: String,
        /// The number that belongs there.
        expected: u32,
    },
    /// The list begins behind what the database has.
    #[error(
        "the database has migrations up to {current}, and the program's begin with {first}: {} to {} are missing; use a version of the \
         program that has them first", current + 1, first - 1
    )]
    Gap {
        /// The newest in the database.
        current: u32,
        /// The first in the list.
        first: u32,
    },
    /// The text of an applied migration is another one now.
    #[error(
        "migration {number} ({name:?}) was applied with another text: put back the text that was applied, and make the change in a new \
         migration"
    )]
    Changed {
        /// Which.
        number: u32,
        /// Its name.
        name: String,
    },
    /// The database has migrations that the program does not know.
    #[error(
        "the database has migrations up to {current} ({name:?}), this program knows them up to {known}: use the version of the program \
         that applied them, or a newer one"
    )]
    Newer {
        /// The newest in the database.
        current: u32,
        /// Its name.
        name: String,
        /// The newest in the list; 0: it is empty.
        known: u32,
    },
    /// SQLite refused a migration; it was rolled back.
    #[error("migration {number} ({name:?}) was rolled back: {message} (SQLite code {extended_code})")]
    Sql {
        /// Which.
        number: u32,
        /// Its name.
        name: String,
        /// SQLite's extended result code.
        extended_code: i32,
        /// SQLite's words.
        message: String,
    },
    /// Refused for another reason: too large, or no name for a database, among others.
    #[error("{0}")]
    Rejected(String),
    /// No leader took it, or this node did not catch up in time. Call again.
    #[error("{0}")]
    Retryable(String),
    /// Whether the last migration is applied cannot be told. Call again: what is applied is not run twice.
    #[error("{0}")]
    OutcomeUnknown(String),
    /// The node has stopped.
    #[error("this node has stopped: {0}")]
    Fatal(String),
}

impl MigrationError {
    /// What became of the call.
    pub fn class(&self) -> ErrorClass {
        match self {
            MigrationError::Retryable(_) => ErrorClass::Retryable,
            MigrationError::OutcomeUnknown(_) => ErrorClass::OutcomeUnknown,
            MigrationError::Fatal(_) => ErrorClass::Fatal,
            _ => ErrorClass::Rejected,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Request {
    database: String,
    migrations: Vec<Migration>,
}

#[derive(Serialize, Deserialize)]
struct Reply {
    applied: Vec<u32>,
    current: u32,
    version: u64,
}

impl Database {
    /// Brings the database's schema up to the last of `migrations`, from any node. Each is run once, on the leader, in a transaction of
    /// its own; the first one makes the database. When it returns, everything is committed, and readers on this node see it.
    ///
    /// The list may leave out the oldest migrations once every database has them.
    ///
    /// # Errors
    /// See [`MigrationError`].
    ///
    /// # Cancellation
    /// Dropping the future may leave some migrations applied; the next call goes on.
    pub async fn migrate(&self, migrations: &[Migration]) -> Result<Migrated, MigrationError> {
        check_list(migrations)?;
        let request = Request { database: self.name().to_owned(), migrations: migrations.to_vec() };
        let payload = Bytes::from(serde_json::to_vec(&request).expect("invariant: plain JSON"));
        let deadline = Instant::now() + PATIENCE;
        let mut applied = Vec::new();
        let (current, version) = loop {
            match self.ask_leader(payload.clone()).await {
                Ok(reply) => {
                    applied.extend(reply.applied);
                    break (reply.current, Version(reply.version));
                }
                Err(MigrationError::Retryable(_) | MigrationError::OutcomeUnknown(_)) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => return Err(error),
            }
        };
        match self.wait_for_version(version, PATIENCE).await {
            Ok(()) => Ok(Migrated { applied, current, version }),
            Err(ReadError::Fatal(why)) => Err(MigrationError::Fatal(why)),
            Err(error) => Err(MigrationError::Retryable(error.to_string())),
        }
    }

    async fn ask_leader(&self, payload: Bytes) -> Result<Reply, MigrationError> {
        match self.call_leader(HANDLER, payload).await {
            Ok(reply) => serde_json::from_slice(&reply).map_err(|error| {
                MigrationError::OutcomeUnknown(format!("the leader's answer could not be read: {error}"))
            }),
            Err(CallError::Handler(error)) => Err(serde_json::from_slice(&error).unwrap_or_else(|error| {
                MigrationError::OutcomeUnknown(format!("the leader's error could not be read: {error}"))
            })),
            Err(error @ (CallError::NoLeader | CallError::NotSent(_))) => {
                Err(MigrationError::Retryable(error.to_string()))
            }
            Err(error @ CallError::Stopped) => Err(MigrationError::Fatal(error.to_string())),
            Err(error @ CallError::OutcomeUnknown(_)) => Err(MigrationError::OutcomeUnknown(error.to_string())),
        }
    }
}

fn check_list(migrations: &[Migration]) -> Result<(), MigrationError> {
    let mut expected = migrations.first().map_or(1, |first| first.number.max(1));
    for Migration { number, name, .. } in migrations {
        if *number != expected {
            return Err(MigrationError::NotConsecutive { number: *number, name: name.clone(), expected });
        }
        expected = expected.saturating_add(1);
    }
    Ok(())
}

/// The newest migration in the database, and the first of the list that is not. None: all are.
fn next<'a>(
    connection: &Connection,
    migrations: &'a [Migration],
) -> Result<(u32, Option<&'a Migration>), MigrationStep> {
    let exists: bool = connection
        .prepare_cached("SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?")?
        .query_row([TABLE], |row| row.get(0))?;
    if !exists {
        return match migrations.first() {
            Some(first) if first.number > 1 => Err(MigrationError::Gap { current: 0, first: first.number }.into()),
            first => Ok((0, first)),
        };
    }
    let (current, current_name): (u32, String) = connection
        .prepare(&format!("SELECT number, name FROM {TABLE} ORDER BY number DESC LIMIT 1"))?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?
        .unwrap_or_default();
    let known = migrations.last().map_or(0, |last| last.number);
    if current > known {
        return Err(MigrationError::Newer { current, name: current_name, known }.into());
    }
    if let Some(first) = migrations.first().filter(|first| first.number > current.saturating_add(1)) {
        return Err(MigrationError::Gap { current, first: first.number }.into());
    }
    let mut recorded = connection.prepare(&format!("SELECT checksum FROM {TABLE} WHERE number = ?"))?;
    for migration in migrations {
        let checksum: Option<Vec<u8>> = recorded.query_row([migration.number], |row| row.get(0)).optional()?;
        match checksum {
            None => return Ok((current, Some(migration))),
            Some(checksum) if checksum == migration.checksum() => {}
            Some(_) => {
                let (number, name) = (migration.number, migration.name.clone());
                return Err(MigrationError::Changed { number, name }.into());
            }
        }
    }
    Ok((current, None))
}

/// What ends a transaction without a migration.
enum MigrationStep {
    Refused(MigrationError),
    Sql(rusqlite::Error),
}

impl From<MigrationError> for MigrationStep {
    fn from(error: MigrationError) -> Self {
        MigrationStep::Refused(error)
    }
}

impl From<rusqlite::Error> for MigrationStep {
    fn from(error: rusqlite::Error) -> Self {
        MigrationStep::Sql(error)
    }
}

/// Runs the first migration that is missing: its number, or, when there is none, the newest in the database.
fn step(context: &WriteContext<'_>, migrations: &[Migration]) -> Result<Result<u32, u32>, MigrationStep> {
    let connection = context.connection();
    let (current, missing) = next(connection, migrations)?;
    let Some(migration) = missing else { return Ok(Err(current)) };
    if current == 0 {
        connection.execute_batch(CREATE_TABLE)?;
    }
    forget_refusal();
    connection.execute_batch(&migration.sql).map_err(|error| {
        let error = explain_refusal(error);
        MigrationError::Sql {
            number: migration.number,
            name: migration.name.clone(),
            extended_code: error.sqlite_error().map_or(1, |error| error.extended_code),
            message: match error.sqlite_error().map(|error| error.extended_code) {
                Some(rusqlite::ffi::SQLITE_CONSTRAINT_COMMITHOOK) => {
                    "a migration is one transaction, begun and ended by the library: leave BEGIN and COMMIT out".into()
                }
                _ => error.to_string(),
            },
        }
    })?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_millis());
    connection.prepare_cached(&format!("INSERT INTO {TABLE} VALUES (?, ?, ?, ?)"))?.execute((
        migration.number,
        &migration.name,
        migration.checksum(),
        now as i64,
    ))?;
    Ok(Ok(migration.number))
}

/// The leader's end.
pub(crate) struct MigrationHandler {
    node: std::sync::Weak<crate::node::NodeInner>,
}

impl MigrationHandler {
    pub fn new(node: std::sync::Weak<crate::node::NodeInner>) -> Self {
        Self { node }
    }
}

impl CallHandler for MigrationHandler {
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>> {
        let node = self.node.clone();
        Box::pin(async move {
            let migrated = match node.upgrade() {
                None => Err(MigrationError::Retryable("the node stops".into())),
                Some(inner) => migrate_here(Node { inner }, &payload).await,
            };
            let json = match &migrated {
                Ok(reply) => serde_json::to_vec(reply),
                Err(error) => serde_json::to_vec(error),
            };
            let bytes = Bytes::from(json.expect("invariant: plain JSON"));
            if migrated.is_ok() { Ok(bytes) } else { Err(bytes) }
        })
    }
}

async fn migrate_here(node: Node, payload: &[u8]) -> Result<Reply, MigrationError> {
    let Request { database, migrations } = serde_json::from_slice(payload)
        .map_err(|error| MigrationError::Rejected(format!("the migrations could not be read: {error}")))?;
    check_list(&migrations)?;
    let name = database;
    let database = node.database(&name);
    let migrations = std::sync::Arc::new(migrations);
    let mut applied = Vec::new();
    loop {
        let list = migrations.clone();
        let written = database.write(move |context| step(context, &list)).await;
        match written.map_err(from_write)? {
            Ok(number) => {
                tracing::info!(database = name, number, "a migration was applied");
                applied.push(number);
            }
            Err(current) => {
                let version = node.database_statistics(&name).map_or(0, |now| now.version);
                return Ok(Reply { applied, current, version });
            }
        }
    }
}

fn from_write(error: WriteError<MigrationStep>) -> MigrationError {
    match error {
        WriteError::Closure(MigrationStep::Refused(error)) => error,
        WriteError::Closure(MigrationStep::Sql(error)) | WriteError::Sql(error) => {
            MigrationError::Rejected(format!("SQLite: {error}"))
        }
        WriteError::NotLeader { leader } => {
            MigrationError::Retryable(WriteError::<std::convert::Infallible>::NotLeader { leader }.to_string())
        }
        WriteError::Timeout(why) => MigrationError::Retryable(why),
        WriteError::Overloaded => MigrationError::Retryable("too many writes are waiting on the leader".into()),
        WriteError::DiskFull => {
            MigrationError::Retryable("no space is left for the log on the leader: free some".into())
        }
        WriteError::TooLarge { limit_bytes } => MigrationError::Rejected(format!(
            "a migration changes more than {limit_bytes} bytes of pages: split it, or raise max_transaction_bytes"
        )),
        WriteError::Rejected(why) => MigrationError::Rejected(why),
        WriteError::OutcomeUnknown(why) => MigrationError::OutcomeUnknown(why),
        WriteError::Damaged(damage) => MigrationError::Fatal(damage.to_string()),
        WriteError::Fatal(why) => MigrationError::Fatal(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_text_whatever_its_line_ends() {
        let one = Migration::new(1, "a", "CREATE TABLE t(a);\nCREATE TABLE u(a);\n");
        let other = Migration::new(2, "b", "CREATE TABLE t(a);\r\nCREATE TABLE u(a);\r\n");
        assert_eq!(one.checksum(), other.checksum());
        assert_ne!(one.checksum(), Migration::new(1, "a", "CREATE TABLE t(b);\nCREATE TABLE u(a);\n").checksum());
    }

    #[test]
    fn golden_checksum() {
        // sha256sum of "abc" (FIPS 180-2, appendix B.1).
        let hex: String = Migration::new(1, "", "abc").checksum().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn lists_are_consecutive() {
        let list = |numbers: &[u32]| {
            check_list(&numbers.iter().map(|number| Migration::new(*number, "m", "")).collect::<Vec<_>>())
        };
        for good in [&[][..], &[1], &[1, 2, 3], &[4, 5]] {
            assert_eq!(list(good), Ok(()), "{good:?}");
        }
        for (bad, at) in [(&[0][..], 0), (&[1, 3], 3), (&[1, 1], 1), (&[2, 1], 1)] {
            assert!(matches!(list(bad), Err(MigrationError::NotConsecutive { number, .. }) if number == at), "{bad:?}");
        }
    }
}
