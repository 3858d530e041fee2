//! Following what is committed: versions and the tables they changed.

#![allow(clippy::unwrap_used)]

#[path = "sql/nodes.rs"]
mod nodes;

use std::time::Duration;

use nodes::{Nodes, PATIENCE};
use raft_sqlite::{Change, Changes, Client, Database, ErrorClass, ReadConsistency, ReadError, Version, blocking};

fn addresses(nodes: &Nodes) -> Vec<String> {
    nodes.node(0).members().into_iter().flat_map(|member| member.peer_urls).collect()
}

async fn next(changes: &mut Changes) -> Result<Change, ReadError> {
    tokio::time::timeout(PATIENCE, changes.next_change()).await.expect("a change comes")
}

/// Everything up to `last`, one version after the other.
async fn up_to(changes: &mut Changes, last: Version) -> Vec<Change> {
    let (mut seen, mut all) = (changes.start(), Vec::new());
    while seen < last {
        let change = next(changes).await.unwrap();
        assert_eq!(change.version.0, seen.0 + 1, "{all:?}");
        seen = change.version;
        all.push(change);
    }
    all
}

const SCHEMA: &str = "
    CREATE TABLE parent(id INTEGER PRIMARY KEY, n);
    CREATE TABLE child(id INTEGER PRIMARY KEY, parent REFERENCES parent ON DELETE CASCADE);
    CREATE TABLE log(what);
    CREATE TRIGGER noted AFTER UPDATE OF n ON parent BEGIN INSERT INTO log VALUES ('n'); END;
    CREATE TABLE pair(a PRIMARY KEY, b) WITHOUT ROWID;
    CREATE TABLE counted(id INTEGER PRIMARY KEY AUTOINCREMENT);
    CREATE VIRTUAL TABLE text USING fts5(body);
    CREATE VIEW parents AS SELECT id FROM parent;
    CREATE TRIGGER through_a_view INSTEAD OF INSERT ON parents BEGIN INSERT INTO parent VALUES (new.id, 0); END;";

#[tokio::test(flavor = "multi_thread")]
async fn every_version_names_its_tables() {
    let nodes = Nodes::start_with(4096, |config| config.track_tables = true).await;
    let db: Database = nodes.node(0).database("app").into();
    db.execute_batch(SCHEMA).await.unwrap();
    for node in 0..3 {
        nodes.node(node).linearize().await.unwrap();
    }
    let mut followers = Vec::new();
    for (number, address) in addresses(&nodes).into_iter().enumerate() {
        followers.push(nodes.node(number).database("app").changes(None).await.unwrap());
        followers.push(Client::connect([address]).await.unwrap().database("app").changes(None).await.unwrap());
    }
    let statements: &[(&str, &[&str])] = &[
        ("INSERT INTO parent VALUES (1, 1), (2, 2)", &["parent"]),
        // Twice the same: a statement that is kept would not be looked at again.
        ("INSERT INTO child(parent) VALUES (1)", &["child"]),
        ("INSERT INTO child(parent) VALUES (1)", &["child"]),
        ("UPDATE parent SET n = 7", &["log", "parent"]),
        ("DELETE FROM parent WHERE id = 1", &["child", "parent"]),
        ("INSERT INTO pair VALUES (1, 2)", &["pair"]),
        ("REPLACE INTO pair VALUES (1, 3)", &["pair"]),
        ("INSERT INTO counted DEFAULT VALUES", &["counted"]),
        // Without a row looked at.
        ("DELETE FROM log", &["log"]),
        // With what FTS5 keeps of it.
        ("INSERT INTO text VALUES ('some words')", &["text", "text_content", "text_data", "text_docsize", "text_idx"]),
        ("INSERT INTO parents VALUES (9)", &["parent", "parents"]),
        ("CREATE INDEX by_n ON parent(n)", &["sqlite_schema"]),
        ("PRAGMA user_version = 5", &[]),
        ("WITH one AS (SELECT 3 AS id) INSERT INTO parent SELECT id, id FROM one", &["parent"]),
    ];
    let mut want = Vec::new();
    let mut last = followers[0].start();
    for (sql, tables) in statements {
        last = db.execute(*sql).await.unwrap().version;
        want.push(tables.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    }
    // What failed or changed nothing is no version; several transactions may be one.
    db.execute("INSERT INTO pair VALUES (1, 2)").await.unwrap_err();
    db.execute("DELETE FROM counted WHERE id = 99").await.unwrap();
    // On the program's own connection, with statements of its own that it keeps.
    let leader = nodes.leader().await.database("app");
    for turn in 0..2 {
        leader
            .write(move |context| -> raft_sqlite::rusqlite::Result<()> {
                let mut kept = context.connection().prepare_cached("INSERT INTO log VALUES (?)")?;
                kept.execute([turn])?;
                Ok(())
            })
            .await
            .unwrap();
        want.push(vec!["log".to_owned()]);
    }
    let mut tx = db.begin().await.unwrap();
    tx.execute("INSERT INTO counted DEFAULT VALUES").await.unwrap();
    tx.savepoint("s").await.unwrap();
    tx.execute("INSERT INTO log VALUES (1)").await.unwrap();
    last = last.max(tx.commit().await.unwrap());
    want.push(vec!["counted".to_owned(), "log".to_owned()]);
    for (number, follower) in followers.iter_mut().enumerate() {
        let tables: Vec<Vec<String>> =
            up_to(follower, last).await.into_iter().map(|change| change.tables.unwrap().to_vec()).collect();
        assert_eq!(tables, want, "follower {number}");
    }
    // From a version of the past, through any member: what it is to be told is the same.
    for node in 0..3 {
        let mut again = nodes.node(node).database("app").changes(Some(Version(last.0 - 3))).await.unwrap();
        assert_eq!(up_to(&mut again, last).await.len(), 3);
    }
    // Dropped: it ends.
    nodes.node(1).drop_database("app").await.unwrap();
    for follower in &mut followers {
        let error = next(follower).await.unwrap_err();
        assert!(matches!(error, ReadError::NoSuchDatabase(_)), "{error:?}");
    }
    let error = db.changes(None).await.unwrap_err();
    assert!(matches!(error, ReadError::NoSuchDatabase(_)), "{error:?}");
    // Another of the same name: whoever followed the old one is told that anything may be different.
    let version = db.execute("CREATE TABLE t(a)").await.unwrap().version;
    let mut new = db.changes(Some(last)).await.unwrap();
    let first = next(&mut new).await.unwrap();
    assert!(first.tables.is_none() && first.version <= version, "{first:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_names_versions_are_told_all_the_same() {
    let nodes = Nodes::start(4096).await;
    let client = Client::connect(addresses(&nodes)).await.unwrap();
    let db = client.database("app");
    db.execute("CREATE TABLE t(a)").await.unwrap();
    let mut changes = db.changes(None).await.unwrap();
    let start = changes.start();
    let version = db.execute("INSERT INTO t VALUES (1)").await.unwrap().version;
    assert_eq!(up_to(&mut changes, version).await.last().unwrap(), &Change { version, tables: None });
    // Too far behind to be told each: one change of anything.
    let mut last = version;
    for _ in 0..1100 {
        last = db.execute("INSERT INTO t VALUES (1)").await.unwrap().version;
    }
    let local = nodes.leader().await.database("app");
    let mut behind = local.changes(Some(start)).await.unwrap();
    let change = next(&mut behind).await.unwrap();
    assert_eq!(change, Change { version: last, tables: None });
    // The one that has not taken any for so long goes on without a gap that it is not told of.
    let mut seen = version;
    while seen < last {
        let change = next(&mut changes).await.unwrap();
        assert!(change.version > seen && change.tables.is_none());
        seen = change.version;
    }
    assert_eq!(seen, last);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_with_another_member() {
    let nodes = Nodes::start_with(4096, |config| {
        config.track_tables = true;
        config.election_timeout = Duration::from_millis(600);
    })
    .await;
    let client = Client::connect(addresses(&nodes)).await.unwrap();
    let db = client.database("app");
    db.execute("CREATE TABLE t(a)").await.unwrap();
    let mut changes = db.changes(None).await.unwrap();
    let mut own = nodes.leader().await.database("app").changes(None).await.unwrap();
    let writing = tokio::spawn({
        let db = db.clone();
        async move {
            let mut last = Version(0);
            for turn in 0..300 {
                match db.execute(("INSERT INTO t VALUES (?)", [turn])).await {
                    Ok(done) => last = last.max(done.version),
                    Err(error) => assert_ne!(error.class(), ErrorClass::Rejected, "{error}"),
                }
            }
            last
        }
    });
    let first = next(&mut changes).await.unwrap();
    nodes.leader().await.shutdown().await.unwrap();
    let last = writing.await.unwrap();
    let mut seen = first.version;
    while seen < last {
        let change = next(&mut changes).await.unwrap();
        assert_eq!(change.version.0, seen.0 + 1);
        assert_eq!(change.tables.unwrap().to_vec(), ["t"]);
        seen = change.version;
    }
    let count = db.query_row("SELECT count(*) FROM t", ReadConsistency::Linearizable).await.unwrap();
    assert!(count.get::<i64>(0).unwrap() > 0);
    // The node that was shut down says so.
    let error = loop {
        if let Err(error) = next(&mut own).await {
            break error;
        }
    };
    assert_eq!(error.class(), ErrorClass::Fatal, "{error}");
}

#[test]
fn blocking_changes() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = raft_sqlite::NodeConfig::single(folder.path());
    config.track_tables = true;
    let node = blocking::Node::start(config).unwrap();
    let db = node.database("app");
    db.execute("CREATE TABLE t(a)").unwrap();
    let mut changes = db.changes(None).unwrap();
    let version = db.execute("INSERT INTO t VALUES (1)").unwrap().version;
    let change = changes.next().unwrap().unwrap();
    assert_eq!((change.version, change.tables.unwrap().to_vec()), (version, vec!["t".to_owned()]));
    node.shutdown().unwrap();
    assert_eq!(changes.next().unwrap().unwrap_err().class(), ErrorClass::Fatal);
    assert!(changes.next().is_none());
}
