//! Starts that must be refused: exit code 1, a text that says what to do, and every file as it was.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use raft_sqlite_tests::cluster::{Cluster, Flags};
use raft_sqlite_tests::disk;
use raft_sqlite_tests::ledger::{Ledger, stop_and_compare};

use crate::{ONE_AT_A_TIME, QUICK, put_all, put_through};

/// The start must end with exit code 1 and a text that holds all of `texts`, and leave the files of `data_dir` as they are.
async fn refused(cluster: &Cluster, flags: &Flags, data_dir: &Path, texts: &[&str]) -> Result<()> {
    let before = disk::contents(data_dir)?;
    let (code, text) = cluster.refusal(flags).await?;
    ensure!(code == Some(1), "exit code {code:?}: {text}");
    let last = text.lines().rfind(|line| !line.is_empty()).unwrap_or_default();
    ensure!(last.starts_with("raft-sqlite: "), "the last line is not the error: {text}");
    for wanted in texts {
        ensure!(last.contains(wanted), "{wanted:?} is not said: {last}");
    }
    let after = disk::contents(data_dir)?;
    let changed: Vec<_> =
        before.keys().chain(after.keys()).filter(|name| before.get(*name) != after.get(*name)).collect();
    ensure!(changed.is_empty(), "changed by a start that was refused: {changed:?}");
    Ok(())
}

/// The segment with the newest records.
fn newest_segment(data_dir: &Path) -> Result<PathBuf> {
    let names = std::fs::read_dir(data_dir.join("log"))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let is_segment =
        |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("segment-"));
    names.iter().filter(is_segment).max().cloned().context("no segment")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_is_refused_and_a_torn_tail_is_cut() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "damage/", 60).await?;
    cluster.stop(0)?;
    let data_dir = cluster.nodes[0].data_dir.clone();
    let segment = newest_segment(&data_dir)?;
    let good = std::fs::read(&segment)?;

    // A byte in the middle of what is written.
    let needle = b"damage/000030";
    let at = good.windows(needle.len()).position(|window| window == needle).context("the key is not in the log")?;
    let mut damaged = good.clone();
    damaged[at] ^= 1;
    std::fs::write(&segment, &damaged)?;
    let (_, text) = cluster.refusal(&cluster.flags(0)).await?;
    let offset: usize = text
        .rsplit_once(" at offset ")
        .and_then(|(_, rest)| rest.split(':').next())
        .and_then(|offset| offset.parse().ok())
        .with_context(|| text.clone())?;
    ensure!(offset <= at && at < offset + 64 * 1024, "damage at {at} is reported at {offset}");
    let path = segment.display().to_string();
    let texts =
        ["the Raft log is damaged", &path, "Nothing was changed", "remove it, empty its data directory, add it again"];
    refused(&cluster, &cluster.flags(0), &data_dir, &texts).await?;

    // The last record only half written, as a crash leaves it: the log ends before it.
    let end = good.iter().rposition(|byte| *byte != 0).context("an empty segment")?;
    let mut torn = good;
    torn[end - 8..].fill(0);
    std::fs::write(&segment, &torn)?;
    cluster.spawn(0)?;
    cluster.wait_node_ready(0).await?;
    put_all(&cluster, &ledger, "damage/after/", 10).await?;
    ledger.check_nodes(&cluster, "damage/").await?;
    stop_and_compare(&mut cluster).await
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_another_node_or_version_is_refused() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "other/", 10).await?;
    cluster.stop(0)?;
    let data_dir = cluster.nodes[0].data_dir.clone();

    // Another member's data directory: by its name.
    let mut flags = cluster.flags(1);
    flags.insert("data-dir".into(), data_dir.display().to_string());
    for (flag, url) in [("listen-client-urls", "http://127.0.0.1:0"), ("listen-peer-urls", "http://127.0.0.1:0")] {
        flags.insert(flag.into(), url.into());
    }
    let texts = ["belongs to member \"n1\"", "started as \"n2\"", "--data-dir or --name"];
    refused(&cluster, &flags, &data_dir, &texts).await?;

    // A data directory that a running node uses.
    let mut flags = cluster.flags(1);
    for (flag, url) in [("listen-client-urls", "http://127.0.0.1:0"), ("listen-peer-urls", "http://127.0.0.1:0")] {
        flags.insert(flag.into(), url.into());
    }
    let (code, text) = cluster.refusal(&flags).await?;
    ensure!(code == Some(1) && text.contains("in use by process"), "{code:?}: {text}");

    // A version of tomorrow.
    let path = data_dir.join("node.json");
    let own = std::fs::read_to_string(&path)?;
    std::fs::write(&path, own.replace("\"format_version\": 1", "\"format_version\": 7"))?;
    let texts = ["has format version 7", "knows up to 1", "use that version or a newer one"];
    refused(&cluster, &cluster.flags(0), &data_dir, &texts).await?;
    std::fs::write(&path, "{")?;
    refused(&cluster, &cluster.flags(0), &data_dir, &["node.json is damaged"]).await?;
    std::fs::write(&path, own)?;

    // Addresses that the initial cluster does not list.
    let mut flags = cluster.flags(0);
    flags.insert("initial-advertise-peer-urls".into(), "http://127.0.0.1:9".into());
    refused(&cluster, &flags, &data_dir, &["initial cluster lists", "make them equal"]).await?;

    cluster.spawn(0)?;
    cluster.wait_node_ready(0).await?;
    ledger.check_nodes(&cluster, "other/").await?;
    stop_and_compare(&mut cluster).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_another_cluster_is_refused() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let ledger = Arc::new(Ledger::default());
    put_all(&cluster, &ledger, "cluster/", 10).await?;
    cluster.stop(2)?;
    let own = cluster.folder().join("own");
    std::fs::rename(&cluster.nodes[2].data_dir, &own)?;

    // A cluster of one under the same name and addresses, but with another token.
    let mut foreign = cluster.flags(2);
    foreign.insert("initial-cluster".into(), format!("n3={}", cluster.nodes[2].peer_url));
    foreign.insert("initial-cluster-token".into(), "another".into());
    cluster.spawn_with(2, &foreign)?;
    cluster.wait_node_ready(2).await?;
    cluster.stop(2)?;
    let data_dir = cluster.nodes[2].data_dir.clone();
    let texts = ["wrong cluster", "the peers belong to cluster", "--initial-cluster-token"];
    refused(&cluster, &cluster.flags(2), &data_dir, &texts).await?;

    // Without data, a wrong token alone.
    std::fs::rename(&data_dir, cluster.folder().join("foreign"))?;
    let mut flags = cluster.flags(2);
    flags.insert("initial-cluster-token".into(), "another".into());
    let (code, text) = cluster.refusal(&flags).await?;
    ensure!(code == Some(1) && text.contains("wrong cluster"), "{code:?}: {text}");
    std::fs::rename(&data_dir, cluster.folder().join("made with a wrong token"))?;

    // A member that finds one stranger among its peers goes on: the stranger is the one who is wrong.
    std::fs::rename(cluster.folder().join("foreign"), &data_dir)?;
    cluster.spawn_with(2, &foreign)?;
    cluster.wait_node_ready(2).await?;
    for index in [0, 1] {
        cluster.stop(index)?;
        cluster.spawn(index)?;
        cluster.wait_node_ready(index).await?;
    }
    put_through(&cluster.nodes[..2], &ledger, "cluster/stranger/", 10).await?;
    cluster.stop(2)?;
    std::fs::rename(&data_dir, cluster.folder().join("foreign again"))?;

    std::fs::rename(&own, &data_dir)?;
    cluster.spawn(2)?;
    cluster.wait_node_ready(2).await?;
    ledger.check_nodes(&cluster, "cluster/").await?;
    stop_and_compare(&mut cluster).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_told() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::prepare(1, QUICK)?;
    cluster.spawn(0)?;
    cluster.wait_ready().await?;
    cluster.stop(0)?;
    let data_dir = cluster.nodes[0].data_dir.clone();
    for (url, flag) in [
        (cluster.nodes[0].client_url.clone(), "--listen-client-urls"),
        (cluster.nodes[0].peer_url.clone(), "--listen-peer-urls"),
    ] {
        let address = url.trim_start_matches("http://").to_owned();
        let _taken = TcpListener::bind(&address)?;
        let texts = [&address, "Address already in use", "is another process using it?", flag];
        refused(&cluster, &cluster.flags(0), &data_dir, &texts).await?;
    }
    cluster.spawn(0)?;
    cluster.wait_ready().await
}
