//! How a node is set up.

use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::NodeId;
use crate::log::SyncMode;

/// A member as the initial configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitialMember {
    /// Unique in the cluster.
    pub name: String,
    /// `http://HOST:PORT` or `https://HOST:PORT`; at least one.
    pub peer_urls: Vec<String>,
}

/// How a node without data comes to its cluster. A node with data ignores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterStart {
    /// A new cluster of these members (this node among them); every member is started with the same list and token.
    Static {
        /// All initial members.
        members: Vec<InitialMember>,
        /// Keeps clusters apart that have the same addresses.
        token: String,
    },
    /// An existing cluster, reached through any of these peer addresses; this node is added to it.
    Join {
        /// Peer addresses of members.
        contacts: Vec<String>,
        /// Whether this node gets a vote once it has caught up.
        voter: bool,
    },
}

/// Certificates for peers: mutual TLS.
#[derive(Clone, Debug)]
pub struct PeerTls {
    /// This node's certificate chain, PEM.
    pub certificate_pem: Vec<u8>,
    /// Its private key, PEM.
    pub key_pem: Vec<u8>,
    /// The authority that signed every peer's certificate, PEM.
    pub authority_pem: Vec<u8>,
}

/// The configuration of a node.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The folder of this node's files; made if absent.
    pub data_dir: PathBuf,
    /// This member's name.
    pub name: String,
    /// Where peers are listened for: `HOST:PORT` each. Port 0 takes a free one (single nodes only).
    pub listen_peers: Vec<String>,
    /// Peer addresses that other members use, `http://HOST:PORT`.
    pub advertise_peer_urls: Vec<String>,
    /// Client addresses told to clients; raft-sqlite itself does not use them.
    pub advertise_client_urls: Vec<String>,
    /// What to do on the first start.
    pub cluster: ClusterStart,
    /// How often the leader is heard of; 100 ms.
    pub heartbeat_interval: Duration,
    /// After how long without a leader a follower stands for election; 1 s, between 1.2 and 1.6 times that at random. At least five
    /// heartbeat intervals.
    pub election_timeout: Duration,
    /// Size of database pages, in bytes: a power of two from 512 to 65,536. Fixed when a database is made; 4,096.
    pub page_size: u32,
    /// Largest transaction, in bytes of changed page images; 64 MiB.
    pub max_transaction_bytes: u64,
    /// A checkpoint is made after this many log entries; 10,000.
    pub checkpoint_entries: u64,
    /// A checkpoint is made when the pages in memory exceed this many bytes; 8 MiB.
    pub checkpoint_bytes: u64,
    /// Checkpointed log entries kept for followers that lag; 5,000.
    pub log_entries_to_keep: u64,
    /// Log entries that a member being sent a snapshot will need are kept until the log's files have so many bytes; 4 GiB. Beyond it the
    /// transfer goes on with a newer snapshot.
    pub snapshot_log_bytes: u64,
    /// A read transaction that lasts longer ends with an error; 600 s.
    pub max_reader_age: Duration,
    /// Page images that stay in memory for read transactions on older versions, in bytes a database; 256 MiB. Beyond it those on the oldest
    /// version end with an error.
    pub max_reader_bytes: u64,
    /// Note which tables each transaction may change, for [`Database::changes`](crate::Database::changes); off. The leader then prepares each
    /// statement anew: SQLite names the tables only then. The same on all members.
    pub track_tables: bool,
    /// Longest idle time-out and total limit that an interactive transaction may ask for; 5 min. While one is open, no other writer of
    /// that database goes on.
    pub max_transaction_duration: Duration,
    /// Reader threads; 0 = one per processor, at most 4.
    pub reader_threads: usize,
    /// How often the databases' files are read and compared with their checksums, so that damage is found before it is needed; a day. The
    /// first time after a random part of it. None: only what is needed is compared.
    pub scrub_interval: Option<Duration>,
    /// How fast, in bytes a second at most; 8 MiB.
    pub scrub_bytes_per_second: u64,
    /// What the log's sync promises; full: an acknowledged write survives the loss of power on a majority.
    pub log_sync: SyncMode,
    /// Certificates for peers; None: plain connections.
    pub peer_tls: Option<PeerTls>,
}

impl NodeConfig {
    /// A single node on this machine with its files in `data_dir`, reached by no peer.
    pub fn single(data_dir: impl Into<PathBuf>) -> Self {
        let url = "http://127.0.0.1:0".to_owned();
        let member = InitialMember { name: "default".into(), peer_urls: vec![url.clone()] };
        Self {
            data_dir: data_dir.into(),
            name: "default".into(),
            listen_peers: vec!["127.0.0.1:0".into()],
            advertise_peer_urls: vec![url],
            advertise_client_urls: Vec::new(),
            cluster: ClusterStart::Static { members: vec![member], token: "raft-sqlite".into() },
            heartbeat_interval: Duration::from_millis(100),
            election_timeout: Duration::from_millis(1000),
            page_size: 4096,
            max_transaction_bytes: 64 * 1024 * 1024,
            checkpoint_entries: 10_000,
            checkpoint_bytes: 8 * 1024 * 1024,
            log_entries_to_keep: 5_000,
            snapshot_log_bytes: 4 * 1024 * 1024 * 1024,
            max_reader_age: Duration::from_secs(600),
            max_reader_bytes: 256 * 1024 * 1024,
            track_tables: false,
            max_transaction_duration: Duration::from_secs(300),
            reader_threads: 0,
            scrub_interval: Some(Duration::from_secs(24 * 60 * 60)),
            scrub_bytes_per_second: 8 * 1024 * 1024,
            log_sync: SyncMode::default(),
            peer_tls: None,
        }
    }

    /// One member of a static cluster; `members` is the same on each.
    ///
    /// # Errors
    /// A sentence when `name` is not among `members` or an address is none.
    pub fn member(data_dir: impl Into<PathBuf>, name: &str, members: Vec<InitialMember>) -> Result<Self, String> {
        let own = members
            .iter()
            .find(|member| member.name == name)
            .ok_or_else(|| format!("the initial cluster has no member {name:?}: it must list this node too"))?;
        let peer_urls = own.peer_urls.clone();
        let listen = peer_urls.iter().map(|url| host_and_port(url)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            name: name.to_owned(),
            listen_peers: listen,
            advertise_peer_urls: peer_urls,
            cluster: ClusterStart::Static { members, token: "raft-sqlite".into() },
            ..Self::single(data_dir)
        })
    }
}

/// `HOST:PORT` of a URL.
///
/// # Errors
/// A sentence when `url` is not `http://HOST:PORT` or `https://HOST:PORT`.
pub fn host_and_port(url: &str) -> Result<String, String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let rest = rest.map(|rest| rest.trim_end_matches('/'));
    match rest {
        Some(rest)
            if rest.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) =>
        {
            Ok(rest.to_owned())
        }
        _ => Err(format!("{url:?} is no address: write http://HOST:PORT or https://HOST:PORT")),
    }
}

/// The id of a member: from its peer addresses and the cluster's token, so that all members of a static cluster agree without talking.
pub fn member_id(peer_urls: &[String], token: &str) -> NodeId {
    let mut urls: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    urls.sort_unstable();
    NodeId(hash_id(&[&urls.join(","), token]))
}

/// The id of a cluster: from its initial members' ids and its token.
pub fn cluster_id(members: &[InitialMember], token: &str) -> u64 {
    let mut ids: Vec<u64> = members.iter().map(|member| member_id(&member.peer_urls, token).0).collect();
    ids.sort_unstable();
    let ids: Vec<String> = ids.iter().map(|id| format!("{id:016x}")).collect();
    hash_id(&["cluster", &ids.join(","), token])
}

/// Never 0: that stands for "unknown" on the wire.
fn hash_id(parts: &[&str]) -> u64 {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    u64::from_le_bytes(digest[..8].try_into().expect("invariant: SHA-256 has 32 bytes")).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_depend_on_addresses_and_token_not_on_order() {
        let urls = |list: &[&str]| list.iter().map(|url| url.to_string()).collect::<Vec<_>>();
        let (a, b) = (urls(&["http://a:1", "http://b:1"]), urls(&["http://b:1", "http://a:1"]));
        assert_eq!(member_id(&a, "t"), member_id(&b, "t"));
        assert_ne!(member_id(&a, "t"), member_id(&a, "u"));
    }

    #[test]
    fn addresses() {
        assert_eq!(host_and_port("http://h:1").unwrap(), "h:1");
        assert_eq!(host_and_port("https://[::1]:2380/").unwrap(), "[::1]:2380");
        for bad in ["h:1", "http://h", "http://:1", "http://h:x", "ftp://h:1"] {
            assert!(host_and_port(bad).unwrap_err().contains("http://HOST:PORT"), "{bad}");
        }
    }
}
