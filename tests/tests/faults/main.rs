//! Faults and bad input, shown on the real program: full disks, damaged files, wrong flags, lost data, requests that are too large,
//! certificates that do not fit. After each fault the cluster must hold every acknowledged write, and the nodes' files must be equal.

mod command_line;
mod disk_full;
mod lost_data;
mod refused_start;
mod requests;
mod tls;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use raft_sqlite_tests::cluster::{Cluster, ServerNode};
use raft_sqlite_tests::ledger::Ledger;
use raft_sqlite_tests::{etcd, wait};
use tokio::task::JoinHandle;

/// One cluster at a time: each has three processes, and machines have few processors.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Flags that make things happen soon.
const QUICK: &[&str] = &["--election-timeout", "500", "--heartbeat-interval", "50"];

/// Writes key after key, each once, through the nodes in turn, until it is stopped.
struct Writer {
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Writer {
    fn start(cluster: &Cluster, ledger: &Arc<Ledger>, prefix: &str, value_bytes: usize) -> Writer {
        let stop = Arc::new(AtomicBool::new(false));
        let urls: Vec<String> = cluster.nodes.iter().map(|node| node.client_url.clone()).collect();
        let task = tokio::spawn(write_until(stop.clone(), ledger.clone(), urls, prefix.to_owned(), value_bytes));
        Writer { stop, task }
    }

    async fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        Ok(self.task.await?)
    }
}

async fn write_until(stop: Arc<AtomicBool>, ledger: Arc<Ledger>, urls: Vec<String>, prefix: String, size: usize) {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let url = &urls[number as usize % urls.len()];
        if put(&ledger, url, &format!("{prefix}{number:06}"), number, size).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

/// Writes a key through a node, and books it.
async fn put(ledger: &Ledger, url: &str, key: &str, value: u64, size: usize) -> Result<()> {
    let channel = etcd::connect(url).await?;
    ledger.sending(key, value);
    let padding = "x".repeat(size);
    etcd::put(&channel, key, &format!("{value} {padding}")).await?;
    ledger.acknowledged(key, value);
    Ok(())
}

/// Writes `count` keys through all nodes in turn, each until it is acknowledged.
async fn put_all(cluster: &Cluster, ledger: &Ledger, prefix: &str, count: u64) -> Result<()> {
    put_through(&cluster.nodes, ledger, prefix, count).await
}

/// The same through these nodes.
async fn put_through(nodes: &[ServerNode], ledger: &Ledger, prefix: &str, count: u64) -> Result<()> {
    for number in 1..=count {
        let node = &nodes[number as usize % nodes.len()];
        let key = format!("{prefix}{number:06}");
        wait::until("a write", || put(ledger, &node.client_url, &key, number, 10)).await?;
    }
    Ok(())
}

/// Waits until `count` more keys are acknowledged.
async fn wait_for_more(ledger: &Ledger, count: usize) -> Result<()> {
    let before = ledger.acknowledged_count();
    wait::until("more acknowledged writes", || async {
        let now = ledger.acknowledged_count();
        if now >= before + count { Ok(()) } else { bail!("{} of {count}", now - before) }
    })
    .await
}

/// Makes a node lead that may: a leader that stops hands over to the member whose log is furthest, so those that may not lead miss an
/// entry before.
async fn choose_leader(cluster: &mut Cluster, may_lead: impl Fn(usize) -> bool) -> Result<usize> {
    for number in 0..20 {
        let leader = cluster.leader().await?;
        if may_lead(leader) {
            return Ok(leader);
        }
        let mut stopped: Vec<usize> = (0..cluster.nodes.len()).filter(|index| !may_lead(*index)).collect();
        stopped.retain(|index| *index != leader);
        for index in &stopped {
            cluster.stop(*index)?;
        }
        let url = cluster.nodes[leader].client_url.clone();
        let value = number.to_string();
        wait::until("a write", || async { etcd::put(&etcd::connect(&url).await?, "choice", &value).await }).await?;
        cluster.stop(leader)?;
        stopped.push(leader);
        for index in &stopped {
            cluster.spawn(*index)?;
        }
        cluster.wait_ready().await?;
    }
    bail!("the wrong nodes are elected again and again\n{}", cluster.logs())
}
