//! Linearizable reads: one round of ReadIndex serves every reader that came before it began.
//!
//! The leader confirms with a quorum that it still leads and gives its read index; the reader's node waits until it has applied that
//! index (Raft dissertation, section 6.4). Readers that come while a round is on its way wait for the next one: a round that began
//! before a reader came proves nothing to that reader.

use std::time::Duration;

use openraft::raft::ReadPolicy;
use tokio::sync::{mpsc, oneshot, watch};

use crate::consensus::types::Raft;

/// Most readers waiting for a round.
const MAX_WAITING_READERS: usize = 64 * 1024;

/// What a round proved.
#[derive(Clone, Debug)]
pub(crate) struct Confirmed {
    /// Everything committed before the round began is at or below this index.
    pub index: u64,
    /// The term in which this node itself was confirmed as the leader; None when another member was.
    pub own_term: Option<u64>,
}

/// Why a round failed; the same for all its readers.
pub(crate) type RoundError = String;

/// Asks another member for the read index.
pub(crate) trait AskLeader: Send + Sync + 'static {
    /// The index that the present leader confirmed.
    fn ask(&self) -> impl Future<Output = Result<u64, RoundError>> + Send;
}

/// The readers' end; clones share it.
#[derive(Clone)]
pub(crate) struct ReadIndex {
    sender: mpsc::Sender<oneshot::Sender<Result<Confirmed, RoundError>>>,
}

impl ReadIndex {
    /// Starts the task that runs the rounds.
    pub fn start(raft: Raft, ask: impl AskLeader, patience: Duration) -> Self {
        let (sender, receiver) = mpsc::channel(MAX_WAITING_READERS);
        tokio::spawn(run(raft, ask, patience, receiver));
        Self { sender }
    }

    /// Waits for a round that begins after this call. None: too many wait already.
    pub async fn confirm(&self) -> Option<Result<Confirmed, RoundError>> {
        let (sender, receiver) = oneshot::channel();
        self.sender.try_send(sender).ok()?;
        Some(receiver.await.unwrap_or_else(|_| Err("the node stops".into())))
    }
}

async fn run(
    raft: Raft,
    ask: impl AskLeader,
    patience: Duration,
    mut receiver: mpsc::Receiver<oneshot::Sender<Result<Confirmed, RoundError>>>,
) {
    let mut waiting = Vec::new();
    while receiver.recv_many(&mut waiting, MAX_WAITING_READERS).await > 0 {
        let outcome = match tokio::time::timeout(patience, round(&raft, &ask)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("no leader confirmed a read within {} ms", patience.as_millis())),
        };
        for reader in waiting.drain(..) {
            let _ = reader.send(outcome.clone());
        }
    }
}

/// One round, tried until it succeeds; the caller bounds the time.
async fn round(raft: &Raft, ask: &impl AskLeader) -> Result<Confirmed, RoundError> {
    loop {
        match local_round(raft).await {
            Ok(Some(confirmed)) => return Ok(confirmed),
            Ok(None) => {
                if let Ok(index) = ask.ask().await {
                    return Ok(Confirmed { index, own_term: None });
                }
            }
            Err(error) => return Err(error),
        }
        // An election is on its way, most likely.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// None: this node does not lead, or could not reach a quorum now.
pub(crate) async fn local_round(raft: &Raft) -> Result<Option<Confirmed>, RoundError> {
    if !raft.is_leader() {
        return Ok(None);
    }
    match raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
        Ok(linearizer) => {
            let read = linearizer.read_log_id();
            // A read index belongs to the leadership that confirmed it.
            Ok(Some(Confirmed { index: read.index(), own_term: Some(**read.committed_leader_id()) }))
        }
        Err(openraft::errors::RaftError::APIError(_)) => Ok(None),
        Err(openraft::errors::RaftError::Fatal(fatal)) => Err(fatal.to_string()),
    }
}

/// Waits until `applied` has reached `index`.
pub(crate) async fn wait_applied(
    applied: &mut watch::Receiver<u64>,
    index: u64,
    patience: Duration,
) -> Result<(), RoundError> {
    match tokio::time::timeout(patience, applied.wait_for(|applied| *applied >= index)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) => Err("the node stops".into()),
        Err(_) => Err(format!("entry {index} was not applied here within {} ms", patience.as_millis())),
    }
}
