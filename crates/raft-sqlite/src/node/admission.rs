//! Whether this node may take part in its cluster, found out from its peers before it votes or acknowledges anything.
//!
//! Raft rests on what voters remember. A member whose data directory was emptied has forgotten its vote and the entries it
//! acknowledged: voting again, it could make a leader of a node that lacks committed entries. So a member that starts without a log
//! asks its peers first, and answers nobody until it knows (INV-VOTER-REMEMBERS, docs/adr/0006):
//!
//! ```text
//!                 a peer knows this member as started ──► refused: remove it, add it again
//!  no log ──► ask a peer's membership lacks it        ──► refused: it was removed
//!                 most peers are of another cluster   ──► refused: wrong flags or data directory
//!                 enough peers know nothing of it     ──► takes part
//!                 else                                ──► asks again
//! ```
//!
//! "Enough" peers are so many that every majority has one among them: whatever this member was part of, one of them knows of it. A
//! member with a log takes part at once; it only looks whether its peers are of its cluster at all.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use openraft::async_runtime::watch::WatchReceiver as _;

use super::NodeInner;
use super::identity::Identity;
use crate::config::{ClusterStart, NodeConfig, host_and_port};
use crate::network::proto::peer_client::PeerClient;
use crate::network::tls::Tls;
use crate::network::{check_protocol, proto};

/// How long one peer may take to connect and to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two rounds.
const ROUND_INTERVAL: Duration = Duration::from_millis(200);
/// How often the log tells that the node still waits.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

/// What a peer is asked about: whoever asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker<'a> {
    pub node_id: u64,
    pub peer_urls: &'a [String],
}

/// What is known after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The node takes part.
    TakePart {
        /// Some peer has a leader: there is a log to be given.
        runs: bool,
    },
    /// Not enough is known: for people, who has not answered.
    Wait(String),
    /// The node must not take part: for people, why and what to do.
    Refuse(String),
}

/// Asks the member at `url` who it is, and who it takes the asker for.
///
/// # Errors
/// A sentence when it cannot be reached.
pub(super) async fn identify(
    url: &str,
    tls: &Tls,
    asker: Option<Asker<'_>>,
) -> Result<proto::IdentifyResponse, String> {
    host_and_port(url)?;
    let channel = tls.channel(url, |endpoint| endpoint.connect_timeout(ANSWER_TIMEOUT).timeout(ANSWER_TIMEOUT))?;
    let request = asker.map_or_else(proto::IdentifyRequest::default, |asker| proto::IdentifyRequest {
        node_id: asker.node_id,
        peer_urls: asker.peer_urls.to_vec(),
    });
    let mut client = PeerClient::new(channel);
    let answer = tokio::time::timeout(ANSWER_TIMEOUT * 2, client.identify(request))
        .await
        .map_err(|_| "no answer in time".to_owned())?
        .map_err(|status| crate::consensus::transport::innermost(&status))?
        .into_inner();
    check_protocol(answer.protocol_version, &answer.program_version)?;
    Ok(answer)
}

/// What a node that answers says about whoever asked.
pub(super) fn about(node: &NodeInner, request: &proto::IdentifyRequest) -> Option<proto::KnownMember> {
    let metrics = node.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let membership = metrics.membership_config.membership();
    let by_id = membership.get_node(&request.node_id).map(|peer| (request.node_id, peer));
    let by_url = || {
        let same =
            |peer: &crate::consensus::types::PeerNode| peer.peer_urls.iter().any(|url| request.peer_urls.contains(url));
        membership.nodes().find(|(_, peer)| same(peer)).map(|(id, peer)| (*id, peer))
    };
    let (node_id, peer) = by_id.or_else(by_url)?;
    Some(proto::KnownMember { node_id, started: peer.started })
}

/// The text for a member that has lost its data.
pub(super) fn lost_its_data(data_dir: &std::path::Path, member: u64) -> String {
    format!(
        "member {member:016x} has already taken part in this cluster, but {} holds no log: its votes and the entries it has \
         acknowledged are lost, and taking part without them could lose writes that others rely on. Put its data directory back, \
         or remove the member (raft-sqlite member remove {member:016x}) and start this node with an empty data directory and \
         --initial-cluster-state existing: it is then added as a new member",
        data_dir.display()
    )
}

fn other_cluster(data_dir: &std::path::Path, own: u64, other: u64) -> String {
    format!(
        "wrong cluster: the peers belong to cluster {other:016x}, this node to {own:016x} ({}). Give the data directory of this \
         cluster, or the --initial-cluster and --initial-cluster-token that the peers were started with",
        data_dir.display()
    )
}

/// The round's outcome as one verdict. `members`: how many the cluster has, this node included.
fn judge(
    config: &NodeConfig,
    own: &Identity,
    has_log: bool,
    members: usize,
    answers: &[(String, Result<proto::IdentifyResponse, String>)],
) -> Verdict {
    let data_dir = &config.data_dir;
    let majority = members / 2 + 1;
    let answered: Vec<&proto::IdentifyResponse> =
        answers.iter().filter_map(|(_, answer)| answer.as_ref().ok()).collect();
    let (ours, others): (Vec<&proto::IdentifyResponse>, Vec<&proto::IdentifyResponse>) =
        answered.into_iter().partition(|answer| answer.cluster_id == own.cluster_id);
    if let Some(other) = others.first()
        && ours.is_empty()
        && (others.len() >= majority || (!has_log && others.len() + 1 >= members))
    {
        return Verdict::Refuse(other_cluster(data_dir, own.cluster_id, other.cluster_id));
    }
    if has_log {
        return if ours.is_empty() {
            Verdict::Wait(silent(own.cluster_id, answers))
        } else {
            Verdict::TakePart { runs: true }
        };
    }
    for answer in ours.iter().filter(|answer| answer.initialized) {
        match &answer.you {
            Some(you) if you.started => return Verdict::Refuse(lost_its_data(data_dir, you.node_id)),
            Some(_) => {}
            None if matches!(config.cluster, ClusterStart::Join { .. }) => {}
            None => {
                return Verdict::Refuse(format!(
                    "member {} is no longer in cluster {:016x}: it was removed. To add this node again, start it with an empty \
                     data directory and --initial-cluster-state existing",
                    own.node_id, own.cluster_id
                ));
            }
        }
    }
    // Every majority of the members has one of so many.
    let needed = (members - majority + 1).min(members - 1);
    if ours.len() < needed {
        return Verdict::Wait(silent(own.cluster_id, answers));
    }
    Verdict::TakePart { runs: ours.iter().any(|answer| answer.has_leader) }
}

/// Who did not answer, or not as one of this cluster, and why.
fn silent(cluster_id: u64, answers: &[(String, Result<proto::IdentifyResponse, String>)]) -> String {
    let silent: Vec<String> = answers
        .iter()
        .filter_map(|(url, answer)| match answer {
            Ok(answer) if answer.cluster_id == cluster_id => None,
            Ok(answer) => Some(format!("{url} (it belongs to cluster {:016x})", answer.cluster_id)),
            Err(why) => Some(format!("{url} ({why})")),
        })
        .collect();
    silent.join(", ")
}

/// One round of questions to all other initial members.
pub(super) async fn ask(config: &NodeConfig, tls: &Tls, own: &Identity, has_log: bool) -> Verdict {
    let (urls, members): (Vec<Vec<String>>, usize) = match &config.cluster {
        ClusterStart::Static { members, .. } => {
            let others = members.iter().filter(|member| member.name != own.name);
            (others.map(|member| member.peer_urls.clone()).collect(), members.len())
        }
        ClusterStart::Join { contacts, .. } => {
            (contacts.iter().map(|contact| vec![contact.clone()]).collect(), contacts.len() + 1)
        }
    };
    let asker = Asker { node_id: own.node_id.0, peer_urls: &config.advertise_peer_urls };
    let answers = join_all(urls.into_iter().map(|urls| async move {
        let mut outcome = (String::new(), Err("no address".to_owned()));
        for url in urls {
            let answer = identify(&url, tls, Some(asker)).await;
            let answered = answer.is_ok();
            outcome = (url, answer);
            if answered {
                break;
            }
        }
        outcome
    }))
    .await;
    judge(config, own, has_log, members, &answers)
}

/// Asks until the node takes part or is refused; on a refusal the node is broken. `take_part` makes the cluster if it does not run.
pub(super) async fn run(node: std::sync::Weak<NodeInner>, has_log: bool) {
    // With a log, silence is worth a word only when it lasts: the peers may be starting, too.
    let mut told = has_log.then(tokio::time::Instant::now);
    loop {
        tokio::time::sleep(ROUND_INTERVAL).await;
        let Some(inner) = node.upgrade() else { return };
        if has_log && inner.leadership.borrow().leader.is_some() {
            return;
        }
        match ask(&inner.config, inner.channels.tls(), &inner.identity, has_log).await {
            Verdict::TakePart { runs } => {
                if !has_log && let Err(error) = take_part(&inner, runs).await {
                    inner.refuse(error.to_string());
                }
                return;
            }
            Verdict::Refuse(why) => {
                inner.refuse(why);
                return;
            }
            Verdict::Wait(silent) => {
                if told.is_none_or(|told| told.elapsed() > TELL_INTERVAL) {
                    if has_log {
                        tracing::warn!("no leader is known, and no peer answers: {silent}");
                    } else {
                        tracing::info!(
                            "this member has no log yet: it takes part once it has heard from its peers; no answer from {silent}"
                        );
                    }
                    told = Some(tokio::time::Instant::now());
                }
            }
        }
        drop(inner);
    }
}

/// Answers peers from now on, and makes the cluster unless it runs already.
pub(super) async fn take_part(node: &Arc<NodeInner>, runs: bool) -> Result<(), crate::error::StartError> {
    node.takes_part.store(true, Ordering::Release);
    if runs {
        tracing::info!("the cluster already runs: this member waits to be given its log by the leader");
        return Ok(());
    }
    super::start::initialize(node).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NodeId;
    use crate::config::InitialMember;

    const OWN: u64 = 7;
    const FOREIGN: u64 = 8;

    type Answer = Result<proto::IdentifyResponse, String>;

    fn peer(cluster_id: u64, initialized: bool, started: Option<bool>) -> Answer {
        let you = started.map(|started| proto::KnownMember { node_id: 1, started });
        Ok(proto::IdentifyResponse { cluster_id, initialized, you, ..Default::default() })
    }

    /// One word for the verdict on a member of a cluster of one more than `answers`.
    fn verdict(joins: bool, has_log: bool, answers: Vec<Answer>) -> &'static str {
        let members = answers.len() + 1;
        let named =
            |number| InitialMember { name: format!("n{number}"), peer_urls: vec![format!("http://n{number}:1")] };
        let cluster = match joins {
            true => ClusterStart::Join { contacts: Vec::new(), voter: true },
            false => ClusterStart::Static { members: (0..members).map(named).collect(), token: "t".into() },
        };
        let config = NodeConfig { cluster, ..NodeConfig::single("data") };
        let own = Identity { cluster_id: OWN, node_id: NodeId(1), name: "n0".into() };
        let answers: Vec<_> = answers.into_iter().map(|answer| ("http://peer:1".to_owned(), answer)).collect();
        match judge(&config, &own, has_log, members, &answers) {
            Verdict::TakePart { .. } => "takes part",
            Verdict::Wait(silent) => {
                assert!(silent.contains("http://peer:1 (down)"), "{silent}");
                "waits"
            }
            Verdict::Refuse(why) if why.contains("has already taken part") => "lost its data",
            Verdict::Refuse(why) if why.contains("it was removed") => "removed",
            Verdict::Refuse(why) if why.contains("wrong cluster") => "wrong cluster",
            Verdict::Refuse(why) => panic!("{why}"),
        }
    }

    #[test]
    fn a_member_without_a_log_hears_from_one_of_every_majority() {
        let fresh = || peer(OWN, false, None);
        let down = || Err("down".to_owned());
        let unstarted = || peer(OWN, true, Some(false));
        let started = || peer(OWN, true, Some(true));
        for (answers, wanted) in [
            (vec![], "takes part"),
            (vec![down()], "waits"),
            (vec![fresh()], "takes part"),
            (vec![fresh(), down()], "waits"),
            (vec![unstarted(), down()], "waits"),
            (vec![fresh(), fresh()], "takes part"),
            (vec![unstarted(), fresh()], "takes part"),
            (vec![fresh(), fresh(), down()], "takes part"),
            (vec![fresh(), fresh(), down(), down()], "waits"),
            (vec![fresh(), fresh(), unstarted(), down()], "takes part"),
            (vec![started(), down()], "lost its data"),
            (vec![fresh(), fresh(), unstarted(), started()], "lost its data"),
            (vec![peer(OWN, true, None), down()], "removed"),
            (vec![peer(FOREIGN, true, None), peer(FOREIGN, true, None)], "wrong cluster"),
            (vec![peer(FOREIGN, true, None)], "wrong cluster"),
        ] {
            assert_eq!(verdict(false, false, answers.clone()), wanted, "{answers:?}");
        }
        // Who joins was never there, unless its log alone is gone.
        assert_eq!(verdict(true, false, vec![peer(OWN, true, None)]), "takes part");
        assert_eq!(verdict(true, false, vec![started()]), "lost its data");
    }

    /// A member that only says who it is: of another version of the protocol.
    async fn member_of_version(protocol_version: u32) -> String {
        use crate::network::proto::peer_server::{Peer, PeerServer};
        use tonic::{Request, Response, Status, Streaming};

        struct Other(u32);
        type AppendStream = tokio_stream::Empty<Result<proto::AppendResponse, Status>>;
        type SnapshotStream = tokio_stream::Empty<Result<proto::SnapshotAnswer, Status>>;
        fn never<T>() -> Result<Response<T>, Status> {
            Err(Status::unimplemented("a member of another version was asked for more than who it is"))
        }

        #[tonic::async_trait]
        impl Peer for Other {
            type AppendStream = AppendStream;
            type SnapshotStream = SnapshotStream;

            async fn identify(
                &self,
                _: Request<proto::IdentifyRequest>,
            ) -> Result<Response<proto::IdentifyResponse>, Status> {
                Ok(Response::new(proto::IdentifyResponse {
                    cluster_id: OWN,
                    node_id: 2,
                    program_version: "9.9.9".into(),
                    protocol_version: self.0,
                    ..Default::default()
                }))
            }

            async fn append(
                &self,
                _: Request<Streaming<proto::AppendRequest>>,
            ) -> Result<Response<AppendStream>, Status> {
                never()
            }

            async fn heartbeat(
                &self,
                _: Request<proto::AppendRequest>,
            ) -> Result<Response<proto::AppendResponse>, Status> {
                never()
            }

            async fn vote(&self, _: Request<proto::VoteRequest>) -> Result<Response<proto::VoteResponse>, Status> {
                never()
            }

            async fn pre_vote(&self, _: Request<proto::VoteRequest>) -> Result<Response<proto::VoteResponse>, Status> {
                never()
            }

            async fn transfer_leader(
                &self,
                _: Request<proto::TransferLeaderRequest>,
            ) -> Result<Response<proto::TransferLeaderResponse>, Status> {
                never()
            }

            async fn snapshot(
                &self,
                _: Request<Streaming<proto::SnapshotChunk>>,
            ) -> Result<Response<SnapshotStream>, Status> {
                never()
            }

            async fn read_index(
                &self,
                _: Request<proto::ReadIndexRequest>,
            ) -> Result<Response<proto::ReadIndexResponse>, Status> {
                never()
            }

            async fn call(&self, _: Request<proto::CallRequest>) -> Result<Response<proto::CallResponse>, Status> {
                never()
            }
        }

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let server = tonic::transport::Server::builder().add_service(PeerServer::new(Other(protocol_version)));
        tokio::spawn(server.serve_with_incoming(incoming));
        url
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_member_of_another_version_is_told_at_once() {
        let tls = Tls::default();
        let now = member_of_version(crate::network::PROTOCOL_VERSION).await;
        assert_eq!(identify(&now, &tls, None).await.unwrap().node_id, 2);
        for (version, who) in [(crate::network::PROTOCOL_VERSION + 1, "this member"), (0, "the peer")] {
            let url = member_of_version(version).await;
            let why = identify(&url, &tls, None).await.unwrap_err();
            for words in ["incompatible versions", "9.9.9", env!("CARGO_PKG_VERSION"), &format!("upgrade {who} first")]
            {
                assert!(why.contains(words), "{why}");
            }
            // Who waits for it says so.
            let config = NodeConfig {
                cluster: ClusterStart::Join { contacts: vec![url.clone()], voter: true },
                ..NodeConfig::single("data")
            };
            let own = Identity { cluster_id: OWN, node_id: NodeId(1), name: "n0".into() };
            let verdict = ask(&config, &tls, &own, true).await;
            assert!(matches!(&verdict, Verdict::Wait(why) if why.contains("incompatible versions")), "{verdict:?}");
        }
    }

    #[test]
    fn a_member_with_a_log_only_looks_for_its_cluster() {
        let down = || Err("down".to_owned());
        let ours = || peer(OWN, true, Some(true));
        let foreign = || peer(FOREIGN, true, None);
        for (answers, wanted) in [
            (vec![down(), down()], "waits"),
            (vec![ours(), down()], "takes part"),
            (vec![foreign(), foreign()], "wrong cluster"),
            // The stranger may be the one who is wrong.
            (vec![foreign(), down()], "waits"),
            (vec![foreign(), ours()], "takes part"),
        ] {
            assert_eq!(verdict(false, true, answers.clone()), wanted, "{answers:?}");
        }
    }
}
