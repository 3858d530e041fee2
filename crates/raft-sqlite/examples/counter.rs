//! A counter that three nodes share: each of them counts at the same time, one stops in the middle, and nothing is lost or counted twice.
//!
//! `cargo run -p raft-sqlite --example counter`

use std::time::Duration;

use raft_sqlite::{Database, ErrorClass, InitialMember, Node, NodeConfig, ReadConsistency};

const TURNS: i64 = 50;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let mut nodes = Vec::new();
    let members = members()?;
    for member in &members {
        let config = NodeConfig::member(folder.path().join(&member.name), &member.name, members.clone())?;
        nodes.push(Node::start(config).await?);
    }
    nodes[0].wait_for_leader(Duration::from_secs(30)).await?;
    nodes[0].database("app").execute_batch("CREATE TABLE counted(who TEXT, turn INTEGER, UNIQUE(who, turn))").await?;

    let counting: Vec<_> = nodes
        .iter()
        .map(|node| {
            let (db, who) = (node.database("app").into(), node.name().to_owned());
            tokio::spawn(async move { count(db, &who).await })
        })
        .collect();
    let counted = "SELECT count(*) FROM counted";
    while nodes[0].database("app").query_row(counted, ReadConsistency::Linearizable).await?.get::<i64>(0)? < TURNS / 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The one that leads, of all nodes: its callers are told, and another takes over.
    let leader = nodes[0].wait_for_leader(Duration::from_secs(30)).await?;
    let leaving = nodes.iter().position(|node| node.id() == leader).ok_or("the leader is one of them")?;
    nodes[leaving].shutdown().await?;
    println!("{} has stopped", nodes[leaving].name());
    for (number, counting) in counting.into_iter().enumerate() {
        let finished = counting.await?;
        println!("{} counted {finished} turns", members[number].name);
        assert!(finished == TURNS || number == leaving);
    }

    let other = &nodes[(leaving + 1) % 3];
    let row = other.database("app").query_row(counted, ReadConsistency::Linearizable).await?;
    println!("the counter stands at {}", row.get::<i64>(0)?);
    for node in nodes.iter().filter(|node| node.id() != leader) {
        node.shutdown().await?;
    }
    Ok(())
}

/// How many turns were acknowledged.
async fn count(db: Database, who: &str) -> i64 {
    for turn in 0..TURNS {
        // A turn has a name. So when its outcome is not known it is simply done again: it counts once.
        let insert = "INSERT INTO counted VALUES (?, ?) ON CONFLICT DO NOTHING";
        while let Err(error) = db.execute((insert, (who, turn))).await {
            match error.class() {
                ErrorClass::Retryable | ErrorClass::OutcomeUnknown => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                // This node has stopped.
                ErrorClass::Fatal | ErrorClass::Rejected => return turn,
            }
        }
    }
    TURNS
}

fn members() -> std::io::Result<Vec<InitialMember>> {
    let member = |name: &str| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        Ok(InitialMember { name: name.into(), peer_urls: vec![format!("http://{}", listener.local_addr()?)] })
    };
    ["anna", "bert", "cleo"].into_iter().map(member).collect()
}
