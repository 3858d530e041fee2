//! A cluster of processes under measurement, and what the system says of them.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kine_adapter::proto::etcdserverpb::StatusRequest;
use kine_adapter::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use tonic::transport::Endpoint;

/// Running nodes; they end when this is dropped.
pub struct Servers {
    /// Client addresses.
    pub urls: Vec<String>,
    children: Vec<Child>,
    _folder: tempfile::TempDir,
}

impl Servers {
    /// Starts `size` nodes of `command` and waits until each knows a leader.
    pub async fn start(command: &[String], size: usize) -> Result<Servers> {
        let folder = tempfile::Builder::new().prefix("side-by-side-").tempdir()?;
        let listeners = (0..2 * size).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
        let ports = listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect::<Result<Vec<_>>>()?;
        drop(listeners);
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let members: Vec<String> = (0..size).map(|index| format!("n{index}={}", url(ports[size + index]))).collect();
        let mut servers = Servers {
            urls: ports[..size].iter().map(|port| url(*port)).collect(),
            children: Vec::new(),
            _folder: folder,
        };
        for index in 0..size {
            let peer = url(ports[size + index]);
            let client = &servers.urls[index];
            let name = format!("n{index}");
            let data = servers._folder.path().join(&name);
            let child = Command::new(&command[0])
                .args(&command[1..])
                .args(["--name", &name, "--log-level", "error", "--data-dir"])
                .arg(data)
                .args(["--listen-client-urls", client, "--advertise-client-urls", client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &members.join(","), "--initial-cluster-state", "new"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .with_context(|| command[0].clone())?;
            servers.children.push(child);
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        for url in &servers.urls {
            while !knows_leader(url).await {
                if Instant::now() > deadline {
                    bail!("{url} knows no leader after 60 s");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(servers)
    }

    /// User and system time of all nodes so far, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
        let mut ticks = 0.0;
        for child in &self.children {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
            let fields: Vec<&str> = stat.rsplit_once(')').context("/proc/PID/stat")?.1.split_whitespace().collect();
            ticks += fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        }
        Ok(ticks / ticks_per_second)
    }

    /// Bytes that all nodes have caused to be written to disks so far.
    pub fn disk_bytes(&self) -> Result<u64> {
        self.sum("io", "write_bytes:")
    }

    /// Resident memory of all nodes, in bytes.
    pub fn rss_bytes(&self) -> Result<u64> {
        Ok(self.sum("status", "VmRSS:")? * 1024)
    }

    fn sum(&self, file: &str, key: &str) -> Result<u64> {
        let mut sum = 0;
        for child in &self.children {
            let text = std::fs::read_to_string(format!("/proc/{}/{file}", child.id()))?;
            let line = text.lines().find(|line| line.starts_with(key)).with_context(|| key.to_owned())?;
            sum += line.split_whitespace().nth(1).context("a number")?.parse::<u64>()?;
        }
        Ok(sum)
    }
}

async fn knows_leader(url: &str) -> bool {
    let Ok(endpoint) = Endpoint::from_shared(url.to_owned()) else {
        return false;
    };
    let Ok(channel) = endpoint.connect_timeout(Duration::from_secs(1)).connect().await else {
        return false;
    };
    match MaintenanceClient::new(channel).status(StatusRequest {}).await {
        Ok(status) => status.into_inner().leader != 0,
        Err(_) => false,
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
