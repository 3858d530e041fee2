//! Clusters of nodes in one process, over real sockets: replication, forwarding, reads, leader changes, membership, restarts.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use raft_sqlite::{
    ClusterStart, InitialMember, Node, NodeConfig, NodeId, ReadConsistency, Role, StartError, Statement, Value,
    WriteError,
};

const PATIENCE: Duration = Duration::from_secs(60);

struct Cluster {
    folder: tempfile::TempDir,
    members: Vec<InitialMember>,
    nodes: Vec<Option<Node>>,
}

fn free_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

impl Cluster {
    async fn start(size: usize) -> Cluster {
        let members: Vec<InitialMember> =
            (0..size).map(|number| InitialMember { name: format!("n{number}"), peer_urls: vec![free_url()] }).collect();
        let mut cluster = Cluster { folder: tempfile::tempdir().unwrap(), members, nodes: Vec::new() };
        for number in 0..size {
            let node = Node::start(cluster.config(number)).await.unwrap();
            cluster.nodes.push(Some(node));
        }
        for node in cluster.running() {
            node.wait_for_leader(PATIENCE).await.unwrap();
        }
        cluster
    }

    fn config(&self, number: usize) -> NodeConfig {
        let name = format!("n{number}");
        let mut config = NodeConfig::member(self.folder.path().join(&name), &name, self.members.clone()).unwrap();
        config.heartbeat_interval = Duration::from_millis(50);
        config.election_timeout = Duration::from_millis(400);
        config.checkpoint_entries = 50;
        config.log_entries_to_keep = 20;
        config
    }

    fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().flatten()
    }

    async fn leader(&self) -> usize {
        let start = Instant::now();
        loop {
            let found = self
                .nodes
                .iter()
                .position(|node| node.as_ref().is_some_and(|node| node.leadership().borrow().writable_here));
            if let Some(found) = found {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "no leader");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn node(&self, number: usize) -> &Node {
        self.nodes[number].as_ref().unwrap()
    }

    async fn stop(&mut self, number: usize) {
        self.nodes[number].take().unwrap().shutdown().await.unwrap();
    }

    async fn restart(&mut self, number: usize) {
        let node = Node::start(self.config(number)).await.unwrap();
        node.wait_for_leader(PATIENCE).await.unwrap();
        self.nodes[number] = Some(node);
    }

    /// Waits until all nodes are at the same version with the same state hash.
    async fn wait_equal(&self) -> u128 {
        let start = Instant::now();
        loop {
            let states: Vec<_> = self
                .running()
                .map(|node| node.database_statistics("app").map(|now| (now.version, now.state_hash)))
                .collect();
            if states.windows(2).all(|pair| pair[0] == pair[1]) && states[0].is_some() {
                return states[0].unwrap().1;
            }
            assert!(start.elapsed() < PATIENCE, "the nodes differ: {states:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn count(node: &Node, consistency: ReadConsistency) -> i64 {
    let rows = node.database("app").query("SELECT count(*) FROM t", consistency).await.unwrap();
    match rows[0][0] {
        Value::Integer(count) => count,
        ref other => panic!("{other:?}"),
    }
}

/// Inserts a row through `node`, again and again until it is acknowledged; each row is inserted once whatever happens.
async fn insert(node: &Node, key: i64) {
    let start = Instant::now();
    loop {
        let statement = Statement::new("INSERT OR IGNORE INTO t VALUES (?, hex(randomblob(20)))").bind(key);
        match node.database("app").execute(statement).await {
            Ok(_) => return,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_takes_writes_and_reads() {
    let cluster = Cluster::start(3).await;
    let db = cluster.node(0).database("app");
    let created = db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)").await.unwrap();
    assert_eq!(created.rows_affected, 0);
    for (number, node) in cluster.running().enumerate() {
        let db = node.database("app");
        let statement = Statement::new("INSERT INTO t VALUES (:k, :v)")
            .bind_named(":k", number as i64)
            .bind_named(":v", "x".to_owned());
        let done = db.execute(statement).await.unwrap();
        assert_eq!((done.rows_affected, done.last_insert_rowid), (1, number as i64));
        // Linearizable on every other node, at once; and by version.
        for other in cluster.running() {
            assert_eq!(count(other, ReadConsistency::Linearizable).await, number as i64 + 1);
            assert_eq!(count(other, ReadConsistency::AtLeast(done.version)).await, number as i64 + 1);
        }
        // A batch is all or nothing.
        let broken = vec!["DELETE FROM t".into(), Statement::new("INSERT INTO nowhere VALUES (1)")];
        match db.batch(broken).await {
            Err(WriteError::Closure(error)) => {
                assert_eq!(error.statement, 1);
                assert!(error.message.contains("no such table"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        let returned = db.execute("UPDATE t SET v = random() RETURNING v").await.unwrap();
        assert_eq!(returned.rows.len(), number + 1);
    }
    cluster.wait_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closures_run_on_the_leader_alone_and_what_they_read_is_confirmed() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let db = cluster.node(leader).database("app");
    db.write(|context| context.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)"))
        .await
        .unwrap();
    let writes = (0..200).map(|key| {
        let db = db.clone();
        tokio::spawn(async move {
            db.write(move |context| {
                context.connection().prepare_cached("INSERT INTO t VALUES (?, 'x')")?.execute([key])?;
                context.connection().query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))
            })
            .await
            .unwrap()
        })
    });
    let mut seen = Vec::new();
    for write in writes.collect::<Vec<_>>() {
        seen.push(write.await.unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (1..=200).collect::<Vec<_>>(), "each transaction ran alone, one after another");
    // No effect, no entry; and an error of the closure's own rolls back.
    let before = db.read(|_, version| version).await.unwrap();
    let read = db
        .write(|context| context.connection().query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)))
        .await;
    assert_eq!(read.unwrap(), 200);
    let failed: Result<(), _> = db
        .write(|context| {
            context.connection().execute_batch("DELETE FROM t").map_err(|error| error.to_string())?;
            Err("no".to_owned())
        })
        .await;
    assert!(matches!(failed, Err(WriteError::Closure(ref why)) if why == "no"), "{failed:?}");
    let panicked: Result<(), WriteError<()>> = db.write(|_| panic!("on purpose")).await;
    assert!(matches!(panicked, Err(WriteError::Rejected(_))), "{panicked:?}");
    assert_eq!(db.read(|_, version| version).await.unwrap(), before);
    let follower = (0..3).find(|number| *number != leader).unwrap();
    let refused = cluster.node(follower).database("app").write(|_| Ok::<_, ()>(())).await;
    assert!(matches!(refused, Err(WriteError::NotLeader { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leaders_go_and_come_back_and_nothing_is_lost() {
    let mut cluster = Cluster::start(3).await;
    cluster.node(0).database("app").execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)").await.unwrap();
    let mut key = 0;
    for round in 0..4 {
        for _ in 0..40 {
            key += 1;
            insert(cluster.node((key % 3) as usize), key).await;
        }
        // Round by round: hand the leadership over, stop the leader, stop a follower.
        let leader = cluster.leader().await;
        let victim = match round % 3 {
            0 => {
                cluster.node(leader).transfer_leader(None).await.unwrap();
                assert_ne!(cluster.leader().await, leader);
                continue;
            }
            1 => leader,
            _ => (leader + 1) % 3,
        };
        cluster.stop(victim).await;
        for _ in 0..40 {
            key += 1;
            insert(cluster.node((victim + 1 + (key % 2) as usize) % 3), key).await;
        }
        cluster.restart(victim).await;
        assert_eq!(count(cluster.node(victim), ReadConsistency::Linearizable).await, key);
    }
    cluster.wait_equal().await;
    for node in 0..3 {
        cluster.stop(node).await;
    }
    // Plain SQLite files, equal byte for byte.
    let file = |number: usize| cluster.folder.path().join(format!("n{number}/db/app.sqlite"));
    let bytes: Vec<Vec<u8>> = (0..3).map(|number| std::fs::read(file(number)).unwrap()).collect();
    assert!(bytes[0] == bytes[1] && bytes[1] == bytes[2]);
    let connection = raft_sqlite::rusqlite::Connection::open(file(0)).unwrap();
    let rows: i64 = connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, key);
    let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_away_too_long_gets_a_snapshot() {
    let mut cluster = Cluster::start(3).await;
    cluster.node(0).database("app").execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)").await.unwrap();
    let leader = cluster.leader().await;
    let away = (leader + 1) % 3;
    cluster.stop(away).await;
    for key in 1..=400 {
        insert(cluster.node(leader), key).await;
    }
    // Checkpoints every 50 entries, 20 entries kept: once one is made, the log no longer reaches back.
    let start = Instant::now();
    for node in cluster.running() {
        while node.log_statistics().entries > 300 {
            assert!(start.elapsed() < PATIENCE, "the log is not purged");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    cluster.restart(away).await;
    assert_eq!(count(cluster.node(away), ReadConsistency::Linearizable).await, 400);
    cluster.wait_equal().await;
    // Both ends have counted it; the sender hears of its end a moment later than the receiver.
    let counted = |node: &Node, name: &str| node.metrics().get(name).and_then(|family| family.value()).unwrap();
    assert_eq!(counted(cluster.node(away), "raft_sqlite_snapshots_received_total"), 1.0);
    assert!(counted(cluster.node(away), "raft_sqlite_snapshot_received_bytes_total") > 10_000.0);
    let start = Instant::now();
    while counted(cluster.node(leader), "raft_sqlite_snapshots_sent_total") < 1.0 {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(counted(cluster.node(leader), "raft_sqlite_snapshot_sent_bytes_total") > 10_000.0);
}

/// Pages that the present leaders have sent of snapshots.
fn sent_pages(cluster: &Cluster) -> u64 {
    cluster.running().map(|node| node.snapshot_statistics().sent_pages).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_comes_in_under_writes_leader_changes_and_a_restart() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    for name in ["app", "other"] {
        let db = cluster.node(leader).database(name);
        db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").await.unwrap();
        for _ in 0..4 {
            let sql = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
                       INSERT INTO t(v) SELECT randomblob(3900) FROM n";
            db.execute(sql).await.unwrap();
        }
    }
    let away = (leader + 1) % 3;
    cluster.stop(away).await;
    // More than the log keeps, and everything changed.
    cluster.node(leader).database("app").execute("UPDATE t SET v = randomblob(3800)").await.unwrap();
    for key in 10_000..10_400 {
        insert(cluster.node(leader), key).await;
    }
    // Until the log no longer reaches back.
    let start = Instant::now();
    while cluster.node(leader).log_statistics().entries > 350 {
        assert!(start.elapsed() < PATIENCE, "the log is not purged");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writers: Vec<_> = (0..3)
        .filter(|number| *number != away)
        .map(|number| {
            let (node, stop) = (cluster.node(number).clone(), stop.clone());
            tokio::spawn(async move {
                let mut done = 0u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let sql = "UPDATE t SET v = randomblob(3700) WHERE k = 1 + abs(random()) % 4000";
                    // While the leadership changes some are refused.
                    done += u64::from(node.database("app").execute(sql).await.is_ok());
                }
                done
            })
        })
        .collect();
    for round in 0..3 {
        let before = sent_pages(&cluster);
        cluster.restart(away).await;
        let start = Instant::now();
        while sent_pages(&cluster) == before && round == 0 {
            assert!(start.elapsed() < PATIENCE, "no snapshot is sent");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let leader = cluster.leader().await;
        if round < 2 && leader != away {
            let to = cluster.node((0..3).find(|number| ![leader, away].contains(number)).unwrap()).id();
            // One that is refused changes nothing.
            let _ = cluster.node(leader).transfer_leader(Some(to)).await;
            cluster.stop(away).await;
        } else if round < 2 {
            cluster.stop(away).await;
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.unwrap() > 0);
    }
    cluster.wait_equal().await;
    // The databases of a snapshot are installed one after the other.
    let start = Instant::now();
    loop {
        let other = |node: &Node| node.database_statistics("other").map(|now| (now.version, now.state_hash));
        let states: Vec<_> = cluster.running().map(other).collect();
        if states.windows(2).all(|pair| pair[0] == pair[1]) {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "the nodes differ: {states:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(cluster.running().map(|node| node.snapshot_statistics().completed).sum::<u64>() > 0);
    // What was received is installed, or the log was faster.
    let incoming = cluster.folder.path().join(format!("n{away}/incoming"));
    let start = Instant::now();
    while incoming.exists() {
        assert!(start.elapsed() < PATIENCE, "what has come in stays");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(count(cluster.node(away), ReadConsistency::Local).await, 4_400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_becomes_a_voter_and_is_removed() {
    let mut cluster = Cluster::start(1).await;
    cluster.node(0).database("app").execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)").await.unwrap();
    for key in 1..=120 {
        insert(cluster.node(0), key).await;
    }
    let contacts = cluster.members[0].peer_urls.clone();
    for number in 1..3 {
        let url = free_url();
        let mut config = cluster.config(0);
        config.name = format!("n{number}");
        config.data_dir = cluster.folder.path().join(&config.name);
        config.listen_peers = vec![url.trim_start_matches("http://").to_owned()];
        config.advertise_peer_urls = vec![url];
        config.cluster = ClusterStart::Join { contacts: contacts.clone(), voter: true };
        let node = Node::start(config).await.unwrap();
        node.wait_for_leader(PATIENCE).await.unwrap();
        assert_eq!(count(&node, ReadConsistency::Linearizable).await, 120);
        assert_ne!(node.status().role, Role::Learner);
        cluster.nodes.push(Some(node));
    }
    assert_eq!(cluster.node(0).members().len(), 3);
    insert(cluster.node(2), 121).await;
    cluster.wait_equal().await;
    let gone: NodeId = cluster.node(2).id();
    cluster.node(1).remove_member(gone).await.unwrap();
    cluster.nodes.pop().unwrap().unwrap().shutdown().await.unwrap();
    let start = Instant::now();
    while cluster.node(0).members().len() != 2 {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    insert(cluster.node(0), 122).await;
    let error = cluster.node(0).remove_member(gone).await.unwrap_err().to_string();
    assert!(error.contains("there is no member"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_starts_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig::single(folder.path())).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    node.database("app").execute("CREATE TABLE t(x)").await.unwrap();
    let refused = node.database("../etc").execute("SELECT 1").await.unwrap_err().to_string();
    assert!(refused.contains("no name for a database"), "{refused}");
    let error = Node::start(NodeConfig::single(folder.path())).await.unwrap_err().to_string();
    assert!(error.contains("in use") || error.contains("lock"), "{error}");
    node.shutdown().await.unwrap();

    // Another node's folder.
    let mut other = NodeConfig::single(folder.path());
    other.name = "other".into();
    let ClusterStart::Static { members, .. } = &mut other.cluster else { panic!() };
    members[0].name = "other".into();
    let error = Node::start(other).await.unwrap_err().to_string();
    assert!(error.contains("belongs to member \"default\"") && error.contains("--data-dir"), "{error}");

    // A port in use.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = NodeConfig::single(folder.path());
    config.listen_peers = vec![taken.local_addr().unwrap().to_string()];
    let error = Node::start(config).await.unwrap_err().to_string();
    assert!(error.contains("cannot listen on"), "{error}");

    // A newer format.
    let path = folder.path().join("node.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"format_version\": 1", "\"format_version\": 99")).unwrap();
    let error = Node::start(NodeConfig::single(folder.path())).await.unwrap_err().to_string();
    assert!(error.contains("format version 99"), "{error}");
    std::fs::write(&path, text).unwrap();

    // A damaged database file: named, not deleted.
    let file = folder.path().join("db/app.sqlite");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.truncate(5000);
    std::fs::write(&file, &bytes).unwrap();
    let error = Node::start(NodeConfig::single(folder.path())).await.unwrap_err().to_string();
    assert!(error.contains("app.sqlite is damaged at byte 5000"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_another_cluster_is_refused() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    // The same address list with another token: another cluster.
    let outsider = (leader + 1) % 3;
    let mut config = cluster.config(outsider);
    let mut cluster = cluster;
    cluster.stop(outsider).await;
    config.data_dir = cluster.folder.path().join("outsider");
    let ClusterStart::Static { token, .. } = &mut config.cluster else { panic!() };
    *token = "another".into();
    let error = Node::start(config).await.unwrap_err();
    assert!(matches!(&error, StartError::Refused(why) if why.contains("wrong cluster")), "{error}");
    cluster.node(leader).database("app").execute("CREATE TABLE t(x)").await.unwrap();
}
