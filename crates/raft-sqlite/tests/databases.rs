//! Databases of one cluster: made and dropped at run time, each on its own.

#![allow(clippy::unwrap_used)]

#[path = "sql/nodes.rs"]
mod nodes;

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nodes::{Nodes, PATIENCE};
use raft_sqlite::{Database, ErrorClass, Node, NodeConfig, ReadConsistency, ReadError, Version, WriteError, rusqlite};

async fn insert(db: &Database, value: i64) -> Version {
    db.batch(vec!["CREATE TABLE IF NOT EXISTS t(v)".into(), ("INSERT INTO t VALUES (?)", [value]).into()])
        .await
        .unwrap()
        .pop()
        .unwrap()
        .version
}

async fn values(db: &Database) -> Vec<i64> {
    let rows = db.query("SELECT v FROM t ORDER BY v", ReadConsistency::Linearizable).await.unwrap();
    rows.deserialize().unwrap()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn made_and_dropped_through_any_node() {
    let nodes = Nodes::start(4096).await;
    for turn in 0..3 {
        let node = nodes.node(turn);
        assert!(node.create_database("one").await.unwrap());
        assert!(!node.create_database("one").await.unwrap(), "twice");
        assert_eq!(node.database_names(), ["one"]);
        let born = node.database_statistics("one").unwrap().version;
        assert!(insert(&node.database("one"), 7).await.0 > born);
        assert_eq!(values(&nodes.node(turn + 1).database("one")).await, [7], "nothing of the one before it");
        assert!(nodes.node(turn + 2).drop_database("one").await.unwrap());
        assert!(!nodes.node(turn + 2).drop_database("one").await.unwrap(), "twice");
        nodes.node(turn + 1).linearize().await.unwrap();
        let read = nodes.node(turn + 1).database("one").query("SELECT 1", ReadConsistency::Local).await;
        assert!(matches!(read, Err(ReadError::NoSuchDatabase(_))), "{read:?}");
    }
    nodes.stop_and_compare(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    for name in ["", "../up", "a/b", ".hidden", "white space"] {
        for result in [node.create_database(name).await, node.drop_database(name).await] {
            let error = result.unwrap_err();
            assert_eq!(error.class(), ErrorClass::Rejected);
            assert!(error.to_string().contains("letters, digits"), "{error}");
        }
        let error = node.database(name).execute("CREATE TABLE t(a)").await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Rejected, "{error}");
    }
    assert_eq!(node.database_names(), Vec::<String>::new());
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_in_one_database_keeps_no_other_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    for name in ["held", "free", "gone"] {
        node.create_database(name).await.unwrap();
    }
    let (inside, has_begun) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let held = node.database("held");
    let holder = tokio::spawn({
        let held = held.clone();
        async move {
            held.write(move |context| {
                context.connection().execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (1)")?;
                inside.send(()).unwrap();
                let _ = released.recv();
                Ok::<_, rusqlite::Error>(())
            })
            .await
        }
    });
    tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
    // Whatever happens elsewhere goes on, while one caller's transaction stays open.
    for value in 0..20 {
        insert(&node.database("free"), value).await;
    }
    assert_eq!(values(&node.database("free")).await.len(), 20);
    assert!(node.create_database("new").await.unwrap());
    insert(&node.database("new"), 1).await;
    insert(&node.database("made-by-writing"), 1).await;
    assert!(node.drop_database("gone").await.unwrap());
    assert!(!holder.is_finished());
    release.send(()).unwrap();
    holder.await.unwrap().unwrap();
    assert_eq!(values(&held).await, [1]);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_databases_written_at_once_are_equal_on_all_nodes() {
    const DATABASES: usize = 24;
    let nodes = Nodes::start(4096).await;
    let names: Vec<String> = (0..DATABASES).map(|number| format!("db-{number}")).collect();
    let writers: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(number, name)| {
            let db = nodes.node(number).database(name);
            tokio::spawn(async move {
                for value in 0..15 {
                    insert(&db, value).await;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    for (number, name) in names.iter().enumerate() {
        assert_eq!(values(&nodes.node(number + 1).database(name)).await, (0..15).collect::<Vec<_>>());
        nodes.wait_equal(name).await;
    }
    nodes.stop_and_compare(&names).await;
}

/// The files of a node as a crash leaves them: copied while it runs.
fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &target),
            // A file that a checkpoint removes meanwhile.
            false => drop(std::fs::copy(entry.path(), target)),
        }
    }
}

fn files_of(folder: &Path, name: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join("db")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|file| file.starts_with(&format!("{name}."))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_and_made_again_across_restarts_without_a_clean_stop() {
    let folder = tempfile::tempdir().unwrap();
    let config = |turn: usize| {
        let mut config = NodeConfig::single(folder.path().join(turn.to_string()));
        config.checkpoint_entries = 7;
        config
    };
    let mut node = Node::start(config(0)).await.unwrap();
    let (mut versions, mut kept) = (vec![Version(0)], Vec::new());
    for turn in 0..12 {
        node.wait_for_leader(PATIENCE).await.unwrap();
        insert(&node.database("kept"), turn as i64).await;
        kept.push(turn as i64);
        assert_eq!(values(&node.database("kept")).await, kept, "turn {turn}");
        // With a checkpoint in between or without, now and then.
        if turn % 3 == 0 {
            let (folder, node) = (folder.path().join(turn.to_string()), node.clone());
            eventually("a checkpoint", || !files_of(&folder, "kept").is_empty()).await;
            drop(node);
        }
        if turn > 0 {
            assert_eq!(values(&node.database("again")).await, [turn as i64 - 1], "turn {turn}");
            assert!(node.drop_database("again").await.unwrap());
            assert!(node.create_database("again").await.unwrap());
        }
        let version = insert(&node.database("again"), turn as i64).await;
        assert!(version > *versions.last().unwrap(), "versions go on from one database to the next of its name");
        versions.push(version);
        copy_folder(&folder.path().join(turn.to_string()), &folder.path().join((turn + 1).to_string()));
        node.shutdown().await.unwrap();
        node = Node::start(config(turn + 1)).await.unwrap();
    }
    node.wait_for_leader(PATIENCE).await.unwrap();
    node.drop_database("again").await.unwrap();
    let last = folder.path().join("12");
    eventually("the dropped database's files go", || files_of(&last, "again").is_empty()).await;
    assert_eq!(values(&node.database("kept")).await, kept);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_answers_whoever_uses_the_database() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let db = node.database("app");
    insert(&db, 1).await;
    // A read that has begun sees its version to the end.
    let (inside, has_begun) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let reader = tokio::spawn({
        let db = db.clone();
        async move {
            db.read(move |connection, _| {
                inside.send(()).unwrap();
                let _ = released.recv();
                connection.query_row("SELECT sum(v) FROM t", [], |row| row.get::<_, i64>(0)).unwrap()
            })
            .await
        }
    });
    tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
    // A writer that stays inside is interrupted; those behind it are told.
    let (inside, has_begun) = mpsc::channel();
    let endless = tokio::spawn({
        let db = db.clone();
        async move {
            db.write(move |context| {
                inside.send(()).unwrap();
                let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n";
                context.connection().query_row(endless, [], |row| row.get::<_, i64>(0))
            })
            .await
        }
    });
    tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
    assert!(node.drop_database("app").await.unwrap());
    let error = endless.await.unwrap().unwrap_err();
    assert!(
        matches!(error.class(), ErrorClass::Rejected | ErrorClass::Retryable) && !matches!(error, WriteError::Fatal(_)),
        "{error}"
    );
    release.send(()).unwrap();
    assert_eq!(reader.await.unwrap().unwrap(), 1);
    // The name is free.
    insert(&db, 2).await;
    assert_eq!(values(&db).await, [2]);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_ours_is_moved_aside_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    let stray = folder.path().join("db/app.sqlite");
    rusqlite::Connection::open(&stray).unwrap().execute_batch("CREATE TABLE mine(a)").unwrap();
    let content = std::fs::read(&stray).unwrap();
    insert(&node.database("app"), 1).await;
    assert_eq!(values(&node.database("app")).await, [1]);
    let aside = files_of(folder.path(), "app").into_iter().find(|name| name.contains("found")).unwrap();
    assert_eq!(std::fs::read(folder.path().join("db").join(aside)).unwrap(), content);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_whose_file_was_taken_away_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    insert(&node.database("app"), 1).await;
    node.shutdown().await.unwrap();
    for file in files_of(folder.path(), "app") {
        std::fs::remove_file(folder.path().join("db").join(file)).unwrap();
    }
    let error = Node::start(NodeConfig::single(folder.path())).await.unwrap_err().to_string();
    assert!(error.contains("app.sqlite") && error.contains("removed"), "{error}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_database_keeps_no_file_open() {
    let nodes = Nodes::start(4096).await;
    // This process's files that were removed and still take room.
    let held = |name: &str| {
        let file = format!("/{name}.sqlite");
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.filter(|link| link.to_string_lossy().contains(&file)).count()
    };
    for turn in 0..40 {
        insert(&nodes.node(turn).database("held"), turn as i64).await;
    }
    for node in 0..3 {
        // On each of its threads.
        for _ in 0..20 {
            values(&nodes.node(node).database("held")).await;
        }
    }
    eventually("checkpoints have made files", || held("held") > 0).await;
    nodes.node(0).drop_database("held").await.unwrap();
    // Checkpoints take dropped names out of the catalog, and then files go.
    for turn in 0..100 {
        insert(&nodes.node(turn).database("other"), turn as i64).await;
    }
    eventually("the file is held by nobody", || held("held") == 0).await;
}
