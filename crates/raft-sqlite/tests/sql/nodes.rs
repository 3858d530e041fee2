//! Three nodes in this process, over real sockets.

#![allow(dead_code, reason = "each test program uses a part")]

use std::time::{Duration, Instant};

use raft_sqlite::rusqlite::Connection;
use raft_sqlite::{InitialMember, Node, NodeBuilder, NodeConfig};

pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Nodes {
    folder: tempfile::TempDir,
    nodes: Vec<Node>,
}

impl Nodes {
    pub async fn start(page_size: u32) -> Nodes {
        Self::start_with(page_size, |_| {}).await
    }

    pub async fn start_with(page_size: u32, adjust: impl Fn(&mut NodeConfig)) -> Nodes {
        Self::start_built(page_size, adjust, |_, builder| builder).await
    }

    /// `build` is given the node's number.
    pub async fn start_built(
        page_size: u32,
        adjust: impl Fn(&mut NodeConfig),
        build: impl Fn(usize, NodeBuilder) -> NodeBuilder,
    ) -> Nodes {
        let folder = tempfile::tempdir().unwrap();
        let free_url = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}", listener.local_addr().unwrap())
        };
        let members: Vec<InitialMember> =
            (0..3).map(|number| InitialMember { name: format!("n{number}"), peer_urls: vec![free_url()] }).collect();
        let mut nodes = Vec::new();
        for (number, member) in members.iter().enumerate() {
            let mut config =
                NodeConfig::member(folder.path().join(&member.name), &member.name, members.clone()).unwrap();
            config.page_size = page_size;
            // Checkpoints all the time: pages come from the file, from memory and from the WAL's private copy.
            config.checkpoint_entries = 40;
            // Nobody stops here: a busy machine is no reason for an election, which would make outcomes unknown.
            config.election_timeout = Duration::from_secs(5);
            adjust(&mut config);
            nodes.push(build(number, Node::builder(config)).start().await.unwrap());
        }
        for node in &nodes {
            node.wait_for_leader(PATIENCE).await.unwrap();
        }
        Nodes { folder, nodes }
    }

    /// Any number stands for a node.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number % self.nodes.len()]
    }

    pub async fn leader(&self) -> &Node {
        let start = Instant::now();
        loop {
            if let Some(node) = self.nodes.iter().find(|node| node.leadership().borrow().writable_here) {
                return node;
            }
            assert!(start.elapsed() < PATIENCE, "no leader");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until every node is at the same version of a database, with the same state hash.
    pub async fn wait_equal(&self, database: &str) {
        let start = Instant::now();
        loop {
            let states: Vec<_> = self
                .nodes
                .iter()
                .map(|node| node.database_statistics(database).map(|now| (now.version, now.state_hash)))
                .collect();
            if states[0].is_some() && states.iter().all(|state| *state == states[0]) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the nodes differ: {states:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops every node; their files are equal, byte for byte, and whole.
    pub async fn stop_and_compare(self, databases: &[String]) {
        for node in &self.nodes {
            node.shutdown().await.unwrap();
        }
        for name in databases {
            let path = |number: usize| self.folder.path().join(format!("n{number}/db/{name}.sqlite"));
            let files: Vec<Vec<u8>> = (0..3).map(|number| std::fs::read(path(number)).unwrap()).collect();
            assert!(files[0] == files[1] && files[1] == files[2], "the files of {name} differ");
            assert!(!path(0).with_extension("sqlite-wal").exists());
            let connection = Connection::open(path(0)).unwrap();
            let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
            assert_eq!(verdict, "ok", "{name}");
        }
    }
}
