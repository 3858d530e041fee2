//! The writer's state: contents that are ahead of what Raft has committed, and how requests run on them.
//!
//! ```text
//!            reset (leadership gained, captured versions dropped)
//!              │ contents := the committed ones
//!              v
//!   run: ── check that the tables are where we left them ── body ──┬─ Ok: keep, hand out the sidecar
//!              │ no: contents := from the tables, ask again        └─ Err: undo, SQLite rolls back
//! ```
//!
//! INV-KV-WRITER: between two runs the contents equal the tables as the writer connection sees them. A COMMIT that fails
//! after a run said Ok breaks that without a word to us; so each run finds out whether the one before it took place: by
//! the number SQLite gives to the first row appended (which costs nothing), or by a query if it appends none.

use super::cache::ValueCache;
use super::contents::{Contents, Undo};
use super::sidecar::Encoder;
use super::transaction::Transaction;
use super::view::{Fault, Values};
use crate::error::KvError;
use crate::schema::{self, SchemaError};
use bytes::Bytes;
use rusqlite::Connection;

/// Keys that the index may be rid of garbage in, after each run.
const FORGET_PER_RUN: usize = 32;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Writer {
    contents: Contents,
    /// Whether the contents can be relied on at all: not while a body runs (it may panic).
    known: bool,
    /// Whether the tables are known to have the layout that this code writes.
    migrated: bool,
    /// What tells whether the last run took place.
    doubt: Doubt,
    /// Kept for its memory.
    undo: Vec<Undo>,
}

/// What the last run wrote, as long as nobody knows whether it was kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Doubt {
    #[default]
    None,
    /// Rows alone: the next row appended must have the number that follows.
    Rows,
    /// Something else too, perhaps of this lease: the tables have to be asked first.
    More(Option<i64>),
}

/// Why a run came to nothing.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The request was refused.
    Kv(KvError),
    /// The run before did not take place after all; this one had no effect and can be repeated.
    Again,
}

impl From<SchemaError> for Refusal {
    fn from(error: SchemaError) -> Refusal {
        match error {
            SchemaError::Sql(error) => Refusal::Kv(from_sql(&error)),
            error => Refusal::Kv(KvError::Internal(error.to_string())),
        }
    }
}

/// What SQLite's errors mean to a client.
pub(super) fn from_sql(error: &rusqlite::Error) -> KvError {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => KvError::NoSpace,
        Some(rusqlite::ErrorCode::TooBig) => KvError::RequestTooLarge,
        _ => KvError::Internal(error.to_string()),
    }
}

impl Writer {
    /// Starts from the committed state.
    pub(super) fn reset(&mut self, committed: Contents) {
        *self = Writer { contents: committed, known: true, ..Writer::default() };
    }

    /// Runs `body` within the SQLite transaction that is open on `connection`; what it returns, and the sidecar if it
    /// changed anything. After an error the caller rolls back.
    pub(super) fn run<T>(
        &mut self,
        connection: &Connection,
        cache: &ValueCache,
        size_hint: usize,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault>,
    ) -> Result<(T, Option<Bytes>), Refusal> {
        self.prepare(connection)?;
        let migrating = !self.migrated && schema::migrate(connection)?;
        let base = self.contents.revision;
        let first_id = self.contents.next_id;
        self.known = false;
        let mut transaction = Transaction {
            connection,
            values: Values { cache, connection: Some(connection), committed: false },
            undo: &mut self.undo,
            sidecar: Encoder::new(base + 1, first_id, size_hint),
            contents: &mut self.contents,
            base,
            events: 0,
            first_row: None,
        };
        let result = body(&mut transaction);
        let appended = transaction.first_row.is_some();
        let sidecar = transaction.sidecar;
        self.known = true;
        if result.is_err() {
            while let Some(undo) = self.undo.pop() {
                self.contents.undo(undo);
            }
            self.contents.revision = base;
        }
        if let Err(Fault::Gone) = result {
            return Err(self.start_over());
        }
        // What the body saw must not leave this function if it never was.
        if self.doubt == Doubt::Rows && !appended && !self.is_at_last_row(connection)? {
            return Err(self.start_over());
        }
        match result {
            Ok(answer) => {
                self.migrated = true;
                self.doubt = self.doubt_of_this_run(migrating);
                self.undo.clear();
                self.contents.forget_some(FORGET_PER_RUN);
                Ok((answer, Some(sidecar).filter(|sidecar| !sidecar.is_empty()).map(Encoder::finish)))
            }
            Err(Fault::Refused(error)) => Err(Refusal::Kv(error)),
            Err(Fault::Sql(error)) => Err(Refusal::Kv(from_sql(&error))),
            Err(Fault::Gone | Fault::NotCached) => {
                unreachable!("invariant: the writer has a connection")
            }
        }
    }

    /// Sees to it that the contents are those of the tables, except for what appending a row will tell.
    fn prepare(&mut self, connection: &Connection) -> Result<(), Refusal> {
        if let Doubt::More(lease) = self.doubt {
            self.known = self.known && self.matches(connection, lease)?;
            self.doubt = Doubt::None;
        }
        if !self.known {
            self.undo.clear();
            *self = Writer {
                contents: Contents::load(connection)?,
                known: true,
                undo: std::mem::take(&mut self.undo),
                ..Writer::default()
            };
        }
        Ok(())
    }

    fn start_over(&mut self) -> Refusal {
        self.known = false;
        self.doubt = Doubt::None;
        Refusal::Again
    }

    fn doubt_of_this_run(&self, migrating: bool) -> Doubt {
        let lease = self.undo.iter().rev().find_map(|undo| match undo {
            Undo::Granted(id) => Some(*id),
            Undo::Ended(lease) => Some(lease.info.id),
            _ => None,
        });
        match self.undo.as_slice() {
            [] if !migrating => Doubt::None,
            undo if !migrating && undo.iter().all(|undo| matches!(undo, Undo::Key(_))) => Doubt::Rows,
            _ => Doubt::More(lease),
        }
    }

    fn matches(&self, connection: &Connection, lease: Option<i64>) -> Result<bool, SchemaError> {
        if schema::layout(connection)? != schema::LAYOUT {
            return Ok(false);
        }
        let compacted = schema::number(connection, schema::COMPACT_REVISION, [])?;
        let removed = schema::number(connection, schema::REMOVED_REVISION, [])?;
        let same_lease = match lease {
            Some(id) => {
                let ttl = schema::number(connection, schema::LEASE_TTL, [id])?;
                ttl.is_some() == self.contents.leases.get(&id).is_some()
            }
            None => true,
        };
        Ok(compacted == Some(self.contents.compact_revision)
            && removed == Some(self.contents.removed_revision)
            && same_lease
            && self.is_at_last_row(connection)?)
    }

    fn is_at_last_row(&self, connection: &Connection) -> Result<bool, SchemaError> {
        let last = schema::number(connection, schema::LAST_ID, [])?.unwrap_or(0);
        Ok(last + 1 == self.contents.next_id.0)
    }

    /// What the writer has, for tests.
    #[cfg(test)]
    pub(super) fn contents(&self) -> &Contents {
        &self.contents
    }
}
