//! openraft's state machine on [`crate::state_machine`].

use std::io;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use openraft::entry::RaftEntry as _;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};

use super::types::{
    LogId, SnapshotMeta, StoredMembership, TypeConfig, decode_membership, encode_membership, log_id, term_of,
};
use crate::database::replica::LogPosition;
use crate::state_machine::snapshot::{ReceivedSnapshot, materialise};
use crate::state_machine::{CommandOutcome, Machine, MembershipRecord, PinnedState};

/// The snapshot type openraft carries about for us.
type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// Either end of a snapshot.
pub enum SnapshotData {
    /// To be sent: a pinned state of this node.
    Pinned(PinnedSnapshot),
    /// To be installed: files that a peer sent.
    Received(ReceivedFiles),
}

/// A pinned state of this node; opaque outside the crate.
pub struct PinnedSnapshot(pub(crate) PinnedState);

/// Files that a peer sent; opaque outside the crate.
pub struct ReceivedFiles(pub(crate) ReceivedSnapshot);

/// The state machine as openraft wants it.
#[derive(Clone)]
pub struct StateMachine {
    machine: Machine,
}

impl StateMachine {
    pub(crate) fn new(machine: Machine) -> Self {
        Self { machine }
    }
}

/// An openraft log id as our own.
pub(crate) fn position(id: &LogId) -> LogPosition {
    LogPosition { term: term_of(id), index: id.index }
}

fn to_log_id(position: LogPosition) -> LogId {
    log_id(position.term, position.index)
}

fn stored_membership(record: &MembershipRecord) -> io::Result<StoredMembership> {
    if record.bytes.is_empty() {
        return Ok(StoredMembership::default());
    }
    Ok(StoredMembership::new(record.position.map(to_log_id), decode_membership(&record.bytes)?))
}

/// A stored membership as our own record.
pub(crate) fn membership_record(stored: &StoredMembership) -> MembershipRecord {
    let bytes = match stored.log_id() {
        Some(_) => encode_membership(stored.membership()),
        None => Bytes::new(),
    };
    MembershipRecord { position: stored.log_id().as_ref().map(position), bytes }
}

fn meta(state: &PinnedState) -> io::Result<SnapshotMeta> {
    Ok(SnapshotMeta {
        last_log_id: state.position.map(to_log_id),
        last_membership: stored_membership(&state.membership)?,
    })
}

/// Makes the checkpoint that lets the log be purged. What it gives to openraft is the same state, still pinned.
pub struct Checkpointer {
    machine: Machine,
    /// Pinned between two entries, when openraft asked.
    state: Option<PinnedState>,
}

impl RaftSnapshotBuilder<TypeConfig> for Checkpointer {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let state = self.state.take().ok_or_else(|| io::Error::other("a snapshot builder is used once"))?;
        let meta = meta(&state)?;
        let copy = state.again();
        if let Err(error) = self.machine.checkpoint(state).await {
            // Nothing is lost: the log is kept until a later checkpoint goes through.
            tracing::error!(%error, "the checkpoint failed; the log is kept, and the next checkpoint tries again");
        }
        Ok(Snapshot { meta, snapshot: SnapshotData::Pinned(PinnedSnapshot(copy)) })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Checkpointer;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let (position, membership) = self.machine.applied_state();
        Ok((position.map(to_log_id), stored_membership(&membership)?))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let position = position(&entry.log_id());
            let outcome = match entry.payload {
                EntryPayload::Blank => {
                    self.machine.apply_blank(position);
                    CommandOutcome::Done
                }
                EntryPayload::Normal(command) => self.machine.apply_command(position, command.0).await?,
                EntryPayload::Membership(membership) => {
                    self.machine.apply_membership(position, encode_membership(&membership));
                    CommandOutcome::Done
                }
            };
            if let Some(responder) = responder {
                responder.send(outcome);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        Checkpointer { machine: self.machine.clone(), state: Some(self.machine.pin()) }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> Result<(), io::Error> {
        let Some(last) = &meta.last_log_id else {
            return Err(io::Error::other("a snapshot without a log id cannot be installed"));
        };
        let received = match snapshot {
            SnapshotData::Received(ReceivedFiles(received)) => received,
            SnapshotData::Pinned(PinnedSnapshot(state)) => {
                let files = self.machine.incoming_files();
                tokio::task::spawn_blocking(move || materialise(&state, files)).await.map_err(io::Error::other)??
            }
        };
        self.machine
            .install(position(last), membership_record(&meta.last_membership), received)
            .await
            .map_err(io::Error::other)
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let state = self.machine.pin();
        if state.position.is_none() {
            return Ok(None);
        }
        Ok(Some(Snapshot { meta: meta(&state)?, snapshot: SnapshotData::Pinned(PinnedSnapshot(state)) }))
    }
}
