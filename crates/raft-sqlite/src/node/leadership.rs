//! Who leads, and the writers that go with it.
//!
//! A leader's writers are opened only when every entry of earlier terms is applied here: the next transaction then runs on the newest
//! committed state (INV-WRITER-STARTS-COMMITTED). They are closed as soon as this node learns that it leads no more; until then the
//! base check guards what it may still propose.

use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::Instant as _;
use openraft::async_runtime::watch::WatchReceiver as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::NodeInner;
use super::read_index::{local_round, wait_applied};
use crate::NodeId;
use crate::consensus::types::Raft;
use crate::state_machine::Machine;

/// Who leads, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The newest term known.
    pub term: u64,
    /// Who leads in it; None: nobody known.
    pub leader: Option<NodeId>,
    /// This node leads, has applied all earlier entries, and takes writes.
    pub writable_here: bool,
}

/// How often a leader that could not open its writers tries again.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Whether a leader is heard of. Raft's own word for the leader is the newest vote, which stays when the leader is gone and nobody can be
/// elected, and after a restart.
pub(super) struct Contact {
    /// After so long without a word there is no leader.
    silence: Duration,
    last: Mutex<Option<Instant>>,
    /// After a silence.
    back: Notify,
}

impl Contact {
    pub fn new(election_timeout: Duration) -> Self {
        Self { silence: election_timeout * 2, last: Mutex::default(), back: Notify::new() }
    }

    /// The leader that this node follows has called.
    pub fn heard(&self) {
        let before = self.last.lock().replace(Instant::now());
        if before.is_none_or(|before| before.elapsed() > self.silence) {
            self.back.notify_one();
        }
    }

    fn is_there(&self) -> bool {
        self.last.lock().is_some_and(|last| last.elapsed() <= self.silence)
    }

    /// Whether this leader reaches a majority, as far as is known.
    fn has_quorum(&self, raft: &Raft) -> bool {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let alone = metrics.membership_config.membership().voter_ids().count() <= 1;
        alone || metrics.last_quorum_acked.is_none_or(|acked| acked.elapsed() <= self.silence)
    }
}

/// Follows Raft and keeps the writers in step. Runs until Raft stops.
pub(super) async fn run(
    raft: Raft,
    machine: Machine,
    node: NodeId,
    contact: Arc<Contact>,
    sender: watch::Sender<Leadership>,
) {
    let mut metrics = raft.server_metrics();
    let mut election = Election::default();
    let mut last_leader = None;
    loop {
        let (term, leader, state) = {
            let now = metrics.borrow_and_update();
            (now.vote.leader_id.term, now.current_leader, now.state)
        };
        election.follow(state, term, &machine);
        let leading = state == openraft::ServerState::Leader;
        let writable = sender.borrow().writable_here && sender.borrow().term == term;
        if leading && !writable {
            publish(&sender, Leadership { term, leader: Some(node), writable_here: false });
            match open(&raft, &machine, term).await {
                Ok(true) => {
                    tracing::info!(term, "this node leads");
                    publish(&sender, Leadership { term, leader: Some(node), writable_here: true });
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(term, %error, "the writers could not be opened");
                    tokio::time::sleep(RETRY_INTERVAL * 10).await;
                    continue;
                }
            }
        } else if leading {
            // Cut off from the others, it leads nobody.
            let leader = contact.has_quorum(&raft).then_some(node);
            publish(&sender, Leadership { term, leader, writable_here: true });
        } else {
            let leader = leader.filter(|leader| *leader != node.0 && contact.is_there());
            let was_writable = sender.borrow().writable_here;
            publish(&sender, Leadership { term, leader: leader.map(NodeId), writable_here: false });
            if was_writable {
                tracing::info!(term, "this node leads no more");
            }
            machine.close_writers("this node leads no more").await;
        }
        let known = sender.borrow().leader;
        if known.is_some() && known != last_leader {
            last_leader = known;
            machine.recorder().leader_changes.add(1);
        }
        // A writer that a failed proposal closed is opened again by the next turn.
        let reopen = machine.has_closed_writer() && leading;
        let pause = if reopen { RETRY_INTERVAL } else { Duration::from_millis(250) };
        let changed = async {
            tokio::select! {
                changed = metrics.changed() => changed,
                () = contact.back.notified() => Ok(()),
            }
        };
        match tokio::time::timeout(pause, changed).await {
            Ok(Err(_)) => break,
            Ok(Ok(())) => {}
            Err(_) if leading && machine.has_closed_writer() => {
                sender.send_modify(|now| now.writable_here = false);
            }
            Err(_) => {}
        }
    }
    sender.send_modify(|now| {
        now.leader = None;
        now.writable_here = false;
    });
    machine.close_writers("raft has stopped").await;
}

/// An election that this node stands for, as a span: from its first vote to the leader that comes of it.
#[derive(Default)]
struct Election {
    span: Option<tracing::Span>,
    /// The term that this node led last.
    led: u64,
}

impl Election {
    fn follow(&mut self, state: openraft::ServerState, term: u64, machine: &Machine) {
        let leads = state == openraft::ServerState::Leader;
        let stands = state == openraft::ServerState::Candidate;
        // Won before anybody looked.
        let won_at_once = leads && self.led != term;
        if leads {
            self.led = term;
        }
        match &self.span {
            None if stands || won_at_once => {
                machine.recorder().elections.add(1);
                let span = tracing::info_span!("election", term, outcome = tracing::field::Empty);
                if won_at_once {
                    span.record("outcome", "won");
                } else {
                    self.span = Some(span);
                }
            }
            Some(span) if !stands => {
                span.record("outcome", if leads { "won" } else { "lost" });
                span.record("term", term);
                self.span = None;
            }
            _ => {}
        }
    }
}

fn publish(sender: &watch::Sender<Leadership>, new: Leadership) {
    sender.send_if_modified(|now| {
        let changed = *now != new;
        *now = new;
        changed
    });
}

/// True: the writers are open for `term`. False: this node leads no more.
async fn open(raft: &Raft, machine: &Machine, term: u64) -> Result<bool, crate::database::DatabaseError> {
    let mut applied = machine.applied_index();
    loop {
        let leads = {
            let metrics = raft.server_metrics();
            let now = metrics.borrow_watched();
            now.state == openraft::ServerState::Leader && now.vote.leader_id.term == term
        };
        if !leads {
            return Ok(false);
        }
        // The read index of a leadership is at or after its first, blank entry: once it is applied, so is everything before.
        if let Ok(Some(confirmed)) = local_round(raft).await
            && confirmed.own_term == Some(term)
            && wait_applied(&mut applied, confirmed.index, RETRY_INTERVAL * 50).await.is_ok()
        {
            machine.open_writers(term).await?;
            return Ok(true);
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// Keeps what this node advertises in the membership up to date (addresses to clients are known only to the member itself).
pub(super) async fn publish_own_addresses(node: std::sync::Weak<NodeInner>) {
    // Soon: until then its peers do not know that this member has taken part (INV-VOTER-REMEMBERS).
    let mut pause = Duration::from_millis(50);
    loop {
        let Some(inner) = node.upgrade() else { return };
        match super::membership::publish_own(&super::Node { inner: Arc::clone(&inner) }).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(%error, "this member's addresses are not published yet"),
        }
        drop(inner);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(400));
    }
}
