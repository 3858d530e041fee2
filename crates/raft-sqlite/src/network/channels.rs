//! Connections to peers: one HTTP/2 connection per member and purpose, connected when first used, found again by member.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

use super::MAX_MESSAGE_BYTES;
use super::client_proto::client_client::ClientClient;
use super::identity::Outgoing;
use super::proto::peer_client::PeerClient;
use super::tls::Tls;

/// How long a TCP (and TLS) connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an idle connection is probed, so that a silently dead peer is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// HTTP/2 flow-control windows: a pipelined log must not stall on them.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// What a connection carries. Heartbeats and snapshots have connections of their own, so that neither waits behind log entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Log entries, votes.
    Log,
    /// Heartbeats and read confirmations.
    Heartbeat,
    /// Snapshots.
    Snapshot,
    /// Forwarded calls.
    Call,
}

/// Member, purpose, address.
type Key = (u64, Purpose, String);

/// A client of one member.
pub type Client = PeerClient<InterceptedService<Channel, Outgoing>>;

/// Connections of this node to its peers; clones share them.
#[derive(Clone, Debug)]
pub struct Channels {
    cluster_id: u64,
    tls: Tls,
    open: Arc<Mutex<HashMap<Key, Channel>>>,
}

impl Channels {
    /// `tls`: for peers with `https://` addresses.
    pub fn new(cluster_id: u64, tls: Tls) -> Self {
        Self { cluster_id, tls, open: Arc::default() }
    }

    /// A client of member `to` at `url`. Connects on first use.
    ///
    /// # Errors
    /// A sentence when `url` is no address.
    pub fn client(&self, to: u64, url: &str, purpose: Purpose) -> Result<Client, String> {
        let identity = Outgoing { cluster_id: self.cluster_id, to };
        Ok(PeerClient::with_interceptor(self.channel(to, url, purpose)?, identity)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    /// The same member's answers to programs that are no members.
    ///
    /// # Errors
    /// As [`Self::client`].
    pub fn client_service(&self, to: u64, url: &str) -> Result<ClientClient<Channel>, String> {
        Ok(ClientClient::new(self.channel(to, url, Purpose::Call)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn channel(&self, to: u64, url: &str, purpose: Purpose) -> Result<Channel, String> {
        let key = (to, purpose, url.to_owned());
        let mut open = self.open.lock();
        Ok(match open.get(&key) {
            Some(channel) => channel.clone(),
            None => {
                let channel = self.connect_lazy(url)?;
                open.insert(key, channel.clone());
                channel
            }
        })
    }

    fn connect_lazy(&self, url: &str) -> Result<Channel, String> {
        self.tls.channel(url, |endpoint| {
            endpoint
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_INTERVAL)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        })
    }

    /// The certificates of all connections.
    pub fn tls(&self) -> &Tls {
        &self.tls
    }
}
