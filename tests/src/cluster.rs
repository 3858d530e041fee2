//! Clusters of real processes on loopback.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::etcd;
use crate::wait;

/// Environment variable that names another server to test, such as a real etcd: program and leading arguments.
pub const SERVER_VARIABLE: &str = "RAFT_SQLITE_TESTS_SERVER";

/// The program under test and its leading arguments.
fn server() -> Result<Vec<String>> {
    if let Ok(server) = std::env::var(SERVER_VARIABLE) {
        return Ok(server.split_whitespace().map(str::to_owned).collect());
    }
    Ok(vec![program()?.display().to_string(), "serve".to_owned()])
}

/// The `raft-sqlite` that cargo built beside this test.
pub fn program() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(|deps| if deps.ends_with("deps") { deps.parent() } else { Some(deps) });
    let program = folder.map(|folder| folder.join("raft-sqlite")).filter(|program| program.is_file());
    program.with_context(|| {
        format!("no program raft-sqlite beside {}: run `cargo build --workspace` first", test.display())
    })
}

/// Flags of the program by name.
pub type Flags = BTreeMap<String, String>;

/// One node of a cluster.
#[derive(Debug)]
pub struct ServerNode {
    /// Its name.
    pub name: String,
    /// Its client address, `http://127.0.0.1:PORT`.
    pub client_url: String,
    /// Its peer address.
    pub peer_url: String,
    /// Its files.
    pub data_dir: PathBuf,
    /// Its standard error, over all its lives.
    pub log: PathBuf,
    child: Option<Child>,
}

/// A cluster; its processes end when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// The nodes, in the order of their names.
    pub nodes: Vec<ServerNode>,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
}

/// Ports that were free a moment ago.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

impl Cluster {
    /// Starts `size` nodes and waits until each knows a leader.
    pub async fn start(size: usize) -> Result<Cluster> {
        Self::start_with(size, &[]).await
    }

    /// The same with more arguments for every node.
    pub async fn start_with(size: usize, arguments: &[&str]) -> Result<Cluster> {
        let mut cluster = Self::prepare(size, arguments)?;
        for index in 0..size {
            cluster.spawn(index)?;
        }
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    /// Chooses names, ports and folders; starts nothing.
    pub fn prepare(size: usize, arguments: &[&str]) -> Result<Cluster> {
        let folder = tempfile::Builder::new().prefix("raft-sqlite-test-").tempdir()?;
        let ports = free_ports(2 * size)?;
        let nodes = (0..size)
            .map(|index| {
                let name = format!("n{}", index + 1);
                ServerNode {
                    client_url: format!("http://127.0.0.1:{}", ports[2 * index]),
                    peer_url: format!("http://127.0.0.1:{}", ports[2 * index + 1]),
                    data_dir: folder.path().join(&name),
                    log: folder.path().join(format!("{name}.log")),
                    name,
                    child: None,
                }
            })
            .collect();
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Ok(Cluster { nodes, folder, arguments })
    }

    /// The flags of a node, by name without dashes; an empty value is a switch.
    pub fn flags(&self, index: usize) -> Flags {
        let node = &self.nodes[index];
        let members: Vec<String> = self.nodes.iter().map(|node| format!("{}={}", node.name, node.peer_url)).collect();
        [
            ("name", node.name.clone()),
            ("data-dir", node.data_dir.display().to_string()),
            ("listen-client-urls", node.client_url.clone()),
            ("advertise-client-urls", node.client_url.clone()),
            ("listen-peer-urls", node.peer_url.clone()),
            ("initial-advertise-peer-urls", node.peer_url.clone()),
            ("initial-cluster", members.join(",")),
            ("initial-cluster-state", "new".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// The command line with these flags.
    pub fn command(&self, flags: &Flags) -> Result<Command> {
        let server = server()?;
        let mut command = Command::new(&server[0]);
        command.args(&server[1..]).stdin(Stdio::null());
        for (name, value) in flags {
            command.arg(format!("--{name}"));
            if !value.is_empty() {
                command.arg(value);
            }
        }
        command.args(&self.arguments);
        Ok(command)
    }

    /// Starts a node that is not running.
    pub fn spawn(&mut self, index: usize) -> Result<()> {
        self.spawn_with(index, &self.flags(index))
    }

    /// The same with other flags.
    pub fn spawn_with(&mut self, index: usize, flags: &Flags) -> Result<()> {
        let mut command = self.command(flags)?;
        let node = &mut self.nodes[index];
        if node.child.is_some() {
            bail!("{} is running already", node.name);
        }
        let log = File::options().create(true).append(true).open(&node.log)?;
        command.stdout(log.try_clone()?).stderr(log);
        node.child = Some(command.spawn().with_context(|| format!("{command:?}"))?);
        Ok(())
    }

    /// Starts a node that is expected to end by itself: its exit code, and what it wrote.
    pub async fn refusal(&self, flags: &Flags) -> Result<(Option<i32>, String)> {
        let mut command = self.command(flags)?;
        let output = self.folder.path().join(format!("refusal-{}.log", flags["name"]));
        let log = File::create(&output)?;
        let mut child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        let ended = wait::until("a start that is refused", || {
            let ended = child.try_wait();
            async move { ended?.context("it still runs") }
        })
        .await;
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        let text = std::fs::read_to_string(&output)?;
        let status = ended.with_context(|| text.clone())?;
        Ok((status.code(), text))
    }

    /// Waits until a line of the node's log holds `text`.
    pub async fn wait_logged(&self, index: usize, text: &str) -> Result<()> {
        let node = &self.nodes[index];
        wait::until(&format!("{:?} in the log of {}", text, node.name), || async {
            let log = std::fs::read_to_string(&node.log)?;
            if log.contains(text) { Ok(()) } else { bail!("{}", self.logs()) }
        })
        .await
    }

    /// Waits until every running node answers and knows a leader.
    pub async fn wait_ready(&mut self) -> Result<()> {
        for index in 0..self.nodes.len() {
            if self.nodes[index].child.is_some() {
                self.wait_node_ready(index).await?;
            }
        }
        Ok(())
    }

    /// Waits until a node answers and knows a leader.
    pub async fn wait_node_ready(&mut self, index: usize) -> Result<()> {
        let url = self.nodes[index].client_url.clone();
        let ready = wait::until("a node that knows a leader", || async {
            let status = etcd::status(&url).await?;
            if status.leader == 0 { bail!("{url} knows no leader") } else { Ok(()) }
        })
        .await;
        if let Err(error) = ready {
            bail!("{error:#}\n{}", self.logs());
        }
        Ok(())
    }

    /// kill -9.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        if let Some(mut child) = self.nodes[index].child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// SIGTERM, and waits for the end. The exit code.
    pub fn stop(&mut self, index: usize) -> Result<Option<i32>> {
        let Some(mut child) = self.nodes[index].child.take() else {
            bail!("{} is not running", self.nodes[index].name)
        };
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        Ok(child.wait()?.code())
    }

    /// Whether the node's process is there; one that ended by itself is not.
    pub fn is_running(&mut self, index: usize) -> bool {
        self.nodes[index].child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The index of the node that leads.
    pub async fn leader(&self) -> Result<usize> {
        wait::until("a leader", || async {
            for (index, node) in self.nodes.iter().enumerate() {
                if node.child.is_none() {
                    continue;
                }
                if let Ok(status) = etcd::status(&node.client_url).await
                    && status.header.is_some_and(|header| header.member_id == status.leader)
                {
                    return Ok(index);
                }
            }
            bail!("no node says that it leads")
        })
        .await
    }

    /// The client addresses, separated by commas.
    pub fn endpoints(&self) -> String {
        let urls: Vec<&str> = self.nodes.iter().map(|node| node.client_url.as_str()).collect();
        urls.join(",")
    }

    /// The folder of the whole cluster.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The last lines of every node's log.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            let log = std::fs::read_to_string(&node.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(25)..];
            text.push_str(&format!("--- {}\n{}\n", node.name, tail.join("\n")));
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for index in 0..self.nodes.len() {
            let _ = self.kill(index);
        }
    }
}
