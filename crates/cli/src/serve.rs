//! `raft-sqlite serve`: one node, with etcd's flags for static clusters.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use kine_adapter::Server;
use kine_adapter::kv::{Store, StoreOptions};
use kine_adapter::server::{ServerOptions, TlsOptions};
use raft_sqlite::config::{PeerTls, host_and_port};
use raft_sqlite::error::StartError;
use raft_sqlite::{ClusterStart, InitialMember, Node, NodeConfig};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::Failure;

/// Values of keys kept in memory; what is not there is read from the database.
const VALUE_CACHE_BYTES: usize = 8 << 20;
/// Recent events kept for watchers that fall behind; older ones are read from the database.
const EVENT_RING_BYTES: usize = 4 << 20;

#[derive(Args)]
pub struct ServeArguments {
    /// This member's name, unique in the cluster
    #[arg(long, env = "ETCD_NAME", default_value = "default")]
    name: String,
    /// The folder of this node's files
    #[arg(long, env = "ETCD_DATA_DIR", default_value = "raft-sqlite.data")]
    data_dir: PathBuf,
    /// Where clients are listened for, separated by commas
    #[arg(long, env = "ETCD_LISTEN_CLIENT_URLS", default_value = "http://127.0.0.1:2379", value_delimiter = ',')]
    listen_client_urls: Vec<String>,
    /// Client addresses told to clients [default: --listen-client-urls]
    #[arg(long, env = "ETCD_ADVERTISE_CLIENT_URLS", value_delimiter = ',')]
    advertise_client_urls: Vec<String>,
    /// Where peers are listened for
    #[arg(long, env = "ETCD_LISTEN_PEER_URLS", default_value = "http://127.0.0.1:2380", value_delimiter = ',')]
    listen_peer_urls: Vec<String>,
    /// Peer addresses that other members use [default: --listen-peer-urls]
    #[arg(long, env = "ETCD_INITIAL_ADVERTISE_PEER_URLS", value_delimiter = ',')]
    initial_advertise_peer_urls: Vec<String>,
    /// The initial members, NAME=URL separated by commas, the same on each [default: this node alone]
    #[arg(long, env = "ETCD_INITIAL_CLUSTER")]
    initial_cluster: Option<String>,
    /// new: the initial members make a cluster; existing: this node is added to theirs
    #[arg(long, env = "ETCD_INITIAL_CLUSTER_STATE", value_enum, default_value_t = ClusterState::New)]
    initial_cluster_state: ClusterState,
    /// Keeps clusters apart that have the same addresses
    #[arg(long, env = "ETCD_INITIAL_CLUSTER_TOKEN", default_value = "etcd-cluster")]
    initial_cluster_token: String,
    /// How often a leader is heard of, in milliseconds
    #[arg(long, env = "ETCD_HEARTBEAT_INTERVAL", default_value_t = 100)]
    heartbeat_interval: u64,
    /// After how long without a leader an election begins, in milliseconds
    #[arg(long, env = "ETCD_ELECTION_TIMEOUT", default_value_t = 1000)]
    election_timeout: u64,
    /// Most operations in one etcd transaction
    #[arg(long, env = "ETCD_MAX_TXN_OPS", default_value_t = 128)]
    max_txn_ops: usize,
    /// Largest client request, in bytes
    #[arg(long, env = "ETCD_MAX_REQUEST_BYTES", default_value_t = 1_572_864)]
    max_request_bytes: usize,
    /// Log entries between two checkpoints of the database file
    #[arg(long, env = "ETCD_SNAPSHOT_COUNT", default_value_t = 10_000)]
    snapshot_count: u64,
    /// This node's certificate for clients (PEM file); with it, client addresses are https://
    #[arg(long, env = "ETCD_CERT_FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// Its private key (PEM file)
    #[arg(long, env = "ETCD_KEY_FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// The authority that signs clients' certificates (PEM file); with it, clients must show one
    #[arg(long, env = "ETCD_TRUSTED_CA_FILE", requires = "cert_file")]
    trusted_ca_file: Option<PathBuf>,
    /// Clients must show a certificate: needs --trusted-ca-file, and follows from it
    #[arg(long, env = "ETCD_CLIENT_CERT_AUTH", requires = "trusted_ca_file")]
    client_cert_auth: bool,
    /// This node's certificate for peers (PEM file), shown in both directions; with it, peer addresses are https://
    #[arg(long, env = "ETCD_PEER_CERT_FILE", requires_all = ["peer_key_file", "peer_trusted_ca_file"])]
    peer_cert_file: Option<PathBuf>,
    /// Its private key (PEM file)
    #[arg(long, env = "ETCD_PEER_KEY_FILE", requires = "peer_cert_file")]
    peer_key_file: Option<PathBuf>,
    /// The authority that signs every peer's certificate (PEM file)
    #[arg(long, env = "ETCD_PEER_TRUSTED_CA_FILE", requires = "peer_cert_file")]
    peer_trusted_ca_file: Option<PathBuf>,
    /// Peers must show a certificate: always so with --peer-cert-file
    #[arg(long, env = "ETCD_PEER_CLIENT_CERT_AUTH", requires = "peer_cert_file")]
    peer_client_cert_auth: bool,
    /// What is logged: error, warn, info, debug, trace, or a filter such as info,raft_sqlite=debug
    #[arg(long, env = "ETCD_LOG_LEVEL", default_value = "info")]
    log_level: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ClusterState {
    New,
    Existing,
}

impl ServeArguments {
    fn config(&self) -> Result<NodeConfig, Failure> {
        let or = |given: &[String], default: &[String]| -> Vec<String> {
            if given.is_empty() { default.to_vec() } else { given.to_vec() }
        };
        let peers = or(&self.initial_advertise_peer_urls, &self.listen_peer_urls);
        let members = match &self.initial_cluster {
            Some(text) => parse_initial_cluster(text)?,
            None => vec![InitialMember { name: self.name.clone(), peer_urls: peers.clone() }],
        };
        let cluster = match self.initial_cluster_state {
            ClusterState::New => ClusterStart::Static { members, token: self.initial_cluster_token.clone() },
            ClusterState::Existing => ClusterStart::Join {
                contacts: members
                    .into_iter()
                    .filter(|member| member.name != self.name)
                    .flat_map(|member| member.peer_urls)
                    .collect(),
                voter: true,
            },
        };
        if self.election_timeout < 5 * self.heartbeat_interval {
            return Err(Failure::usage(format!(
                "--election-timeout ({} ms) must be at least five times --heartbeat-interval ({} ms)",
                self.election_timeout, self.heartbeat_interval
            )));
        }
        let listen_peers = self
            .listen_peer_urls
            .iter()
            .map(|url| host_and_port(url).map_err(|why| Failure::usage(format!("--listen-peer-urls: {why}"))))
            .collect::<Result<Vec<_>, _>>()?;
        let encrypted = self.peer_cert_file.is_some();
        check_schemes("--listen-peer-urls", &self.listen_peer_urls, encrypted, "--peer-cert-file")?;
        check_schemes("--initial-advertise-peer-urls", &peers, encrypted, "--peer-cert-file")?;
        check_schemes("--listen-client-urls", &self.listen_client_urls, self.cert_file.is_some(), "--cert-file")?;
        Ok(NodeConfig {
            name: self.name.clone(),
            listen_peers,
            advertise_peer_urls: peers,
            advertise_client_urls: or(&self.advertise_client_urls, &self.listen_client_urls),
            cluster,
            heartbeat_interval: Duration::from_millis(self.heartbeat_interval),
            election_timeout: Duration::from_millis(self.election_timeout),
            checkpoint_entries: self.snapshot_count.max(1),
            peer_tls: self.peer_tls()?,
            ..NodeConfig::single(&self.data_dir)
        })
    }
}

impl ServeArguments {
    fn peer_tls(&self) -> Result<Option<PeerTls>, Failure> {
        let (Some(certificate), Some(key), Some(authority)) =
            (&self.peer_cert_file, &self.peer_key_file, &self.peer_trusted_ca_file)
        else {
            return Ok(None);
        };
        Ok(Some(PeerTls {
            certificate_pem: read_pem("--peer-cert-file", certificate)?,
            key_pem: read_pem("--peer-key-file", key)?,
            authority_pem: read_pem("--peer-trusted-ca-file", authority)?,
        }))
    }

    fn client_tls(&self) -> Result<Option<TlsOptions>, Failure> {
        let (Some(certificate), Some(key)) = (&self.cert_file, &self.key_file) else { return Ok(None) };
        let authority = self.trusted_ca_file.as_ref();
        Ok(Some(TlsOptions {
            certificate: read_pem("--cert-file", certificate)?,
            key: read_pem("--key-file", key)?,
            client_authority: authority.map(|path| read_pem("--trusted-ca-file", path)).transpose()?,
        }))
    }
}

fn read_pem(flag: &str, path: &std::path::Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::usage(format!("{flag} {}: {error}", path.display())))
}

/// Addresses say http or https, certificates are there or not: both must agree, lest something goes over the wire in the clear.
fn check_schemes(flag: &str, urls: &[String], encrypted: bool, certificate_flag: &str) -> Result<(), Failure> {
    for url in urls {
        match (url.starts_with("https://"), encrypted) {
            (true, false) => {
                return Err(Failure::usage(format!("{flag}: {url} needs a certificate ({certificate_flag})")));
            }
            (false, true) => {
                return Err(Failure::usage(format!("{flag}: {url} must be https:// with {certificate_flag}")));
            }
            _ => {}
        }
    }
    Ok(())
}

/// `NAME=URL,NAME=URL`; a name that comes twice has two addresses.
fn parse_initial_cluster(text: &str) -> Result<Vec<InitialMember>, Failure> {
    let mut members: Vec<InitialMember> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let wrong = || Failure::usage(format!("--initial-cluster: {part:?} is not NAME=URL"));
        let (name, url) = part.split_once('=').ok_or_else(wrong)?;
        host_and_port(url).map_err(|why| Failure::usage(format!("--initial-cluster: {why}")))?;
        match members.iter_mut().find(|member| member.name == name) {
            Some(member) => member.peer_urls.push(url.to_owned()),
            None => members.push(InitialMember { name: name.to_owned(), peer_urls: vec![url.to_owned()] }),
        }
    }
    if members.is_empty() {
        return Err(Failure::usage("--initial-cluster names no member"));
    }
    Ok(members)
}

pub async fn run(arguments: ServeArguments) -> Result<(), Failure> {
    // openraft tells its inner life at level info, and each call to a peer that is down at level warn: that is our debug. Changes of
    // membership that meet another one are tried again.
    let level = match arguments.log_level.as_str() {
        "info" => "info,openraft=error,openraft::raft::api::management=off,openraft::progress=warn",
        level => level,
    };
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .map_err(|error| Failure::usage(format!("--log-level {:?}: {error}", arguments.log_level)))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let config = arguments.config()?;
    let tls = arguments.client_tls()?;
    // Before the node is started: a port in use must not cost an election.
    let mut listeners = Vec::new();
    for url in &arguments.listen_client_urls {
        let address = host_and_port(url).map_err(|why| Failure::usage(format!("--listen-client-urls: {why}")))?;
        let listener = TcpListener::bind(&address).await.map_err(|error| {
            Failure::failed(format!(
                "cannot listen for clients on {address}: {error}; is another process using it? (--listen-client-urls)"
            ))
        })?;
        listeners.push(listener);
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;

    let store = Store::new(StoreOptions {
        max_txn_ops: arguments.max_txn_ops,
        max_request_bytes: arguments.max_request_bytes,
        min_lease_ttl_seconds: arguments.election_timeout.saturating_mul(3).div_ceil(2000) as i64,
        value_cache_bytes: VALUE_CACHE_BYTES,
        event_ring_bytes: EVENT_RING_BYTES,
        ..StoreOptions::default()
    });
    let starting = Node::builder(config).observer(store.observer()).handler("etcd", store.handler()).start();
    let started = tokio::select! {
        started = starting => started,
        // Joining may take long. Nothing was promised to anybody yet that is not on the disk.
        _ = terminate.recv() => return Err(Failure::failed("told to stop before the node had started")),
        _ = interrupt.recv() => return Err(Failure::failed("told to stop before the node had started")),
    };
    let node = started.map_err(|error| match error {
        error @ StartError::Listen { .. } => {
            Failure::failed(format!("the node did not start: {error} (--listen-peer-urls)"))
        }
        error => Failure::failed(format!("the node did not start: {error}")),
    })?;
    store.attach(node.clone());
    let options = ServerOptions {
        election_timeout: Duration::from_millis(arguments.election_timeout),
        tls,
        ..ServerOptions::default()
    };
    let server = Server::new(node.clone(), store, options);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let shutdown = {
        let mut stopped = stopped.clone();
        async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    };
    tracing::info!(
        member = %node.id(),
        cluster = format!("{:016x}", node.cluster_id()),
        clients = arguments.listen_client_urls.join(","),
        "ready to serve client requests"
    );
    let mut serving = tokio::spawn(server.serve(listeners, shutdown));
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = &mut serving => Err(Failure::failed(match ended {
            Ok(Ok(())) => "the server ended by itself".to_owned(),
            Ok(Err(error)) => format!("the server ended: {error}"),
            Err(error) => format!("the server ended: {error}"),
        })),
        why = broken(&node) => Err(Failure::failed(format!("the node stopped serving: {why}"))),
    };
    tracing::info!("stopping: handing over the leadership and writing the last checkpoint");
    let closed = node.shutdown().await;
    let _ = stop.send(true);
    closed.map_err(|error| {
        Failure::failed(format!("the last checkpoint failed: {error}; nothing is lost, the next start replays the log"))
    })?;
    tracing::info!("stopped; the databases are plain SQLite files");
    outcome
}

/// Ends when the node can serve no more.
async fn broken(node: &Node) -> String {
    loop {
        if let Some(why) = node.status().broken {
            return why;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_cluster() {
        let members = parse_initial_cluster("a=http://h:1,b=http://h:2,a=http://h:3").unwrap();
        assert_eq!(members.len(), 2);
        assert_eq!(members[0].peer_urls, ["http://h:1", "http://h:3"]);
        for bad in ["", "a", "a=h:1", "a=http://h"] {
            assert_eq!(parse_initial_cluster(bad).unwrap_err().code, 2, "{bad}");
        }
    }
}
