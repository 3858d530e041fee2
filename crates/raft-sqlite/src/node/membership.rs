//! Adding, removing, promoting members: asked of any node, done by the leader through Raft's joint consensus.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ClientWriteError, RaftError};
use serde::{Deserialize, Serialize};

use super::calls::{BuiltInFailure, CallHandler};
use super::{Node, NodeInner};
use crate::NodeId;
use crate::consensus::types::{PeerNode, TypeConfig};
use crate::error::{CallError, MembershipError};

/// Name of the built-in handler.
pub(super) const HANDLER: &str = "raft-sqlite.membership";
/// How long a member that is to become a voter may take to catch up.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(120);

/// A member of the cluster, as the membership in force names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Unique in the cluster, never used again.
    pub id: NodeId,
    /// Its name; empty until a member that was added has started.
    pub name: String,
    /// Where peers reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started.
    pub client_urls: Vec<String>,
    /// It has no vote.
    pub learner: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum Change {
    Add { id: u64, node: PeerNode, voter: bool },
    Remove { id: u64 },
    Promote { id: u64 },
    Update { id: u64, node: PeerNode },
}

impl Node {
    /// The members, by id.
    pub fn members(&self) -> Vec<Member> {
        let metrics = self.inner.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        membership
            .nodes()
            .map(|(id, node)| Member {
                id: NodeId(*id),
                name: node.name.clone(),
                peer_urls: node.peer_urls.clone(),
                client_urls: node.client_urls.clone(),
                learner: !voters.contains(id),
            })
            .collect()
    }

    /// Adds a member. As a voter it must be running and reachable: it gets its vote when it has caught up.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_member(
        &self,
        id: NodeId,
        name: &str,
        peer_urls: Vec<String>,
        voter: bool,
    ) -> Result<(), MembershipError> {
        let node = PeerNode { name: name.to_owned(), peer_urls, client_urls: Vec::new(), started: false };
        self.change(&Change::Add { id: id.0, node, voter }).await
    }

    /// Removes a member; it no longer counts for any quorum when this returns.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove_member(&self, id: NodeId) -> Result<(), MembershipError> {
        self.change(&Change::Remove { id: id.0 }).await
    }

    /// Gives a learner its vote, once it has caught up.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn promote_member(&self, id: NodeId) -> Result<(), MembershipError> {
        self.change(&Change::Promote { id: id.0 }).await
    }

    /// Hands the leadership of this node to `to`, or to the member that is furthest. Nothing to do if this node does not lead.
    ///
    /// # Errors
    /// [`MembershipError::Rejected`] when nobody took over within several election time-outs.
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<(), MembershipError> {
        let raft = &self.inner.raft;
        if !raft.is_leader() {
            return Ok(());
        }
        let target = to.or_else(|| self.furthest(|_| true)).map(|id| id.0);
        let Some(target) = target else { return Ok(()) };
        let fatal = |error: &dyn std::fmt::Display| MembershipError::Rejected(format!("raft has stopped: {error}"));
        raft.trigger().transfer_leader(target).await.map_err(|error| fatal(&error))?;
        let mut leadership = self.leadership();
        let own = self.id();
        let taken = leadership.wait_for(|now| now.leader.is_some_and(|leader| leader != own));
        match tokio::time::timeout(self.inner.config.election_timeout * 2, taken).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                Err(MembershipError::Rejected(format!("member {target:016x} did not take over the leadership in time")))
            }
        }
    }

    /// The voter, other than this leader, whose log is furthest of those that `may`.
    pub(super) fn furthest(&self, may: impl Fn(u64) -> bool) -> Option<NodeId> {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let voters: BTreeSet<u64> = metrics.membership_config.membership().voter_ids().collect();
        let candidates = metrics
            .replication
            .iter()
            .flatten()
            .filter(|(id, _)| voters.contains(id) && **id != self.id().0 && may(**id));
        candidates.max_by_key(|(_, matched)| matched.as_ref().map(|id| id.index)).map(|(id, _)| NodeId(*id))
    }

    async fn change(&self, change: &Change) -> Result<(), MembershipError> {
        let payload = Bytes::from(serde_json::to_vec(change).expect("invariant: plain JSON"));
        match self.call_leader(HANDLER, payload).await {
            Ok(_) => Ok(()),
            Err(CallError::Handler(bytes)) => {
                let failure = BuiltInFailure::decode(&bytes);
                Err(match failure.unknown {
                    true => MembershipError::OutcomeUnknown(failure.message),
                    false => MembershipError::Rejected(failure.message),
                })
            }
            Err(CallError::OutcomeUnknown(why)) => Err(MembershipError::OutcomeUnknown(why)),
            Err(error) => Err(MembershipError::NoLeader(error.to_string())),
        }
    }
}

/// Brings this member's name and addresses in the membership up to date.
pub(super) async fn publish_own(node: &Node) -> Result<(), MembershipError> {
    let config = &node.inner.config;
    let want = PeerNode {
        name: node.name().to_owned(),
        peer_urls: config.advertise_peer_urls.clone(),
        client_urls: config.advertise_client_urls.clone(),
        started: true,
    };
    let found = {
        let metrics = node.inner.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&node.id().0).cloned()
    };
    match found {
        Some(member) if member == want => Ok(()),
        Some(_) => node.change(&Change::Update { id: node.id().0, node: want }).await,
        None => Err(MembershipError::Rejected("this node is not a member yet".into())),
    }
}

/// The leader's end.
pub(super) struct MembershipHandler {
    pub node: std::sync::Weak<NodeInner>,
}

impl CallHandler for MembershipHandler {
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>> {
        let node = self.node.clone();
        Box::pin(async move {
            let failure = |unknown: bool, message: String| BuiltInFailure { unknown, message }.encode();
            let node = node.upgrade().ok_or_else(|| failure(false, "the node stops".into()))?;
            let change = serde_json::from_slice(&payload)
                .map_err(|error| failure(false, format!("the change could not be read: {error}")))?;
            apply(&node, change).await.map(|()| Bytes::new()).map_err(|error| match error {
                MembershipError::OutcomeUnknown(why) => failure(true, why),
                other => failure(false, other.to_string()),
            })
        })
    }
}

fn rejected(text: String) -> MembershipError {
    MembershipError::Rejected(text)
}

fn from_raft(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> MembershipError {
    match error {
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => rejected(error.to_string()),
        // No ForwardToLeader proves that the change had no effect.
        other => MembershipError::OutcomeUnknown(other.to_string()),
    }
}

async fn apply(node: &NodeInner, change: Change) -> Result<(), MembershipError> {
    let raft = &node.raft;
    let (nodes, voters) = {
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let nodes: BTreeMap<u64, PeerNode> = membership.nodes().map(|(id, node)| (*id, node.clone())).collect();
        (nodes, membership.voter_ids().collect::<BTreeSet<u64>>())
    };
    let known = |id: u64| {
        if nodes.contains_key(&id) { Ok(()) } else { Err(rejected(format!("there is no member {id:016x}"))) }
    };
    match change {
        Change::Add { id, node: peer, voter } => {
            if let Some(other) = nodes
                .iter()
                .find(|(other, n)| **other != id && n.peer_urls.iter().any(|url| peer.peer_urls.contains(url)))
            {
                return Err(rejected(format!(
                    "member {:016x} already has one of the addresses {}: remove that member first if it is gone",
                    other.0,
                    peer.peer_urls.join(",")
                )));
            }
            if peer.peer_urls.is_empty() {
                return Err(rejected("a member needs a peer address".into()));
            }
            if nodes.get(&id).is_some_and(|known| known.started) {
                return Err(rejected(format!(
                    "member {id:016x} has already taken part: a member that has lost its log must be removed and added as a new one"
                )));
            }
            if !nodes.contains_key(&id) {
                raft.add_learner(id, peer, false).await.map_err(from_raft)?;
            }
            if voter && !voters.contains(&id) {
                promote(node, id).await?;
            }
            Ok(())
        }
        Change::Remove { id } => {
            known(id)?;
            if voters.contains(&id) {
                if voters.len() == 1 {
                    return Err(rejected("the last voter cannot be removed".into()));
                }
                let change = ChangeMembers::RemoveVoters(BTreeSet::from([id]));
                raft.change_membership(change, false).await.map_err(from_raft)?;
            } else {
                let change = ChangeMembers::RemoveNodes(BTreeSet::from([id]));
                raft.change_membership(change, false).await.map_err(from_raft)?;
            }
            Ok(())
        }
        Change::Promote { id } => {
            known(id)?;
            if voters.contains(&id) {
                return Err(rejected(format!("member {id:016x} has a vote already")));
            }
            promote(node, id).await
        }
        Change::Update { id, node: peer } => {
            known(id)?;
            let change = ChangeMembers::SetNodes(BTreeMap::from([(id, peer)]));
            raft.change_membership(change, true).await.map_err(from_raft).map(drop)
        }
    }
}

/// Gives a learner its vote once it has nearly caught up: a voter that lags could stop the cluster.
async fn promote(node: &NodeInner, id: u64) -> Result<(), MembershipError> {
    /// Entries that a member may lag behind and still count as caught up.
    const CLOSE_ENOUGH: u64 = 1000;
    let mut metrics = node.raft.metrics();
    let caught_up = async {
        loop {
            let near = {
                let now = metrics.borrow_and_update();
                let matched =
                    now.replication.as_ref().and_then(|all| all.get(&id)).and_then(|matched| matched.as_ref());
                let last = now.last_log_index.unwrap_or(0);
                matched.is_some_and(|matched| matched.index + CLOSE_ENOUGH >= last)
                    || now.state != openraft::ServerState::Leader
            };
            if near || metrics.changed().await.is_err() {
                return;
            }
        }
    };
    if tokio::time::timeout(CATCH_UP_PATIENCE, caught_up).await.is_err() {
        return Err(rejected(format!(
            "member {id:016x} has not caught up within {} s: is it running and reachable? It stays a learner",
            CATCH_UP_PATIENCE.as_secs()
        )));
    }
    let change = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
    node.raft.change_membership(change, true).await.map_err(from_raft).map(drop)
}

/// Asks the cluster behind `contacts` to add this node, and waits until it has.
pub(super) async fn join(node: &Node, contacts: &[String], voter: bool) -> Result<(), MembershipError> {
    use crate::network::proto;
    let change = Change::Add {
        id: node.id().0,
        node: PeerNode {
            name: node.name().to_owned(),
            peer_urls: node.inner.config.advertise_peer_urls.clone(),
            client_urls: node.inner.config.advertise_client_urls.clone(),
            started: false,
        },
        voter,
    };
    let payload = Bytes::from(serde_json::to_vec(&change).expect("invariant: plain JSON"));
    let deadline = tokio::time::Instant::now() + CATCH_UP_PATIENCE;
    let mut last = "no contact answered".to_owned();
    while tokio::time::Instant::now() < deadline {
        for contact in contacts {
            match ask_contact(node, contact, &payload).await {
                Ok(proto::call_response::Outcome::Reply(_)) => return Ok(()),
                Ok(proto::call_response::Outcome::Error(bytes)) => {
                    let failure = BuiltInFailure::decode(&bytes);
                    if !failure.unknown {
                        return Err(rejected(failure.message));
                    }
                    last = failure.message;
                }
                Ok(_) => last = format!("{contact} knows no leader"),
                Err(why) => last = format!("{contact}: {why}"),
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Err(MembershipError::NoLeader(last))
}

/// Sends the change to the contact or, if it does not lead, to the leader it names.
async fn ask_contact(
    node: &Node,
    contact: &str,
    payload: &Bytes,
) -> Result<crate::network::proto::call_response::Outcome, String> {
    use crate::network::channels::Purpose;
    use crate::network::proto;
    let channels = &node.inner.channels;
    let who = super::admission::identify(contact, channels.tls(), None).await?;
    let mut client = channels.client(who.node_id, contact, Purpose::Call)?;
    let request = proto::CallRequest { handler: FORWARD_HANDLER.into(), payload: payload.clone() };
    let answer = client.call(request).await.map_err(|status| status.to_string())?.into_inner();
    answer.outcome.ok_or_else(|| "an answer without an outcome".to_owned())
}

/// Name of the handler that any member answers, passing the change on to the leader.
pub(super) const FORWARD_HANDLER: &str = "raft-sqlite.membership.forward";
