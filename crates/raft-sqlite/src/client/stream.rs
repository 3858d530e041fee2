//! Results too large to hold: rows given one by one.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures_util::Stream;
use rusqlite::types::Value;
use tokio::sync::mpsc;

use super::remote_sql;
use super::row::{Row, Rows};
use super::sql::ReadConsistency;
use super::{Database, Way, deadline};
use crate::database::{DatabaseError, Reader, explain_refusal, forget_refusal};
use crate::error::ReadError;
use crate::network::proto;
use crate::node::Node;

/// A chunk ends when it has so many rows, or so many bytes of values.
const CHUNK_ROWS: usize = 512;
const CHUNK_BYTES: usize = 256 * 1024;
/// Chunks made ahead of whoever takes them.
const CHUNKS_AHEAD: usize = 2;

/// A part of a streamed result.
pub(crate) enum Part {
    /// Comes first.
    Head(Vec<String>),
    Rows(Vec<Vec<Value>>),
}

/// The parts of a result; after an error comes nothing.
pub(crate) type Parts = mpsc::Receiver<Result<Part, ReadError>>;

/// The rows of a query, in order, made as they are taken: a few hundred are ahead. While it is open the node that serves it keeps the
/// version that it reads, and whoever takes rows too slowly ends with [`ReadError::TooOld`]. Dropped, it ends the query.
///
/// Take rows with [`Self::next_row`], or as a [`Stream`].
#[derive(Debug)]
pub struct RowStream {
    columns: Arc<[String]>,
    ahead: VecDeque<Row>,
    parts: Parts,
}

impl RowStream {
    pub(super) async fn open(
        database: &Database,
        statement: proto::SqlStatement,
        consistency: ReadConsistency,
    ) -> Result<Self, ReadError> {
        let mut parts = match database.way() {
            Way::Node(node) => node.query_parts(database.name(), statement, consistency, database.deadline()).await?,
            Way::Client(client) => {
                client.query_parts(database.name(), statement, consistency, database.deadline()).await?
            }
        };
        match parts.recv().await {
            Some(Ok(Part::Head(columns))) => Ok(Self { columns: columns.into(), ahead: VecDeque::new(), parts }),
            Some(Err(error)) => Err(error),
            Some(Ok(Part::Rows(_))) | None => Err(ReadError::Fatal("the query ended before it began".into())),
        }
    }

    /// Column names.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The next row; None: there are no more.
    ///
    /// # Errors
    /// See [`ReadError`]; nothing comes after one.
    pub async fn next_row(&mut self) -> Result<Option<Row>, ReadError> {
        std::future::poll_fn(|context| self.poll_row(context)).await.transpose()
    }

    fn poll_row(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Row, ReadError>>> {
        loop {
            if let Some(row) = self.ahead.pop_front() {
                return Poll::Ready(Some(Ok(row)));
            }
            match ready!(self.parts.poll_recv(context)) {
                Some(Ok(Part::Rows(rows))) => {
                    self.ahead.extend(rows.into_iter().map(|values| Row::new(self.columns.clone(), values)));
                }
                Some(Ok(Part::Head(_))) => {}
                Some(Err(error)) => {
                    self.parts.close();
                    return Poll::Ready(Some(Err(error)));
                }
                None => return Poll::Ready(None),
            }
        }
    }

    pub(super) async fn collect_rows(mut self) -> Result<Rows, ReadError> {
        let mut rows = Vec::new();
        while let Some(row) = self.next_row().await? {
            rows.push(row);
        }
        Ok(Rows::of(self.columns, rows))
    }
}

impl Stream for RowStream {
    type Item = Result<Row, ReadError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_row(context)
    }
}

impl Node {
    /// Runs a query on a thread and a connection of its own: a slow taker must not keep one of the few threads of [`crate::Database::query`].
    pub(crate) async fn query_parts(
        &self,
        name: &str,
        statement: proto::SqlStatement,
        consistency: ReadConsistency,
        deadline: Option<Instant>,
    ) -> Result<Parts, ReadError> {
        let database = self.database(name);
        database.reach(consistency, deadline).await?;
        let inner = &self.inner;
        if let Some(why) = inner.machine.broken() {
            return Err(ReadError::Fatal(why));
        }
        let permit = inner.streams.clone().try_acquire_owned().map_err(|_| ReadError::Overloaded)?;
        let state = inner.machine.database(name).ok_or_else(|| ReadError::NoSuchDatabase(name.to_owned()))?;
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let told = sender.clone();
            if let Err(error) = run(|| state.replica.open_reader(), &statement, deadline, &sender) {
                let _ = told.blocking_send(Err(error));
            }
        });
        Ok(receiver)
    }
}

/// What a reader says when it cannot go on.
pub(super) fn read_error(error: DatabaseError) -> ReadError {
    match error {
        DatabaseError::ReaderTooOld { max_age } => ReadError::TooOld { max_age },
        DatabaseError::ReaderHoldsTooMuch { max_bytes } => ReadError::HoldsTooMuch { max_bytes },
        DatabaseError::DamagedPage(damage) => ReadError::Damaged(damage),
        DatabaseError::Prepare(error) => ReadError::Prepare(error),
        other => ReadError::Fatal(other.to_string()),
    }
}

fn run(
    open: impl FnOnce() -> Result<Reader, DatabaseError>,
    statement: &proto::SqlStatement,
    deadline: Option<Instant>,
    sender: &mpsc::Sender<Result<Part, ReadError>>,
) -> Result<(), ReadError> {
    let reader = open().map_err(read_error)?;
    reader.begin().map_err(read_error)?;
    // A statement that gives no row for long would not notice that nobody waits any more.
    let taker = sender.clone();
    reader.stop_check().set(move || taker.is_closed() || deadline::is_past(deadline));
    let given = give_rows(reader.connection(), statement, sender);
    // What went wrong may only be that a page is no longer there.
    reader.end().map_err(read_error)?;
    given.map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::OperationInterrupted) if deadline::is_past(deadline) => {
            ReadError::DeadlinePassed("the query was interrupted".into())
        }
        _ => ReadError::Sql(error),
    })
}

fn give_rows(
    connection: &rusqlite::Connection,
    statement: &proto::SqlStatement,
    sender: &mpsc::Sender<Result<Part, ReadError>>,
) -> Result<(), rusqlite::Error> {
    forget_refusal();
    let mut prepared = connection.prepare(&statement.sql).map_err(explain_refusal)?;
    remote_sql::bind(&mut prepared, statement)?;
    let columns: Vec<String> = prepared.column_names().map(str::to_owned).collect();
    if sender.blocking_send(Ok(Part::Head(columns))).is_err() {
        return Ok(());
    }
    let mut left = if statement.max_rows == 0 { u64::MAX } else { u64::from(statement.max_rows) };
    let mut cursor = prepared.raw_query();
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while left > 0
        && let Some(row) = cursor.next().map_err(explain_refusal)?
    {
        left -= 1;
        let values = remote_sql::values_of(row)?;
        bytes += values.iter().map(size_of_value).sum::<usize>();
        chunk.push(values);
        if chunk.len() >= CHUNK_ROWS || bytes >= CHUNK_BYTES {
            bytes = 0;
            if sender.blocking_send(Ok(Part::Rows(std::mem::take(&mut chunk)))).is_err() {
                return Ok(());
            }
        }
    }
    if !chunk.is_empty() {
        let _ = sender.blocking_send(Ok(Part::Rows(chunk)));
    }
    Ok(())
}

fn size_of_value(value: &Value) -> usize {
    match value {
        Value::Text(text) => text.len(),
        Value::Blob(bytes) => bytes.len(),
        Value::Null | Value::Integer(_) | Value::Real(_) => 8,
    }
}
