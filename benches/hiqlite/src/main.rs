//! The library benchmark's load on three nodes of hiqlite in this process; callers use the client of the leader. Every acknowledged
//! write is synced (`LogSync::Immediate`), as ours is.

#[path = "../../src/library/load.rs"]
mod load;

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Parser as _;
use hiqlite::{Client, Node, NodeConfig, Param};

use load::{Measure, Outcome, PRELOADED, ROWS, WRITERS, Workload};

const PATIENCE: Duration = Duration::from_secs(60);
const INSERT: &str = "INSERT INTO item(value) VALUES ($1)";
const SELECT: &str = "SELECT value FROM item WHERE id = $1";

fn main() -> Result<()> {
    let measure = Measure::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(run(&measure))?;
    outcome.print();
    // Its nodes wait for a signal before they stop.
    std::process::exit(0);
}

async fn run(measure: &Measure) -> Result<Outcome> {
    let clients = start(&measure.data).await?;
    let leader = leader(&clients).await?;
    leader.execute("CREATE TABLE item(id INTEGER PRIMARY KEY, value BLOB NOT NULL)", vec![]).await?;
    if measure.workload.reads() {
        for first in (0..PRELOADED).step_by(ROWS as usize) {
            insert_rows(leader, first).await?;
        }
    }
    let duration = Duration::from_secs(measure.seconds);
    let insert = {
        let client = leader.clone();
        move |number| {
            let client = client.clone();
            async move { client.execute(INSERT, vec![Param::Blob(load::value(number))]).await }
        }
    };
    Ok(match measure.workload {
        Workload::Insert => load::drive(measure.callers, duration, 1, insert).await,
        Workload::Rows => {
            let client = leader.clone();
            load::drive(measure.callers, duration, ROWS, move |number| {
                let client = client.clone();
                async move { insert_rows(&client, number * ROWS).await }
            })
            .await
        }
        Workload::SelectLocal => select(leader, measure.callers, duration, false).await,
        Workload::SelectLinearizable => select(leader, measure.callers, duration, true).await,
        Workload::SelectWhileWriting => {
            let writing = tokio::spawn(load::drive(WRITERS, duration, 1, insert));
            let outcome = select(leader, measure.callers, duration, false).await;
            writing.await?;
            outcome
        }
    })
}

async fn select(client: &Client, callers: usize, duration: Duration, consistent: bool) -> Outcome {
    let client = client.clone();
    load::drive(callers, duration, 1, move |number| {
        let client = client.clone();
        async move {
            let parameters = vec![Param::Integer(load::some_key(number))];
            let rows = match consistent {
                true => client.query_consistent(SELECT, parameters).await?.len(),
                false => client.query_raw(SELECT, parameters).await?.len(),
            };
            if rows == 1 { Ok(()) } else { Err(anyhow::anyhow!("no such row")) }
        }
    })
    .await
}

async fn insert_rows(client: &Client, first: u64) -> Result<()> {
    let rows = (first..first + ROWS).map(|number| (INSERT, vec![Param::Blob(load::value(number))]));
    for row in client.txn(rows).await? {
        row?;
    }
    Ok(())
}

async fn start(data: &Path) -> Result<Vec<Client>> {
    let listeners = (0..6).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
    let addresses =
        listeners.iter().map(|listener| Ok(listener.local_addr()?.to_string())).collect::<Result<Vec<String>>>()?;
    drop(listeners);
    let nodes: Vec<Node> = (0..3)
        .map(|number| Node {
            id: number as u64 + 1,
            addr_raft: addresses[number].clone(),
            addr_api: addresses[number + 3].clone(),
        })
        .collect();
    let starts: Vec<_> = nodes
        .iter()
        .map(|node| {
            let folder = data.join(node.id.to_string());
            let nodes = nodes.clone();
            let id = node.id;
            tokio::spawn(async move {
                std::fs::create_dir_all(&folder)?;
                let config = NodeConfig {
                    node_id: id,
                    nodes,
                    listen_addr_api: "127.0.0.1".into(),
                    listen_addr_raft: "127.0.0.1".into(),
                    data_dir: folder.display().to_string().into(),
                    wal_sync: hiqlite::LogSync::Immediate,
                    wal_size: 16 * 1024 * 1024,
                    secret_raft: "library-benchmark".into(),
                    secret_api: "library-benchmark".into(),
                    ..NodeConfig::default()
                };
                Ok::<_, anyhow::Error>(hiqlite::start_node(config).await?)
            })
        })
        .collect();
    let mut clients = Vec::new();
    for start in starts {
        clients.push(start.await??);
    }
    Ok(clients)
}

async fn leader(clients: &[Client]) -> Result<&Client> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        for client in clients {
            if client.is_healthy_db().await.is_ok() && client.is_leader_db().await {
                return Ok(client);
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("hiqlite: no leader")
}
