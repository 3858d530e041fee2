//! Interactive transactions and deadlines: through nodes and programs that are no members, over real sockets.

#![allow(clippy::unwrap_used)]

#[path = "sql/nodes.rs"]
mod nodes;

use std::time::{Duration, Instant};

use nodes::{Nodes, PATIENCE};
use raft_sqlite::{
    Client, Database, EndReason, ErrorClass, Node, ReadConsistency, ReadError, Transaction, TransactionError,
    TransactionOptions, WriteError, blocking,
};

const ENDLESS: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0";

fn addresses(nodes: &Nodes) -> Vec<String> {
    nodes.node(0).members().into_iter().flat_map(|member| member.peer_urls).collect()
}

/// Through each member: its own handle, and a program that knows only this member.
async fn handles(nodes: &Nodes) -> Vec<Database> {
    let mut handles = Vec::new();
    for (number, address) in addresses(nodes).into_iter().enumerate() {
        handles.push(nodes.node(number).database("app").into());
        handles.push(Client::connect([address]).await.unwrap().database("app"));
    }
    handles
}

/// Of those that stay open while a slow machine does other things.
fn patient() -> TransactionOptions {
    TransactionOptions { queue_timeout: Some(PATIENCE), idle_timeout: PATIENCE, total_timeout: PATIENCE }
}

async fn count(db: &Database) -> i64 {
    db.query_row("SELECT count(*) FROM t", ReadConsistency::Linearizable).await.unwrap().get(0).unwrap()
}

/// What waits for the writer of "app" on this node.
fn queued(node: &Node) -> u64 {
    let text = node.metrics().to_string();
    let line = text.lines().find(|line| line.starts_with("raft_sqlite_database_writers_queued{database=\"app\"}"));
    line.unwrap_or_else(|| panic!("{text}")).split(' ').next_back().unwrap().parse::<f64>().unwrap() as u64
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_everywhere() {
    let nodes = Nodes::start(4096).await;
    let handles = handles(&nodes).await;
    let other = Client::connect(addresses(&nodes)).await.unwrap().database("other");
    handles[0].execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").await.unwrap();
    for (number, db) in handles.iter().enumerate() {
        let key = |k: usize| ("INSERT INTO t VALUES (?)", [(number * 10 + k) as i64]);
        let before = count(db).await;
        let mut tx = db.begin_with(patient()).await.unwrap();
        tx.execute(key(1)).await.unwrap();
        tx.savepoint("a \"b").await.unwrap();
        tx.execute(key(2)).await.unwrap();
        tx.rollback_to("a \"b").await.unwrap();
        tx.release("a \"b").await.unwrap();
        // A statement that is refused ends nothing.
        match tx.execute(key(1)).await {
            Err(TransactionError::Sql(error)) => assert!(error.message.contains("UNIQUE"), "{error:?}"),
            other => panic!("{other:?}"),
        }
        let seen = tx.query_row("SELECT count(*) FROM t").await.unwrap();
        assert_eq!(seen.get::<i64>(0).unwrap(), before + 1);
        assert!(matches!(tx.query_row("SELECT 1 WHERE 0").await, Err(TransactionError::Row(_))));
        // Readers are not kept waiting and see nothing of it; writers wait, and end by their own deadline without effect.
        assert_eq!(count(db).await, before);
        let waiting = db.with_timeout(Duration::from_millis(200));
        match waiting.execute(key(5)).await {
            Err(error @ WriteError::Timeout(_)) => assert_eq!(error.class(), ErrorClass::Retryable),
            other => panic!("{other:?}"),
        }
        match waiting.begin().await {
            Err(TransactionError::Write(WriteError::Timeout(_))) => {}
            other => panic!("{other:?}"),
        }
        // Another database goes on.
        other.execute(format!("CREATE TABLE u{number}(x)").as_str()).await.unwrap();
        let version = tx.commit().await.unwrap();
        for reader in &handles {
            let count = reader.query_row("SELECT count(*) FROM t", ReadConsistency::AtLeast(version)).await.unwrap();
            assert_eq!(count.get::<i64>(0).unwrap(), before + 1);
        }

        let mut tx = db.begin().await.unwrap();
        tx.execute(key(6)).await.unwrap();
        tx.rollback().await.unwrap();
        let mut tx = db.begin().await.unwrap();
        tx.execute(key(7)).await.unwrap();
        drop(tx);
        let mut tx = db.begin().await.unwrap();
        tx.execute(key(8)).await.unwrap();
        // A call that its caller gives up ends it.
        assert!(tokio::time::timeout(Duration::from_millis(50), tx.query(ENDLESS)).await.is_err());
        assert!(matches!(tx.execute("SELECT 1").await, Err(TransactionError::Ended(EndReason::CallDropped))));
        // The writer is free again, and nothing has stayed.
        let deleted = db.with_timeout(PATIENCE).execute("DELETE FROM t WHERE k % 10 > 1").await.unwrap();
        assert_eq!(deleted.rows_affected, 0);
        // COMMIT as a statement ends it, and takes no effect.
        let mut tx = db.begin().await.unwrap();
        tx.execute(key(9)).await.unwrap();
        match tx.execute("COMMIT").await {
            Err(TransactionError::Ended(EndReason::ByStatement(_))) => {}
            other => panic!("{other:?}"),
        }
        assert!(matches!(tx.commit().await, Err(TransactionError::Ended(EndReason::ByStatement(_)))));
        // One that reads only.
        let mut tx = db.begin().await.unwrap();
        assert_eq!(tx.query_row("SELECT count(*) FROM t").await.unwrap().get::<i64>(0).unwrap(), before + 1);
        assert!(tx.commit().await.unwrap() >= version);
        assert_eq!(count(db).await, before + 1);
    }
    nodes.wait_equal("app").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_bounds() {
    let nodes = Nodes::start_with(4096, |config| config.max_transaction_bytes = 1024 * 1024).await;
    for (number, db) in handles(&nodes).await.iter().enumerate() {
        db.execute("CREATE TABLE IF NOT EXISTS t(k)").await.unwrap();
        let short = Duration::from_millis(100);
        let idle = TransactionOptions { idle_timeout: Duration::from_secs(1), ..Default::default() };
        let total = TransactionOptions { total_timeout: short, ..Default::default() };
        let mut tx = db.begin_with(idle).await.unwrap();
        tx.execute("INSERT INTO t VALUES (1)").await.unwrap();
        // The next one begins because this one was ended.
        db.begin().await.unwrap().rollback().await.unwrap();
        for _ in 0..2 {
            let error = tx.query("SELECT 1").await.unwrap_err();
            assert!(matches!(error, TransactionError::Ended(EndReason::IdleTimeout)), "{error:?}");
            assert_eq!(error.class(), ErrorClass::Retryable);
        }
        assert!(matches!(tx.commit().await, Err(TransactionError::Ended(EndReason::IdleTimeout))));
        // A statement that never ends is interrupted.
        for sql in [ENDLESS.to_owned(), format!("INSERT INTO t {ENDLESS}")] {
            let mut tx = db.begin_with(total).await.unwrap();
            let error = tx.execute(&sql).await.unwrap_err();
            assert!(matches!(error, TransactionError::Ended(EndReason::TotalTimeout)), "{number} {error:?}");
        }
        let greedy = TransactionOptions { total_timeout: Duration::from_secs(3600), ..Default::default() };
        match db.begin_with(greedy).await {
            Err(error @ TransactionError::Write(WriteError::Rejected(_))) => {
                assert!(error.to_string().contains("max_transaction_duration"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        // More than fits a transaction.
        let mut tx = db.begin().await.unwrap();
        let large = ("INSERT INTO t VALUES (?)", [vec![1u8; 300_000]]);
        for _ in 0..10 {
            tx.execute(large.clone()).await.unwrap();
        }
        let error = tx.commit().await.unwrap_err();
        assert!(matches!(error, TransactionError::Write(WriteError::TooLarge { .. })), "{error:?}");
        assert_eq!(count(db).await, 0);
        // A name that is none.
        let error = match number % 2 {
            0 => nodes.node(number).database("no name").begin().await.unwrap_err(),
            _ => Client::connect(addresses(&nodes)).await.unwrap().database("no name").begin().await.unwrap_err(),
        };
        assert_eq!(error.class(), ErrorClass::Rejected, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_stop_what_never_ends() {
    let nodes = Nodes::start(4096).await;
    for db in handles(&nodes).await {
        db.execute("CREATE TABLE IF NOT EXISTS t(k INTEGER PRIMARY KEY)").await.unwrap();
        let short = db.with_timeout(Duration::from_millis(150));
        for consistency in [ReadConsistency::Local, ReadConsistency::Linearizable] {
            match short.query(ENDLESS, consistency).await {
                Err(error @ ReadError::DeadlinePassed(_)) => assert_eq!(error.class(), ErrorClass::Retryable),
                other => panic!("{other:?}"),
            }
            let error = match short.query_stream(ENDLESS, consistency).await {
                Ok(mut rows) => rows.next_row().await.unwrap_err(),
                Err(error) => error,
            };
            assert!(matches!(error, ReadError::DeadlinePassed(_)), "{error:?}");
        }
        match short.execute(&format!("INSERT INTO t {ENDLESS}")).await {
            Err(WriteError::Timeout(_)) => {}
            other => panic!("{other:?}"),
        }
        // Everybody else goes on, and this one with what takes no longer.
        short.with_timeout(PATIENCE).execute("INSERT INTO t VALUES (1)").await.unwrap();
        assert_eq!(db.execute("DELETE FROM t").await.unwrap().rows_affected, 1);
    }
    // A closure's statements, too.
    let leader = nodes.leader().await.database("app").with_timeout(Duration::from_millis(150));
    let endless =
        |connection: &raft_sqlite::rusqlite::Connection| connection.query_row(ENDLESS, [], |row| row.get::<_, i64>(0));
    let written = leader.write(move |context| endless(context.connection())).await;
    assert!(matches!(written, Err(WriteError::Timeout(_))), "{written:?}");
    let read = leader.read(move |connection, _| endless(connection)).await;
    assert!(matches!(read, Err(ReadError::DeadlinePassed(_))), "{read:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_stops_what_it_asked_for() {
    let nodes = Nodes::start(4096).await;
    let leader = nodes.leader().await;
    let db = leader.database("app");
    db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").await.unwrap();
    let tx = db.begin_with(patient()).await.unwrap();
    // Behind an open transaction: given up before it has begun, it never begins.
    let waiting = tokio::spawn({
        let db = db.clone();
        async move { db.execute("INSERT INTO t VALUES (1)").await }
    });
    eventually("the write waits", || queued(leader) == 1).await;
    waiting.abort();
    tx.rollback().await.unwrap();
    db.execute("INSERT INTO t VALUES (2)").await.unwrap();
    assert_eq!(count(&db).await, 1);
    // Reads give their thread back: there are fewer threads than these.
    for number in 0..40 {
        let db: Database = nodes.node(number).database("app").into();
        let read = tokio::time::timeout(Duration::from_millis(5), db.query(ENDLESS, ReadConsistency::Local));
        assert!(read.await.is_err());
    }
    for number in 0..3 {
        nodes.node(number).database("app").query("SELECT 1", ReadConsistency::Local).await.unwrap();
        let node = nodes.node(number);
        eventually("no version stays pinned", || {
            node.database_statistics("app").is_some_and(|now| now.oldest_reader.is_none())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_are_taken_in_order() {
    let nodes = Nodes::start(4096).await;
    let leader = nodes.leader().await;
    let clients: Vec<Database> = {
        let mut clients = Vec::new();
        for _ in 0..8 {
            clients.push(Client::connect(addresses(&nodes)).await.unwrap().database("app"));
        }
        clients
    };
    clients[0].execute("CREATE TABLE t(k)").await.unwrap();
    let first = clients[0].begin_with(patient()).await.unwrap();
    let mut waiting = Vec::new();
    for (number, db) in clients.iter().enumerate() {
        let db = db.clone();
        waiting.push(tokio::spawn(async move {
            let mut tx = db.begin_with(patient()).await.unwrap();
            tx.execute(("INSERT INTO t VALUES (?)", [number as i64])).await.unwrap();
            tx.commit().await.unwrap();
        }));
        // Single writes stand in the same queue.
        eventually("the transaction waits", || queued(leader) == number as u64 + 1).await;
    }
    first.rollback().await.unwrap();
    for task in waiting {
        task.await.unwrap();
    }
    let order: Vec<i64> =
        clients[0].query_as("SELECT k FROM t ORDER BY rowid", ReadConsistency::Linearizable).await.unwrap();
    assert_eq!(order, (0..8).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_programs_count_together() {
    let nodes = Nodes::start(4096).await;
    let first = Client::connect(addresses(&nodes)).await.unwrap().database("app");
    first.execute_batch("CREATE TABLE t(k INTEGER); INSERT INTO t VALUES (0)").await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..64usize {
        let address = addresses(&nodes).swap_remove(number % 3);
        tasks.spawn(async move {
            let db = Client::connect([address]).await.unwrap().database("app");
            let mut tx = db.begin_with(patient()).await.unwrap();
            let k: i64 = tx.query_row("SELECT k FROM t").await.unwrap().get(0).unwrap();
            tx.execute(("UPDATE t SET k = ?", [k + 1])).await.unwrap();
            tx.commit().await.unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let k = first.query_row("SELECT k FROM t", ReadConsistency::Linearizable).await.unwrap();
    assert_eq!(k.get::<i64>(0).unwrap(), 64);
    nodes.stop_and_compare(&["app".into()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_vanishes_lets_the_next_one_go_on() {
    let nodes = Nodes::start(4096).await;
    let db: Database = nodes.leader().await.database("app").into();
    db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").await.unwrap();
    for address in addresses(&nodes) {
        // A runtime of its own, ended with all its connections, as the system does when a process dies.
        let program = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let open = program.spawn(async move {
            let db = Client::connect([address]).await.unwrap().database("app");
            let long = Duration::from_secs(200);
            let options = TransactionOptions { idle_timeout: long, total_timeout: long, ..Default::default() };
            let mut tx = db.begin_with(options).await.unwrap();
            tx.execute("INSERT INTO t VALUES (1)").await.unwrap();
            tx
        });
        let tx = open.await.unwrap();
        program.shutdown_background();
        // Long before the bounds of the one that has gone.
        db.with_timeout(PATIENCE).execute("DELETE FROM t").await.unwrap();
        assert_eq!(count(&db).await, 0);
        drop(tx);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_with_the_leader() {
    let nodes = Nodes::start_with(4096, |config| config.election_timeout = Duration::from_millis(600)).await;
    let leader = nodes.leader().await;
    let mut open: Vec<(Database, Transaction)> = Vec::new();
    for number in 0..6usize {
        // One database each: they are open at the same time.
        let name = format!("app{number}");
        let db = match number % 2 {
            0 => nodes.node(number / 2).database(&name).into(),
            _ => Client::connect(addresses(&nodes)).await.unwrap().database(&name),
        };
        db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").await.unwrap();
        let mut tx = db.begin_with(patient()).await.unwrap();
        tx.execute("INSERT INTO t VALUES (1)").await.unwrap();
        open.push((db, tx));
    }
    leader.shutdown().await.unwrap();
    for (db, mut tx) in open {
        let error = tx.execute("INSERT INTO t VALUES (2)").await.unwrap_err();
        assert!(
            matches!(error, TransactionError::Ended(EndReason::LeadershipLost | EndReason::ConnectionLost(_))),
            "{error:?}"
        );
        assert_eq!(error.class(), ErrorClass::Retryable);
        let start = Instant::now();
        let again = loop {
            match db.begin().await {
                Ok(tx) => break Some(tx),
                // A handle of the node that has stopped.
                Err(error) if error.class() == ErrorClass::Fatal => break None,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
        };
        let Some(mut tx) = again else { continue };
        assert_eq!(tx.query_row("SELECT count(*) FROM t").await.unwrap().get::<i64>(0).unwrap(), 0);
        tx.execute("INSERT INTO t VALUES (3)").await.unwrap();
        tx.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leadership_handed_over_ends_it() {
    let nodes = Nodes::start(4096).await;
    let leader = nodes.leader().await;
    let db = leader.database("app");
    db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").await.unwrap();
    let mut tx = db.begin().await.unwrap();
    tx.execute("INSERT INTO t VALUES (1)").await.unwrap();
    leader.transfer_leader(None).await.unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TransactionError::Ended(EndReason::LeadershipLost)), "{error:?}");
    // From the member that leads no more, through the one that does.
    let mut tx = db.begin().await.unwrap();
    assert_eq!(tx.query_row("SELECT count(*) FROM t").await.unwrap().get::<i64>(0).unwrap(), 0);
    tx.execute("INSERT INTO t VALUES (2)").await.unwrap();
    tx.commit().await.unwrap();
    nodes.stop_and_compare(&["app".into()]).await;
}

#[test]
fn blocking_transactions() {
    let folder = tempfile::tempdir().unwrap();
    let node = blocking::Node::start(raft_sqlite::NodeConfig::single(folder.path())).unwrap();
    let db = node.database("app");
    db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").unwrap();
    let mut tx = db.begin().unwrap();
    tx.execute("INSERT INTO t VALUES (1)").unwrap();
    tx.savepoint("s").unwrap();
    tx.execute("INSERT INTO t VALUES (2)").unwrap();
    tx.rollback_to("s").unwrap();
    assert_eq!(tx.query_row("SELECT count(*) FROM t").unwrap().get::<i64>(0).unwrap(), 1);
    tx.commit().unwrap();
    let tx = db.begin_with(TransactionOptions::default()).unwrap();
    tx.rollback().unwrap();
    let short = db.with_timeout(Duration::from_millis(50));
    assert!(matches!(short.query(ENDLESS, ReadConsistency::Local), Err(ReadError::DeadlinePassed(_))));
    let rows: Vec<i64> = db.query_as("SELECT k FROM t", ReadConsistency::Linearizable).unwrap();
    assert_eq!(rows, [1]);
    node.shutdown().unwrap();
}
