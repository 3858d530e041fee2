//! Sealed groups on their way to Raft.

use std::future::Future;
use std::pin::Pin;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::impls::ProgressResponder;
use tokio::sync::mpsc;

use crate::consensus::types::{CommandBytes, Raft, log_id};
use crate::database::writer_thread::{Proposal, ProposalFailed, Proposer};
use crate::state_machine::Machine;
use crate::state_machine::command::{Command, bounded_tables};

/// A proposal as a command.
struct Encoded {
    term: u64,
    command: CommandBytes,
    failed: ProposalFailed,
}

/// The writer threads' end. Bounded by the writers: each has only so many groups in flight.
#[derive(Clone)]
pub(crate) struct ProposalQueue {
    sender: mpsc::UnboundedSender<Encoded>,
}

/// The node's end.
pub(crate) struct Proposals {
    receiver: mpsc::UnboundedReceiver<Encoded>,
}

/// Both ends.
pub(crate) fn proposal_queue() -> (ProposalQueue, Proposals) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (ProposalQueue { sender }, Proposals { receiver })
}

impl Proposer for ProposalQueue {
    fn propose(&self, proposal: Proposal, failed: ProposalFailed) {
        let Proposal { term, database, tables, origin, sidecars, page_set } = proposal;
        let tables = tables.and_then(bounded_tables);
        let command = Command::Pages { database, tables, origin, sidecars, page_set }.encode();
        let encoded = Encoded { term, command: CommandBytes(command), failed };
        if let Err(mpsc::error::SendError(encoded)) = self.sender.send(encoded) {
            encoded.failed.report("the node stops".into());
        }
    }
}

type Outcome = Pin<Box<dyn Future<Output = Option<(ProposalFailed, String)>> + Send>>;

impl Proposals {
    /// Proposes in order until the writers are gone or Raft has stopped. A proposal that fails closes its writer, which tells the
    /// callers; one that succeeds is answered by the apply.
    pub async fn run(mut self, raft: Raft, machine: Machine) {
        let recorder = machine.recorder();
        let mut outcomes: FuturesUnordered<Outcome> = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                Some(failed) = outcomes.next(), if !outcomes.is_empty() => {
                    if let Some((failed, why)) = failed {
                        recorder.proposals_failed.add(1);
                        failed.report(why);
                    }
                }
                encoded = self.receiver.recv() => {
                    let Some(Encoded { term, command, failed }) = encoded else { return };
                    let (responder, outcome) = ProgressResponder::complete_only();
                    // Only this very leadership may propose what was captured in it.
                    let leader = *log_id(term, 0).committed_leader_id();
                    let sent = raft.write(command).with_leader(leader).responder(responder).await;
                    recorder.proposals.add(1);
                    if let Err(fatal) = sent {
                        recorder.proposals_failed.add(1);
                        failed.report(format!("raft has stopped: {fatal}"));
                        continue;
                    }
                    outcomes.push(Box::pin(async move {
                        match outcome.await {
                            Ok(Ok(_)) => None,
                            Ok(Err(error)) => Some((failed, format!("the leadership was lost: {error}"))),
                            Err(_) => Some((failed, "raft has stopped".to_owned())),
                        }
                    }));
                }
            }
        }
    }
}
