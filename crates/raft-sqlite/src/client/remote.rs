//! A program that is no member of the cluster.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, mpsc};
use tokio_rustls::rustls;
use tonic::transport::Channel;

use super::changes::{Change, Told};
use super::sql::ReadConsistency;
use super::stream::{Part, Parts};
use super::transaction::{NotBegun, Wire};
use super::{Database, SqlError, Way, deadline, remote_sql, transaction_host};
use crate::NodeId;
use crate::config::PeerTls;
use crate::error::{CallError, ReadError, WriteError};
use crate::network::client_proto::client_call_reply::Outcome;
use crate::network::client_proto::client_client::ClientClient;
use crate::network::client_proto::query_failure::Kind;
use crate::network::client_proto::query_request::Consistency;
use crate::network::client_proto::{self as wire};
use crate::network::client_proto::{changes_reply, query_reply};
use crate::network::tls::Tls;
use crate::network::{CLIENT_PROTOCOL_VERSION, MAX_MESSAGE_BYTES, proto};
use crate::page::Version;

/// How often the members are asked who they are.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// Pause between two rounds of tries.
const ROUND_PAUSE: Duration = Duration::from_millis(50);
/// How often an idle connection is probed, so that a silently dead member is noticed.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// HTTP/2 flow-control windows.
const WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// Why a client did not come to its cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The addresses or the certificates are none.
    #[error("{0}")]
    Configuration(String),
    /// No member answered.
    #[error("no member of the cluster was reached: {0}")]
    Unreachable(String),
}

/// Prepares a [`Client`].
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    addresses: Vec<String>,
    tls: Result<Tls, String>,
    connect_timeout: Duration,
    patience: Duration,
}

impl ClientBuilder {
    /// Certificates as members have them; addresses are `https://HOST:PORT` then.
    #[must_use]
    pub fn tls(mut self, pem: &PeerTls) -> Self {
        self.tls = Tls::from_pem(pem);
        self
    }

    /// Encrypts with a rustls configuration of the program's own; addresses are `https://HOST:PORT` then.
    #[must_use]
    pub fn rustls(mut self, client: rustls::ClientConfig) -> Self {
        self.tls = Ok(Tls::of_client(client));
        self
    }

    /// How long a TCP (and TLS) connection may take; 2 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long a call goes on trying other members and waiting for a leader, as long as it provably had no effect; 10 s.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Reaches the cluster.
    ///
    /// # Errors
    /// See [`ConnectError`]; after the patience.
    pub async fn connect(self) -> Result<Client, ConnectError> {
        let tls = self.tls.map_err(ConnectError::Configuration)?;
        if self.addresses.is_empty() {
            return Err(ConnectError::Configuration("no address was given: name some members of the cluster".into()));
        }
        let inner = Arc::new(Inner {
            given: self.addresses,
            tls,
            connect_timeout: self.connect_timeout,
            patience: self.patience,
            cluster: RwLock::default(),
            channels: Mutex::default(),
            stale: Notify::new(),
        });
        for address in &inner.given {
            crate::config::host_and_port(address).map_err(ConnectError::Configuration)?;
            inner.client(address).map_err(ConnectError::Configuration)?;
        }
        let deadline = Instant::now() + inner.patience;
        while let Err(why) = inner.refresh().await {
            if Instant::now() > deadline {
                return Err(ConnectError::Unreachable(why));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
        tokio::spawn(keep_fresh(Arc::downgrade(&inner)));
        Ok(Client { inner })
    }
}

/// What is known of the cluster.
#[derive(Clone, Debug, Default)]
struct Cluster {
    id: u64,
    leader: u64,
    /// The leader's addresses first.
    addresses: Vec<String>,
}

struct Inner {
    /// By the program.
    given: Vec<String>,
    tls: Tls,
    connect_timeout: Duration,
    patience: Duration,
    cluster: RwLock<Cluster>,
    channels: Mutex<HashMap<String, Channel>>,
    /// What is known of the cluster may no longer be true.
    stale: Notify,
}

/// A connection of a program that is no member to a cluster: to any of its members, over the addresses that peers use. It learns who the
/// members are from the first that answers, prefers the leader, and goes on with others when one is gone. Clones share it.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use raft_sqlite::{Client, ReadConsistency};
///
/// let client = Client::connect(["http://10.0.0.1:2380", "http://10.0.0.2:2380"]).await?;
/// let db = client.database("app");
/// db.execute(("INSERT INTO word(text) VALUES (?)", ["hello"])).await?;
/// let words: Vec<String> = db.query_as("SELECT text FROM word", ReadConsistency::Linearizable).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("cluster", &*self.inner.cluster.read()).finish_non_exhaustive()
    }
}

impl Client {
    /// Reaches a cluster through any of these addresses, `http://HOST:PORT` each: what members advertise to peers.
    ///
    /// # Errors
    /// See [`ClientBuilder::connect`].
    pub async fn connect(addresses: impl IntoIterator<Item = impl Into<String>>) -> Result<Client, ConnectError> {
        Self::builder(addresses).connect().await
    }

    /// The same, with settings.
    pub fn builder(addresses: impl IntoIterator<Item = impl Into<String>>) -> ClientBuilder {
        ClientBuilder {
            addresses: addresses.into_iter().map(Into::into).collect(),
            tls: Ok(Tls::default()),
            connect_timeout: Duration::from_secs(2),
            patience: Duration::from_secs(10),
        }
    }

    /// A handle to a database; it need not exist yet: the first write makes it.
    pub fn database(&self, name: &str) -> Database {
        Database::new(Way::Client(self.clone()), name)
    }

    /// The cluster.
    pub fn cluster_id(&self) -> u64 {
        self.inner.cluster.read().id
    }

    /// Who led when the members were last asked.
    pub fn leader(&self) -> Option<NodeId> {
        let leader = self.inner.cluster.read().leader;
        (leader != 0).then_some(NodeId(leader))
    }

    /// Makes an empty database; see [`Node::create_database`](crate::Node::create_database).
    ///
    /// # Errors
    /// As there.
    pub async fn create_database(&self, name: &str) -> Result<bool, WriteError> {
        self.change_database(name, proto::database_change::Kind::Create).await
    }

    /// Drops a database; see [`Node::drop_database`](crate::Node::drop_database).
    ///
    /// # Errors
    /// As there.
    pub async fn drop_database(&self, name: &str) -> Result<bool, WriteError> {
        self.change_database(name, proto::database_change::Kind::Drop).await
    }

    async fn change_database(&self, name: &str, kind: proto::database_change::Kind) -> Result<bool, WriteError> {
        let payload = remote_sql::encode_database_change(name, kind);
        let reply = self.call_leader(remote_sql::DATABASES_HANDLER, &|| payload.clone(), None).await;
        Ok(remote_sql::decode_database_change(reply)?.changed)
    }

    /// How long a call of now may look for a member that takes it.
    pub(super) fn patient_until(&self, deadline: Option<Instant>) -> Instant {
        let patience = Instant::now() + self.inner.patience;
        deadline.map_or(patience, |deadline| deadline.min(patience))
    }

    /// Calls a built-in handler on the leader, through any member that can be reached.
    /// `payload`: called for each try; after `deadline` there is none.
    pub(super) async fn call_leader(
        &self,
        handler: &str,
        payload: &(dyn Fn() -> Bytes + Send + Sync),
        deadline: Option<Instant>,
    ) -> Result<Bytes, CallError> {
        let deadline = self.patient_until(deadline);
        loop {
            let mut failed = CallError::NoLeader;
            for address in self.inner.addresses() {
                match self.inner.call(&address, handler, payload()).await {
                    Err(error @ (CallError::NoLeader | CallError::NotSent(_))) => failed = error,
                    answer => return answer,
                }
                self.inner.stale.notify_one();
            }
            if Instant::now() > deadline {
                return Err(failed);
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    /// Begins a transaction through the first member that lets it.
    pub(super) async fn begin(&self, begin: wire::TransactionBegin) -> Result<Wire, WriteError<SqlError>> {
        let deadline = Instant::now() + Duration::from_millis(begin.queue_timeout_ms);
        loop {
            let mut failed = "no member was reached".to_owned();
            for address in self.inner.addresses() {
                let left = deadline.saturating_duration_since(Instant::now());
                let begin = wire::TransactionBegin {
                    cluster_id: self.cluster_id(),
                    queue_timeout_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1),
                    ..begin.clone()
                };
                let client = self.inner.client(&address).map_err(WriteError::Rejected)?;
                match transaction_host::begin_remotely(client, begin).await {
                    Ok(wire) => return Ok(wire),
                    Err(NotBegun::Failed(error)) => return Err(error),
                    Err(NotBegun::TryOn(why)) => failed = format!("{address}: {why}"),
                }
                self.inner.stale.notify_one();
            }
            if Instant::now() > deadline {
                return Err(WriteError::Timeout(format!("no leader let the transaction begin: {failed}")));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    /// Begins a query on the first member that takes it.
    pub(super) async fn query_parts(
        &self,
        database: &str,
        statement: proto::SqlStatement,
        consistency: ReadConsistency,
        deadline: Option<Instant>,
    ) -> Result<Parts, ReadError> {
        let parts = self.try_query_parts(database, statement, consistency, deadline);
        let late = || Err(ReadError::DeadlinePassed("no member answered".into()));
        deadline::until(deadline, deadline::ANSWER_GRACE, parts).await.unwrap_or_else(late)
    }

    async fn try_query_parts(
        &self,
        database: &str,
        statement: proto::SqlStatement,
        consistency: ReadConsistency,
        bound: Option<Instant>,
    ) -> Result<Parts, ReadError> {
        let (consistency, version) = match consistency {
            ReadConsistency::Linearizable => (Consistency::Linearizable, 0),
            ReadConsistency::Local => (Consistency::Local, 0),
            ReadConsistency::AtLeast(version) => (Consistency::AtLeast, version.0),
        };
        let deadline = self.patient_until(bound);
        loop {
            let mut failed = ReadError::NoLeader("no member was reached".into());
            for address in self.inner.addresses() {
                let request = wire::QueryRequest {
                    cluster_id: self.cluster_id(),
                    database: database.to_owned(),
                    statement: Some(statement.clone()),
                    consistency: consistency.into(),
                    version,
                    timeout_ms: deadline::left_millis(bound),
                };
                match self.inner.begin_query(&address, request).await {
                    Ok(parts) => return Ok(parts),
                    // This member is cut off, or stops: another may not be.
                    Err(error @ (ReadError::NoLeader(_) | ReadError::Fatal(_))) => failed = error,
                    Err(error) => return Err(error),
                }
                self.inner.stale.notify_one();
            }
            if Instant::now() > deadline {
                return Err(failed);
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }

    /// Follows a database through the first member that answers, and goes on with others.
    pub(super) async fn changes(
        &self,
        database: &str,
        after: Option<Version>,
    ) -> Result<(Version, mpsc::Receiver<Told>), ReadError> {
        let (mut start, mut replies) = self.begin_changes(database, after).await?;
        let begun = start;
        let (sender, receiver) = mpsc::channel(1);
        let (client, database) = (self.clone(), database.to_owned());
        tokio::spawn(async move {
            loop {
                let message = tokio::select! {
                    message = replies.message() => message,
                    () = sender.closed() => return,
                };
                let told = match message.ok().flatten().and_then(|reply| reply.part) {
                    Some(changes_reply::Part::Changed(changed)) => {
                        start = Version(changed.version);
                        let tables = changed.tables_known.then(|| changed.tables.into());
                        Ok(Change { version: start, tables })
                    }
                    // What is still to come is another member's to tell.
                    Some(changes_reply::Part::Failure(failed)) if Kind::try_from(failed.kind) != Ok(Kind::Fatal) => {
                        Err(from_failure(failed))
                    }
                    _ => match client.begin_changes(&database, Some(start)).await {
                        Ok((_, next)) => {
                            replies = next;
                            continue;
                        }
                        Err(error) => Err(error),
                    },
                };
                let failed = told.is_err();
                if sender.send(told).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok((begun, receiver))
    }

    async fn begin_changes(
        &self,
        database: &str,
        after: Option<Version>,
    ) -> Result<(Version, tonic::Streaming<wire::ChangesReply>), ReadError> {
        let deadline = self.patient_until(None);
        loop {
            let mut failed = "no member was reached".to_owned();
            for address in self.inner.addresses() {
                let mut client = self.inner.client(&address).map_err(ReadError::NoLeader)?;
                let request = wire::ChangesRequest {
                    cluster_id: self.cluster_id(),
                    database: database.to_owned(),
                    after: after.map(|version| version.0),
                };
                let replies = async {
                    let mut replies = client.changes(request).await?.into_inner();
                    let first = replies.message().await?.and_then(|reply| reply.part);
                    Ok::<_, tonic::Status>((first, replies))
                };
                match replies.await {
                    Ok((Some(changes_reply::Part::Begun(begun)), replies)) => {
                        return Ok((Version(begun.after), replies));
                    }
                    Ok((Some(changes_reply::Part::Failure(failure)), _)) => match from_failure(failure) {
                        ReadError::Fatal(why) => failed = format!("{address}: {why}"),
                        error => return Err(error),
                    },
                    Ok(_) => failed = format!("{address} gave no answer"),
                    Err(status) => failed = format!("{address}: {}", describe(&status)),
                }
                self.inner.stale.notify_one();
            }
            if Instant::now() > deadline {
                return Err(ReadError::NoLeader(failed));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }
}

async fn keep_fresh(client: Weak<Inner>) {
    loop {
        let Some(inner) = client.upgrade() else { return };
        if let Err(why) = inner.refresh().await {
            tracing::debug!("no member of the cluster answers: {why}");
        }
        let _ = tokio::time::timeout(REFRESH_INTERVAL, async {
            // Held weakly while nothing happens: the program's last handle ends this.
            let asked = inner.stale.notified();
            tokio::pin!(asked);
            asked.as_mut().enable();
            let weak = Arc::downgrade(&inner);
            while weak.strong_count() > 1 {
                if tokio::time::timeout(Duration::from_millis(500), &mut asked).await.is_ok() {
                    break;
                }
            }
        })
        .await;
        if Arc::strong_count(&inner) == 1 {
            return;
        }
        tokio::time::sleep(ROUND_PAUSE).await;
    }
}

impl Inner {
    /// Where to try, in order.
    fn addresses(&self) -> Vec<String> {
        let mut addresses = self.cluster.read().addresses.clone();
        // Members may advertise what cannot be reached from here, such as addresses of an inner network.
        addresses.extend(self.given.iter().filter(|given| !addresses.contains(given)).cloned().collect::<Vec<_>>());
        addresses
    }

    fn client(&self, address: &str) -> Result<ClientClient<Channel>, String> {
        let mut channels = self.channels.lock();
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let channel = self.tls.channel(address, |endpoint| {
                    endpoint
                        .connect_timeout(self.connect_timeout)
                        .tcp_nodelay(true)
                        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                        .keep_alive_timeout(KEEPALIVE_INTERVAL)
                        .initial_stream_window_size(WINDOW_BYTES)
                        .initial_connection_window_size(WINDOW_BYTES)
                })?;
                channels.insert(address.to_owned(), channel.clone());
                channel
            }
        };
        Ok(ClientClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    /// Asks members who belongs to the cluster until one answers.
    async fn refresh(&self) -> Result<(), String> {
        let known = self.cluster.read().id;
        let mut failed = Vec::new();
        for address in self.addresses() {
            let mut client = match self.client(&address) {
                Ok(client) => client,
                Err(why) => {
                    failed.push(why);
                    continue;
                }
            };
            let request = wire::ClusterRequest { protocol_version: CLIENT_PROTOCOL_VERSION };
            let answer = tokio::time::timeout(self.connect_timeout * 2, client.cluster(request)).await;
            let reply = match answer {
                Ok(Ok(reply)) => reply.into_inner(),
                Ok(Err(status)) => {
                    failed.push(format!("{address}: {}", describe(&status)));
                    continue;
                }
                Err(_) => {
                    failed.push(format!("{address}: no answer"));
                    continue;
                }
            };
            if known != 0 && reply.cluster_id != known {
                failed.push(format!("{address}: now belongs to another cluster, {:016x}", reply.cluster_id));
                continue;
            }
            let mut members = reply.members;
            members.sort_by_key(|member| (member.id != reply.leader, member.id != reply.node_id));
            let mut cluster = self.cluster.write();
            cluster.id = reply.cluster_id;
            cluster.leader = reply.leader;
            // The one that answers first is the best known, whatever it advertises.
            cluster.addresses = members.into_iter().flat_map(|member| member.peer_urls).collect();
            return Ok(());
        }
        Err(failed.join("; "))
    }

    async fn call(&self, address: &str, handler: &str, payload: Bytes) -> Result<Bytes, CallError> {
        let mut client = self.client(address).map_err(CallError::NotSent)?;
        let cluster_id = self.cluster.read().id;
        let request = wire::ClientCallRequest { cluster_id, handler: handler.to_owned(), payload };
        match client.call(request).await {
            Ok(reply) => match reply.into_inner().outcome {
                Some(Outcome::Reply(reply)) => Ok(reply),
                Some(Outcome::Error(error)) => Err(CallError::Handler(error)),
                Some(Outcome::NoLeader(_)) => Err(CallError::NoLeader),
                Some(Outcome::NotSent(why)) => Err(CallError::NotSent(why)),
                Some(Outcome::Unknown(why)) => Err(CallError::OutcomeUnknown(why)),
                None => Err(CallError::OutcomeUnknown(format!("{address} answered without an outcome"))),
            },
            Err(status) if crate::node::never_sent(&status) => {
                Err(CallError::NotSent(format!("{address}: {}", describe(&status))))
            }
            Err(status) => Err(CallError::OutcomeUnknown(format!("{address}: {}", describe(&status)))),
        }
    }

    async fn begin_query(&self, address: &str, request: wire::QueryRequest) -> Result<Parts, ReadError> {
        let lost = |status: &tonic::Status| ReadError::NoLeader(format!("{address}: {}", describe(status)));
        let mut client = self.client(address).map_err(ReadError::NoLeader)?;
        let mut replies = client.query(request).await.map_err(|status| lost(&status))?.into_inner();
        // With the first part it has begun: until then another member may be tried.
        let first = match replies.message().await.map_err(|status| lost(&status))? {
            Some(reply) => from_wire(reply)?,
            None => return Err(ReadError::NoLeader(format!("{address} gave no answer"))),
        };
        let address = address.to_owned();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut next = Ok(first);
            loop {
                let failed = next.is_err();
                if sender.send(next).await.is_err() || failed {
                    return;
                }
                let message = tokio::select! {
                    message = replies.message() => message,
                    () = sender.closed() => return,
                };
                next = match message {
                    Ok(Some(reply)) => from_wire(reply),
                    Ok(None) => return,
                    Err(status) => Err(ReadError::NoLeader(format!("{address}: {}", describe(&status)))),
                };
            }
        });
        Ok(receiver)
    }
}

/// A status in words, with what caused it: tonic's own say "transport error".
pub(super) fn describe(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

fn from_wire(reply: wire::QueryReply) -> Result<Part, ReadError> {
    match reply.part {
        Some(query_reply::Part::Head(head)) => Ok(Part::Head(head.columns)),
        Some(query_reply::Part::Rows(rows)) => {
            let values = |row: proto::SqlRow| row.values.into_iter().map(remote_sql::from_proto_value).collect();
            Ok(Part::Rows(rows.rows.into_iter().map(values).collect()))
        }
        Some(query_reply::Part::Failure(failure)) => Err(from_failure(failure)),
        None => Err(ReadError::Fatal("a member answered with an empty part: is it of another version?".into())),
    }
}

fn from_failure(failure: wire::QueryFailure) -> ReadError {
    match Kind::try_from(failure.kind) {
        Ok(Kind::NoLeader) => ReadError::NoLeader(failure.message),
        Ok(Kind::Timeout) => ReadError::Timeout(failure.message),
        Ok(Kind::NoSuchDatabase) => ReadError::NoSuchDatabase(failure.message),
        Ok(Kind::Overloaded) => ReadError::Overloaded,
        Ok(Kind::TooOld) => ReadError::TooOld { max_age: Duration::from_secs(failure.max_age_seconds) },
        Ok(Kind::HoldsTooMuch) => ReadError::HoldsTooMuch { max_bytes: failure.max_bytes },
        Ok(Kind::DeadlinePassed) => ReadError::DeadlinePassed(failure.message),
        Ok(Kind::Sql) => {
            let code = rusqlite::ffi::Error::new(failure.extended_code);
            ReadError::Sql(rusqlite::Error::SqliteFailure(code, Some(failure.message)))
        }
        Ok(Kind::Fatal) | Err(_) => ReadError::Fatal(failure.message),
    }
}
