//! Connections prepared by the program: the same on every node, whatever becomes of a connection, and without a way to break replication.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use raft_sqlite::rusqlite::Connection;
use raft_sqlite::rusqlite::functions::FunctionFlags;
use raft_sqlite::{
    ConnectionRole, Database, ErrorClass, Node, NodeConfig, PrepareFailure, ReadConsistency, ReadError, StartError,
    Statement, Value, WriteError,
};

use crate::nodes::{Nodes, PATIENCE};

/// A function, one that gives another value each time, and a collation.
fn prepare(connection: &Connection, calls: Arc<AtomicUsize>) -> Result<(), PrepareFailure> {
    let deterministic = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
    connection.create_scalar_function("twice", 1, deterministic, |context| Ok(context.get::<i64>(0)? * 2))?;
    connection.create_scalar_function("ticket", 0, FunctionFlags::SQLITE_UTF8, move |_| {
        Ok(calls.fetch_add(1, Ordering::Relaxed) as i64)
    })?;
    connection.create_collation("backwards", |a: &str, b: &str| b.cmp(a))?;
    // Stays on the connection, and is no caller's leftover.
    connection.execute_batch("PRAGMA case_sensitive_like = 1; CREATE TEMP VIEW answer AS SELECT 42 AS a")?;
    Ok(())
}

async fn start() -> Nodes {
    let build = |number: usize, builder: raft_sqlite::NodeBuilder| {
        // Each node's tickets are its own.
        let calls = Arc::new(AtomicUsize::new(1000 * number));
        builder.prepare_connection(move |connection, _| prepare(connection, calls.clone()))
    };
    Nodes::start_built(4096, |_| {}, build).await
}

async fn one(database: &Database, sql: &str) -> Value {
    database.query(sql, ReadConsistency::Linearizable).await.unwrap()[0][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_and_collations_are_there_on_every_node_and_every_connection() {
    let nodes = start().await;
    let leader = nodes.leader().await.database("app");
    leader
        .execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT COLLATE backwards, w INT AS (twice(k)) STORED, n INT)")
        .await
        .unwrap();
    leader.execute("CREATE INDEX by_v ON t(v)").await.unwrap();
    leader.execute("CREATE INDEX by_twice ON t(twice(k))").await.unwrap();
    for number in 0..3i64 {
        let database = nodes.node(number as usize).database("app");
        // A caller that leaves something on its connection: the next one gets a new connection, prepared again.
        let batch = [
            "CREATE TEMP TABLE left_over(a)".into(),
            Statement::new("INSERT INTO t(k, v, n) VALUES (?, ?, ticket())").bind(number).bind(format!("v{number}")),
        ];
        database.batch(batch.into()).await.unwrap();
        let statement =
            Statement::new("INSERT INTO t(k, v, n) VALUES (?, 'x' || ticket(), ticket())").bind(10 + number);
        database.execute(statement).await.unwrap();
    }
    for number in 0..3 {
        let database = nodes.node(number).database("app");
        assert_eq!(one(&database, "SELECT max(w) FROM t").await, Value::Integer(24));
        assert_eq!(one(&database, "SELECT k FROM t INDEXED BY by_twice WHERE twice(k) = 22").await, Value::Integer(11));
        assert_eq!(
            one(&database, "SELECT max(v) FROM t INDEXED BY by_v WHERE v >= 'w'").await,
            Value::Text("v0".into())
        );
        assert_eq!(one(&database, "SELECT 'A' LIKE 'a'").await, Value::Integer(0));
        assert_eq!(one(&database, "SELECT a FROM answer").await, Value::Integer(42));
        // Not deterministic, and yet the same everywhere: the leader's pages.
        let sum = one(&leader, "SELECT group_concat(v || n) FROM t").await;
        assert_eq!(one(&database, "SELECT group_concat(v || n) FROM t").await, sum);
    }
    // The writer's connection, too, is prepared anew after a change of leadership.
    let old = nodes.leader().await.id();
    nodes.leader().await.transfer_leader(None).await.unwrap();
    let new = nodes.leader().await;
    assert_ne!(new.id(), old);
    let insert = "INSERT INTO t(k, v, n) VALUES (twice(50), 'z', 0)";
    new.database("app").execute(insert).await.unwrap();
    assert_eq!(one(&new.database("app"), "SELECT w FROM t WHERE v = 'z'").await, Value::Integer(200));
    nodes.wait_equal("app").await;
}

/// Each is tried on the connection of each role; what it may not do, with words of the refusal.
const FORBIDDEN: &[(&str, &str)] = &[
    ("CREATE TABLE mine(a)", "a preparation sets up its connection only"),
    ("INSERT INTO t VALUES (9)", "a preparation sets up its connection only"),
    ("DELETE FROM t", "a preparation sets up its connection only"),
    ("VACUUM", "a preparation sets up its connection only"),
    ("PRAGMA user_version = 5", "a preparation sets up its connection only"),
    ("PRAGMA application_id = 5", "a preparation sets up its connection only"),
    ("BEGIN", "it left a transaction open"),
    ("SAVEPOINT a", "it left a transaction open"),
    ("PRAGMA journal_mode = DELETE", "the journal is the replicated log"),
    ("PRAGMA page_size = 512", "it is fixed when the database is made"),
    ("PRAGMA wal_checkpoint", "checkpoints are made by the library"),
    ("PRAGMA writable_schema = 1", "a wrong schema corrupts"),
    ("PRAGMA mmap_size = 0", "without copying already"),
    ("ATTACH '/tmp/elsewhere.sqlite' AS e", "a file cannot be attached"),
    ("VACUUM INTO '/tmp/elsewhere.sqlite'", ""),
    ("SELECT load_extension('x')", "load_extension is refused"),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_preparation_cannot_write_or_touch_what_replication_rests_on() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    node.database("app").batch(vec!["CREATE TABLE t(a)".into(), "INSERT INTO t VALUES (1)".into()]).await.unwrap();
    let before = node.database_statistics("app").unwrap().state_hash;
    node.shutdown().await.unwrap();
    for role in [ConnectionRole::Writer, ConnectionRole::Reader] {
        for (sql, why) in FORBIDDEN {
            let started = Node::builder(NodeConfig::single(folder.path()))
                .prepare_connection(move |connection, purpose| {
                    if purpose.role == role {
                        connection.execute_batch(sql)?;
                    }
                    Ok(())
                })
                .start()
                .await;
            let error = started.expect_err(sql).to_string();
            assert!(
                error.contains("prepare_connection failed for a") && error.contains(why),
                "{role:?} {sql}: {error}"
            );
            assert!(error.contains("\"app\""), "{error}");
        }
    }
    // Errors that the preparation swallows change nothing either, nor do settings that it makes by other means.
    let node = Node::builder(NodeConfig::single(folder.path()))
        .prepare_connection(|connection, _| {
            use raft_sqlite::rusqlite::config::DbConfig;
            for (sql, _) in FORBIDDEN.iter().filter(|(sql, _)| !["BEGIN", "SAVEPOINT a"].contains(sql)) {
                let _ = connection.execute_batch(sql);
            }
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_WRITABLE_SCHEMA, true)?;
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_RESET_DATABASE, true)?;
            Ok(())
        })
        .start()
        .await
        .unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let database = node.database("app");
    assert_eq!(one(&database, "SELECT count(*) FROM t").await, Value::Integer(1));
    let error = database.execute("UPDATE sqlite_schema SET sql = 'x'").await.unwrap_err();
    assert!(error.to_string().contains("may not be modified"), "{error}");
    assert_eq!(node.database_statistics("app").unwrap().state_hash, before);
    database.execute("VACUUM").await.unwrap();
    database.execute("INSERT INTO t VALUES (2)").await.unwrap();
    assert_eq!(one(&database, "SELECT count(*) FROM t").await, Value::Integer(2));
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preparation_that_fails_is_told_at_the_start_and_at_the_call() {
    let folder = tempfile::tempdir().unwrap();
    let failing = Arc::new(AtomicBool::new(true));
    let panics = Arc::new(AtomicBool::new(false));
    let start = || {
        let (failing, panics) = (failing.clone(), panics.clone());
        Node::builder(NodeConfig::single(folder.path()))
            .prepare_connection(move |_, _| {
                assert!(!panics.load(Ordering::SeqCst), "on purpose");
                if failing.load(Ordering::SeqCst) { Err("the license server is away".into()) } else { Ok(()) }
            })
            .start()
    };
    // Without a database, too.
    let error = start().await.unwrap_err();
    assert!(matches!(&error, StartError::Database(error) if error.class() == ErrorClass::Rejected), "{error:?}");
    assert!(error.to_string().contains("the license server is away"), "{error}");
    failing.store(false, Ordering::SeqCst);
    panics.store(true, Ordering::SeqCst);
    let error = start().await.unwrap_err().to_string();
    assert!(error.contains("it panicked: on purpose"), "{error}");
    panics.store(false, Ordering::SeqCst);

    let node = start().await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let database = node.database("app");
    database.execute("CREATE TABLE t(a)").await.unwrap();
    for (flag, words) in [(&failing, "the license server is away"), (&panics, "it panicked")] {
        // In a group with others, and on a connection that has to be opened anew.
        flag.store(true, Ordering::SeqCst);
        let touch = database.batch(vec!["INSERT INTO t VALUES (1)".into(), "CREATE TEMP TABLE x(a)".into()]);
        touch.await.unwrap();
        for error in [
            database.execute("INSERT INTO t VALUES (2)").await.unwrap_err().to_string(),
            database.write(|_| Ok::<_, std::fmt::Error>(())).await.unwrap_err().to_string(),
        ] {
            assert!(error.contains(words) && error.contains("writer's connection of database \"app\""), "{error}");
        }
        let error = database.write(|_| Ok::<_, ()>(())).await.unwrap_err();
        assert!(matches!(error, WriteError::Rejected(_)), "{error:?}");
        // Readers' connections are opened anew after a caller that left something.
        let touch = database.read(|connection, _| connection.execute_batch("ATTACH ':memory:' AS scratch")).await;
        if let Ok(touched) = touch {
            touched.unwrap();
        }
        let error = loop {
            // Until the thread with the connection that was touched has its turn.
            let read = database.read(|connection, _| connection.execute_batch("ATTACH ':memory:' AS scratch")).await;
            if let Err(error) = read {
                break error;
            }
        };
        assert!(matches!(&error, ReadError::Prepare(error) if error.why.contains(words)), "{error:?}");
        flag.store(false, Ordering::SeqCst);
        database.execute("INSERT INTO t VALUES (3)").await.unwrap();
    }
    assert_eq!(one(&database, "SELECT group_concat(a) FROM t").await, Value::Text("1,3,1,3".into()));
    node.shutdown().await.unwrap();
}
