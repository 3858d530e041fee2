//! Random SQL through the handle, mixed over the nodes, and on a plain SQLite.
//!
//! Each transaction is made on the plain SQLite first, statement by statement, for the schema that it has then. The handle is given
//! the same statements, and must give the same rows, counts, rowids and errors. Queries are then asked on any node.
//!
//! `PROPTEST_CASES=5000 cargo test -p raft-sqlite --test sql random` runs as long as one likes. What fails is shrunk, printed, and kept
//! in `equality.regressions` to be tried first from then on.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestError, TestRunner};
use raft_sqlite::rusqlite::Connection;
use raft_sqlite::{
    ErrorClass, Executed, LocalDatabase, ReadConsistency, ReadError, Rows, SqlError, Statement, Value, WriteError,
};

use super::nodes::{Nodes, PATIENCE};
use super::random_sql::{self, Outcome, Random, Refused, SavePoints, Schema, Step, refused, run};

/// Cases that share three nodes.
const CASES_TOGETHER: usize = 25;

/// How a transaction reaches the leader.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// A batch, forwarded by a node: ends at the first error.
    Batch,
    /// A closure on the leader: goes on after errors.
    Closure,
    /// No transaction: the file is written anew.
    Vacuum,
    /// What the planner knows of the data.
    Analyze,
    /// The leadership goes to another node before the batch.
    Transfer,
}

#[derive(Clone, Debug)]
struct Turn {
    way: Way,
    /// Which node is asked.
    node: usize,
    statements: Vec<u64>,
    queries: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Case {
    auto_vacuum: u32,
    turns: Vec<Turn>,
}

fn cases() -> impl Strategy<Value = Case> {
    let seed = || any::<u64>().no_shrink();
    let way = prop_oneof![
        60 => Just(Way::Batch),
        25 => Just(Way::Closure),
        4 => Just(Way::Vacuum),
        4 => Just(Way::Analyze),
        1 => Just(Way::Transfer),
    ];
    let statements = prop::collection::vec(seed(), 1..9);
    let queries = prop::collection::vec(seed(), 0..4);
    let turn = (way, 0..3usize, statements, queries).prop_map(|(way, node, statements, queries)| Turn {
        way,
        node,
        statements,
        queries,
    });
    (0..3u32, prop::collection::vec(turn, 1..40)).prop_map(|(auto_vacuum, turns)| Case { auto_vacuum, turns })
}

/// What a transaction gave: of every statement, or why there was none.
type Answer = Result<Vec<Result<Outcome, Refused>>, (usize, Refused)>;

/// Connections to the plain SQLite are as short as a caller's hold on the writer.
fn open_plain(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.execute_batch("PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY").unwrap();
    connection
}

/// The statements one after another. A batch ends with the first error; a closure when its transaction is gone.
fn run_all(connection: &Connection, steps: &[Step], batch: bool) -> Answer {
    let mut outcomes = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        match run(connection, step) {
            Err(refused) if batch || connection.is_autocommit() => return Err((at, refused)),
            outcome => outcomes.push(outcome),
        }
    }
    Ok(outcomes)
}

/// Makes a transaction and runs it on the plain SQLite.
fn run_plain(path: &Path, seeds: &[u64], mark: Step, batch: bool) -> (Vec<Step>, Answer) {
    let connection = open_plain(path);
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut outcomes = vec![run(&connection, &mark)];
    let mut steps = vec![mark];
    let mut savepoints = SavePoints::default();
    for seed in seeds {
        let schema = Schema::read(&connection).unwrap();
        let step = random_sql::statement(&mut Random::new(*seed), &schema, &mut savepoints);
        let outcome = run_all(&connection, std::slice::from_ref(&step), batch);
        steps.push(step);
        match outcome {
            Ok(outcome) => outcomes.extend(outcome),
            Err((_, refused)) => return (steps, Err((outcomes.len(), refused))),
        }
    }
    match connection.execute_batch("COMMIT") {
        Ok(()) => (steps, Ok(outcomes)),
        Err(error) => (steps, Err((outcomes.len(), refused(&error)))),
    }
}

fn to_statement(step: &Step) -> Statement {
    step.values.iter().fold(Statement::new(step.sql.clone()), |statement, value| statement.bind(value.clone()))
}

fn to_outcome(executed: Executed) -> Outcome {
    Outcome {
        columns: executed.rows.columns().to_vec(),
        rows: executed.rows.into_values(),
        changes: executed.rows_affected,
        last_insert_rowid: executed.last_insert_rowid,
    }
}

/// A database of the nodes beside a plain one.
struct Pair<'a> {
    nodes: &'a Nodes,
    name: &'a str,
    path: &'a Path,
    /// What happened, for the report.
    story: RefCell<String>,
    counts: &'a Counts,
}

/// How much was tried: a run in which SQLite refuses most of it would show little.
#[derive(Debug, Default)]
struct Counts {
    statements: Cell<usize>,
    refused: Cell<usize>,
    transactions: Cell<usize>,
    rolled_back: Cell<usize>,
}

fn add(count: &Cell<usize>, more: usize) {
    count.set(count.get() + more);
}

impl Pair<'_> {
    fn database(&self, node: usize) -> LocalDatabase {
        self.nodes.node(node).database(self.name)
    }

    fn tell(&self, what: impl std::fmt::Display) {
        let mut story = self.story.borrow_mut();
        let line = what.to_string();
        let cut = line.char_indices().nth(600).map_or(line.len(), |(at, _)| at);
        writeln!(story, "{}", &line[..cut]).unwrap();
    }

    /// Again and again until the nodes answer for good. None: it took effect, but its answer was lost.
    async fn submit(&self, turn: &Turn, steps: &[Step], mark: i64) -> Option<Answer> {
        let start = Instant::now();
        loop {
            let (result, class) = match turn.way {
                Way::Closure => self.run_closure(steps).await,
                _ => self.run_batch(turn.node, steps).await,
            };
            match class {
                None | Some(ErrorClass::Rejected) => return Some(result),
                Some(ErrorClass::OutcomeUnknown) => {
                    let database = self.database(turn.node);
                    let rows = database.query("SELECT n FROM mark", ReadConsistency::Linearizable).await;
                    if rows.is_ok_and(|rows| rows.into_values() == [[Value::from(mark)]]) {
                        return None;
                    }
                }
                Some(_) => {}
            }
            assert!(start.elapsed() < PATIENCE, "{result:?}");
        }
    }

    async fn run_batch(&self, node: usize, steps: &[Step]) -> (Answer, Option<ErrorClass>) {
        match self.database(node).batch(steps.iter().map(to_statement).collect()).await {
            Ok(executed) => (Ok(executed.into_iter().map(to_outcome).map(Ok).collect()), None),
            Err(error) => {
                let class = error.class();
                let refused = match error {
                    WriteError::Closure(SqlError { extended_code, message, statement }) => {
                        (statement, (extended_code, message))
                    }
                    other => (usize::MAX, (0, other.to_string())),
                };
                (Err(refused), Some(class))
            }
        }
    }

    async fn run_closure(&self, steps: &[Step]) -> (Answer, Option<ErrorClass>) {
        let count = steps.len();
        let steps = steps.to_vec();
        let database = self.nodes.leader().await.database(self.name);
        let written = database.write(move |context| run_all(context.connection(), &steps, false));
        match written.await {
            Ok(outcomes) => (Ok(outcomes), None),
            Err(error) => {
                let class = error.class();
                let refused = match error {
                    WriteError::Closure(refused) => refused,
                    WriteError::Sql(error) => (count, refused(&error)),
                    other => (usize::MAX, (0, format!("{other:?}"))),
                };
                (Err(refused), Some(class))
            }
        }
    }

    /// Statements that are no transaction, on both.
    async fn outside(&self, node: usize, sql: &[&str]) {
        self.tell(format_args!("outside a transaction: {sql:?}"));
        open_plain(self.path).execute_batch(&sql.join(";")).unwrap();
        let start = Instant::now();
        loop {
            let statements = sql.iter().map(|sql| Statement::new(*sql)).collect();
            match self.database(node).batch(statements).await {
                Ok(_) => return,
                Err(error) => {
                    assert!(error.class() != ErrorClass::Rejected && start.elapsed() < PATIENCE, "{sql:?}: {error}")
                }
            }
        }
    }

    async fn query(&self, node: usize, seed: u64) -> Result<(), String> {
        let connection = open_plain(self.path);
        let schema = Schema::read(&connection).unwrap();
        let step = random_sql::query(&mut Random::new(seed), &schema);
        let sorted = |rows: &[Vec<Value>]| {
            let mut lines: Vec<String> = rows.iter().map(|row| format!("{row:?}")).collect();
            lines.sort();
            lines
        };
        let want = run(&connection, &step).map(|outcome| (outcome.columns, sorted(&outcome.rows)));
        let start = Instant::now();
        let got = loop {
            match self.database(node).query(to_statement(&step), ReadConsistency::Linearizable).await {
                Ok(rows) => break Ok((rows.columns().to_vec(), sorted(&rows.into_values()))),
                Err(ReadError::Sql(error)) => break Err(refused(&error)),
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
        };
        self.tell(format_args!("query on node {node}: {} {:?}", step.sql, step.values));
        differs(&want, &got)
    }

    async fn turn(&self, number: usize, turn: &Turn) -> Result<(), String> {
        match turn.way {
            Way::Vacuum => self.outside(turn.node, &["VACUUM"]).await,
            Way::Analyze => {
                // Rows of sqlite_stat4 are in the order in which a connection came to know the tables: a PRAGMA that sets makes the
                // writer's connection be opened anew, as the plain one is.
                self.outside(turn.node, &["PRAGMA cache_size = 100"]).await;
                self.outside(turn.node, &["ANALYZE"]).await;
            }
            Way::Transfer => {
                // It may come to nothing; then the next turn meets the old leader.
                let _ = self.nodes.leader().await.transfer_leader(None).await;
            }
            Way::Batch | Way::Closure => {}
        }
        let mark = number as i64 + 1;
        let step = Step { sql: "UPDATE mark SET n = ?1".into(), values: vec![mark.into()] };
        let batch = !matches!(turn.way, Way::Closure);
        let (steps, want) = run_plain(self.path, &turn.statements, step, batch);
        self.tell(format_args!("{:?} on node {}:", turn.way, turn.node));
        let refused = want.as_ref().map_or(1, |outcomes| outcomes.iter().filter(|outcome| outcome.is_err()).count());
        add(&self.counts.statements, steps.len());
        add(&self.counts.refused, refused);
        add(&self.counts.transactions, 1);
        add(&self.counts.rolled_back, usize::from(want.is_err()));
        for (at, step) in steps.iter().enumerate() {
            let outcome = want.as_ref().ok().and_then(|outcomes| outcomes[at].as_ref().err());
            self.tell(format_args!("  {};  -- {:?} {outcome:?}", step.sql, step.values));
        }
        if let Err((at, why)) = &want {
            self.tell(format_args!("  ROLLBACK; -- statement {at}: {why:?}"));
        }
        if let Some(got) = self.submit(turn, &steps, mark).await {
            differs(&want, &got)?;
        }
        for seed in &turn.queries {
            self.query(turn.node + 1, *seed).await?;
        }
        Ok(())
    }

    async fn run(&self, case: &Case) -> Result<(), String> {
        let mode = format!("PRAGMA auto_vacuum = {}", case.auto_vacuum);
        self.outside(0, &[mode.as_str(), "VACUUM"]).await;
        self.outside(0, &["CREATE TABLE IF NOT EXISTS mark(n)"]).await;
        self.outside(0, &["DELETE FROM mark", "INSERT INTO mark VALUES (0)"]).await;
        for (number, turn) in case.turns.iter().enumerate() {
            self.turn(number, turn).await?;
        }
        // Everything, and whole.
        let connection = open_plain(self.path);
        for table in Schema::read(&connection).unwrap().names() {
            self.tell(format_args!("SELECT * FROM {table}"));
            let step = Step::from(format!("SELECT * FROM {table}"));
            let want = run(&connection, &step).map(|outcome| outcome.rows);
            let got = self.database(2).query(step.sql.as_str(), ReadConsistency::Linearizable).await;
            let got = got.map(Rows::into_values).map_err(|error| match error {
                ReadError::Sql(error) => refused(&error),
                other => panic!("{other}"),
            });
            differs(&want, &got)?;
        }
        let want = run(&connection, &"PRAGMA integrity_check".into()).map(|outcome| outcome.rows);
        // On the leader: see `random_sql::query`.
        let check = self.database(1).execute("PRAGMA integrity_check").await.unwrap();
        differs(&want, &Ok(check.rows.into_values()))?;
        self.nodes.wait_equal(self.name).await;
        Ok(())
    }
}

fn differs<T: PartialEq + std::fmt::Debug>(want: &T, got: &T) -> Result<(), String> {
    if want == got {
        return Ok(());
    }
    let texts = [want, got].map(|value| format!("{value:?}").chars().collect::<Vec<char>>());
    let same = texts[0].iter().zip(&texts[1]).take_while(|(want, got)| want == got).count();
    // From a little before they part.
    let part = |text: &[char]| text.iter().skip(same.saturating_sub(300)).take(1000).collect::<String>();
    Err(format!("SQLite: {}\n  nodes: {}", part(&texts[0]), part(&texts[1])))
}

/// The cases as one goes: three nodes for some of them.
struct Run {
    runtime: tokio::runtime::Runtime,
    page_size: u32,
    folder: tempfile::TempDir,
    nodes: RefCell<Option<Nodes>>,
    databases: RefCell<Vec<String>>,
    counts: Counts,
}

impl Run {
    fn case(&self, case: &Case) -> Result<(), TestCaseError> {
        let mut databases = self.databases.borrow_mut();
        if databases.len() == CASES_TOGETHER {
            self.compare(&databases);
            databases.clear();
        }
        let mut nodes = self.nodes.borrow_mut();
        let nodes = nodes.get_or_insert_with(|| self.runtime.block_on(Nodes::start(self.page_size)));
        let name = format!("case-{}", databases.len());
        databases.push(name.clone());
        let path = self.folder.path().join("plain.sqlite");
        let _ = std::fs::remove_file(&path);
        let plain = Connection::open(&path).unwrap();
        plain.execute_batch(&format!("PRAGMA page_size = {}", self.page_size)).unwrap();
        plain.execute_batch("VACUUM").unwrap();
        drop(plain);
        let pair = Pair { nodes, name: &name, path: &path, story: RefCell::default(), counts: &self.counts };
        self.runtime.block_on(pair.run(case)).map_err(|why| {
            TestCaseError::fail(format!("{why}\nauto_vacuum {}\n{}", case.auto_vacuum, pair.story.borrow()))
        })
    }

    fn compare(&self, databases: &[String]) {
        if let Some(nodes) = self.nodes.take() {
            self.runtime.block_on(nodes.stop_and_compare(databases));
        }
    }
}

fn random_sql_is_equal(page_size: u32, cases_by_default: u32) {
    let cases = std::env::var("PROPTEST_CASES").map_or(cases_by_default, |text| text.parse().unwrap());
    let config = ProptestConfig {
        cases,
        max_shrink_iters: 500,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/sql/equality.regressions"))),
        ..ProptestConfig::default()
    };
    let all = Run {
        runtime: tokio::runtime::Runtime::new().unwrap(),
        page_size,
        folder: tempfile::tempdir().unwrap(),
        nodes: RefCell::new(None),
        databases: RefCell::default(),
        counts: Counts::default(),
    };
    let result = TestRunner::new(config).run(&self::cases(), |case| all.case(&case));
    match result {
        Err(TestError::Fail(why, case)) => panic!("{why}\n{case:?}"),
        Err(TestError::Abort(why)) => panic!("{why}"),
        Ok(()) => {}
    }
    let databases = all.databases.borrow().clone();
    all.compare(&databases);
    println!("{cases} cases: {:?}", all.counts);
    let refused = all.counts.refused.get() as f64 / all.counts.statements.get() as f64;
    assert!(cases < 10 || (0.02..0.3).contains(&refused), "{refused} of the statements were refused");
}

#[test]
fn random_sql_on_pages_of_4096_bytes() {
    random_sql_is_equal(4096, 25);
}

#[test]
fn random_sql_on_pages_of_512_bytes() {
    random_sql_is_equal(512, 25);
}
