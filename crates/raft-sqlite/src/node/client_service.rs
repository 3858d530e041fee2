//! Answers programs that are no members, on the addresses for peers: what a node's own handle does, from afar.

use std::pin::Pin;
use std::sync::{Arc, Weak};

use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Node, NodeInner, databases};
use crate::client::stream::Part;
use crate::client::{Change, ReadConsistency, deadline, migrate, remote_sql, transaction_host};
use crate::error::{CallError, ReadError};
use crate::network::client_proto::client_call_reply::Outcome;
use crate::network::client_proto::client_server::Client;
use crate::network::client_proto::query_failure::Kind;
use crate::network::client_proto::query_request::Consistency;
use crate::network::client_proto::{self as wire};
use crate::network::client_proto::{changes_reply, query_reply};
use crate::network::{CLIENT_PROTOCOL_VERSION, proto};
use crate::page::Version;

/// The handlers that a program may call; others are the members' own.
const HANDLERS: [&str; 3] = [remote_sql::HANDLER, databases::HANDLER, migrate::HANDLER];

/// The service.
#[derive(Clone)]
pub(super) struct ClientService {
    node: Weak<NodeInner>,
}

impl ClientService {
    pub fn new(node: Weak<NodeInner>) -> Self {
        Self { node }
    }

    fn node(&self) -> Result<Node, Status> {
        let inner = self.node.upgrade().ok_or_else(|| Status::unavailable("this member is stopping"))?;
        Ok(Node { inner })
    }

    fn node_of(&self, cluster_id: u64) -> Result<Node, Status> {
        let node = self.node()?;
        match node.cluster_id() {
            own if own == cluster_id => Ok(node),
            own => Err(Status::failed_precondition(format!(
                "wrong cluster: the program was connected to {cluster_id:016x}, this member belongs to {own:016x}"
            ))),
        }
    }
}

type ChangesReplies = Pin<Box<dyn Stream<Item = Result<wire::ChangesReply, Status>> + Send>>;
type Replies = Pin<Box<dyn Stream<Item = Result<wire::QueryReply, Status>> + Send>>;

#[tonic::async_trait]
impl Client for ClientService {
    type QueryStream = Replies;
    type TransactionStream = ReceiverStream<Result<wire::TransactionReply, Status>>;

    type ChangesStream = ChangesReplies;

    async fn changes(&self, request: Request<wire::ChangesRequest>) -> Result<Response<ChangesReplies>, Status> {
        let request = request.into_inner();
        let node = self.node_of(request.cluster_id)?;
        let (start, told) = match node.changes(&request.database, request.after.map(Version)) {
            Ok(begun) => begun,
            Err(error) => return Ok(Response::new(Box::pin(futures_util::stream::iter([Ok(change_failed(error))])))),
        };
        let begun = changes_reply(changes_reply::Part::Begun(wire::ChangesBegun { after: start.0 }));
        let changes = ReceiverStream::new(told).map(|told| {
            Ok(match told {
                Ok(Change { version, tables }) => changes_reply(changes_reply::Part::Changed(wire::ChangedVersion {
                    version: version.0,
                    tables_known: tables.is_some(),
                    tables: tables.map_or_else(Vec::new, |tables| tables.to_vec()),
                })),
                Err(error) => change_failed(error),
            })
        });
        Ok(Response::new(Box::pin(futures_util::stream::iter([Ok(begun)]).chain(changes))))
    }

    async fn transaction(
        &self,
        request: Request<Streaming<wire::TransactionRequest>>,
    ) -> Result<Response<Self::TransactionStream>, Status> {
        let node = self.node()?;
        // A connection that breaks is the caller's end, as one that is closed.
        let requests = request.into_inner().take_while(|request| std::future::ready(request.is_ok()));
        let requests = requests.filter_map(|request| std::future::ready(request.ok()));
        let (sender, replies) = mpsc::channel(2);
        tokio::spawn(transaction_host::serve(node, Box::pin(requests), sender));
        Ok(Response::new(ReceiverStream::new(replies)))
    }

    async fn cluster(&self, request: Request<wire::ClusterRequest>) -> Result<Response<wire::ClusterReply>, Status> {
        let node = self.node()?;
        let version = request.into_inner().protocol_version;
        if version != CLIENT_PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "the program speaks version {version} of the client protocol, this member (raft-sqlite {}) {CLIENT_PROTOCOL_VERSION}: use versions that understand each other",
                env!("CARGO_PKG_VERSION")
            )));
        }
        let members = node.members().into_iter().map(|member| wire::ClusterMember {
            id: member.id.0,
            name: member.name,
            peer_urls: member.peer_urls,
        });
        Ok(Response::new(wire::ClusterReply {
            cluster_id: node.cluster_id(),
            leader: node.inner.leadership.borrow().leader.map_or(0, |leader| leader.0),
            members: members.collect(),
            node_id: node.id().0,
        }))
    }

    async fn call(&self, request: Request<wire::ClientCallRequest>) -> Result<Response<wire::ClientCallReply>, Status> {
        let request = request.into_inner();
        let node = self.node_of(request.cluster_id)?;
        if !HANDLERS.contains(&request.handler.as_str()) {
            return Err(Status::failed_precondition(format!("programs have no call {:?}", request.handler)));
        }
        let outcome = match node.call_leader(&request.handler, request.payload).await {
            Ok(reply) => Outcome::Reply(reply),
            Err(CallError::Handler(error)) => Outcome::Error(error),
            Err(CallError::NoLeader) => Outcome::NoLeader(true),
            Err(error @ CallError::Stopped) => Outcome::NotSent(error.to_string()),
            Err(CallError::NotSent(why)) => Outcome::NotSent(why),
            Err(CallError::OutcomeUnknown(why)) => Outcome::Unknown(why),
        };
        Ok(Response::new(wire::ClientCallReply { outcome: Some(outcome) }))
    }

    async fn query(&self, request: Request<wire::QueryRequest>) -> Result<Response<Replies>, Status> {
        let request = request.into_inner();
        let node = self.node_of(request.cluster_id)?;
        let consistency = match Consistency::try_from(request.consistency) {
            Ok(Consistency::Linearizable) => ReadConsistency::Linearizable,
            Ok(Consistency::Local) => ReadConsistency::Local,
            Ok(Consistency::AtLeast) => ReadConsistency::AtLeast(Version(request.version)),
            Err(_) => return Err(Status::failed_precondition("an unknown consistency: upgrade this member")),
        };
        let statement = request.statement.ok_or_else(|| Status::invalid_argument("a query without a statement"))?;
        let replies: Replies = match node
            .query_parts(&request.database, statement, consistency, deadline::from_millis(request.timeout_ms))
            .await
        {
            Ok(parts) => Box::pin(ReceiverStream::new(parts).map(|part| Ok(to_wire(part)))),
            Err(error) => Box::pin(futures_util::stream::iter([Ok(to_wire(Err(error)))])),
        };
        Ok(Response::new(replies))
    }
}

fn changes_reply(part: changes_reply::Part) -> wire::ChangesReply {
    wire::ChangesReply { part: Some(part) }
}

fn change_failed(error: ReadError) -> wire::ChangesReply {
    changes_reply(changes_reply::Part::Failure(failure(error)))
}

fn to_wire(part: Result<Part, ReadError>) -> wire::QueryReply {
    let part = match part {
        Ok(Part::Head(columns)) => query_reply::Part::Head(wire::QueryHead { columns }),
        Ok(Part::Rows(rows)) => {
            let row =
                |values: Vec<_>| proto::SqlRow { values: values.iter().map(remote_sql::to_proto_value).collect() };
            query_reply::Part::Rows(wire::QueryRows { rows: rows.into_iter().map(row).collect() })
        }
        Err(error) => query_reply::Part::Failure(failure(error)),
    };
    wire::QueryReply { part: Some(part) }
}

fn failure(error: ReadError) -> wire::QueryFailure {
    let (kind, message) = match &error {
        ReadError::NoLeader(why) => (Kind::NoLeader, why.clone()),
        ReadError::Timeout(why) => (Kind::Timeout, why.clone()),
        ReadError::NoSuchDatabase(name) => (Kind::NoSuchDatabase, name.clone()),
        ReadError::Overloaded => (Kind::Overloaded, String::new()),
        ReadError::DeadlinePassed(why) => (Kind::DeadlinePassed, why.clone()),
        ReadError::TooOld { .. } => (Kind::TooOld, String::new()),
        ReadError::HoldsTooMuch { .. } => (Kind::HoldsTooMuch, String::new()),
        ReadError::Sql(error) => (Kind::Sql, error.to_string()),
        ReadError::Prepare(_) | ReadError::Row(_) | ReadError::Panicked => (Kind::Sql, error.to_string()),
        ReadError::Damaged(damage) => (Kind::Fatal, damage.to_string()),
        ReadError::Fatal(why) => (Kind::Fatal, why.clone()),
    };
    let extended_code = match &error {
        ReadError::Sql(error) => error.sqlite_error().map_or(1, |error| error.extended_code),
        _ => 1,
    };
    let max_bytes = match &error {
        ReadError::HoldsTooMuch { max_bytes } => *max_bytes,
        _ => 0,
    };
    let max_age_seconds = match &error {
        ReadError::TooOld { max_age } => max_age.as_secs(),
        _ => 0,
    };
    wire::QueryFailure { kind: kind.into(), message, extended_code, max_age_seconds, max_bytes }
}

impl ClientService {
    /// The server's end, with the limits of peers.
    pub fn server(node: &Arc<NodeInner>) -> wire::client_server::ClientServer<Self> {
        wire::client_server::ClientServer::new(Self::new(Arc::downgrade(node)))
            .max_decoding_message_size(crate::network::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(crate::network::MAX_MESSAGE_BYTES)
    }
}
