//! The program's own preparation of connections: functions, collations, virtual table modules, extensions that it links.
//!
//! It is run for each connection this node opens, before anybody uses it: the writer's (again whenever that is opened anew) and the
//! readers'. It gets the connection by shared reference and with everything in place that the library rests on: the authorizer, the
//! commit and rollback hooks and the progress of the WAL can only be replaced through `&mut Connection`, PRAGMAs such as journal_mode
//! are refused as everywhere, and the writer's database is read-only until the preparation has ended (INV-PREPARED-READ-ONLY: what it
//! would write belongs to no caller).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rusqlite::Connection;

use crate::vfs::refuse;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionRole {
    /// The one connection that writes, on the leader.
    Writer,
    /// A read-only one, on any node.
    Reader,
}

/// Which connection is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionPurpose<'a> {
    /// Name of the replicated database; empty when the node starts without any, and tries the preparation on one in memory.
    pub database: &'a str,
    /// What the connection is for.
    pub role: ConnectionRole,
}

/// The program's own error.
pub type PrepareFailure = Box<dyn std::error::Error + Send + Sync>;

/// What a program prepares its connections with.
pub(crate) type PrepareFn =
    dyn Fn(&Connection, &ConnectionPurpose<'_>) -> Result<(), PrepareFailure> + Send + Sync + 'static;

/// The program's preparation of a connection failed; the connection is not used.
#[derive(Debug, thiserror::Error)]
#[error("the program's prepare_connection failed for a {} connection of database {database:?}: {why}", match role {
    ConnectionRole::Writer => "writer's",
    ConnectionRole::Reader => "reader's",
})]
pub struct PrepareError {
    /// Name of the replicated database.
    pub database: String,
    /// What the connection was for.
    pub role: ConnectionRole,
    /// What went wrong, in words.
    pub why: String,
}

/// All preparations of a program, in the order in which they were given; clones share them.
#[derive(Clone, Default)]
pub(crate) struct Preparation {
    steps: Vec<Arc<PrepareFn>>,
}

impl Preparation {
    pub fn push(&mut self, step: Arc<PrepareFn>) {
        self.steps.push(step);
    }

    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Runs all steps on a connection, by way of `on`: the connection's own `prepare`.
    pub fn run(
        &self,
        database: &str,
        role: ConnectionRole,
        on: impl FnOnce(&dyn Fn(&Connection) -> Result<(), String>) -> rusqlite::Result<Option<Result<(), String>>>,
    ) -> Result<(), PrepareError> {
        if self.is_empty() {
            return Ok(());
        }
        let purpose = ConnectionPurpose { database, role };
        let steps =
            |connection: &Connection| self.steps.iter().try_for_each(|step| run_step(step, connection, &purpose));
        let failed = |why: String| PrepareError { database: database.to_owned(), role, why };
        match on(&steps) {
            Ok(Some(outcome)) => outcome.map_err(failed),
            Ok(None) => Err(failed("it left a transaction open: end what it begins".into())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Runs all steps on an empty database in memory: what fails whatever the database holds is told before there is one.
    pub fn rehearse(&self) -> Result<(), PrepareError> {
        for role in [ConnectionRole::Writer, ConnectionRole::Reader] {
            self.run("", role, |steps| Connection::open_in_memory().map(|connection| Some(steps(&connection))))?;
        }
        Ok(())
    }
}

fn run_step(step: &Arc<PrepareFn>, connection: &Connection, purpose: &ConnectionPurpose<'_>) -> Result<(), String> {
    refuse::forget();
    match catch_unwind(AssertUnwindSafe(|| step(connection, purpose))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(match error.downcast::<rusqlite::Error>() {
            Ok(error) => explain(*error),
            Err(error) => error.to_string(),
        }),
        Err(panic) => {
            let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
            let words = words.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(format!("it panicked: {}", words.as_deref().unwrap_or("no words")))
        }
    }
}

fn explain(error: rusqlite::Error) -> String {
    if error.sqlite_error_code() == Some(rusqlite::ErrorCode::ReadOnly) {
        return "it would change the database: a preparation sets up its connection only; write through the handle, or migrate".into();
    }
    refuse::explain(error).to_string()
}
