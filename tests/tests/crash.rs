//! kill -9 of a random node every few seconds, under writes through all nodes.
//!
//! Every acknowledged write must be there at the end, on every node; no key may hold a value that was never written; each
//! database file must pass SQLite's integrity check and be equal, byte for byte, on all nodes.
//!
//! CRASH_SECONDS (default 60) and CRASH_SEED choose the run; the seed is printed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use raft_sqlite_tests::cluster::{Cluster, SERVER_VARIABLE};
use raft_sqlite_tests::etcd;
use raft_sqlite_tests::ledger::{Ledger, stop_and_compare};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const NODES: usize = 3;
const WRITERS: usize = 12;

async fn writer(
    number: usize,
    urls: Vec<String>,
    ledger: Arc<Ledger>,
    failures: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    seed: u64,
) {
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
        ledger.sending(&key, value);
        match etcd::put(open, &key, &value.to_string()).await {
            Ok(_) => ledger.acknowledged(&key, value),
            Err(_) => {
                failures.fetch_add(1, Ordering::Relaxed);
                channel = None;
            }
        }
    }
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
    let ledger = Arc::new(Ledger::default());
    let failures = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| tokio::spawn(writer(number, urls.clone(), ledger.clone(), failures.clone(), stop.clone(), seed)))
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
    let acknowledged = ledger.acknowledged_count();
    println!(
        "{kills} kills; {acknowledged} keys acknowledged, {} failed writes, highest values add up to {}",
        failures.load(Ordering::Relaxed),
        ledger.sent_sum()
    );
    ensure!(acknowledged > WRITERS, "hardly anything was written: the test tests nothing");

    ledger.check_nodes(&cluster, "crash/").await?;
    if std::env::var_os(SERVER_VARIABLE).is_none() {
        stop_and_compare(&mut cluster).await?;
    }
    Ok(())
}
