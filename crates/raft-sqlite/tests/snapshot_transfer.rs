//! What sending a snapshot costs, measured: `cargo test --release -p raft-sqlite --test snapshot_transfer -- --ignored --nocapture`.
//!
//! A leader with SIZE_MIB (2,048) of incompressible rows takes random updates from 16 clients; a new member, in a process of its own, joins.
//! Then it is stopped, 1 % of the pages change, and it comes back.

#![allow(clippy::unwrap_used)]

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use raft_sqlite::{ClusterStart, InitialMember, Node, NodeConfig, WriteError};

const CLIENTS: u64 = 16;
const PATIENCE: Duration = Duration::from_secs(600);
/// One row a page.
const ROW_BYTES: u64 = 3_900;

fn free_url() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn rss_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn configured(mut config: NodeConfig) -> NodeConfig {
    config.log_entries_to_keep = 1_000;
    config
}

/// The other member; a process of its own, told by its environment.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the measurement"]
async fn joining_member() {
    let (Ok(contact), Ok(url), Ok(folder)) =
        (std::env::var("CONTACT"), std::env::var("OWN_URL"), std::env::var("FOLDER"))
    else {
        return;
    };
    let mut config = configured(NodeConfig::single(folder));
    config.name = "joining".into();
    config.listen_peers = vec![url.trim_start_matches("http://").to_owned()];
    config.advertise_peer_urls = vec![url];
    config.cluster = ClusterStart::Join { contacts: vec![contact], voter: false };
    let node = Node::start(config).await.unwrap();
    // Until the measurement closes it.
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
    node.shutdown().await.unwrap();
}

fn join(contact: &str, url: &str, folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "joining_member", "--nocapture"])
        .envs([("CONTACT", contact), ("OWN_URL", url)])
        .env("FOLDER", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

async fn leave(mut member: Child) {
    drop(member.stdin.take());
    tokio::task::spawn_blocking(move || member.wait()).await.unwrap().unwrap();
}

/// Updates one random row after the other until told to stop; how long each took.
async fn write(node: Node, rows: u64, seed: u64, stop: Arc<AtomicBool>, pause: Duration) -> Vec<(Instant, Duration)> {
    let db = node.database("app");
    let mut times = Vec::new();
    let mut state = seed * 0x9E37_79B9_7F4A_7C15 + 1;
    while !stop.load(Ordering::Relaxed) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let key = state % rows;
        let began = Instant::now();
        let done: Result<usize, WriteError<rusqlite::Error>> = db
            .write(move |context| {
                let sql = "UPDATE t SET v = randomblob(?) WHERE k = ?";
                context.connection().prepare_cached(sql)?.execute((ROW_BYTES as i64, key as i64))
            })
            .await;
        assert_eq!(done.unwrap(), 1);
        times.push((began, began.elapsed()));
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
    times
}

use raft_sqlite::rusqlite;

fn percentiles(what: &str, times: &[(Instant, Duration)], from: Instant, to: Instant) -> Duration {
    let mut times: Vec<Duration> =
        times.iter().filter(|(at, _)| *at >= from && *at < to).map(|(_, time)| *time).collect();
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!(
        "{what}: {} writes in {:.1} s, {:.0} a second; p50 {:.2?}, p99 {:.2?}, p99.9 {:.2?}, longest {:.2?}",
        times.len(),
        (to - from).as_secs_f64(),
        times.len() as f64 / (to - from).as_secs_f64(),
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0)
    );
    at(0.99)
}

async fn transferred(leader: &Node, completed: u64) {
    let began = Instant::now();
    while leader.snapshot_statistics().completed < completed {
        assert!(began.elapsed() < PATIENCE, "the transfer does not end: {:?}", leader.snapshot_statistics());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: minutes, and gigabytes of disk"]
async fn what_a_transfer_costs() {
    let rows = setting("SIZE_MIB", 2_048) * 256;
    let pause = Duration::from_micros(setting("PAUSE_US", 0));
    let folder = tempfile::tempdir_in(std::env::var("MEASURE_IN").unwrap_or_else(|_| "/root".into())).unwrap();
    let url = free_url();
    let member = InitialMember { name: "leader".into(), peer_urls: vec![url.clone()] };
    let config = NodeConfig::member(folder.path().join("leader"), "leader", vec![member]).unwrap();
    let leader = Node::start(configured(config)).await.unwrap();
    leader.wait_for_leader(PATIENCE).await.unwrap();
    let db = leader.database("app");
    db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").await.unwrap();
    for first in (0..rows).step_by(4096) {
        let last = rows.min(first + 4096);
        db.write(move |context| {
            let connection = context.connection();
            let mut insert = connection.prepare_cached("INSERT INTO t VALUES (?, randomblob(?))")?;
            (first..last).try_for_each(|key| insert.execute((key as i64, ROW_BYTES as i64)).map(drop))
        })
        .await
        .unwrap();
    }
    let size = leader.database_statistics("app").unwrap().size_bytes;
    println!("database: {} MiB, {CLIENTS} clients, pause {pause:?}", size >> 20);

    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> =
        (0..CLIENTS).map(|seed| tokio::spawn(write(leader.clone(), rows, seed + 1, stop.clone(), pause))).collect();
    // What the leader's process takes, and its page images.
    let (rss, images) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let sampler = tokio::spawn({
        let (rss, images, stop, leader) = (rss.clone(), images.clone(), stop.clone(), leader.clone());
        async move {
            while !stop.load(Ordering::Relaxed) {
                rss.fetch_max(rss_bytes(), Ordering::Relaxed);
                images.fetch_max(leader.database_statistics("app").unwrap().memory_bytes, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(10)).await;
    let take = |what: &str| {
        let (rss, images) = (rss.swap(0, Ordering::Relaxed), images.swap(0, Ordering::Relaxed));
        println!("{what}: resident {} MiB at most, page images {} MiB at most", rss >> 20, images >> 20);
        rss
    };
    take("first 10 s");
    let quiet = Instant::now();
    tokio::time::sleep(Duration::from_secs(20)).await;
    let rss_quiet = take("without a transfer");
    let began = Instant::now();
    let own_url = free_url();
    let joining = join(&url, &own_url, &folder.path().join("joining"));
    transferred(&leader, 1).await;
    let ended = Instant::now();
    let rss_sending = take("during the transfer");
    tokio::time::sleep(Duration::from_secs(5)).await;
    stop.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for client in clients {
        times.extend(client.await.unwrap());
    }
    sampler.await.unwrap();
    let before = percentiles("without a transfer", &times, quiet, began);
    let during = percentiles("during the transfer", &times, began, ended);
    println!(
        "transfer: {:.1} s, {:?}; log {:?}",
        (ended - began).as_secs_f64(),
        leader.snapshot_statistics(),
        leader.log_statistics().segment_bytes >> 20
    );
    println!("growth of the leader: {} MiB", rss_sending.saturating_sub(rss_quiet) >> 20);
    println!("p99 {:.2} times that without a transfer", during.as_secs_f64() / before.as_secs_f64());

    // It catches up, is stopped, 1 % of the pages change, it comes back.
    tokio::time::sleep(Duration::from_secs(15)).await;
    leave(joining).await;
    let changed = rows / 100;
    for key in (0..rows).step_by(100) {
        db.write(move |context| {
            let sql = "UPDATE t SET v = randomblob(?) WHERE k = ?";
            context.connection().prepare_cached(sql)?.execute((ROW_BYTES as i64, key as i64))
        })
        .await
        .unwrap();
    }
    // Until the log no longer reaches back.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let before = leader.snapshot_statistics();
    let began = Instant::now();
    let joining = join(&url, &own_url, &folder.path().join("joining"));
    transferred(&leader, before.completed + 1).await;
    let after = leader.snapshot_statistics();
    println!(
        "1 %: {changed} pages ({} KiB) changed of {} MiB; {} pages and {} KiB sent in {:.1} s",
        changed * 4,
        size >> 20,
        after.sent_pages - before.sent_pages,
        (after.sent_bytes - before.sent_bytes) >> 10,
        began.elapsed().as_secs_f64()
    );
    leave(joining).await;
    leader.shutdown().await.unwrap();
}
