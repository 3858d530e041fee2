//! Random SQL that mostly succeeds: every statement is made for the schema that a connection has at that moment.
//!
//! Used by the tests of the storage engine (`equality`) and, by its path, by those of the replicated handle (tests/sql). Everything
//! made here is a function of the seed and the schema; the result of every statement is, too (no clock, no `random()`), and does not
//! depend on the plan that SQLite chooses, but for the order of the rows of a query.
//!
//! All objects have names that begin with `q`: `qt` tables, `qw` tables WITHOUT ROWID, `qs` STRICT tables, `qf` full-text and `qr` R-Tree
//! tables, `qv` views, `qi` indices, `qg` triggers. A table's key is its column `id`.

mod expression;
mod query;
mod schema;
mod statement;

use rusqlite::Connection;
use rusqlite::types::Value;

pub use query::query;
pub use schema::Schema;
pub use statement::{SavePoints, statement};

/// A small random generator: the same seed, the same run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    pub fn blob(&mut self, length: u64) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// True once in `times`.
    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A statement and the values of its parameters `?1`, `?2`, ...
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub sql: String,
    pub values: Vec<Value>,
}

impl From<String> for Step {
    fn from(sql: String) -> Self {
        Self { sql, values: Vec::new() }
    }
}

impl From<&str> for Step {
    fn from(sql: &str) -> Self {
        sql.to_owned().into()
    }
}

/// SQLite's refusal: extended code and words.
pub type Refused = (i32, String);

/// What a statement gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
    pub changes: u64,
    pub last_insert_rowid: i64,
}

pub fn refused(error: &rusqlite::Error) -> Refused {
    (error.sqlite_error().map_or(1, |error| error.extended_code), error.to_string())
}

/// Runs a statement as plainly as one can.
pub fn run(connection: &Connection, step: &Step) -> Result<Outcome, Refused> {
    let before = connection.total_changes();
    let run = || -> rusqlite::Result<Outcome> {
        let mut statement = connection.prepare(&step.sql)?;
        for (at, value) in step.values.iter().enumerate() {
            statement.raw_bind_parameter(at + 1, value)?;
        }
        let mut rows = Vec::new();
        let mut cursor = statement.raw_query();
        while let Some(row) = cursor.next()? {
            let width = row.as_ref().column_count();
            rows.push((0..width).map(|column| row.get(column)).collect::<rusqlite::Result<Vec<Value>>>()?);
        }
        drop(cursor);
        let columns = statement.column_names().map(str::to_owned).collect();
        // SQLite keeps the count of the last statement that could change rows.
        let changes = if connection.total_changes() == before { 0 } else { connection.changes() };
        Ok(Outcome { columns, rows, changes, last_insert_rowid: connection.last_insert_rowid() })
    };
    run().map_err(|error| refused(&error))
}
