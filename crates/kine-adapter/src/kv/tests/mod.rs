//! The key space on a plain SQLite connection: what raft-sqlite does around it is done here step by step, so that
//! commits can be held back, dropped or made to fail.

mod model;
mod rules;
mod script;
mod speed;
mod store;

use super::contents::Contents;
use super::replica::Replica;
use super::request::{Write, Written};
use super::view::Fault;
use super::writer::{Refusal, Writer};
use super::{StoreOptions, transaction::Transaction};
use crate::error::KvError;
use crate::schema;
use bytes::Bytes;
use raft_sqlite::Version;
use rusqlite::Connection;

/// A leader without a cluster.
pub(super) struct Bench {
    /// The writer's tables. What is not committed yet is in an open transaction.
    pub(super) connection: Connection,
    pub(super) writer: Writer,
    pub(super) replica: Replica,
    pub(super) options: StoreOptions,
    version: u64,
    /// Sidecars of what is held back.
    held: Option<Vec<Bytes>>,
}

impl Bench {
    pub(super) fn new() -> Bench {
        let options = StoreOptions::default();
        let bench = Bench {
            connection: Connection::open_in_memory().unwrap(),
            writer: Writer::default(),
            replica: Replica::new(options.value_cache_bytes, options.event_ring_bytes),
            options,
            version: 0,
            held: None,
        };
        bench.replica.restored(Version(0), &bench.connection);
        bench.reset()
    }

    fn reset(mut self) -> Bench {
        self.writer.reset(self.replica.state().contents.clone());
        self
    }

    /// What follows is captured, but not committed.
    pub(super) fn hold(&mut self) {
        assert!(self.held.is_none());
        self.connection.execute_batch("SAVEPOINT held").unwrap();
        self.held = Some(Vec::new());
    }

    /// Commits what was held back, as one entry.
    pub(super) fn release(&mut self) {
        let sidecars = self.held.take().unwrap();
        self.connection.execute_batch("RELEASE held").unwrap();
        self.version += 1;
        self.replica.applied(Version(self.version), &sidecars);
    }

    /// Leadership is lost before what was held back is committed, and gained again.
    pub(super) fn discard(&mut self) {
        self.held = None;
        self.connection.execute_batch("ROLLBACK TO held; RELEASE held").unwrap();
        self.writer.reset(self.replica.state().contents.clone());
    }

    /// Runs a body in an SQLite transaction of its own; `commit` false lets COMMIT fail.
    pub(super) fn run<T>(
        &mut self,
        commit: bool,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault>,
    ) -> Result<T, Refusal> {
        self.connection.execute_batch("SAVEPOINT caller").unwrap();
        let done = self.writer.run(&self.connection, &self.replica.cache, 0, body);
        let undone = done.is_err() || !commit;
        self.connection
            .execute_batch(if undone { "ROLLBACK TO caller; RELEASE caller" } else { "RELEASE caller" })
            .unwrap();
        let (answer, sidecar) = done?;
        if !undone {
            match &mut self.held {
                Some(held) => held.extend(sidecar),
                None => {
                    self.version += 1;
                    let sidecars: Vec<Bytes> = sidecar.into_iter().collect();
                    self.replica.applied(Version(self.version), &sidecars);
                }
            }
        }
        Ok(answer)
    }

    /// Runs a request, again if it has to be.
    pub(super) fn write(&mut self, request: &Write) -> Result<Written, KvError> {
        request.check(&self.options)?;
        let options = self.options.clone();
        for _ in 0..2 {
            match self.run(true, |transaction| request.execute(transaction, &options)) {
                Ok(written) => return Ok(written),
                Err(Refusal::Kv(error)) => return Err(error),
                Err(Refusal::Again) => {}
            }
        }
        panic!("the writer never agrees with the tables");
    }

    /// Removes the rows that compaction has made superfluous, `step` of them at a time.
    pub(super) fn remove(&mut self, step: usize) -> usize {
        let state = self.replica.state();
        let revision = state.compact_revision();
        let garbage = state.contents.keys.garbage(revision);
        for ids in garbage.chunks(step) {
            let runs: Vec<_> = ids.iter().map(|id| (*id, *id)).collect();
            self.run(true, |transaction| transaction.remove_rows(&runs)).unwrap();
        }
        self.run(true, |transaction| transaction.rows_removed(revision)).unwrap();
        garbage.len()
    }

    /// The writer's contents, the committed ones and those in the tables are the same.
    pub(super) fn check(&self) {
        let tables = Contents::load(&self.connection).unwrap().portrait();
        assert_eq!(self.writer.contents().portrait(), tables, "the writer's contents");
        if self.held.is_none() {
            self.replica.check().unwrap();
            assert_eq!(self.replica.state().contents.portrait(), tables, "the committed contents");
        }
    }

    pub(super) fn rows(&self) -> i64 {
        schema::number(&self.connection, "SELECT count(*) FROM rev", []).unwrap().unwrap()
    }
}
