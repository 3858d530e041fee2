//! Bits that the disk has changed, under real nodes: who notices, who goes on, and how a damaged member comes back.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use raft_sqlite::{
    ClusterStart, ErrorClass, InitialMember, Node, NodeConfig, PageDamage, ReadConsistency, ReadError, Statement,
    Value, WriteError,
};

const PATIENCE: Duration = Duration::from_secs(60);
const ROWS: i64 = 300;
/// In the middle: on a page that is neither the first nor the table's root.
const HIT: i64 = 150;

fn free_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

struct Cluster {
    folder: tempfile::TempDir,
    members: Vec<InitialMember>,
    nodes: Vec<Node>,
    scrub_interval: Option<Duration>,
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < PATIENCE, "not so: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Cluster {
    /// Stopped, with [`ROWS`] rows on all nodes alike.
    async fn filled(size: usize) -> Cluster {
        let members: Vec<InitialMember> =
            (0..size).map(|number| InitialMember { name: format!("n{number}"), peer_urls: vec![free_url()] }).collect();
        let folder = tempfile::tempdir().unwrap();
        let mut cluster = Cluster { folder, members, nodes: Vec::new(), scrub_interval: None };
        cluster.start().await;
        let db = cluster.nodes[0].database("app");
        db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v TEXT)").await.unwrap();
        let fill = format!(
            "WITH n(k) AS (VALUES(1) UNION ALL SELECT k + 1 FROM n WHERE k < {ROWS})
             INSERT INTO t SELECT k, printf('row %04d ', k) || hex(zeroblob(400)) FROM n"
        );
        db.execute(Statement::new(fill)).await.unwrap();
        cluster.wait_equal().await;
        cluster.stop().await;
        cluster
    }

    fn config(&self, number: usize) -> NodeConfig {
        let name = format!("n{number}");
        let mut config = NodeConfig::member(self.folder.path().join(&name), &name, self.members.clone()).unwrap();
        config.heartbeat_interval = Duration::from_millis(50);
        config.election_timeout = Duration::from_millis(400);
        config.checkpoint_entries = 50;
        config.log_entries_to_keep = 20;
        config.scrub_interval = self.scrub_interval;
        config
    }

    async fn start(&mut self) {
        for number in 0..self.members.len() {
            self.nodes.push(Node::start(self.config(number)).await.unwrap());
        }
        for node in &self.nodes {
            node.wait_for_leader(PATIENCE).await.unwrap();
        }
    }

    async fn stop(&mut self) {
        for node in self.nodes.drain(..) {
            node.shutdown().await.unwrap();
        }
    }

    fn file(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("n{number}/db/app.sqlite"))
    }

    /// Flips a bit in the row [`HIT`] of a node's file; what has to be told of it.
    fn damage(&self, number: usize) -> PageDamage {
        let path = self.file(number);
        let mut bytes = std::fs::read(&path).unwrap();
        let text = format!("row {HIT:04} ");
        let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
        bytes[at + 2] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let page = (at / 4096) as u32 + 1;
        assert!(page > 2);
        PageDamage { path, page, offset: u64::from(page - 1) * 4096 }
    }

    /// Node 0 leads.
    async fn lead_with_the_first(&self) {
        until("node 0 leads", async || {
            for node in &self.nodes {
                if node.leadership().borrow().writable_here && node.id() != self.nodes[0].id() {
                    let _ = node.transfer_leader(Some(self.nodes[0].id())).await;
                }
            }
            self.nodes[0].leadership().borrow().writable_here
        })
        .await;
    }

    async fn wait_equal(&self) {
        until("all nodes are equal", async || {
            let states: Vec<_> = self
                .nodes
                .iter()
                .map(|node| node.database_statistics("app").map(|now| (now.version, now.state_hash)))
                .collect();
            states[0].is_some() && states.windows(2).all(|pair| pair[0] == pair[1])
        })
        .await;
    }
}

async fn row(node: &Node, key: i64) -> Result<String, ReadError> {
    let statement = Statement::new("SELECT substr(v, 1, 8) FROM t WHERE k = ?").bind(key);
    let rows = node.database("app").query(statement, ReadConsistency::Local).await?;
    match &rows[0][0] {
        Value::Text(text) => Ok(text.clone()),
        other => panic!("{other:?}"),
    }
}

/// Until it is acknowledged.
async fn update(node: &Node, key: i64, text: &str) {
    let start = Instant::now();
    loop {
        let statement = Statement::new("UPDATE t SET v = ? || substr(v, 9) WHERE k = ?").bind(text).bind(key);
        match node.database("app").execute(statement).await {
            Ok(done) => return assert_eq!(done.rows_affected, 1),
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
    }
}

fn metric(node: &Node, name: &str) -> f64 {
    let metrics = node.metrics();
    let family = metrics.get(name).unwrap();
    match family.samples[0].value {
        raft_sqlite::metrics::MetricValue::Number(value) => value,
        ref other => panic!("{other:?}"),
    }
}

/// One flipped bit on the leader must not stop its followers, who have computed their state hash on whole pages.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_with_a_damaged_page_proposes_nothing_of_it_and_hands_over() {
    let mut cluster = Cluster::filled(3).await;
    let damage = cluster.damage(0);
    let file = std::fs::read(&damage.path).unwrap();
    cluster.start().await;
    cluster.lead_with_the_first().await;
    update(&cluster.nodes[0], 1, "before..").await;

    let error = cluster.nodes[0]
        .database("app")
        .write(|context| context.connection().execute("UPDATE t SET v = 'x' WHERE k = ?", [HIT]))
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Fatal);
    assert!(matches!(&error, WriteError::Damaged(told) if *told == damage), "{error}");
    for text in ["app.sqlite is damaged", &format!("page {}, from byte {}", damage.page, damage.offset)] {
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(cluster.nodes[0].status().damaged, Some(damage.clone()));
    until("another node leads", async || {
        cluster.nodes[1..].iter().any(|node| node.leadership().borrow().writable_here)
    })
    .await;

    // It follows on, as long as nothing is changed on that page; and it never leads for long.
    update(&cluster.nodes[1], 2, "between.").await;
    cluster.wait_equal().await;
    assert!(cluster.nodes[0].status().broken.is_none());
    update(&cluster.nodes[1], HIT, "changed.").await;
    update(&cluster.nodes[2], 3, "after...").await;
    until("the damaged node says so", async || cluster.nodes[0].status().broken.is_some()).await;
    let told = cluster.nodes[0].status().broken.unwrap();
    assert!(told.contains("app.sqlite is damaged"), "{told}");
    for node in &cluster.nodes[1..] {
        assert!(node.status().broken.is_none() && node.status().damaged.is_none());
        until("the followers have all of it", async || {
            row(node, 3).await.unwrap() == "after..." && row(node, HIT).await.unwrap() == "changed."
        })
        .await;
        assert_eq!(row(node, 1).await.unwrap(), "before..");
        assert_eq!(row(node, 2).await.unwrap(), "between.");
        node.verify_database("app").await.unwrap();
    }

    // What the text says: stop it, remove it, empty its data directory (here: keep it elsewhere), add it again.
    let broken = cluster.nodes.remove(0);
    let gone = broken.id();
    let _ = broken.shutdown().await;
    let folder = cluster.folder.path().join("n0");
    let kept = cluster.folder.path().join("kept");
    assert_eq!(std::fs::read(&damage.path).unwrap().len(), file.len());
    std::fs::rename(&folder, &kept).unwrap();
    until("it is removed", async || cluster.nodes[0].remove_member(gone).await.is_ok()).await;
    let mut config = cluster.config(0);
    let contacts = cluster.members[1].peer_urls.clone();
    config.cluster = ClusterStart::Join { contacts, voter: true };
    let node = Node::start(config).await.unwrap();
    node.wait_for_leader(PATIENCE).await.unwrap();
    cluster.nodes.insert(0, node);
    cluster.wait_equal().await;
    assert_eq!(row(&cluster.nodes[0], HIT).await.unwrap(), "changed.");
    cluster.nodes[0].verify_database("app").await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_needs_a_damaged_page_says_so_and_others_go_on() {
    let mut cluster = Cluster::filled(1).await;
    let damage = cluster.damage(0);
    let file = std::fs::read(&damage.path).unwrap();
    cluster.start().await;
    let node = &cluster.nodes[0];
    let error = row(node, HIT).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Fatal);
    assert!(matches!(&error, ReadError::Damaged(told) if *told == damage), "{error}");
    assert_eq!(row(node, 1).await.unwrap(), "row 0001");
    let error = node.verify_database("app").await.unwrap_err();
    assert!(matches!(&error, ReadError::Damaged(told) if *told == damage), "{error}");
    assert!(matches!(node.verify_database("none").await, Err(ReadError::NoSuchDatabase(_))));
    // Alone, it serves what is whole, and takes what does not need the page.
    update(node, 1, "changed.").await;
    assert_eq!(row(node, 1).await.unwrap(), "changed.");
    cluster.stop().await;
    let page = damage.offset as usize..damage.offset as usize + 4096;
    assert_eq!(std::fs::read(&damage.path).unwrap()[page.clone()], file[page]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_what_nobody_has_read_yet() {
    let mut cluster = Cluster::filled(3).await;
    cluster.damage(0);
    cluster.scrub_interval = Some(Duration::from_millis(50));
    cluster.start().await;
    until("the damage is found", async || {
        metric(&cluster.nodes[0], "raft_sqlite_database_damaged_pages") == 1.0
            && metric(&cluster.nodes[0], "raft_sqlite_scrubs_failed_total") >= 1.0
    })
    .await;
    assert!(metric(&cluster.nodes[0], "raft_sqlite_scrubbed_pages_total") > 10.0);
    until("the others are read, too", async || metric(&cluster.nodes[1], "raft_sqlite_scrubs_total") >= 2.0).await;
    assert_eq!(metric(&cluster.nodes[1], "raft_sqlite_scrubs_failed_total"), 0.0);
    assert!(cluster.nodes[0].status().broken.is_none());
    until("another node leads", async || {
        cluster.nodes[1..].iter().any(|node| node.leadership().borrow().writable_here)
    })
    .await;
    update(&cluster.nodes[0], 1, "changed.").await;
    cluster.stop().await;
}

fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << (at % 8))], at).unwrap();
}

/// Every file of a data directory, at rest: a start names what is damaged, or everything is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_file_of_a_stopped_node_is_told_or_without_effect() {
    let mut cluster = Cluster::filled(1).await;
    let root = cluster.folder.path().join("n0");
    let mut paths: Vec<PathBuf> = ["node.json", "db/catalog.json", "db/app.sqlite", "db/app.applied", "db/app.sums"]
        .map(|name| root.join(name))
        .to_vec();
    for entry in std::fs::read_dir(root.join("log")).unwrap() {
        paths.push(entry.unwrap().path());
    }
    let names: Vec<&str> = paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert!(names.contains(&"vote") && names.contains(&"segment-0000000001"), "{names:?}");
    let (mut told, mut harmless) = (Vec::new(), 0);
    for path in &paths {
        let name = path.file_name().unwrap().to_str().unwrap();
        let length = std::fs::metadata(path).unwrap().len();
        let places = [0, 9, 17, 70, 515, 4096, 4100, 4200].into_iter().filter(|at| *at < length);
        for at in places {
            flip(path, at);
            let length = std::fs::metadata(path).unwrap().len();
            match Node::start(cluster.config(0)).await {
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains(name), "{name}, byte {at}: {text}");
                    assert!(text.contains("damaged") || text.contains("format version"), "{name}, byte {at}: {text}");
                    assert_eq!(std::fs::metadata(path).unwrap().len(), length);
                    flip(path, at);
                    told.push(name);
                }
                Ok(node) => {
                    node.wait_for_leader(PATIENCE).await.unwrap();
                    for key in [1, HIT, ROWS] {
                        match row(&node, key).await {
                            Ok(text) => assert_eq!(text, format!("row {key:04}")),
                            Err(error) => assert!(matches!(error, ReadError::Damaged(_)), "{name}, byte {at}: {error}"),
                        }
                    }
                    let verified = node.verify_database("app").await;
                    assert_eq!(verified.is_err(), name == "app.sqlite", "{name}, byte {at}: {verified:?}");
                    node.shutdown().await.unwrap();
                    if name == "app.sqlite" {
                        flip(path, at);
                        told.push(name);
                    } else {
                        harmless += 1;
                    }
                }
            }
        }
    }
    // Of the applied mark, either slot does here: both are of one state.
    for name in ["node.json", "catalog.json", "app.sqlite", "app.sums", "segment-0000000001"] {
        assert!(told.contains(&name), "no bit of {name} was found: {told:?}");
    }
    assert!(harmless > 0);
    cluster.start().await;
    cluster.nodes[0].verify_database("app").await.unwrap();
    cluster.stop().await;
}
