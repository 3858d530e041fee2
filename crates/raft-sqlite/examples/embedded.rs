//! A replicated SQLite inside a program: three nodes, writes through any of them, and a plain SQLite file in the end.
//!
//! `cargo run -p raft-sqlite --example embedded`

use std::time::Duration;

use raft_sqlite::{InitialMember, Node, NodeConfig, ReadConsistency, Statement};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    // In a real deployment each node runs on a machine of its own, started with the same list.
    let free = || -> std::io::Result<String> {
        Ok(format!("http://{}", std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?))
    };
    let members = ["anna", "bert", "cleo"]
        .map(|name| Ok(InitialMember { name: name.to_owned(), peer_urls: vec![free()?] }))
        .into_iter()
        .collect::<std::io::Result<Vec<_>>>()?;
    let mut nodes = Vec::new();
    for member in &members {
        let config = NodeConfig::member(folder.path().join(&member.name), &member.name, members.clone())?;
        nodes.push(Node::start(config).await?);
    }
    let leader = nodes[0].wait_for_leader(Duration::from_secs(30)).await?;
    println!("member {leader} leads");

    // Any node takes writes: they are forwarded to the leader.
    nodes[0].database("app").execute("CREATE TABLE word(id INTEGER PRIMARY KEY, text TEXT, at TEXT)").await?;
    for (number, text) in ["one", "two", "three"].into_iter().enumerate() {
        let insert = Statement::new("INSERT INTO word(text, at) VALUES (?, datetime('now'))").bind(text.to_owned());
        nodes[number].database("app").execute(insert).await?;
    }
    // And linearizable reads.
    for node in &nodes {
        let rows =
            node.database("app").query("SELECT id, text FROM word ORDER BY id", ReadConsistency::Linearizable).await?;
        println!("{}: {rows:?}", node.name());
        assert_eq!(rows.len(), 3);
    }
    for node in &nodes {
        node.shutdown().await?;
    }
    let file = folder.path().join("anna/db/app.sqlite");
    let plain = raft_sqlite::rusqlite::Connection::open(&file)?;
    let count: i64 = plain.query_row("SELECT count(*) FROM word", [], |row| row.get(0))?;
    println!("{} is a plain SQLite file with {count} words", file.display());
    Ok(())
}
