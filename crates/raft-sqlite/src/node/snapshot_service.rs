//! Takes in a snapshot that the leader sends.
//!
//! One at a time: a newer call of a leader takes over from the one before, and what that has brought stays.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use super::NodeInner;
use super::peer_service::{bad, fatal};
use crate::consensus::machine::{ReceivedFiles, SnapshotData, position};
use crate::consensus::snapshot::lower_priority;
use crate::consensus::snapshot_wire::{from_chunk, to_answer};
use crate::consensus::types::{SnapshotMeta, StoredMembership, TypeConfig, Vote, decode_membership};
use crate::consensus::wire;
use crate::network::proto;
use crate::state_machine::Machine;
use crate::state_machine::snapshot::files::remove;
use crate::state_machine::snapshot::receive::Incoming;
use crate::state_machine::snapshot::{Answer, Chunk, ReceivedSnapshot, is_obsolete};

/// Chunks from the network ahead of the disk, and answers ahead of the network.
const CHUNKS_AHEAD: usize = 4;
const ANSWERS_AHEAD: usize = 8;

pub(super) type AnswerStream = ReceiverStream<Result<proto::SnapshotAnswer, Status>>;

/// What is being received; one for each node.
pub(super) struct Receiver {
    incoming: Arc<tokio::sync::Mutex<Incoming>>,
    /// Counts the calls: each ends the one before.
    calls: watch::Sender<u64>,
}

impl Receiver {
    pub fn new(machine: &Machine) -> Self {
        Self { incoming: Arc::new(tokio::sync::Mutex::new(Incoming::new(machine))), calls: watch::channel(0).0 }
    }

    /// Removes what a transfer has left that came to nothing, once this node has the entries some other way.
    pub fn tidy(&self, folder: &Path, applied_index: u64) {
        if folder.exists()
            && let Ok(mut incoming) = self.incoming.try_lock()
            && is_obsolete(folder, applied_index)
        {
            incoming.forget();
            remove(folder);
        }
    }
}

/// Answers a call.
pub(super) fn answer(node: Arc<NodeInner>, chunks: Streaming<proto::SnapshotChunk>) -> AnswerStream {
    let (sender, receiver) = mpsc::channel(ANSWERS_AHEAD);
    tokio::spawn(async move {
        let mut stopped = node.stop.subscribe();
        let call = {
            node.receiver.calls.send_modify(|calls| *calls += 1);
            *node.receiver.calls.borrow()
        };
        let mut calls = node.receiver.calls.subscribe();
        let ended = tokio::select! {
            ended = take(&node, chunks, &sender) => ended,
            _ = calls.wait_for(|calls| *calls != call) => Err(Status::aborted("a newer call took over")),
            _ = stopped.wait_for(|stopped| *stopped) => Err(Status::unavailable("this member is stopping")),
        };
        if let Err(status) = ended {
            node.machine.recorder().snapshots_receive_failed.add(1);
            tracing::info!(why = status.message(), "a snapshot did not come to its end; what has arrived is kept");
            let _ = sender.send(Err(status)).await;
        }
    });
    ReceiverStream::new(receiver)
}

async fn take(
    node: &NodeInner,
    mut chunks: Streaming<proto::SnapshotChunk>,
    answers: &mpsc::Sender<Result<proto::SnapshotAnswer, Status>>,
) -> Result<(), Status> {
    let header = match chunks.message().await?.and_then(|chunk| chunk.chunk) {
        Some(proto::snapshot_chunk::Chunk::Header(header)) => header,
        _ => return Err(Status::invalid_argument("a snapshot begins with its header")),
    };
    let vote = wire::from_vote(header.vote).map_err(bad)?;
    let last_log_id = header.last_log_id.map(wire::from_log_id);
    let membership = StoredMembership::new(
        header.membership_log_id.map(wire::from_log_id),
        decode_membership(&header.membership).map_err(bad)?,
    );
    let own = node.raft.with_raft_state(|state| *state.vote_ref()).await.map_err(|error| fatal(&error))?;
    if own > vote {
        return respond(answers, &own).await;
    }
    let last = last_log_id.as_ref().map(position);
    let index = last.map_or(0, |last| last.index);
    tracing::info!(index, databases = header.databases, "a snapshot comes in");
    let begin = (header.transfer, index, header.databases as usize);
    let span = tracing::info_span!("receive_snapshot", index, databases = header.databases);
    let Some(snapshot) = receive(node, chunks, begin, answers).instrument(span).await? else {
        return Ok(());
    };
    node.machine.recorder().snapshots_received.add(1);
    tracing::info!(index, "a snapshot was received");
    let snapshot = openraft::type_config::alias::SnapshotOf::<TypeConfig, SnapshotData> {
        meta: SnapshotMeta { last_log_id, last_membership: membership },
        snapshot: SnapshotData::Received(ReceivedFiles(snapshot)),
    };
    let answer = node.raft.install_full_snapshot(vote, snapshot).await.map_err(|error| fatal(&error))?;
    respond(answers, &answer.vote).await
}

async fn respond(answers: &mpsc::Sender<Result<proto::SnapshotAnswer, Status>>, vote: &Vote) -> Result<(), Status> {
    let response = proto::SnapshotResponse { vote: Some(wire::to_vote(vote)) };
    let answer = proto::SnapshotAnswer { answer: Some(proto::snapshot_answer::Answer::Response(response)) };
    answers.send(Ok(answer)).await.map_err(|_| Status::cancelled("the leader is gone"))
}

/// Writes what comes to the disk, on a thread of its own. None: the sender will call again with a newer snapshot.
async fn receive(
    node: &NodeInner,
    mut chunks: Streaming<proto::SnapshotChunk>,
    begin: (u64, u64, usize),
    answers: &mpsc::Sender<Result<proto::SnapshotAnswer, Status>>,
) -> Result<Option<ReceivedSnapshot>, Status> {
    // Free once the thread of the call before has noticed that it is over.
    let mut incoming = node.receiver.incoming.clone().lock_owned().await;
    let (to_disk, mut from_network) = mpsc::channel::<Chunk>(CHUNKS_AHEAD);
    let (done, mut is_done) = tokio::sync::oneshot::channel();
    let answers = answers.clone();
    let work = move || -> Result<Option<ReceivedSnapshot>, std::io::Error> {
        let (transfer, index, databases) = begin;
        incoming.begin(transfer, index, databases)?;
        while let Some(chunk) = from_network.blocking_recv() {
            let finish = matches!(chunk, Chunk::Finish { exact: true });
            let Some(answer) = incoming.accept(chunk)? else { continue };
            let complete = finish && matches!(&answer, Answer::Finished { mismatched } if mismatched.is_empty());
            if complete {
                let mut snapshot = incoming.complete()?;
                // The files are its own until it is installed.
                snapshot.lock(incoming);
                let _ = answers.blocking_send(Ok(to_answer(answer)));
                return Ok(Some(snapshot));
            }
            if answers.blocking_send(Ok(to_answer(answer))).is_err() {
                return Ok(None);
            }
        }
        Ok(None)
    };
    let thread = std::thread::Builder::new().name("snapshot-receive".into()).spawn(move || {
        lower_priority();
        let _ = done.send(work());
    });
    thread.map_err(|error| Status::internal(format!("no thread to receive a snapshot: {error}")))?;
    let disk = |result: Result<std::io::Result<Option<ReceivedSnapshot>>, _>| match result {
        Ok(Ok(snapshot)) => Ok(snapshot),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::InvalidData => Err(bad(error)),
        Ok(Err(error)) => Err(Status::resource_exhausted(format!("the snapshot could not be written: {error}"))),
        Err(tokio::sync::oneshot::error::RecvError { .. }) => {
            Err(Status::internal("the thread that receives a snapshot has ended"))
        }
    };
    loop {
        let chunk = tokio::select! {
            finished = &mut is_done => return disk(finished),
            chunk = chunks.message() => chunk?,
        };
        let Some(chunk) = chunk else { break };
        let chunk = from_chunk(chunk).map_err(bad)?;
        if let Chunk::Pages { images, .. } = &chunk {
            node.machine.recorder().snapshot_received_bytes.add(images.len() as u64);
        }
        if to_disk.send(chunk).await.is_err() {
            break;
        }
    }
    drop(to_disk);
    disk(is_done.await)
}
