//! A node's storage without the network: what a single voter does with its log, its state machine and its checkpoints.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::disk::{LogFolder, SimulatedDisk};
use super::script::{BLANK, Chore, MEMBERSHIP, Script, options};
use crate::database::DatabaseError;
use crate::database::reader_pool::ReaderPool;
use crate::database::replica::LogPosition;
use crate::database::writer_thread::{Proposal, ProposalFailed, Proposer};
use crate::log::{Entry, EntryId, Log, LogError, LogOptions};
use crate::state_machine::{CommandOutcome, Machine, MachineSetup};

const TERM: u64 = 1;

/// Nobody writes here but the log.
struct NoProposer;

impl Proposer for NoProposer {
    fn propose(&self, _proposal: Proposal, _failed: ProposalFailed) {
        unreachable!("no writer is open");
    }
}

/// Any layer's error.
#[derive(Debug, thiserror::Error)]
pub(super) enum StorageError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Wrong(String),
}

impl StorageError {
    /// Room on the disk would help.
    pub(super) fn is_full(&self) -> bool {
        match self {
            Self::Log(LogError::DiskFull { .. }) => true,
            Self::Database(DatabaseError::Io { source, .. }) => source.kind() == std::io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

/// What has been acknowledged, and what may be there besides; outlives the node.
#[derive(Default)]
pub(super) struct Progress {
    pub acknowledged: AtomicU64,
    pub submitted: AtomicU64,
    pub vote_acknowledged: AtomicU64,
    pub vote_submitted: AtomicU64,
}

pub(super) struct StorageNode {
    pub log: Log,
    pub machine: Machine,
    runtime: tokio::runtime::Runtime,
}

impl Drop for StorageNode {
    fn drop(&mut self) {
        for name in self.machine.database_names() {
            if let Some(state) = self.machine.database(&name) {
                state.writer.stop();
            }
        }
        self.machine.readers().stop();
        self.log.shutdown();
    }
}

fn data_folder() -> PathBuf {
    PathBuf::from("/data/db")
}

impl StorageNode {
    /// Opens it and applies the log, as a single voter that becomes leader does.
    pub(super) fn start(disk: &SimulatedDisk) -> Result<StorageNode, StorageError> {
        let options_of_log = LogOptions {
            segment_bytes: 16 * 1024,
            cache_bytes: 4 * 1024,
            recycle: 2,
            mark_delay: Duration::from_secs(3600),
            ..LogOptions::default()
        };
        let folder = LogFolder { disk: disk.clone(), folder: PathBuf::from("/data/log") };
        let log = Log::open_on(Arc::new(folder), &options_of_log)?;
        let machine = Machine::open(MachineSetup {
            node: 1,
            directory: data_folder(),
            options: options(disk),
            observers: Vec::new(),
            proposer: Arc::new(NoProposer),
            readers: Arc::new(ReaderPool::start(1)?),
        })?;
        // Its sleeps pass at once when there is nothing else to do.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
        let node = StorageNode { log, machine, runtime };
        let applied = node.applied();
        let state = node.log.state();
        if state.purged.is_some_and(|purged| purged.index > applied) {
            return Err(StorageError::Wrong(format!(
                "the log begins after {:?}, the checkpoint holds {applied}",
                state.purged
            )));
        }
        for entry in node.log.read(applied + 1..u64::MAX, None)? {
            node.apply(&entry)?;
        }
        Ok(node)
    }

    pub(super) fn applied(&self) -> u64 {
        *self.machine.applied_index().borrow()
    }

    fn apply(&self, entry: &Entry) -> Result<(), StorageError> {
        let position = LogPosition { term: entry.id.term, index: entry.id.index };
        match entry.kind {
            BLANK => self.machine.apply_blank(position),
            MEMBERSHIP => self.machine.apply_membership(position, entry.payload.clone()),
            _ => {
                let outcome = self.runtime.block_on(self.machine.apply_command(position, entry.payload.clone()))?;
                if outcome != CommandOutcome::Done && outcome != CommandOutcome::NoSuchDatabase {
                    return Err(StorageError::Wrong(format!("entry {} came out as {outcome}", position.index)));
                }
            }
        }
        Ok(())
    }

    /// Appends entry `index` of the script, waits for the sync, applies it.
    pub(super) fn write(&self, script: &Script, index: u64, progress: &Progress) -> Result<(), StorageError> {
        let from = &script.entries[index as usize - 1];
        let id = EntryId { term: TERM, index };
        let entry = Entry { id, kind: from.kind, payload: from.payload.clone() };
        progress.submitted.fetch_max(index, Ordering::SeqCst);
        let (sender, receiver) = std::sync::mpsc::channel();
        self.log.append(vec![entry.clone()], move |result| {
            let _ = sender.send(result);
        })?;
        receiver.recv().map_err(std::io::Error::other)??;
        progress.acknowledged.fetch_max(index, Ordering::SeqCst);
        self.log.save_committed(Some(id));
        self.apply(&entry)
    }

    pub(super) fn checkpoint(&self) -> Result<(), StorageError> {
        Ok(self.runtime.block_on(self.machine.checkpoint(self.machine.pin()))?)
    }

    pub(super) fn purge(&self) -> Result<(), StorageError> {
        let index = self.machine.checkpointed().load(Ordering::SeqCst);
        let (sender, receiver) = std::sync::mpsc::channel();
        self.log.purge(EntryId { term: TERM, index }, move |result| {
            let _ = sender.send(result);
        })?;
        Ok(receiver.recv().map_err(std::io::Error::other)??)
    }

    pub(super) fn vote(&self, progress: &Progress) -> Result<(), StorageError> {
        let vote = progress.vote_submitted.fetch_add(1, Ordering::SeqCst) + 1;
        let (sender, receiver) = std::sync::mpsc::channel();
        self.log.save_vote(&vote.to_le_bytes(), move |result| {
            let _ = sender.send(result);
        })?;
        receiver.recv().map_err(std::io::Error::other)??;
        progress.vote_acknowledged.fetch_max(vote, Ordering::SeqCst);
        Ok(())
    }

    /// A clean stop.
    pub(super) fn close(self) -> Result<(), StorageError> {
        self.runtime.block_on(self.machine.close())?;
        self.log.shutdown();
        Ok(())
    }

    /// The state is the script's after `applied` entries, by its own hash and by the pages' hashes, and SQLite finds it whole.
    pub(super) fn check_state(&self, script: &Script) -> Result<(), StorageError> {
        let applied = self.applied();
        let wrong = |text: String| StorageError::Wrong(format!("after {applied} entries: {text}"));
        let pinned = self.machine.pin();
        let found: super::script::Databases = pinned
            .databases
            .iter()
            .map(|(name, _, pin)| (name.clone(), (pin.version().0, pin.state_hash().0)))
            .collect();
        if found != script.states[applied as usize] {
            return Err(wrong(format!("{found:?}, the leader had {:?}", script.states[applied as usize])));
        }
        for (name, replica, _) in &pinned.databases {
            if !replica.verify()? {
                return Err(wrong(format!("the pages of {name} do not have its state hash")));
            }
            let reader = replica.open_reader()?;
            let verdict = reader.connection().query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0));
            if verdict.as_deref() != Ok("ok") {
                return Err(wrong(format!("{name}: {verdict:?}")));
            }
        }
        Ok(())
    }

    pub(super) fn last(&self) -> u64 {
        self.log.state().last.map_or(0, |last| last.index)
    }

    /// The vote, as its number; 0: none.
    pub(super) fn found_vote(&self) -> u64 {
        self.log.vote().map_or(0, |vote| vote.as_ref().try_into().map_or(u64::MAX, u64::from_le_bytes))
    }
}

/// Does the script from where the node stands to its end.
pub(super) fn run(disk: &SimulatedDisk, script: &Script, progress: &Progress) -> Result<StorageNode, StorageError> {
    let mut node = StorageNode::start(disk)?;
    for index in node.last() + 1..=script.entries.len() as u64 {
        node.write(script, index, progress)?;
        for chore in script.chores.get(&index).into_iter().flatten() {
            match chore {
                Chore::Vote => node.vote(progress)?,
                Chore::Checkpoint => node.checkpoint()?,
                Chore::Purge => node.purge()?,
                Chore::CleanRestart => {
                    node.close()?;
                    node = StorageNode::start(disk)?;
                }
            }
        }
    }
    Ok(node)
}
