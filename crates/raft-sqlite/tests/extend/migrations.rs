//! Migrations: each once in the cluster, whoever asks and how often, and clear words for every mistake.

use raft_sqlite::{Database, ErrorClass, Migration, MigrationError, Node, NodeConfig, ReadConsistency, Value};

use crate::nodes::{Nodes, PATIENCE};

fn list(count: u32) -> Vec<Migration> {
    (1..=count)
        .map(|number| {
            let sql = format!(
                "CREATE TABLE t{number}(a INTEGER PRIMARY KEY, b TEXT);\nCREATE INDEX i{number} ON t{number}(b);\n\
                 INSERT INTO t{number} VALUES (1, 'of {number}');"
            );
            Migration::new(number, format!("table {number}"), sql)
        })
        .collect()
}

async fn one(database: &Database, sql: &str) -> Value {
    database.query(sql, ReadConsistency::Local).await.unwrap()[0][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_nodes_at_once_run_each_migration_once() {
    let nodes = Nodes::start(4096).await;
    let calls: Vec<_> = (0..9)
        .map(|number| {
            let database = nodes.node(number).database("app");
            tokio::spawn(async move {
                let migrated = database.migrate(&list(5)).await.unwrap();
                // Here and now, without asking the leader again.
                assert_eq!(one(&database, "SELECT b FROM t5").await, Value::Text("of 5".into()));
                migrated
            })
        })
        .collect();
    let mut applied = Vec::new();
    for call in calls {
        let migrated = call.await.unwrap();
        assert_eq!(migrated.current, 5);
        applied.extend(migrated.applied);
    }
    applied.sort_unstable();
    assert_eq!(applied, [1, 2, 3, 4, 5]);
    let database = nodes.node(1).database("app");
    let (records, before) =
        ("SELECT group_concat(number || name) FROM _raft_sqlite_migrations", nodes.node(0).status());
    assert_eq!(one(&database, records).await, Value::Text("1table 1,2table 2,3table 3,4table 4,5table 5".into()));
    // Nothing to do: no log entry.
    let again = database.migrate(&list(5)).await.unwrap();
    assert_eq!((again.applied.len(), again.current), (0, 5));
    nodes.node(1).linearize().await.unwrap();
    assert_eq!(nodes.node(1).status().last_log_index, before.last_log_index);
    // More of them; and the oldest left out.
    assert_eq!(database.migrate(&list(7)).await.unwrap().applied, [6, 7]);
    assert_eq!(nodes.node(2).database("app").migrate(&list(9)[4..]).await.unwrap().applied, [8, 9]);
    nodes.wait_equal("app").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_and_change_nothing() {
    let nodes = Nodes::start(4096).await;
    let database = nodes.node(0).database("app");
    let refused = async |list: &[Migration]| {
        let mut errors = Vec::new();
        for number in 0..3 {
            errors.push(nodes.node(number).database("app").migrate(list).await.unwrap_err());
        }
        assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{errors:?}");
        assert_eq!(errors[0].class(), ErrorClass::Rejected);
        errors.pop().unwrap()
    };
    let error = refused(&list(3)[1..]).await;
    assert_eq!(error, MigrationError::Gap { current: 0, first: 2 });
    assert!(error.to_string().contains("1 to 1 are missing"), "{error}");

    database.migrate(&list(3)).await.unwrap();
    let records = "SELECT group_concat(number) FROM _raft_sqlite_migrations";
    let error = refused(&list(6)[4..]).await;
    assert_eq!(error, MigrationError::Gap { current: 3, first: 5 });
    let error = refused(&list(2)).await;
    assert_eq!(error, MigrationError::Newer { current: 3, name: "table 3".into(), known: 2 });
    assert!(error.to_string().contains("use the version of the program that applied them, or a newer one"), "{error}");
    assert!(matches!(refused(&[]).await, MigrationError::Newer { current: 3, known: 0, .. }));
    let mut changed = list(4);
    changed[1] = Migration::new(2, "table 2", "CREATE TABLE other(a)");
    let error = refused(&changed).await;
    assert_eq!(error, MigrationError::Changed { number: 2, name: "table 2".into() });
    assert!(error.to_string().contains("put back the text that was applied"), "{error}");
    let mut holes = list(5);
    holes.remove(3);
    assert!(matches!(refused(&holes).await, MigrationError::NotConsecutive { number: 5, expected: 4, .. }));

    // One that fails: rolled back as a whole, those before it stay.
    for (sql, words) in [
        ("CREATE TABLE half(a); INSERT INTO nowhere VALUES (1)", "no such table: nowhere"),
        ("CREATE TABLE half(a); INSERT INTO t1 VALUES (1, 'again')", "UNIQUE constraint failed"),
        ("CREATE TABLE half(a); COMMIT", "leave BEGIN and COMMIT out"),
        ("CREATE TABLE half(a); BEGIN", "within a transaction"),
        ("CREATE TABLE half(a); VACUUM", "cannot VACUUM"),
        ("CREATE TABLE half(a); nonsense", "syntax error"),
        ("CREATE TABLE half(a); PRAGMA journal_mode = DELETE", "the journal is the replicated log"),
    ] {
        let mut failing = list(4);
        failing.push(Migration::new(5, "fails", sql));
        let error = refused(&failing).await;
        assert!(matches!(&error, MigrationError::Sql { number: 5, .. }), "{sql}: {error:?}");
        assert!(error.to_string().contains(words), "{sql}: {error}");
        assert_eq!(one(&database, records).await, Value::Text("1,2,3,4".into()), "{sql}");
        let halves = "SELECT count(*) FROM sqlite_schema WHERE name = 'half'";
        assert_eq!(one(&database, halves).await, Value::Integer(0), "{sql}");
    }
    let error = nodes.node(1).database("no name").migrate(&list(1)).await.unwrap_err();
    assert!(matches!(&error, MigrationError::Rejected(why) if why.contains("no name for a database")), "{error:?}");
    nodes.wait_equal("app").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_is_too_large_is_told_and_a_restart_remembers() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = NodeConfig::single(folder.path());
    config.max_transaction_bytes = 64 * 4096;
    let node = Node::start(config.clone()).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let mut migrations = list(2);
    migrations.push(Migration::new(3, "large", "CREATE TABLE l(a); INSERT INTO l VALUES (zeroblob(1000000))"));
    let error = node.database("app").migrate(&migrations).await.unwrap_err();
    assert!(matches!(&error, MigrationError::Rejected(why) if why.contains("max_transaction_bytes")), "{error:?}");
    node.shutdown().await.unwrap();
    config.max_transaction_bytes = 64 * 1024 * 1024;
    let node = Node::start(config).await.unwrap();
    // Without waiting for a leader: that is the call's business.
    let migrated = node.database("app").migrate(&migrations).await.unwrap();
    assert_eq!(migrated.applied, [3]);
    node.shutdown().await.unwrap();
}
