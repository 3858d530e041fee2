//! Nodes whose disk is full: docs/adr/0003.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use raft_sqlite_tests::cluster::Cluster;
use raft_sqlite_tests::disk::SmallDisk;
use raft_sqlite_tests::ledger::{Ledger, stop_and_compare};
use raft_sqlite_tests::{etcd, wait};
use tonic::Code;

use crate::{ONE_AT_A_TIME, QUICK, Writer, choose_leader, put, put_all, wait_for_more};

/// Two log segments, the database, its WAL, and more.
const DISK_MIB: u64 = 160;
/// A few hundred fill the segments of the log, whose room is reserved.
const VALUE_BYTES: usize = 128 * 1024;
const NO_ROOM: &str = "no space is left for the log: entries are kept in memory";
const ROOM_AGAIN: &str = "there is space for the log again";

/// A cluster some of whose nodes have small disks. None: not possible here.
async fn start(small: &[usize]) -> Result<Option<(Cluster, Vec<SmallDisk>)>> {
    let mut cluster = Cluster::prepare(3, QUICK)?;
    let mut disks = Vec::new();
    for index in small {
        let Some(disk) = SmallDisk::mount(&cluster.nodes[*index].data_dir, DISK_MIB)? else { return Ok(None) };
        disks.push(disk);
    }
    for index in 0..cluster.nodes.len() {
        cluster.spawn(index)?;
    }
    cluster.wait_ready().await?;
    Ok(Some((cluster, disks)))
}

/// Reads one key from the node's own state.
async fn read_here(url: &str, key: &str) -> Result<()> {
    etcd::get(&etcd::connect(url).await?, key, true).await?.context("the key is not there").map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_follower_holds_up_nobody_and_catches_up_by_itself() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some((mut cluster, disks)) = start(&[0]).await? else { return Ok(()) };
    choose_leader(&mut cluster, |leader| leader != 0).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "disk/small/", 20).await?;
    disks[0].fill()?;

    let writer = Writer::start(&cluster, &ledger, "disk/big/", VALUE_BYTES);
    cluster.wait_logged(0, NO_ROOM).await?;
    // The others go on, also through the node that is full; it answers reads of what it has.
    wait_for_more(&ledger, 30).await?;
    read_here(&cluster.nodes[0].client_url, "disk/small/000001").await?;
    // Killed and started on the full disk, it is there again.
    cluster.kill(0)?;
    cluster.spawn(0)?;
    cluster.wait_node_ready(0).await?;
    wait_for_more(&ledger, 10).await?;
    read_here(&cluster.nodes[0].client_url, "disk/small/000001").await?;
    writer.stop().await?;
    ensure!((0..3).all(|index| cluster.is_running(index)), "{}", cluster.logs());

    disks[0].free()?;
    ledger.check_nodes(&cluster, "disk/").await?;
    put_all(&cluster, &ledger, "disk/after/", 20).await?;
    ledger.check_nodes(&cluster, "disk/").await?;
    stop_and_compare(&mut cluster).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_leader_hands_over() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some((mut cluster, disks)) = start(&[0]).await? else { return Ok(()) };
    choose_leader(&mut cluster, |leader| leader == 0).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "disk/small/", 20).await?;
    disks[0].fill()?;

    let writer = Writer::start(&cluster, &ledger, "disk/big/", VALUE_BYTES);
    cluster.wait_logged(0, NO_ROOM).await?;
    wait::until("another leader", || async {
        let leader = cluster.leader().await?;
        if leader == 0 { bail!("{}", cluster.logs()) } else { Ok(()) }
    })
    .await?;
    wait_for_more(&ledger, 30).await?;
    read_here(&cluster.nodes[0].client_url, "disk/small/000001").await?;
    writer.stop().await?;
    ensure!((0..3).all(|index| cluster.is_running(index)), "{}", cluster.logs());

    disks[0].free()?;
    cluster.wait_logged(0, ROOM_AGAIN).await?;
    ledger.check_nodes(&cluster, "disk/").await?;
    put_all(&cluster, &ledger, "disk/after/", 20).await?;
    ledger.check_nodes(&cluster, "disk/").await?;
    stop_and_compare(&mut cluster).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_all_disks_full_writes_are_refused_and_reads_answered() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some((mut cluster, disks)) = start(&[0, 1, 2]).await? else { return Ok(()) };
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "disk/small/", 20).await?;
    for disk in &disks {
        disk.fill()?;
    }
    let writer = Writer::start(&cluster, &ledger, "disk/big/", VALUE_BYTES);
    for index in 0..3 {
        cluster.wait_logged(index, NO_ROOM).await?;
    }
    writer.stop().await?;
    for node in &cluster.nodes {
        // Refused at once and with etcd's words, whoever is asked.
        wait::until("a write refused for want of room", || async {
            let Err(error) = put(&ledger, &node.client_url, "disk/refused", 1, 10).await else {
                bail!("it was acknowledged")
            };
            match etcd::grpc_status(&error).map(|status| (status.code(), status.message())) {
                Some((Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded")) => Ok(()),
                _ => Err(error),
            }
        })
        .await
        .with_context(|| cluster.logs())?;
        read_here(&node.client_url, "disk/small/000001").await?;
        let channel = etcd::connect(&node.client_url).await?;
        let linearizable = etcd::get(&channel, "disk/small/000001", false).await.with_context(|| cluster.logs())?;
        ensure!(linearizable.is_some(), "a linearizable read found nothing");
    }
    ensure!((0..3).all(|index| cluster.is_running(index)), "{}", cluster.logs());

    for disk in &disks {
        disk.free()?;
    }
    put_all(&cluster, &ledger, "disk/after/", 20).await?;
    ledger.check_nodes(&cluster, "disk/").await?;
    stop_and_compare(&mut cluster).await
}
