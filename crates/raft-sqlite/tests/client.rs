//! Programs that are no members: over real sockets, to nodes in this process.

#![allow(clippy::unwrap_used)]

#[path = "sql/nodes.rs"]
mod nodes;

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use nodes::{Nodes, PATIENCE};
use raft_sqlite::{
    Client, ConnectError, Database, ErrorClass, Migration, Node, NodeConfig, ReadConsistency, ReadError, Statement,
    Value, WriteError, blocking, named_params, params,
};
use serde::{Deserialize, Serialize};

fn addresses(nodes: &Nodes) -> Vec<String> {
    nodes.node(0).members().into_iter().flat_map(|member| member.peer_urls).collect()
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Item {
    id: i64,
    name: String,
    weight: Option<f64>,
    data: Vec<u8>,
}

/// The same through every kind of handle.
async fn uses_every_call(db: &Database) {
    db.execute_batch(
        "CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT NOT NULL, weight REAL, data BLOB); -- a script
         CREATE INDEX by_name ON item(name);",
    )
    .await
    .unwrap();
    let item =
        |id: i64| Item { id, name: format!("n{id}"), weight: (id % 2 == 0).then_some(0.5), data: vec![id as u8] };
    let sql = "INSERT INTO item VALUES (:id, :name, :weight, :data)";
    let done = db.execute(Statement::new(sql).bind_fields(&item(1))).await.unwrap();
    assert_eq!((done.rows_affected, done.last_insert_rowid), (1, 1));
    let named = named_params! {":id": 2, ":name": "n2", ":weight": 0.5, ":data": vec![2u8]};
    db.execute((sql, named)).await.unwrap();
    let done =
        db.execute(("INSERT INTO item VALUES (?, ?, ?, ?)", params![3, "n3", None::<f64>, [3u8]])).await.unwrap();
    let mine = ReadConsistency::AtLeast(done.version);
    let items: Vec<Item> = db.query_as("SELECT * FROM item ORDER BY id", mine).await.unwrap();
    assert_eq!(items, (1..=3).map(item).collect::<Vec<_>>());
    let row = db.query_row(("SELECT name, weight FROM item WHERE id = ?", [2]), mine).await.unwrap();
    assert_eq!((row.get::<String>("NAME").unwrap(), row.get::<f64>(1).unwrap()), ("n2".into(), 0.5));
    let none = ("SELECT name FROM item WHERE id = ?", [99]);
    assert_eq!(db.query_optional(none, ReadConsistency::Linearizable).await.unwrap(), None);
    let error = db.query_row(none, ReadConsistency::Linearizable).await.unwrap_err();
    assert_eq!((error.to_string().as_str(), error.class()), ("the query gave no row", ErrorClass::Rejected));
    // Only one of these is taken.
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
    assert_eq!(db.query_row(endless, ReadConsistency::Local).await.unwrap()[0], Value::Integer(1));
    let migrations = [Migration::new(1, "note", "CREATE TABLE note(a)")];
    assert_eq!(db.migrate(&migrations).await.unwrap().current, 1);
    // What is wrong is told in SQLite's words, and nothing of it stays.
    for (statement, words) in [
        (Statement::from(("INSERT INTO item VALUES (?, 'x', 0, NULL)", [1])), "UNIQUE constraint failed: item.id"),
        ("INSERT INTO nowhere VALUES (1)".into(), "no such table"),
        (("SELECT ?", (1, 2)).into(), "Wrong number of parameters"),
        (("SELECT ?", [u64::MAX]).into(), "parameter 1"),
        (Statement::new("SELECT :a").bind_named(":b", 1), ":b"),
        ("SELECT 1; SELECT 2".into(), "ultiple statements"),
    ] {
        let error = db.execute(statement.clone()).await.unwrap_err();
        assert!(
            matches!(error, WriteError::Closure(_)) && error.class() == ErrorClass::Rejected,
            "{statement:?}: {error:?}"
        );
        assert!(error.to_string().contains(words), "{statement:?}: {error}");
        let error = db.query(statement.clone(), ReadConsistency::Linearizable).await.unwrap_err();
        assert!(matches!(error, ReadError::Sql(_)), "{statement:?}: {error:?}");
    }
    let error = db.execute_batch("INSERT INTO note VALUES (1); INSERT INTO nowhere VALUES (1)").await.unwrap_err();
    assert!(error.to_string().contains("no such table"), "{error}");
    assert!(db.query("SELECT * FROM note", ReadConsistency::Linearizable).await.unwrap().is_empty());
    let error = db.query("INSERT INTO note VALUES (1)", ReadConsistency::Linearizable).await.unwrap_err();
    assert!(error.to_string().contains("readonly"), "{error}");
    let error = db.query("SELECT * FROM item", mine).await.unwrap().deserialize::<(i64, i64)>().unwrap_err();
    assert!(error.to_string().contains("no tuple of 2"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handle_is_the_same_everywhere() {
    let nodes = Nodes::start(4096).await;
    for number in 0..3 {
        uses_every_call(&nodes.node(number).database(&format!("node{number}"))).await;
        // Through this member alone: it passes on what it cannot do.
        let url = nodes.node(number).members().into_iter().find(|m| m.id == nodes.node(number).id()).unwrap().peer_urls;
        let client = Client::connect(url).await.unwrap();
        assert_eq!(client.cluster_id(), nodes.node(0).cluster_id());
        assert!(client.create_database(&format!("client{number}")).await.unwrap());
        uses_every_call(&client.database(&format!("client{number}"))).await;
        assert!(client.drop_database(&format!("client{number}")).await.unwrap());
        assert!(!client.drop_database(&format!("client{number}")).await.unwrap());
        let error = client.create_database("no name").await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Rejected, "{error}");
        let error = client.database("nowhere").query("SELECT 1", ReadConsistency::Local).await.unwrap_err();
        assert!(matches!(error, ReadError::NoSuchDatabase(_)), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_million_rows_are_held_nowhere() {
    const ROWS: i64 = 1_000_000;
    let nodes = Nodes::start(4096).await;
    let client = Client::connect(addresses(&nodes)).await.unwrap();
    client.database("app").execute("CREATE TABLE t(a)").await.unwrap();
    let sql = format!(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS}) SELECT i, 'row ' || i AS text FROM n"
    );
    let local: Database = nodes.node(1).database("app").into();
    for db in [local, client.database("app")] {
        let mut rows = db.query_stream(&sql, ReadConsistency::Linearizable).await.unwrap();
        assert_eq!(rows.columns(), ["i", "text"]);
        let mut count = 0;
        while let Some(row) = rows.next_row().await.unwrap() {
            count += 1;
            assert_eq!(row[0], Value::Integer(count));
        }
        assert_eq!(count, ROWS);
    }
    // Endless ones end when nobody takes their rows; so many more than can be open at once show it.
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
    let silent = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0";
    let db = client.database("app");
    let start = Instant::now();
    for turn in 0..150 {
        match db.query_stream(endless, ReadConsistency::Local).await {
            Ok(rows) => assert_eq!(rows.take(10).collect::<Vec<_>>().await.len(), 10),
            Err(ReadError::Overloaded) if start.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(20)).await
            }
            Err(error) => panic!("turn {turn}: {error}"),
        }
        if turn % 10 == 0 {
            let _ = db.query_stream(silent, ReadConsistency::Local).await;
        }
    }
    // Later failures come through the stream.
    let late = "SELECT abs(i) FROM (SELECT 1 AS i UNION ALL SELECT -9223372036854775808)";
    let mut rows = db.query_stream(late, ReadConsistency::Local).await.unwrap();
    let mut error = None;
    while error.is_none() {
        match rows.next_row().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("no failure"),
            Err(failure) => error = Some(failure),
        }
    }
    assert!(error.unwrap().to_string().contains("integer overflow"));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_and_batches_pass() {
    let nodes = Nodes::start(4096).await;
    let client = Client::connect(addresses(&nodes)).await.unwrap();
    let db = client.database("app");
    db.execute("CREATE TABLE t(a BLOB)").await.unwrap();
    let large = vec![7u8; 12 * 1024 * 1024];
    db.batch(vec![
        ("INSERT INTO t VALUES (?)", [large.clone()]).into(),
        ("INSERT INTO t VALUES (?)", [large.clone()]).into(),
    ])
    .await
    .unwrap();
    let rows = db.query("SELECT a FROM t", ReadConsistency::Linearizable).await.unwrap();
    assert_eq!(rows.deserialize::<Vec<u8>>().unwrap(), [large.clone(), large]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_clients_while_a_member_stops() {
    let nodes = Nodes::start_with(4096, |config| config.election_timeout = Duration::from_millis(600)).await;
    let addresses = addresses(&nodes);
    let first = Client::connect(&addresses).await.unwrap();
    first.database("app").execute("CREATE TABLE t(k INTEGER PRIMARY KEY)").await.unwrap();
    let stop = std::sync::Arc::new(tokio::sync::Notify::new());
    let writers: Vec<_> = (0..64i64)
        .map(|number| {
            let (addresses, stop) = (addresses.clone(), stop.clone());
            tokio::spawn(async move {
                let client = Client::connect(&addresses).await.unwrap();
                let db = client.database("app");
                let mut acknowledged = Vec::new();
                for turn in 0..40 {
                    let key = number * 1000 + turn;
                    match db.execute(("INSERT INTO t VALUES (?)", [key])).await {
                        Ok(_) => acknowledged.push(key),
                        Err(error) => assert!(
                            matches!(
                                error.class(),
                                ErrorClass::OutcomeUnknown | ErrorClass::Retryable | ErrorClass::Rejected
                            ),
                            "{error}"
                        ),
                    }
                    if turn == 10 {
                        stop.notify_one();
                    }
                }
                acknowledged
            })
        })
        .collect();
    stop.notified().await;
    nodes.leader().await.shutdown().await.unwrap();
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    // The first client goes on, too, on another member.
    let there: std::collections::HashSet<i64> = first
        .database("app")
        .query_as("SELECT k FROM t", ReadConsistency::Linearizable)
        .await
        .unwrap()
        .into_iter()
        .collect();
    assert!(acknowledged.len() > 64 * 11, "{} acknowledged", acknowledged.len());
    let lost: Vec<&i64> = acknowledged.iter().filter(|key| !there.contains(key)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_reached_is_told() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let quick = |addresses: Vec<String>| Client::builder(addresses).patience(Duration::from_millis(200)).connect();
    let error = quick(vec![format!("http://{silent}")]).await.unwrap_err();
    assert!(error.to_string().contains(&silent.to_string()) && error.to_string().contains("refused"), "{error}");
    for (address, words) in [("nonsense", "address"), ("https://127.0.0.1:1", "certificates")] {
        let error = quick(vec![address.into()]).await.unwrap_err();
        assert!(matches!(error, ConnectError::Configuration(_)) && error.to_string().contains(words), "{error}");
    }
    assert!(matches!(quick(Vec::new()).await.unwrap_err(), ConnectError::Configuration(_)));
}

#[test]
fn blocking_handles_need_no_runtime() {
    let folder = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let member = raft_sqlite::InitialMember { name: "n0".into(), peer_urls: vec![url.clone()] };
    let config = NodeConfig::member(folder.path(), "n0", vec![member]).unwrap();
    let node = blocking::Node::start_with(Node::builder(config).peer_listener(listener)).unwrap();
    let db = node.database("app");
    db.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1), (2)").unwrap();
    db.write(|context| context.connection().execute("INSERT INTO t VALUES (3)", [])).unwrap();
    let sum: i64 =
        db.read(|connection, _| connection.query_row("SELECT sum(a) FROM t", [], |row| row.get(0))).unwrap().unwrap();
    assert_eq!(sum, 6);
    let client = blocking::Client::connect([url]).unwrap();
    let rows = client.database("app").query_rows("SELECT a FROM t ORDER BY a", ReadConsistency::Linearizable).unwrap();
    let values: Vec<i64> = rows.map(|row| row.unwrap().get(0).unwrap()).collect();
    assert_eq!(values, [1, 2, 3]);
    assert!(client.create_database("other").unwrap() && node.drop_database("other").unwrap());
    node.shutdown().unwrap();
}
