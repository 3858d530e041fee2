//! Files in the format of SQLite's sqllogictest, through the handle of three nodes; and on a plain SQLite, which checks the files.
//!
//! A value is written as SQLite's own runner does: NULL, integers, reals with three digits, `(empty)`, `@` for what cannot be printed. A
//! row is a line. `onlyif raft-sqlite` and `onlyif sqlite` tell the two apart. `BLESS=1` writes what the plain SQLite gives into the
//! files: read the difference before you keep it.
//!
//! The handle has no BEGIN: a transaction of a file is run from its beginning for each of its statements, in a closure on the leader
//! that rolls back, and at COMMIT in one that does not.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use raft_sqlite::rusqlite::Connection;
use raft_sqlite::rusqlite::ffi::SQLITE_READONLY;
use raft_sqlite::{ErrorClass, LocalDatabase, ReadConsistency, ReadError, Value, WriteError};
use sqllogictest::{AsyncDB, DB, DBOutput, DefaultColumnType, Record, Runner};

use super::nodes::{Nodes, PATIENCE};
use super::random_sql::{Outcome, Refused, Step, refused, run};

type Output = DBOutput<DefaultColumnType>;
type Answer = Result<Outcome, Refused>;

/// SQLite's refusal as a file names it.
#[derive(Debug, thiserror::Error)]
#[error("{} (SQLite code {})", .0.1, .0.0)]
struct SqliteError(Refused);

fn text(value: &Value) -> String {
    let printed = |text: &str| match text {
        "" => "(empty)".into(),
        text => text.chars().map(|c| if c.is_control() { '@' } else { c }).collect(),
    };
    match value {
        Value::Null => "NULL".into(),
        Value::Integer(number) => number.to_string(),
        Value::Real(number) => format!("{number:.3}"),
        Value::Text(text) => printed(text),
        Value::Blob(bytes) => printed(&String::from_utf8_lossy(bytes)),
    }
}

fn output(answer: Answer) -> Result<Output, SqliteError> {
    let outcome = answer.map_err(SqliteError)?;
    if outcome.columns.is_empty() {
        return Ok(DBOutput::StatementComplete(outcome.changes));
    }
    let types = match outcome.rows.first() {
        Some(first) => first
            .iter()
            .map(|value| match value {
                Value::Integer(_) => DefaultColumnType::Integer,
                Value::Real(_) => DefaultColumnType::FloatingPoint,
                _ => DefaultColumnType::Text,
            })
            .collect(),
        None => vec![DefaultColumnType::Any; outcome.columns.len()],
    };
    Ok(DBOutput::Rows { types, rows: outcome.rows.iter().map(|row| row.iter().map(text).collect()).collect() })
}

struct Plain(Connection);

impl DB for Plain {
    type Error = SqliteError;
    type ColumnType = DefaultColumnType;

    fn run(&mut self, sql: &str) -> Result<Output, SqliteError> {
        output(run(&self.0, &sql.into()))
    }

    fn engine_name(&self) -> &str {
        "sqlite"
    }
}

struct Replicated {
    nodes: Arc<Nodes>,
    name: String,
    /// Each statement goes to another node than the one before.
    turn: usize,
    /// What the open transaction of the file has run so far.
    transaction: Option<Vec<Step>>,
}

impl Replicated {
    fn next(&mut self) -> LocalDatabase {
        self.turn += 1;
        self.nodes.node(self.turn).database(&self.name)
    }

    async fn query(&mut self, sql: &str) -> Answer {
        let start = Instant::now();
        loop {
            match self.next().query(sql, ReadConsistency::Linearizable).await {
                Ok(rows) => {
                    return Ok(Outcome {
                        columns: rows.columns().to_vec(),
                        rows: rows.into_values(),
                        changes: 0,
                        last_insert_rowid: 0,
                    });
                }
                Err(ReadError::Sql(error)) => return Err(refused(&error)),
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
        }
    }

    async fn execute(&mut self, sql: &str) -> Answer {
        let start = Instant::now();
        loop {
            match self.next().execute(sql).await {
                Ok(done) => {
                    return Ok(Outcome {
                        columns: done.rows.columns().to_vec(),
                        rows: done.rows.into_values(),
                        changes: done.rows_affected,
                        last_insert_rowid: done.last_insert_rowid,
                    });
                }
                Err(WriteError::Closure(error)) => return Err((error.extended_code, error.message)),
                Err(error) => self.again(&error, start),
            }
        }
    }

    fn again<E: std::fmt::Debug>(&self, error: &WriteError<E>, start: Instant) {
        assert!(error.class() == ErrorClass::Retryable && start.elapsed() < PATIENCE, "{error:?}");
    }

    /// The open transaction so far, and its next statement; whether the transaction is still there after it.
    async fn in_transaction(&mut self, steps: Vec<Step>) -> (Answer, bool) {
        let start = Instant::now();
        loop {
            let steps = steps.clone();
            let database = self.nodes.leader().await.database(&self.name);
            let undone = database.write(move |context| {
                let connection = context.connection();
                let mut last = None;
                for step in &steps {
                    last = Some(run(connection, step));
                    if connection.is_autocommit() {
                        break;
                    }
                }
                Err::<(), _>((last.expect("there is a statement"), !connection.is_autocommit()))
            });
            match undone.await {
                Err(WriteError::Closure(answer)) => return answer,
                Err(error) => self.again(&error, start),
                Ok(()) => unreachable!("the closure fails"),
            }
        }
    }

    async fn commit(&mut self, steps: Vec<Step>) -> Answer {
        let start = Instant::now();
        loop {
            let steps = steps.clone();
            let database = self.nodes.leader().await.database(&self.name);
            let done = database.write(move |context| {
                for step in &steps {
                    // It was refused before, too: the file goes on after it.
                    let _ = run(context.connection(), step);
                }
                Ok::<_, std::convert::Infallible>(())
            });
            match done.await {
                Ok(()) => {
                    return Ok(Outcome { columns: vec![], rows: vec![], changes: 0, last_insert_rowid: 0 });
                }
                Err(WriteError::Sql(error)) => return Err(refused(&error)),
                Err(error) => self.again(&error, start),
            }
        }
    }

    async fn answer(&mut self, sql: &str) -> Answer {
        let words: Vec<String> = sql.split_ascii_whitespace().take(4).map(str::to_ascii_uppercase).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let nothing = Ok(Outcome { columns: vec![], rows: vec![], changes: 0, last_insert_rowid: 0 });
        match (self.transaction.take(), words.as_slice()) {
            (None, ["BEGIN", ..]) => {
                self.transaction = Some(Vec::new());
                nothing
            }
            (Some(steps), ["COMMIT" | "END", ..]) => {
                let committed = self.commit(steps.clone()).await;
                if committed.is_err() {
                    // As on a plain SQLite, it is open until it is rolled back.
                    self.transaction = Some(steps);
                }
                committed
            }
            (Some(_), ["ROLLBACK"]) => nothing,
            (Some(mut steps), _) => {
                steps.push(sql.into());
                let (answer, open) = self.in_transaction(steps.clone()).await;
                self.transaction = open.then_some(steps);
                answer
            }
            (None, ["SELECT" | "VALUES" | "WITH" | "EXPLAIN" | "PRAGMA", ..]) => match self.query(sql).await {
                Err((code, _)) if code & 0xff == SQLITE_READONLY => self.execute(sql).await,
                answer => answer,
            },
            (None, _) => self.execute(sql).await,
        }
    }
}

#[async_trait::async_trait]
impl AsyncDB for Replicated {
    type Error = SqliteError;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<Output, SqliteError> {
        output(self.answer(sql).await)
    }

    async fn shutdown(&mut self) {}

    fn engine_name(&self) -> &str {
        "raft-sqlite"
    }
}

/// Every file, by name.
fn files() -> Vec<PathBuf> {
    let folder = std::fs::read_dir("tests/sql/logic").unwrap();
    let mut files: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "slt"));
    files.sort();
    assert!(files.len() >= 15, "{files:?}");
    files
}

#[tokio::test]
async fn plain_sqlite_gives_what_the_files_say() {
    for file in files() {
        let open = || async { Ok(Plain(Connection::open_in_memory().unwrap())) };
        let mut runner = Runner::new(open);
        if std::env::var_os("BLESS").is_some() {
            runner
                .update_test_file(
                    &file,
                    " ",
                    sqllogictest::default_validator,
                    sqllogictest::default_normalizer,
                    sqllogictest::default_column_validator,
                )
                .await
                .unwrap();
        }
        let records = sqllogictest::parse_file::<DefaultColumnType>(&file).unwrap();
        let asked = records.iter().filter(|record| matches!(record, Record::Query { .. })).count();
        assert!(asked >= 3, "{} asks {asked} questions", file.display());
        Runner::new(open).run_multi_async(records).await.unwrap_or_else(|error| panic!("{error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_give_what_the_files_say() {
    let nodes = Arc::new(Nodes::start(4096).await);
    let mut databases = Vec::new();
    for file in files() {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        // The database is there for the first question.
        nodes.node(0).database(&name).execute("PRAGMA user_version").await.unwrap();
        let mut runner = Runner::new(|| {
            let (nodes, name) = (nodes.clone(), name.clone());
            async move { Ok(Replicated { nodes, name, turn: 0, transaction: None }) }
        });
        runner.run_file_async(&file).await.unwrap_or_else(|error| panic!("{error}"));
        nodes.wait_equal(&name).await;
        databases.push(name);
    }
    let nodes = Arc::into_inner(nodes).expect("every runner has ended");
    nodes.stop_and_compare(&databases).await;
}
