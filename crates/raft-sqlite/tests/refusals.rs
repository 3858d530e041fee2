//! What a replicated database refuses says why and what to do: alike on the leader, through another node, and on a reader.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use raft_sqlite::{Database, InitialMember, Node, NodeConfig, ReadConsistency, ReadError, WriteError};

const PATIENCE: Duration = Duration::from_secs(60);

/// Statement, and words of the reason; for a writer and a reader.
const PRAGMAS: &[(&str, &str)] = &[
    ("PRAGMA journal_mode = DELETE", "PRAGMA journal_mode is refused on a replicated database: the journal is"),
    ("PRAGMA locking_mode = EXCLUSIVE", "PRAGMA locking_mode is refused"),
    ("PRAGMA page_size = 512", "set NodeConfig::page_size"),
    ("PRAGMA synchronous = OFF", "a commit is on the disks of a majority"),
    ("PRAGMA wal_autocheckpoint = 1", "see NodeConfig::checkpoint_entries"),
    ("PRAGMA wal_checkpoint", "see NodeConfig::checkpoint_entries"),
    ("PRAGMA wal_checkpoint(TRUNCATE)", "see NodeConfig::checkpoint_entries"),
    ("PRAGMA journal_size_limit = 1", "PRAGMA journal_size_limit is refused"),
    ("PRAGMA mmap_size = 0", "without copying already"),
    ("PRAGMA read_uncommitted = 1", "nothing uncommitted is ever shown"),
    ("PRAGMA schema_version = 9", "SQLite keeps it"),
    ("PRAGMA writable_schema = 1", "a wrong schema corrupts"),
    ("PRAGMA encoding = 'UTF-16'", "databases are UTF-8"),
    ("PRAGMA cache_spill = 0", "the library depends on it"),
    ("PRAGMA fullfsync = 1", "the log decides"),
    ("PRAGMA checkpoint_fullfsync = 1", "the library decides"),
    ("PRAGMA soft_heap_limit = 1", "every database of this process"),
    ("PRAGMA hard_heap_limit = 1", "every database of this process"),
    ("PRAGMA temp_store_directory = '/'", "set SQLITE_TMPDIR instead"),
    ("PRAGMA data_store_directory = '/'", "every database of this process"),
    ("PRAGMA main.writable_schema = 1", "PRAGMA writable_schema is refused"),
    // By way of another database's name.
    ("PRAGMA temp.writable_schema = 1", "PRAGMA writable_schema is refused"),
    ("PRAGMA temp.hard_heap_limit = 1", "PRAGMA hard_heap_limit is refused"),
];

/// The same for what reaches outside the database.
const OTHERS: &[(&str, &str)] = &[
    ("ATTACH 'other.db' AS o", "a file cannot be attached to a replicated database"),
    ("ATTACH 'file:other.db' AS o", "Attach ':memory:' for scratch tables"),
    ("ATTACH 'other' || '.db' AS o", "a file cannot be attached"),
    ("SELECT load_extension('x')", "load_extension is refused from SQL"),
    ("SELECT load_extension('x', 'y')", "sqlite3_auto_extension"),
];

/// What a write and a read of `sql` are refused with.
async fn refusals(database: &Database, sql: &str) -> [String; 2] {
    let write = match database.execute(sql).await.unwrap_err() {
        WriteError::Closure(error) => error.message,
        other => panic!("{sql}: {other}"),
    };
    let read = match database.query(sql, ReadConsistency::Local).await.unwrap_err() {
        ReadError::Sql(error) => error.to_string(),
        other => panic!("{sql}: {other}"),
    };
    [write, read]
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_why_on_every_path() {
    let folder = tempfile::tempdir().unwrap();
    let url = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let members: Vec<InitialMember> =
        ["a", "b"].map(|name| InitialMember { name: name.into(), peer_urls: vec![url()] }).into();
    let mut nodes = Vec::new();
    for member in &members {
        let config = NodeConfig::member(folder.path().join(&member.name), &member.name, members.clone()).unwrap();
        nodes.push(Node::start(config).await.unwrap());
    }
    for node in &nodes {
        node.wait_for_leader(PATIENCE).await.unwrap();
    }
    nodes[0].database("app").execute("CREATE TABLE t(x)").await.unwrap();
    nodes[1].linearize().await.unwrap();
    // One of them leads, the other forwards.
    for node in &nodes {
        let database = node.database("app");
        for (sql, reason) in PRAGMAS.iter().chain(OTHERS) {
            for said in refusals(&database, sql).await {
                assert!(said.contains(reason), "{sql}: {said}");
                assert!(!said.contains("not authorized"), "{sql}: {said}");
            }
        }
        // Outside a transaction only, which a read never is: SQLite says so first.
        let [write, read] = refusals(&database, "VACUUM INTO 'copy.db'").await;
        assert!(write.contains("a file cannot be attached to a replicated database"), "{write}");
        assert!(read.contains("cannot VACUUM from within a transaction"), "{read}");
        // What is not refused, is not; nor does an older refusal stick to a later error.
        database.execute("PRAGMA user_version = 3").await.unwrap();
        database.query("PRAGMA table_info(t)", ReadConsistency::Local).await.unwrap();
        for said in refusals(&database, "SELECT * FROM nowhere").await {
            assert!(said.contains("no such table: nowhere"), "{said}");
        }
    }
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}
