//! Three nodes of raft-sqlite in this process; callers use the handle of the leader.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use raft_sqlite::{InitialMember, Node, NodeConfig, ReadConsistency, WriteError, rusqlite};

use crate::load::{self, Measure, Outcome, PRELOADED, ROWS, WRITERS, Workload};

const PATIENCE: Duration = Duration::from_secs(30);
const INSERT: &str = "INSERT INTO item(value) VALUES (?)";
const SELECT: &str = "SELECT value FROM item WHERE id = ?";

pub async fn measure(measure: &Measure) -> Result<Outcome> {
    let nodes = start(&measure.data).await?;
    let leader = leader(&nodes).await?;
    let db = leader.database("bench");
    db.execute("CREATE TABLE item(id INTEGER PRIMARY KEY, value BLOB NOT NULL)").await?;
    if measure.workload.reads() {
        for first in (0..PRELOADED).step_by(ROWS as usize) {
            insert_rows(&db, first).await?;
        }
    }
    let duration = Duration::from_secs(measure.seconds);
    let logged = leader.log_statistics().written_bytes;
    let mut outcome = match measure.workload {
        Workload::Insert => {
            let db = db.clone();
            load::drive(measure.callers, duration, 1, move |number| {
                let db = db.clone();
                async move { db.execute((INSERT, [load::value(number)])).await }
            })
            .await
        }
        Workload::Rows => {
            let db = db.clone();
            load::drive(measure.callers, duration, ROWS, move |number| {
                let db = db.clone();
                async move { insert_rows(&db, number * ROWS).await }
            })
            .await
        }
        Workload::SelectLocal => select(&db, measure.callers, duration, ReadConsistency::Local).await,
        Workload::SelectLinearizable => select(&db, measure.callers, duration, ReadConsistency::Linearizable).await,
        Workload::SelectWhileWriting => {
            let writing = {
                let db = db.clone();
                load::drive(WRITERS, duration, 1, move |number| {
                    let db = db.clone();
                    async move { db.execute((INSERT, [load::value(number)])).await }
                })
            };
            let writing = tokio::spawn(writing);
            let outcome = select(&db, measure.callers, duration, ReadConsistency::Local).await;
            writing.await?;
            outcome
        }
    };
    if !measure.workload.reads() {
        let rows = outcome.operations.max(1) as f64;
        let logged = leader.log_statistics().written_bytes - logged;
        outcome.replicated_bytes_per_operation = Some(logged as f64 / rows);
    }
    for node in nodes {
        node.shutdown().await?;
    }
    Ok(outcome)
}

async fn select(db: &raft_sqlite::Database, callers: usize, duration: Duration, how: ReadConsistency) -> Outcome {
    let db = db.clone();
    load::drive(callers, duration, 1, move |number| {
        let db = db.clone();
        async move {
            let rows = db.query((SELECT, [load::some_key(number)]), how).await.map_err(|error| error.to_string())?;
            if rows.len() == 1 { Ok(()) } else { Err("no such row".to_owned()) }
        }
    })
    .await
}

/// One transaction, as a program on the leader writes it.
async fn insert_rows(db: &raft_sqlite::LocalDatabase, first: u64) -> Result<(), WriteError<rusqlite::Error>> {
    let values: Vec<Vec<u8>> = (first..first + ROWS).map(load::value).collect();
    db.write(move |context| {
        let mut insert = context.connection().prepare_cached(INSERT)?;
        values.iter().try_for_each(|value| insert.execute([value]).map(drop))
    })
    .await
}

async fn start(data: &std::path::Path) -> Result<Vec<Node>> {
    let listeners = (0..3).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
    let members: Vec<InitialMember> = listeners
        .iter()
        .enumerate()
        .map(|(number, listener)| {
            let url = format!("http://{}", listener.local_addr()?);
            Ok(InitialMember { name: format!("n{number}"), peer_urls: vec![url] })
        })
        .collect::<std::io::Result<_>>()?;
    drop(listeners);
    let mut nodes = Vec::new();
    for member in &members {
        let config =
            NodeConfig::member(data.join(&member.name), &member.name, members.clone()).map_err(anyhow::Error::msg)?;
        nodes.push(Node::start(config).await?);
    }
    Ok(nodes)
}

async fn leader(nodes: &[Node]) -> Result<&Node> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Some(leader) = nodes.iter().find(|node| node.leadership().borrow().writable_here) {
            return Ok(leader);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("raft-sqlite: no leader")
}
