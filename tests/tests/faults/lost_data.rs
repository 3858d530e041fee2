//! Members whose data directory was emptied or went back to an older state: docs/adr/0006.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kine_adapter::proto::etcdserverpb::cluster_client::ClusterClient;
use kine_adapter::proto::etcdserverpb::{Member, MemberListRequest};
use raft_sqlite_tests::cluster::{Cluster, program};
use raft_sqlite_tests::ledger::{Ledger, stop_and_compare};
use raft_sqlite_tests::{disk, etcd, wait};

use crate::{ONE_AT_A_TIME, QUICK, choose_leader, put_all, put_through};

const LOST: &str = "has already taken part in this cluster";
const REMEDY: &str = "--initial-cluster-state existing";

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_member_is_refused_and_comes_back_as_a_new_one() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "lost/", 30).await?;
    wait_started(&cluster).await?;
    choose_leader(&mut cluster, |leader| leader != 2).await?;
    cluster.kill(2)?;
    let data_dir = cluster.nodes[2].data_dir.clone();
    std::fs::rename(&data_dir, cluster.folder().join("lost"))?;

    // With either state, and again when the first refusal has left a data directory without a log.
    let mut existing = cluster.flags(2);
    existing.insert("initial-cluster-state".into(), "existing".into());
    for flags in [&existing, &cluster.flags(2), &existing, &cluster.flags(2)] {
        let (code, text) = cluster.refusal(flags).await?;
        ensure!(code == Some(1) && text.contains(LOST) && text.contains(REMEDY), "{code:?}: {text}");
    }
    put_through(&cluster.nodes[..2], &ledger, "lost/without/", 10).await?;

    // What the text says: removed, then added under a new id.
    let id = member_id(&cluster, "n3").await?;
    let endpoint = cluster.nodes[0].client_url.clone();
    let removed =
        std::process::Command::new(program()?).args(["member", "remove", &id, "--endpoints", &endpoint]).output()?;
    ensure!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    if data_dir.exists() {
        std::fs::rename(&data_dir, cluster.folder().join("refused"))?;
    }
    // With the old flags it would be the member that was removed.
    let (code, text) = cluster.refusal(&cluster.flags(2)).await?;
    ensure!(code == Some(1) && text.contains("it was removed") && text.contains(REMEDY), "{code:?}: {text}");
    std::fs::rename(&data_dir, cluster.folder().join("refused again"))?;
    cluster.spawn_with(2, &existing)?;
    cluster.wait_node_ready(2).await?;
    ensure!(member_id(&cluster, "n3").await? != id, "the member came back under its old id");
    put_all(&cluster, &ledger, "lost/after/", 20).await?;
    ledger.check_nodes(&cluster, "lost/").await?;
    stop_and_compare(&mut cluster).await
}

/// The emptied member, and a peer that lags behind: together they must not make a leader.
#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_member_makes_no_leader_of_a_node_that_lags() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "lag/", 10).await?;
    wait_started(&cluster).await?;
    choose_leader(&mut cluster, |leader| leader == 0).await?;
    // n2 misses what n1 and n3 acknowledge. Then n3 loses everything while n1 is down.
    cluster.stop(1)?;
    put_through(&cluster.nodes[..1], &ledger, "lag/missed/", 10).await?;
    cluster.kill(2)?;
    cluster.kill(0)?;
    let data_dir = cluster.nodes[2].data_dir.clone();
    std::fs::rename(&data_dir, cluster.folder().join("lost"))?;
    cluster.spawn(1)?;
    let (code, text) = cluster.refusal(&cluster.flags(2)).await?;
    ensure!(code == Some(1) && text.contains(LOST), "{code:?}: {text}");

    // Nobody there who knows it: it waits, and refuses as soon as somebody does.
    cluster.kill(1)?;
    if data_dir.exists() {
        std::fs::rename(&data_dir, cluster.folder().join("refused"))?;
    }
    cluster.spawn(2)?;
    cluster.wait_logged(2, "takes part once it has heard from its peers").await?;
    ensure!(etcd::status(&cluster.nodes[2].client_url).await?.raft_term == 0, "it has voted");
    cluster.spawn(1)?;
    wait::until("its end", || {
        let runs = cluster.is_running(2);
        async move { if runs { anyhow::bail!("it runs") } else { Ok(()) } }
    })
    .await?;
    let log = std::fs::read_to_string(&cluster.nodes[2].log)?;
    ensure!(log.contains(LOST), "{log}");
    cluster.kill(2)?;

    // Its data put back, nothing is lost.
    if data_dir.exists() {
        std::fs::rename(&data_dir, cluster.folder().join("refused again"))?;
    }
    std::fs::rename(cluster.folder().join("lost"), &data_dir)?;
    cluster.spawn(0)?;
    cluster.spawn(2)?;
    cluster.wait_ready().await?;
    ledger.check_nodes(&cluster, "lag/").await?;
    stop_and_compare(&mut cluster).await
}

/// A disk that went back to an older state: the leader must not stop.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_went_back_is_fed_again() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "back/", 10).await?;
    let leader = choose_leader(&mut cluster, |leader| leader != 2).await?;
    cluster.stop(2)?;
    let data_dir = cluster.nodes[2].data_dir.clone();
    let backup = cluster.folder().join("backup");
    disk::copy(&data_dir, &backup)?;
    cluster.spawn(2)?;
    cluster.wait_node_ready(2).await?;
    put_all(&cluster, &ledger, "back/later/", 30).await?;
    cluster.kill(2)?;
    disk::copy(&backup, &data_dir)?;
    cluster.spawn(2)?;
    cluster.wait_node_ready(2).await?;
    put_all(&cluster, &ledger, "back/last/", 30).await?;
    for index in 0..3 {
        ensure!(cluster.is_running(index), "{} ended\n{}", cluster.nodes[index].name, cluster.logs());
    }
    ensure!(cluster.leader().await? == leader, "the leader was lost\n{}", cluster.logs());
    ledger.check_nodes(&cluster, "back/").await?;
    stop_and_compare(&mut cluster).await
}

/// A first start needs so many members that none of them can have been part of the cluster before.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_cluster_begins_when_its_members_have_met() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::prepare(3, QUICK)?;
    // One that is to join finds nobody; told to stop, it does so before its patience has ended.
    let mut existing = cluster.flags(2);
    existing.insert("initial-cluster-state".into(), "existing".into());
    cluster.spawn_with(2, &existing)?;
    cluster.wait_logged(2, "no member of the cluster to join answers").await?;
    ensure!(cluster.stop(2)? == Some(1), "{}", cluster.logs());
    cluster.wait_logged(2, "told to stop before the node had started").await?;

    cluster.spawn(0)?;
    cluster.spawn(1)?;
    cluster.wait_logged(0, &format!("no answer from {}", cluster.nodes[2].peer_url)).await.or_else(|_| {
        // Asked before the second was there, it named both.
        let log = std::fs::read_to_string(&cluster.nodes[0].log)?;
        ensure!(log.contains(&cluster.nodes[2].peer_url), "{log}");
        Ok(())
    })?;
    // Told to stop while it waits, it stops.
    ensure!(cluster.stop(1)? == Some(0), "{}", cluster.logs());
    cluster.spawn(1)?;
    cluster.spawn(2)?;
    cluster.wait_ready().await?;
    // From now on two are enough.
    cluster.kill(2)?;
    let ledger = Ledger::default();
    let url = cluster.nodes[0].client_url.clone();
    wait::until("a write", || crate::put(&ledger, &url, "new/1", 1, 10)).await?;
    cluster.spawn(2)?;
    cluster.wait_ready().await?;
    ledger.check_nodes(&cluster, "new/").await?;
    stop_and_compare(&mut cluster).await
}

/// The members of the running cluster.
async fn members(cluster: &Cluster) -> Result<Vec<Member>> {
    let mut client = ClusterClient::new(etcd::connect(&cluster.nodes[0].client_url).await?);
    Ok(client.member_list(MemberListRequest { linearizable: true }).await?.into_inner().members)
}

/// Waits until every member has told that it has started.
async fn wait_started(cluster: &Cluster) -> Result<()> {
    wait::until("all members started", || async {
        let members = members(cluster).await?;
        ensure!(members.iter().all(|member| !member.client_ur_ls.is_empty()), "{members:?}");
        Ok(())
    })
    .await
}

/// The id of a member, as 16 hex digits.
async fn member_id(cluster: &Cluster, name: &str) -> Result<String> {
    let members = members(cluster).await?;
    let found = members.iter().find(|member| member.name == name).context("no such member")?;
    Ok(format!("{:016x}", found.id))
}
