//! kill -9 of a random node every few seconds, under writes through all nodes.
//!
//! Every acknowledged write must be there at the end, on every node; no key may hold a value that was never written; each
//! database file must pass SQLite's integrity check and be equal, byte for byte, on all nodes.
//!
//! CRASH_SECONDS (default 60) and CRASH_SEED choose the run; the seed is printed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use parking_lot::Mutex;
use raft_sqlite_tests::cluster::{Cluster, SERVER_VARIABLE};
use raft_sqlite_tests::{etcd, wait};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const NODES: usize = 3;
const WRITERS: usize = 12;

/// What the writers know.
#[derive(Default)]
struct Book {
    /// Key to the value of its last acknowledged write.
    acknowledged: Mutex<BTreeMap<String, u64>>,
    /// Key to the highest value that was ever sent.
    sent: Mutex<BTreeMap<String, u64>>,
    failures: AtomicU64,
}

async fn writer(number: usize, urls: Vec<String>, book: Arc<Book>, stop: Arc<AtomicBool>, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed ^ ((number as u64 + 1) << 32));
    let mut value = 0;
    let mut channel = None;
    while !stop.load(Ordering::Relaxed) {
        let url = &urls[random.random_range(0..urls.len())];
        if channel.is_none() || random.random_range(0..50) == 0 {
            channel = etcd::connect(url).await.ok();
        }
        let Some(open) = &channel else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        // Each writer has its own keys and writes rising values, so that the newest acknowledged one must never be undercut.
        let key = format!("crash/{number:02}/{}", random.random_range(0..20));
        value += 1;
        book.sent.lock().insert(key.clone(), value);
        match etcd::put(open, &key, &value.to_string()).await {
            Ok(_) => {
                book.acknowledged.lock().insert(key, value);
            }
            Err(_) => {
                book.failures.fetch_add(1, Ordering::Relaxed);
                channel = None;
            }
        }
    }
}

fn check(book: &Book, found: &[(String, String)], where_from: &str) -> Result<()> {
    let found: BTreeMap<&str, u64> = found
        .iter()
        .map(|(key, value)| Ok((key.as_str(), value.parse()?)))
        .collect::<Result<_>>()
        .context("a value that no writer wrote")?;
    for (key, value) in book.acknowledged.lock().iter() {
        match found.get(key.as_str()) {
            None => bail!("{where_from}: {key} = {value} was acknowledged and is lost"),
            Some(there) if there < value => {
                bail!("{where_from}: {key} = {value} was acknowledged, {there} is there")
            }
            Some(_) => {}
        }
    }
    for (key, value) in &found {
        let sent = book.sent.lock().get(*key).copied().unwrap_or(0);
        ensure!(*value <= sent, "{where_from}: {key} = {value}, but only {sent} was ever sent");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_kills() -> Result<()> {
    let seconds: u64 = std::env::var("CRASH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let seed: u64 = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("CRASH_SEED={seed} CRASH_SECONDS={seconds}");
    let mut random = StdRng::seed_from_u64(seed);
    // Small checkpoints and a short election: more happens in a minute.
    let mut cluster = Cluster::start_with(
        NODES,
        &["--snapshot-count", "500", "--election-timeout", "500", "--heartbeat-interval", "50"],
    )
    .await?;
    let urls: Vec<String> = cluster.nodes.iter().map(|node| node.client_url.clone()).collect();
    let book = Arc::new(Book::default());
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| tokio::spawn(writer(number, urls.clone(), book.clone(), stop.clone(), seed)))
        .collect();

    let start = Instant::now();
    let mut kills = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_millis(random.random_range(500..3000))).await;
        // Mostly one node, sometimes the leader on purpose, sometimes all at once.
        let victims: Vec<usize> = match random.random_range(0..10) {
            0 => (0..NODES).collect(),
            1..=4 => vec![cluster.leader().await?],
            _ => vec![random.random_range(0..NODES)],
        };
        for index in 0..NODES {
            ensure!(cluster.is_running(index), "{} ended by itself\n{}", cluster.nodes[index].name, cluster.logs());
        }
        for victim in &victims {
            cluster.kill(*victim)?;
            kills += 1;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..1500))).await;
        for victim in &victims {
            cluster.spawn(*victim)?;
        }
        for victim in victims {
            cluster.wait_node_ready(victim).await?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await?;
    }
    let acknowledged = book.acknowledged.lock().len();
    let written: u64 = book.sent.lock().values().sum();
    println!(
        "{kills} kills; {acknowledged} keys acknowledged, {} failed writes, highest values add up to {written}",
        book.failures.load(Ordering::Relaxed)
    );
    ensure!(acknowledged > WRITERS, "hardly anything was written: the test tests nothing");

    let mut contents = Vec::new();
    for url in &urls {
        let found = wait::until("a linearizable list", || async {
            let channel = etcd::connect(url).await?;
            etcd::get_prefix(&channel, "crash/").await
        })
        .await?;
        check(&book, &found, url)?;
        contents.push(found);
    }
    ensure!(contents.windows(2).all(|pair| pair[0] == pair[1]), "the nodes list different states");

    // Followers first, so that the leader's last entries reach everybody: then all stop cleanly, and the files must be equal.
    if std::env::var_os(SERVER_VARIABLE).is_none() {
        wait::until("all nodes at the same applied index", || async {
            let mut indexes = Vec::new();
            for url in &urls {
                indexes.push(etcd::status(url).await?.raft_applied_index);
            }
            ensure!(indexes.windows(2).all(|pair| pair[0] == pair[1]), "applied {indexes:?}");
            Ok(())
        })
        .await?;
        let mut files = Vec::new();
        for index in 0..NODES {
            cluster.stop(index)?;
        }
        for node in &cluster.nodes {
            let path = node.data_dir.join("db/etcd.sqlite");
            ensure!(!path.with_extension("sqlite-wal").exists(), "{}: a WAL is left", path.display());
            let connection = rusqlite::Connection::open(&path)?;
            let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
            ensure!(verdict == "ok", "{}: {verdict}", path.display());
            drop(connection);
            files.push(std::fs::read(&path)?);
        }
        ensure!(files.windows(2).all(|pair| pair[0] == pair[1]), "the database files differ");
    }
    Ok(())
}
