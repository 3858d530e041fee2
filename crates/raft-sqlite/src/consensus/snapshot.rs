//! Sending snapshots to one peer: [`crate::state_machine::snapshot`] on a thread of its own, and the network between the two ends.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::ReplicationClosed;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use super::snapshot_wire::{from_answer, to_chunk};
use super::storage::{LogHold, LogStorage};
use crate::network::channels::Client;
use crate::network::proto;
use crate::state_machine::Machine;
use crate::state_machine::snapshot::send::{Entries, Link, Pace, SendError, Sent, Target, Transfer};
use crate::state_machine::snapshot::{Answer, Chunk};

/// Chunks made ahead of the network.
const CHUNKS_AHEAD: usize = 4;
/// Answers ahead of the sender: it never lets more come.
const ANSWERS_AHEAD: usize = 8;
/// Pause after a call that failed, doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_DOUBLINGS: u32 = 7;
/// How long the log is kept once a snapshot is installed: until the receiver is being fed from it.
const GRACE: Duration = Duration::from_secs(10);
/// Niceness of the threads that send and receive: below whatever writes.
pub const NICENESS: i32 = 10;

/// What a snapshot is made from.
#[derive(Clone)]
pub struct Source {
    pub(crate) machine: Machine,
    pub(crate) storage: LogStorage,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").finish_non_exhaustive()
    }
}

/// How a call ended.
pub enum Ended {
    /// The receiver's vote: it has the snapshot, or a newer leader.
    Answered(Option<proto::BallotVote>),
    /// To be called again with a newer snapshot, at once.
    Newer,
    Closed(ReplicationClosed),
    Failed(tonic::Status),
}

/// Sends snapshots to one peer, one call after the other, until it has one.
#[derive(Debug)]
pub struct SnapshotSender {
    source: Source,
    transfer: Transfer,
    /// The log that goes with what was copied.
    hold: Option<Arc<LogHold>>,
    /// Calls that failed since one did not.
    failed: u32,
}

impl SnapshotSender {
    pub fn new(source: Source) -> Self {
        Self { source, transfer: Transfer::new(), hold: None, failed: 0 }
    }

    /// One call. `header`: without the transfer's number.
    pub async fn send(
        &mut self,
        client: Client,
        mut header: proto::SnapshotHeader,
        target: Target,
        cancel: impl Future<Output = ReplicationClosed>,
    ) -> Ended {
        let mut cancel = std::pin::pin!(cancel);
        if self.failed > 0 {
            let pause = FIRST_PAUSE * 2u32.pow(self.failed.min(MAX_DOUBLINGS));
            tokio::select! {
                closed = &mut cancel => return Ended::Closed(closed),
                () = tokio::time::sleep(pause) => {}
            }
        }
        let Some(hold) = self.hold_log(target.index) else {
            return Ended::Newer;
        };
        header.transfer = self.transfer.id;
        let ended = tokio::select! {
            closed = &mut cancel => return Ended::Closed(closed),
            ended = self.call(client, header, target, hold) => ended,
        };
        self.failed = if matches!(ended, Ended::Failed(_)) { self.failed + 1 } else { 0 };
        ended
    }

    /// Keeps the log that a transfer at `index` needs. None: it is gone, and what was copied is of no use without it.
    fn hold_log(&mut self, index: u64) -> Option<Arc<LogHold>> {
        let after = self.transfer.needs_log_after(index);
        if let Some(hold) = &self.hold
            && hold.set(after)
        {
            return Some(hold.clone());
        }
        self.transfer = Transfer::new();
        self.hold = self.source.storage.hold(index).map(Arc::new);
        self.hold.clone()
    }

    async fn call(
        &mut self,
        mut client: Client,
        header: proto::SnapshotHeader,
        target: Target,
        hold: Arc<LogHold>,
    ) -> Ended {
        let (chunks, chunk_receiver) = mpsc::channel(CHUNKS_AHEAD);
        let (answers, answer_receiver) = mpsc::channel(ANSWERS_AHEAD);
        let (done, mut is_done) = oneshot::channel();
        let mut transfer = std::mem::replace(&mut self.transfer, Transfer::new());
        let source = self.source.clone();
        let index = target.index;
        let held = hold.clone();
        let started = std::thread::Builder::new().name("snapshot-send".into()).spawn(move || {
            lower_priority();
            let first = proto::SnapshotChunk { chunk: Some(proto::snapshot_chunk::Chunk::Header(header)) };
            let mut link = Network { chunks, answers: answer_receiver };
            let mut pace = Pace::new(&source.machine);
            let entries = HeldLog { storage: source.storage, hold: held };
            let sent = match link.chunks.blocking_send(first) {
                Ok(()) => transfer.send(&target, &mut link, &entries, &mut pace),
                Err(_) => Err(SendError::Gone),
            };
            let _ = done.send((transfer, sent));
        });
        if let Err(error) = started {
            return Ended::Failed(tonic::Status::internal(format!("no thread to send a snapshot: {error}")));
        }
        let mut exchange = Box::pin(async move {
            let mut incoming = client.snapshot(ReceiverStream::new(chunk_receiver)).await?.into_inner();
            while let Some(answer) = incoming.message().await? {
                match answer.answer {
                    Some(proto::snapshot_answer::Answer::Response(response)) => return Ok(response.vote),
                    Some(answer) => {
                        let answer = from_answer(answer).map_err(|e| tonic::Status::internal(e.to_string()))?;
                        if answers.send(answer).await.is_err() {
                            break;
                        }
                    }
                    None => return Err(tonic::Status::internal("an empty answer to a snapshot")),
                }
            }
            Err(tonic::Status::unavailable("the receiver ended the transfer"))
        });
        let (finished, answered) = tokio::select! {
            finished = &mut is_done => match finished {
                // Installed is what it must be now.
                Ok((transfer, Ok(Sent::Complete))) => (Ok((transfer, Ok(Sent::Complete))), Some(exchange.await)),
                // Why it ended early the network may know.
                Ok((transfer, Err(SendError::Gone))) => (Ok((transfer, Err(SendError::Gone))), Some(exchange.await)),
                finished => (finished, None),
            },
            answered = &mut exchange => {
                // Its end of the channels goes, and so the thread ends.
                drop(exchange);
                (is_done.await, Some(answered))
            }
        };
        let Ok((transfer, sent)) = finished else {
            return Ended::Failed(tonic::Status::internal("the thread that sends a snapshot has ended"));
        };
        self.transfer = transfer;
        match (sent, answered) {
            (Ok(Sent::Newer), _) => Ended::Newer,
            (Ok(Sent::Complete), Some(Ok(vote))) => self.completed(vote, hold, index),
            (_, Some(Ok(vote))) => Ended::Answered(vote),
            (Ok(Sent::Complete) | Err(SendError::Gone), Some(Err(status))) => Ended::Failed(status),
            (Err(error), _) => {
                tracing::warn!(%error, "a snapshot was not sent to its end");
                Ended::Failed(tonic::Status::aborted(error.to_string()))
            }
            (Ok(Sent::Complete), None) => Ended::Failed(tonic::Status::internal("invariant: an answer was waited for")),
        }
    }

    fn completed(&mut self, vote: Option<proto::BallotVote>, hold: Arc<LogHold>, index: u64) -> Ended {
        self.hold = None;
        self.transfer = Transfer::new();
        hold.set(index);
        tokio::spawn(async move {
            tokio::time::sleep(GRACE).await;
            drop(hold);
        });
        Ended::Answered(vote)
    }
}

/// The calling thread gives way to all others of this program.
pub fn lower_priority() {
    if let Err(error) = rustix::process::nice(NICENESS) {
        tracing::debug!(%error, "a thread keeps its priority");
    }
}

struct Network {
    chunks: mpsc::Sender<proto::SnapshotChunk>,
    answers: mpsc::Receiver<Answer>,
}

impl Link for Network {
    fn send(&mut self, chunk: Chunk) -> Result<(), SendError> {
        self.chunks.blocking_send(to_chunk(chunk)).map_err(|_| SendError::Gone)
    }

    fn answer(&mut self) -> Result<Answer, SendError> {
        self.answers.blocking_recv().ok_or(SendError::Gone)
    }
}

struct HeldLog {
    storage: LogStorage,
    hold: Arc<LogHold>,
}

impl Entries for HeldLog {
    fn read(&self, range: Range<u64>, max_bytes: usize) -> io::Result<Vec<(u64, Option<Bytes>)>> {
        self.storage.commands(range, max_bytes)
    }

    fn are_held(&self) -> bool {
        self.hold.holds()
    }
}
