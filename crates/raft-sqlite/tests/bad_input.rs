//! What callers do wrong: a typed error with its class, on the leader as through any other node, and nobody else notices.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use raft_sqlite::{
    Database, ErrorClass, Node, NodeConfig, ReadConsistency, ReadError, SqlError, Statement, Value, WriteError,
};

#[path = "sql/nodes.rs"]
mod nodes;
use nodes::{Nodes, PATIENCE};

/// SQLite's extended codes.
const ERROR: i32 = 1;
const TOOBIG: i32 = 18;
const MISMATCH: i32 = 20;
const CONSTRAINT_CHECK: i32 = 275;
const CONSTRAINT_FOREIGNKEY: i32 = 787;
const CONSTRAINT_NOTNULL: i32 = 1299;
const CONSTRAINT_PRIMARYKEY: i32 = 1555;
const CONSTRAINT_TRIGGER: i32 = 1811;
const CONSTRAINT_UNIQUE: i32 = 2067;
const CONSTRAINT_DATATYPE: i32 = 3091;

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

/// Statements that no database can carry out, with SQLite's code and words.
fn mistakes() -> Vec<(Statement, i32, &'static str)> {
    let two = || Statement::new("INSERT INTO t(k, v) VALUES (?, ?)");
    vec![
        (Statement::new("SELEKT 1"), ERROR, "syntax error"),
        (Statement::new("SELECT 'open"), ERROR, "unrecognized token"),
        (Statement::new("SELECT * FROM nowhere"), ERROR, "no such table: nowhere"),
        (Statement::new("SELECT missing FROM t"), ERROR, "no such column: missing"),
        (Statement::new("SELECT no_function(1)"), ERROR, "no such function"),
        (Statement::new("INSERT INTO t(k) VALUES (1, 2)"), ERROR, "2 values for 1 columns"),
        (Statement::new("CREATE TABLE t(a)"), ERROR, "already exists"),
        // One statement at a time: the second would be dropped in silence.
        (Statement::new("DELETE FROM t; DELETE FROM u"), ERROR, "Multiple statements"),
        // Parameters: too few (SQLite would take NULL), too many, a name that is not there.
        (two(), ERROR, "Got 0, needed 2"),
        (two().bind(1i64), ERROR, "Got 1, needed 2"),
        (two().bind(1i64).bind(2i64).bind(3i64), ERROR, "Got 3, needed 2"),
        (Statement::new("SELECT 1").bind(1i64), ERROR, "Got 1, needed 0"),
        (Statement::new("SELECT :a").bind_named(":b", 1i64), ERROR, ":b"),
        (Statement::new("SELECT :a, :b").bind_named(":a", 1i64), ERROR, "Got 1, needed 2"),
        // Types.
        (two().bind(text("no number")).bind(1i64), MISMATCH, "datatype mismatch"),
        (Statement::new("INSERT INTO strict VALUES (?)").bind(text("x")), CONSTRAINT_DATATYPE, "cannot store TEXT"),
        // Constraints.
        (two().bind(1i64).bind(1i64), CONSTRAINT_PRIMARYKEY, "UNIQUE constraint failed: t.k"),
        (two().bind(100i64).bind(Value::Null), CONSTRAINT_NOTNULL, "NOT NULL constraint failed: t.v"),
        (two().bind(100i64).bind(-1i64), CONSTRAINT_CHECK, "CHECK constraint failed"),
        (Statement::new("INSERT INTO u VALUES (1, 9999)"), CONSTRAINT_FOREIGNKEY, "FOREIGN KEY constraint failed"),
        (Statement::new("INSERT INTO u VALUES (7, 1)"), CONSTRAINT_UNIQUE, "UNIQUE constraint failed: u.n"),
        (Statement::new("DELETE FROM strict"), CONSTRAINT_TRIGGER, "not from here"),
        // Values.
        (Statement::new("SELECT zeroblob(2000000000)"), TOOBIG, "too big"),
    ]
}

async fn prepare(database: &Database) {
    let batch = [
        "CREATE TABLE t(k INTEGER PRIMARY KEY, v NOT NULL CHECK (v <> -1))",
        "CREATE TABLE u(n UNIQUE, t REFERENCES t(k))",
        "CREATE TABLE strict(i INTEGER) STRICT",
        "CREATE TRIGGER never BEFORE DELETE ON strict BEGIN SELECT raise(ABORT, 'not from here'); END",
        "INSERT INTO t VALUES (1, 0)",
        "INSERT INTO u VALUES (7, 1)",
        "INSERT INTO strict VALUES (1)",
    ];
    database.batch(batch.map(Statement::new).into()).await.unwrap();
}

fn refusal(sql: &Statement, outcome: Result<impl std::fmt::Debug, WriteError<SqlError>>) -> SqlError {
    match outcome {
        Err(error @ WriteError::Closure(_)) => {
            assert_eq!(error.class(), ErrorClass::Rejected);
            let WriteError::Closure(error) = error else { unreachable!() };
            error
        }
        other => panic!("{sql:?}: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_alike_by_every_node_and_nobody_else_notices() {
    let nodes = Nodes::start(4096).await;
    let database = nodes.leader().await.database("app");
    prepare(&database).await;
    // Others write all the while, so that mistakes share their groups.
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let others: Vec<_> = (0..4i64)
        .map(|other| {
            let (database, done) = (nodes.node(other as usize).database("app"), done.clone());
            tokio::spawn(async move {
                let mut written = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let key = 1000 + other + 4 * written.len() as i64;
                    let insert = Statement::new("INSERT INTO t VALUES (?, 'good')").bind(key);
                    database.execute(insert).await.unwrap();
                    written.push(key);
                }
                written
            })
        })
        .collect();
    for (statement, code, words) in mistakes() {
        for node in 0..3 {
            let database = nodes.node(node).database("app");
            let error = refusal(&statement, database.execute(statement.clone()).await);
            assert_eq!(error.extended_code, code, "{statement:?}: {error}");
            assert!(error.message.contains(words), "{statement:?}: {error}");
            // Behind something good: none of it takes effect.
            let batch = vec!["INSERT INTO t VALUES (500, 'half')".into(), statement.clone()];
            let error = refusal(&statement, database.batch(batch).await);
            assert_eq!((error.extended_code, error.statement), (code, 1), "{statement:?}: {error}");
        }
        // As a query, where it is one.
        let query = database.query(statement.clone(), ReadConsistency::Linearizable).await;
        let error = query.expect_err(&format!("{statement:?}"));
        assert!(matches!(error, ReadError::Sql(_)), "{statement:?}: {error:?}");
        assert_eq!(error.class(), ErrorClass::Rejected);
    }
    done.store(true, Ordering::Relaxed);
    let mut written = Vec::new();
    for other in others {
        written.extend(other.await.unwrap());
    }
    assert!(written.len() > 20, "{}", written.len());
    let count =
        database.query("SELECT count(*), count(*) FILTER (WHERE v = 'good') FROM t", ReadConsistency::Linearizable);
    let count = count.await.unwrap();
    let good = written.len() as i64;
    assert_eq!(format!("{:?}", count[0][0]), format!("{:?}", Value::Integer(good + 1)));
    assert_eq!(format!("{:?}", count[0][1]), format!("{:?}", Value::Integer(good)));
    nodes.wait_equal("app").await;
    nodes.stop_and_compare(&["app".to_owned()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closures_that_panic_and_callers_that_go_away_harm_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let database = node.database("app");
    database.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)").await.unwrap();
    let ran = Arc::new(AtomicUsize::new(0));
    let insert = |key: i64, then: &'static str| {
        let (database, ran) = (database.clone(), ran.clone());
        async move {
            database
                .write(move |context| {
                    ran.fetch_add(1, Ordering::SeqCst);
                    context.connection().execute("INSERT INTO t VALUES (?, ?)", (key, then))?;
                    match then {
                        "panic" => panic!("on purpose"),
                        "refuse" => Err(raft_sqlite::rusqlite::Error::QueryReturnedNoRows),
                        _ => Ok(key),
                    }
                })
                .await
        }
    };
    // All at once: they share groups. Every fourth one goes away as soon as it has asked.
    let kinds = ["stay", "panic", "refuse", "leave"];
    let calls: Vec<_> =
        (0..200i64).map(|key| (key, tokio::spawn(insert(key, kinds[key as usize % kinds.len()])))).collect();
    for (key, call) in calls {
        match kinds[key as usize % kinds.len()] {
            "leave" => call.abort(),
            "stay" => assert_eq!(call.await.unwrap().unwrap(), key),
            "panic" => {
                let error = call.await.unwrap().unwrap_err();
                assert_eq!(error.class(), ErrorClass::Rejected);
                assert!(matches!(&error, WriteError::Rejected(why) if why.contains("panicked")), "{error:?}");
            }
            _ => {
                let error = call.await.unwrap().unwrap_err();
                assert!(matches!(&error, WriteError::Closure(_)), "{error:?}");
                assert_eq!(error.class(), ErrorClass::Rejected);
            }
        }
    }
    // A future that is dropped before it was polled has asked for nothing; one dropped later may have taken effect, as a whole.
    drop(insert(1000, "stay"));
    for key in 1001..1100 {
        let mut write = Box::pin(insert(key, "left"));
        let _ = futures_util::poll!(&mut write);
    }
    // Behind all that was queued.
    database.write(|_| Ok::<_, std::fmt::Error>(())).await.unwrap();
    let keys = database
        .read(|connection, _| {
            let mut statement = connection.prepare("SELECT v, count(*) FROM t GROUP BY v ORDER BY v").unwrap();
            let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?))).unwrap();
            rows.map(Result::unwrap).collect::<Vec<_>>()
        })
        .await
        .unwrap();
    let of = |kind: &str| keys.iter().find(|(found, _)| found == kind).map_or(0, |(_, count)| *count);
    assert_eq!((of("stay"), of("panic"), of("refuse")), (50, 0, 0));
    assert!(of("leave") <= 50);
    assert!(of("left") <= 99);
    // What nobody waits for any more does not begin; what has begun is done as a whole.
    assert_eq!(of("stay") + of("leave") + of("left") + 100, ran.load(Ordering::SeqCst) as i64);

    // Reads.
    let panicked = database.read(|_, _| -> i64 { panic!("on purpose") }).await.unwrap_err();
    assert!(matches!(panicked, ReadError::Panicked), "{panicked:?}");
    assert_eq!(panicked.class(), ErrorClass::Rejected);
    for _ in 0..20 {
        drop(Box::pin(database.read(|_, _| ())));
        let mut read = Box::pin(database.read(|connection, _| connection.is_autocommit()));
        let _ = futures_util::poll!(&mut read);
    }
    assert!(!database.read(|connection, _| connection.is_autocommit()).await.unwrap());
    node.shutdown().await.unwrap();
    let stopped = database.read(|_, _| ()).await.unwrap_err();
    assert_eq!(stopped.class(), ErrorClass::Fatal, "{stopped:?}");
    let stopped = database.write(|_| Ok::<_, std::fmt::Error>(())).await.unwrap_err();
    assert!(matches!(stopped.class(), ErrorClass::Fatal | ErrorClass::Retryable), "{stopped:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_none_and_writes_where_only_reads_are() {
    let nodes = Nodes::start(4096).await;
    let database = nodes.leader().await.database("app");
    prepare(&database).await;
    let long = "x".repeat(129);
    for name in ["", ".", "..", "../etc", "a/b", "a b", "a\0b", "ä", ".hidden", &long] {
        for node in 0..3 {
            let database = nodes.node(node).database(name);
            let error = database.execute("CREATE TABLE t(a)").await.unwrap_err();
            assert_eq!(error.class(), ErrorClass::Rejected, "{name:?}: {error}");
            assert!(error.to_string().contains("is no name for a database"), "{name:?}: {error}");
            let error = database.query("SELECT 1", ReadConsistency::Local).await.unwrap_err();
            assert!(matches!(&error, ReadError::NoSuchDatabase(found) if found == name), "{error:?}");
            assert_eq!(error.class(), ErrorClass::Rejected);
        }
    }
    assert_eq!(nodes.node(0).database_names(), ["app"]);
    for sql in ["DELETE FROM t", "CREATE TABLE w(a)", "PRAGMA user_version = 9", "VACUUM"] {
        for node in 0..3 {
            nodes.node(node).linearize().await.unwrap();
            let query = nodes.node(node).database("app").query(sql, ReadConsistency::Local).await;
            let error = query.expect_err(sql);
            assert!(matches!(error, ReadError::Sql(_)), "{sql}: {error:?}");
        }
    }
    // Nothing at all is no mistake of SQL's, and does nothing.
    for sql in ["", "  ", ";", "-- a remark", "/* another */ ; "] {
        let outcome = nodes.node(1).database("app").execute(sql).await;
        let nothing = outcome.map(|done| (done.rows_affected, done.rows.columns().len()));
        assert_eq!(nothing.unwrap(), (0, 0), "{sql:?}");
    }
}
