//! The built-in handler that runs SQL batches on the leader, and its messages.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use prost::Message as _;
use rusqlite::Connection;
use rusqlite::fallible_iterator::FallibleIterator as _;
use rusqlite::types::{ToSqlOutput, Value, ValueRef};

use super::row::Rows;
use super::sql::{Executed, SqlError};
use crate::database::job::WriteContext;
use crate::database::{explain_refusal, forget_refusal};
use crate::error::{CallError, WriteError};
use crate::network::proto;
use crate::network::proto::sql_failure::Kind;
use crate::node::{CallHandler, Node};
use crate::page::Version;

/// Name of the built-in handler.
pub(crate) const HANDLER: &str = "raft-sqlite.sql";

pub(crate) fn to_proto_value(value: &Value) -> proto::SqlValue {
    use proto::sql_value::Value as Wire;
    let value = match value {
        Value::Null => Wire::Null(true),
        Value::Integer(number) => Wire::Integer(*number),
        Value::Real(number) => Wire::Real(*number),
        Value::Text(text) => Wire::Text(text.clone()),
        Value::Blob(bytes) => Wire::Blob(Bytes::copy_from_slice(bytes)),
    };
    proto::SqlValue { value: Some(value) }
}

pub(super) fn from_proto_value(value: proto::SqlValue) -> Value {
    use proto::sql_value::Value as Wire;
    match value.value {
        None | Some(Wire::Null(_)) => Value::Null,
        Some(Wire::Integer(number)) => Value::Integer(number),
        Some(Wire::Real(number)) => Value::Real(number),
        Some(Wire::Text(text)) => Value::Text(text),
        Some(Wire::Blob(bytes)) => Value::Blob(bytes.to_vec()),
    }
}

fn parameter(value: Option<&proto::SqlValue>) -> ToSqlOutput<'_> {
    use proto::sql_value::Value as Wire;
    ToSqlOutput::Borrowed(match value.and_then(|value| value.value.as_ref()) {
        None | Some(Wire::Null(_)) => ValueRef::Null,
        Some(Wire::Integer(number)) => ValueRef::Integer(*number),
        Some(Wire::Real(number)) => ValueRef::Real(*number),
        Some(Wire::Text(text)) => ValueRef::Text(text.as_bytes()),
        Some(Wire::Blob(bytes)) => ValueRef::Blob(bytes),
    })
}

fn wrong_count(prepared: &rusqlite::Statement<'_>, statement: &proto::SqlStatement) -> rusqlite::Error {
    rusqlite::Error::InvalidParameterCount(statement.parameters.len(), prepared.parameter_count())
}

/// What one statement gave.
pub(super) struct StatementResult {
    pub rows: Rows,
    pub rows_affected: u64,
    pub last_insert_rowid: i64,
}

/// Runs one statement on any connection. What a replicated database refuses is refused with the reason, on every path alike.
pub(super) fn run_statement(
    connection: &Connection,
    statement: &proto::SqlStatement,
) -> Result<StatementResult, rusqlite::Error> {
    forget_refusal();
    try_statement(connection, statement).map_err(explain_refusal)
}

fn try_statement(connection: &Connection, statement: &proto::SqlStatement) -> Result<StatementResult, rusqlite::Error> {
    if without_leading_comments(&statement.sql).trim_start_matches(|c: char| c == ';' || c.is_whitespace()).is_empty() {
        return match statement.parameters.len() {
            0 => Ok(StatementResult {
                rows: Rows::default(),
                rows_affected: 0,
                last_insert_rowid: connection.last_insert_rowid(),
            }),
            given => Err(rusqlite::Error::InvalidParameterCount(given, 0)),
        };
    }
    let before = connection.total_changes();
    if statement.script {
        return run_script(connection, &statement.sql, before);
    }
    let (mut kept, mut fresh);
    let prepared: &mut rusqlite::Statement<'_> = if is_settled_when_prepared(&statement.sql) {
        fresh = connection.prepare(&statement.sql)?;
        &mut fresh
    } else {
        kept = connection.prepare_cached(&statement.sql)?;
        &mut kept
    };
    bind(prepared, statement)?;
    let mut rows = Vec::new();
    let most = if statement.max_rows == 0 { usize::MAX } else { statement.max_rows as usize };
    let mut cursor = prepared.raw_query();
    // Only now are its columns known: SQLite prepares a kept statement anew when the schema has changed.
    while rows.len() < most
        && let Some(row) = cursor.next()?
    {
        rows.push(values_of(row)?);
    }
    drop(cursor);
    let columns = prepared.column_names().map(str::to_owned).collect();
    Ok(StatementResult {
        rows: Rows::new(columns, rows),
        // SQLite keeps the count of the last statement that could change rows: it is not this one's if the total stands still.
        rows_affected: if connection.total_changes() == before { 0 } else { connection.changes() },
        last_insert_rowid: connection.last_insert_rowid(),
    })
}

/// Binds the parameters that came with a statement.
pub(super) fn bind(
    prepared: &mut rusqlite::Statement<'_>,
    statement: &proto::SqlStatement,
) -> Result<(), rusqlite::Error> {
    if !statement.refused.is_empty() {
        return Err(rusqlite::Error::ToSqlConversionFailure(statement.refused.clone().into()));
    }
    let mut position = 0;
    let mut missing: std::collections::BTreeSet<usize> = (1..=prepared.parameter_count()).collect();
    for given in &statement.parameters {
        let index = match given.name.as_str() {
            "" => {
                position += 1;
                position
            }
            name => {
                prepared.parameter_index(name)?.ok_or_else(|| rusqlite::Error::InvalidParameterName(name.to_owned()))?
            }
        };
        if index > prepared.parameter_count() {
            return Err(wrong_count(prepared, statement));
        }
        prepared.raw_bind_parameter(index, parameter(given.value.as_ref()))?;
        missing.remove(&index);
    }
    // SQLite takes NULL for what is not given: a mistake that nobody would notice.
    if !missing.is_empty() {
        return Err(wrong_count(prepared, statement));
    }
    Ok(())
}

/// A row's values.
pub(super) fn values_of(row: &rusqlite::Row<'_>) -> Result<Vec<Value>, rusqlite::Error> {
    (0..row.as_ref().column_count()).map(|column| row.get(column)).collect()
}

fn run_script(connection: &Connection, sql: &str, before: u64) -> Result<StatementResult, rusqlite::Error> {
    let mut statements = rusqlite::Batch::new(connection, sql);
    while let Some(mut statement) = statements.next()? {
        let mut rows = statement.raw_query();
        while rows.next()?.is_some() {}
    }
    Ok(StatementResult {
        rows: Rows::default(),
        rows_affected: connection.total_changes() - before,
        last_insert_rowid: connection.last_insert_rowid(),
    })
}

pub(super) fn sql_error(error: &rusqlite::Error, statement: usize) -> SqlError {
    let extended_code = error.sqlite_error().map_or(1, |error| error.extended_code);
    let message = match extended_code {
        rusqlite::ffi::SQLITE_CONSTRAINT_COMMITHOOK => {
            "a batch is one transaction, ended by its end: use savepoints".into()
        }
        _ => error.to_string(),
    };
    SqlError { extended_code, message, statement }
}

/// VACUUM, which SQLite runs outside of transactions only; before it may stand the `PRAGMA auto_vacuum` that it puts into effect.
fn is_vacuum(statements: &[proto::SqlStatement]) -> bool {
    let begins = |statement: &proto::SqlStatement, words: &[&str]| {
        let sql = without_leading_comments(&statement.sql);
        let mut given = sql.split(|c: char| c.is_ascii_whitespace() || "=(;".contains(c));
        words
            .iter()
            .all(|word| given.by_ref().find(|part| !part.is_empty()).is_some_and(|g| g.eq_ignore_ascii_case(word)))
    };
    match statements {
        [vacuum] => begins(vacuum, &["VACUUM"]),
        [pragma, vacuum] => begins(pragma, &["PRAGMA", "auto_vacuum"]) && begins(vacuum, &["VACUUM"]),
        _ => false,
    }
}

/// PRAGMA and EXPLAIN look at the schema, or do all their work, when they are prepared: kept, they would know a schema of the past.
fn is_settled_when_prepared(sql: &str) -> bool {
    let sql = without_leading_comments(sql);
    ["PRAGMA", "EXPLAIN"].iter().any(|word| sql.get(..word.len()).is_some_and(|first| first.eq_ignore_ascii_case(word)))
}

fn without_leading_comments(mut sql: &str) -> &str {
    loop {
        sql = sql.trim_start();
        let comment_end = match sql.get(..2) {
            Some("--") => sql.find('\n'),
            Some("/*") => sql[2..].find("*/").map(|at| at + 4),
            _ => return sql,
        };
        sql = &sql[comment_end.unwrap_or(sql.len())..];
    }
}

/// The leader's end.
pub(crate) struct SqlHandler {
    node: std::sync::Weak<crate::node::NodeInner>,
}

impl SqlHandler {
    pub fn new(node: std::sync::Weak<crate::node::NodeInner>) -> Self {
        Self { node }
    }
}

impl CallHandler for SqlHandler {
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>> {
        let node = self.node.clone();
        Box::pin(async move {
            let rejected = |text: String| encode_failure(&WriteError::Rejected(text));
            let inner = node.upgrade().ok_or_else(|| rejected("the node stops".into()))?;
            let batch = proto::SqlBatch::decode(payload).map_err(|error| rejected(error.to_string()))?;
            let mut database = Node { inner }.database(&batch.database);
            if batch.timeout_ms > 0 {
                database = database.with_timeout(std::time::Duration::from_millis(batch.timeout_ms));
            }
            let statements = batch.statements;
            let vacuum = is_vacuum(&statements);
            let count = statements.len();
            let run = move |context: &mut WriteContext<'_>| {
                let run = |(index, statement)| {
                    run_statement(context.connection(), statement).map_err(|error| sql_error(&error, index))
                };
                statements.iter().enumerate().map(run).collect::<Result<Vec<_>, SqlError>>()
            };
            let results = match vacuum {
                true => database.write_without_transaction(run).await,
                false => database.write(run).await,
            };
            let results = results.map_err(|error| match error {
                WriteError::Sql(error) => encode_failure(&WriteError::Closure(sql_error(&error, count))),
                other => encode_failure(&other),
            })?;
            let version = database.node().database_statistics(&batch.database).map_or(0, |now| now.version);
            Ok(encode_reply(&results, version))
        })
    }
}

pub(super) fn to_result(result: &StatementResult) -> proto::SqlResult {
    let row = |row: &super::Row| proto::SqlRow { values: row.values().iter().map(to_proto_value).collect() };
    proto::SqlResult {
        columns: result.rows.columns().to_vec(),
        rows: result.rows.iter().map(row).collect(),
        rows_affected: result.rows_affected,
        last_insert_rowid: result.last_insert_rowid,
    }
}

pub(super) fn from_result(result: proto::SqlResult, version: Version) -> Executed {
    let values = |row: proto::SqlRow| row.values.into_iter().map(from_proto_value).collect();
    Executed {
        rows_affected: result.rows_affected,
        last_insert_rowid: result.last_insert_rowid,
        rows: Rows::new(result.columns, result.rows.into_iter().map(values).collect()),
        version,
    }
}

fn encode_reply(results: &[StatementResult], version: u64) -> Bytes {
    let results = results.iter().map(to_result).collect();
    Bytes::from(proto::SqlBatchReply { results, version }.encode_to_vec())
}

pub(super) fn decode_reply(bytes: &[u8]) -> Result<Vec<Executed>, prost::DecodeError> {
    let reply = proto::SqlBatchReply::decode(bytes)?;
    let version = Version(reply.version);
    Ok(reply.results.into_iter().map(|result| from_result(result, version)).collect())
}

fn encode_failure(error: &WriteError<SqlError>) -> Bytes {
    Bytes::from(to_failure(error).encode_to_vec())
}

pub(super) fn to_failure(error: &WriteError<SqlError>) -> proto::SqlFailure {
    let (kind, extended_code, statement) = match error {
        WriteError::Closure(error) => (Kind::Sql, error.extended_code, error.statement as u32),
        WriteError::NotLeader { .. } => (Kind::NotLeader, 0, 0),
        WriteError::Overloaded => (Kind::Overloaded, 0, 0),
        WriteError::TooLarge { .. } => (Kind::TooLarge, 0, 0),
        WriteError::DiskFull => (Kind::DiskFull, 0, 0),
        WriteError::Timeout(_) => (Kind::Timeout, 0, 0),
        WriteError::OutcomeUnknown(_) => (Kind::OutcomeUnknown, 0, 0),
        WriteError::Damaged(_) | WriteError::Fatal(_) => (Kind::Fatal, 0, 0),
        WriteError::Sql(_) | WriteError::Rejected(_) => (Kind::Rejected, 0, 0),
    };
    let message = match error {
        WriteError::Closure(error) => error.message.clone(),
        WriteError::TooLarge { limit_bytes } => limit_bytes.to_string(),
        WriteError::OutcomeUnknown(why)
        | WriteError::Fatal(why)
        | WriteError::Rejected(why)
        | WriteError::Timeout(why) => why.clone(),
        other => other.to_string(),
    };
    proto::SqlFailure { kind: kind.into(), message, extended_code, statement }
}

/// Name of the built-in handler that makes and drops databases.
pub(crate) const DATABASES_HANDLER: &str = "raft-sqlite.databases";

pub(crate) fn encode_database_change(name: &str, kind: proto::database_change::Kind) -> Bytes {
    Bytes::from(proto::DatabaseChange { name: name.to_owned(), kind: kind.into() }.encode_to_vec())
}

/// What became of it.
pub(crate) fn decode_database_change(
    reply: Result<Bytes, CallError>,
) -> Result<proto::DatabaseChangeReply, WriteError> {
    match reply {
        Ok(reply) => proto::DatabaseChangeReply::decode(reply)
            .map_err(|error| WriteError::OutcomeUnknown(format!("the leader's answer could not be read: {error}"))),
        Err(CallError::Handler(failure)) => Err(decode_plain_failure(&failure)),
        Err(CallError::OutcomeUnknown(why)) => Err(WriteError::OutcomeUnknown(why)),
        Err(CallError::NoLeader) => Err(WriteError::NotLeader { leader: None }),
        Err(CallError::Stopped) => Err(WriteError::Fatal("it was shut down".into())),
        Err(CallError::NotSent(why)) => Err(WriteError::Rejected(why)),
    }
}

/// Of a call that runs no statements.
pub(crate) fn encode_plain_failure(error: WriteError) -> Bytes {
    encode_failure(&error.map_closure(|never| match never {}))
}

/// Of a call that runs no statements.
pub(crate) fn decode_plain_failure(bytes: &[u8]) -> WriteError {
    match decode_failure(bytes) {
        WriteError::Closure(error) => WriteError::Rejected(error.message),
        other => other.map_closure(|_| unreachable!("invariant: taken care of above")),
    }
}

pub(super) fn decode_failure(bytes: &[u8]) -> WriteError<SqlError> {
    let failure = match proto::SqlFailure::decode(bytes) {
        Ok(failure) => failure,
        Err(error) => {
            return WriteError::OutcomeUnknown(format!("the leader's error could not be read: {error}"));
        }
    };
    from_failure(failure)
}

pub(super) fn from_failure(failure: proto::SqlFailure) -> WriteError<SqlError> {
    match Kind::try_from(failure.kind) {
        Ok(Kind::Sql) => WriteError::Closure(SqlError {
            extended_code: failure.extended_code,
            message: failure.message,
            statement: failure.statement as usize,
        }),
        Ok(Kind::NotLeader) => WriteError::NotLeader { leader: None },
        Ok(Kind::Rejected) => WriteError::Rejected(failure.message),
        Ok(Kind::Overloaded) => WriteError::Overloaded,
        Ok(Kind::TooLarge) => WriteError::TooLarge { limit_bytes: failure.message.parse().unwrap_or(0) },
        Ok(Kind::DiskFull) => WriteError::DiskFull,
        Ok(Kind::Timeout) => WriteError::Timeout(failure.message),
        Ok(Kind::OutcomeUnknown) | Err(_) => WriteError::OutcomeUnknown(failure.message),
        Ok(Kind::Fatal) => WriteError::Fatal(failure.message),
    }
}
