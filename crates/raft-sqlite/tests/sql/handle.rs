//! What random SQL and the files found in the handle, one by one.

use raft_sqlite::{ErrorClass, Executed, LocalDatabase, ReadConsistency, SqlError, Statement, Value, WriteError};

use super::nodes::Nodes;

/// SQLite's extended codes.
const SQLITE_CONSTRAINT_FOREIGNKEY: i32 = 787;

async fn table(nodes: &Nodes) -> LocalDatabase {
    let database = nodes.leader().await.database("app");
    database.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v)").await.unwrap();
    database
}

async fn count(database: &LocalDatabase) -> Value {
    database.query("SELECT count(*) FROM t", ReadConsistency::Linearizable).await.unwrap()[0][0].clone()
}

fn refused(result: Result<Vec<Executed>, WriteError<SqlError>>) -> SqlError {
    match result {
        Err(WriteError::Closure(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_statement_has_the_columns_of_now() {
    let nodes = Nodes::start(4096).await;
    let database = table(&nodes).await;
    database.execute("INSERT INTO t VALUES (1, 'v')").await.unwrap();
    let columns = async || {
        let mut seen = Vec::new();
        for node in 0..3 {
            // Every reader thread keeps the statement.
            for _ in 0..20 {
                let database = nodes.node(node).database("app");
                let rows = database.query("SELECT * FROM t", ReadConsistency::Linearizable).await.unwrap();
                assert_eq!(rows[0].values().len(), rows.columns().len());
                seen.push(rows.columns().to_vec());
            }
        }
        seen.push(database.execute("SELECT * FROM t").await.unwrap().rows.columns().to_vec());
        seen.dedup();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.remove(0)
    };
    assert_eq!(columns().await, ["k", "v"]);
    database.execute("ALTER TABLE t ADD COLUMN w DEFAULT 7").await.unwrap();
    assert_eq!(columns().await, ["k", "v", "w"]);
    database.execute("ALTER TABLE t DROP COLUMN v").await.unwrap();
    assert_eq!(columns().await, ["k", "w"]);
    // No row at all.
    database.execute("DELETE FROM t").await.unwrap();
    let rows = database.query("SELECT * FROM t", ReadConsistency::Linearizable).await.unwrap();
    assert_eq!(rows.columns(), ["k", "w"]);
}

/// SQLite settles some statements when it prepares them: they must not be kept.
#[tokio::test(flavor = "multi_thread")]
async fn pragmas_and_explanations_are_of_now() {
    let nodes = Nodes::start(4096).await;
    let database = table(&nodes).await;
    database.execute("CREATE TABLE child(t)").await.unwrap();
    let lines = async |sql: &str| {
        let mut seen = Vec::new();
        // Every reader thread has its own.
        for _ in 0..20 {
            seen.push(database.query(sql, ReadConsistency::Linearizable).await.map_err(|error| error.to_string()));
        }
        seen.push(database.execute(sql).await.map(|done| done.rows).map_err(|error| error.to_string()));
        let texts: Vec<String> = seen.iter().map(|rows| format!("{rows:?}")).collect();
        assert!(texts[..20].windows(2).all(|pair| pair[0] == pair[1]), "{texts:?}");
        texts
    };
    let plan = "EXPLAIN QUERY PLAN SELECT * FROM t WHERE v = 1";
    for texts in [lines("PRAGMA foreign_key_check").await, lines(plan).await] {
        assert!(texts.iter().all(|text| !text.contains("mismatch") && !text.contains("INDEX")), "{texts:?}");
    }
    database.execute("DROP TABLE child").await.unwrap();
    database.execute("CREATE TABLE child(t REFERENCES t(v))").await.unwrap();
    let texts = lines("PRAGMA foreign_key_check").await;
    assert!(texts.iter().all(|text| text.contains("foreign key mismatch")), "{texts:?}");
    database.execute("CREATE INDEX i ON t(v)").await.unwrap();
    let texts = lines(plan).await;
    assert!(texts.iter().all(|text| text.contains("INDEX i ")), "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_ends_its_transaction_has_no_effect() {
    let nodes = Nodes::start(4096).await;
    let database = table(&nodes).await;
    let insert = |key: i64| Statement::new("INSERT INTO t VALUES (?, 'x')").bind(key);
    for end in ["COMMIT", "END", "ROLLBACK; "] {
        for rest in [vec![], vec![insert(2)], vec!["SAVEPOINT a".into(), insert(2)], vec!["BEGIN".into(), insert(2)]] {
            let mut batch = vec![insert(1), end.into()];
            batch.extend(rest);
            let error = database.batch(batch.clone()).await.unwrap_err();
            assert_eq!(error.class(), ErrorClass::Rejected, "{batch:?}: {error}");
            assert!(error.to_string().contains("use savepoints"), "{batch:?}: {error}");
            assert_eq!(count(&database).await, Value::Integer(0), "{batch:?}");
        }
    }
    // In a closure that goes on after the error.
    let written = database
        .write(|context| {
            let _ = context.connection().execute_batch("INSERT INTO t VALUES (1, 'x'); COMMIT");
            let _ = context.connection().execute_batch("INSERT INTO t VALUES (2, 'x')");
            Ok::<_, ()>(())
        })
        .await;
    assert!(matches!(&written, Err(WriteError::Rejected(why)) if why.contains("use savepoints")), "{written:?}");
    assert_eq!(count(&database).await, Value::Integer(0));
    // The next one is as good as any.
    database.batch(vec![insert(1), insert(2)]).await.unwrap();
    assert_eq!(count(&database).await, Value::Integer(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_constraint_that_fails_at_commit_is_told_with_its_code() {
    let nodes = Nodes::start(4096).await;
    let database = table(&nodes).await;
    database.execute("CREATE TABLE child(t REFERENCES t(k) DEFERRABLE INITIALLY DEFERRED)").await.unwrap();
    let batch = vec!["INSERT INTO t VALUES (1, 'x')".into(), Statement::new("INSERT INTO child VALUES (2)")];
    for node in 0..3 {
        let error = refused(nodes.node(node).database("app").batch(batch.clone()).await);
        assert_eq!((error.extended_code, error.statement), (SQLITE_CONSTRAINT_FOREIGNKEY, 2), "{error}");
        assert_eq!(error.message, "FOREIGN KEY constraint failed");
    }
    assert_eq!(count(&database).await, Value::Integer(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_and_rowids_are_of_the_statement_and_of_the_caller() {
    let nodes = Nodes::start(4096).await;
    let database = table(&nodes).await;
    database.execute("CREATE TABLE log(n INTEGER PRIMARY KEY, k)").await.unwrap();
    database
        .execute("CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO log(k) VALUES (new.k), (-new.k); END")
        .await
        .unwrap();
    let done = database.execute("INSERT INTO t VALUES (7, 'a'), (8, 'b')").await.unwrap();
    assert_eq!((done.rows_affected, done.last_insert_rowid), (2, 8));
    // Another caller does not see what this one inserted.
    let done = database.execute("UPDATE t SET v = 'c'").await.unwrap();
    assert_eq!((done.rows_affected, done.last_insert_rowid), (2, 0));
    let done = database.execute("SELECT last_insert_rowid()").await.unwrap();
    assert_eq!(done.rows.into_values(), [[Value::Integer(0)]]);
    assert_eq!(done.rows_affected, 0);
    let batch = ["INSERT INTO t VALUES (20, 'd')", "SELECT last_insert_rowid(), changes()"].map(Statement::new);
    let done = database.batch(batch.into()).await.unwrap();
    assert_eq!(done[1].rows[0].values(), [Value::Integer(20), Value::Integer(1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_runs_on_any_node_and_within_the_bound() {
    let nodes = Nodes::start_with(4096, |config| config.max_transaction_bytes = 100 * 4096).await;
    let database = table(&nodes).await;
    for key in 0..60i64 {
        database.execute(Statement::new("INSERT INTO t VALUES (?, zeroblob(7000))").bind(key)).await.unwrap();
    }
    let pages = async |database: &LocalDatabase| {
        let rows = database.query("PRAGMA page_count", ReadConsistency::Linearizable).await.unwrap();
        match rows[0][0] {
            Value::Integer(pages) => pages,
            ref other => panic!("{other:?}"),
        }
    };
    assert!(pages(&database).await > 100);
    let error = nodes.node(0).database("app").execute("VACUUM").await.unwrap_err();
    assert!(matches!(error, WriteError::TooLarge { limit_bytes } if limit_bytes == 100 * 4096), "{error:?}");
    database.execute("DELETE FROM t WHERE k >= 10").await.unwrap();
    for (node, sql) in ["VACUUM", " -- a remark\n vacuum main;", "/* and another */ Vacuum"].into_iter().enumerate() {
        nodes.node(node).database("app").execute(sql).await.unwrap();
        assert!(pages(&database).await < 30);
    }
    let mode = ["PRAGMA auto_vacuum = FULL", "VACUUM"].map(Statement::new);
    nodes.node(1).database("app").batch(mode.into()).await.unwrap();
    database.execute("DELETE FROM t WHERE k >= 2").await.unwrap();
    assert!(pages(&database).await < 10);
    // With anything else it is no transaction of its own.
    let error = refused(database.batch(vec!["DELETE FROM t".into(), Statement::new("VACUUM")]).await);
    assert!(error.message.contains("cannot VACUUM from within a transaction"), "{error}");
    assert_eq!(count(&database).await, Value::Integer(2));
    assert!(database.execute("VACUUM INTO 'elsewhere.sqlite'").await.is_err());
    nodes.wait_equal("app").await;
    nodes.stop_and_compare(&["app".to_owned()]).await;
}
