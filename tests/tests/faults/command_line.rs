//! `raft-sqlite status` and `raft-sqlite member`: what people and programs are told.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use raft_sqlite_tests::cluster::{Cluster, program};
use serde_json::Value;

use crate::{ONE_AT_A_TIME, QUICK};

/// Exit code, standard output, standard error.
fn run(arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = Command::new(program()?).args(arguments).output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

fn rows(json: &str) -> Result<Vec<Value>> {
    serde_json::from_str::<Value>(json)?.as_array().cloned().with_context(|| json.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_members_of_three_nodes() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start_with(3, QUICK).await?;
    let leader = cluster.leader().await?;
    let endpoint = cluster.nodes[0].client_url.clone();
    // Each member tells its client address itself, soon after it has started.
    let members = raft_sqlite_tests::wait::until("all members started", || {
        let listed = run(&["member", "list", "--output", "json", "--endpoints", &endpoint]);
        async move {
            let (code, json, error) = listed?;
            ensure!(code == Some(0), "{code:?}: {error}");
            let members = rows(&json)?;
            ensure!(members.len() == 3 && members.iter().all(|member| member["status"] == "started"), "{json}");
            Ok(members)
        }
    })
    .await?;
    for node in &cluster.nodes {
        let member =
            members.iter().find(|member| member["name"] == node.name.as_str()).context("a member is missing")?;
        ensure!(member["peer_addresses"] == Value::from(vec![node.peer_url.clone()]), "{member}");
        ensure!(member["client_addresses"] == Value::from(vec![node.client_url.clone()]), "{member}");
        ensure!(member["learner"] == false, "{member}");
        ensure!(member["id"].as_str().is_some_and(|id| id.len() == 16), "{member}");
    }
    let (code, table, _) = run(&["member", "list", "--endpoints", &endpoint])?;
    ensure!(code == Some(0), "{table}");
    for text in ["ID", "Peer addresses", "n1", "n2", "n3", "started", &endpoint] {
        ensure!(table.contains(text), "{text:?} is not in\n{table}");
    }

    // Asked of the first that answers, about all.
    let endpoints = format!("http://127.0.0.1:1,{endpoint}");
    let (code, json, error) = run(&["status", "--output", "json", "--endpoints", &endpoints])?;
    ensure!(code == Some(0), "{code:?}: {error}");
    let status = rows(&json)?;
    ensure!(status.len() == 3, "{json}");
    for node in &status {
        let is_leader = node["name"] == cluster.nodes[leader].name.as_str();
        ensure!(node["role"] == if is_leader { "leader" } else { "follower" }, "{node}");
        for number in ["term", "committed_index", "applied_index", "size_bytes"] {
            ensure!(node[number].as_u64().is_some(), "{number} is no number: {node}");
        }
        ensure!(node["errors"] == Value::Array(Vec::new()), "{node}");
        ensure!(node["leader"] == status.iter().find(|node| node["role"] == "leader").context("no leader")?["id"]);
    }
    let (code, table, _) = run(&["status", "--endpoints", &endpoint])?;
    ensure!(code == Some(0) && table.contains("leader") && table.contains("follower"), "{table}");

    // One is gone: the others are told of, and the exit code is that of a cluster that works.
    cluster.kill(2)?;
    cluster.leader().await?;
    let (code, json, error) = run(&["status", "-o", "json", "--endpoints", &endpoint])?;
    ensure!(code == Some(0), "{code:?}: {error}");
    let gone = rows(&json)?.into_iter().find(|node| node["name"] == "n3").context("n3 is not listed")?;
    ensure!(gone["role"] == "unreachable" && gone["term"].is_null(), "{gone}");
    ensure!(gone["errors"].to_string().contains("cannot be reached"), "{gone}");

    // No majority: listed, but exit code 3.
    cluster.kill(1)?;
    raft_sqlite_tests::wait::until("no leader", || {
        let asked = run(&["status", "--endpoints", &endpoint]);
        async move {
            let (code, table, error) = asked?;
            ensure!(code == Some(3) && error.contains("no member knows a leader"), "{code:?}: {table}{error}");
            ensure!(table.contains("etcdserver: no leader"), "{table}");
            Ok(())
        }
    })
    .await?;
    let (code, _, error) = run(&["member", "list", "--endpoints", &endpoint, "--command-timeout", "20"])?;
    ensure!(code == Some(3) && error.contains("no leader"), "{code:?}: {error}");
    Ok(())
}

#[test]
fn without_a_server_the_exit_code_is_three() -> Result<()> {
    for arguments in [&["status"][..], &["member", "list"], &["member", "remove", "1"]] {
        let (code, output, error) = run(&[arguments, &["--endpoints", "http://127.0.0.1:1"]].concat())?;
        ensure!(code == Some(3) && output.is_empty(), "{code:?}: {output}");
        let texts = ["raft-sqlite: ", "http://127.0.0.1:1 cannot be reached", "Connection refused", "--endpoints"];
        ensure!(texts.iter().all(|text| error.contains(text)), "{error}");
    }
    Ok(())
}

#[test]
fn bad_usage_is_exit_code_two() -> Result<()> {
    for (arguments, text) in [
        (&["member", "remove", "n1"][..], "is no member id"),
        (&["status", "--endpoints", "http://"], "http://"),
        (&["serve", "--initial-cluster", "n1"], "is not NAME=URL"),
        (&["serve", "--election-timeout", "100"], "--election-timeout"),
        (&["serve", "--listen-client-urls", "127.0.0.1:2379"], "write http://HOST:PORT"),
        (&["serve", "--listen-peer-urls", "https://127.0.0.1:2380"], "--peer-cert-file"),
        (&["serve", "--listen-client-urls", "https://127.0.0.1:2379"], "--cert-file"),
        (&["serve", "--peer-cert-file", "a", "--peer-key-file", "b"], "--peer-trusted-ca-file"),
        (&["serve", "--unknown"], "--unknown"),
    ] {
        let (code, _, error) = run(arguments)?;
        ensure!(code == Some(2) && error.contains(text), "{arguments:?}: {code:?}: {error}");
    }
    Ok(())
}
