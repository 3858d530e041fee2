//! What a committed log entry does: the replicated state machine of a node, all its databases in one Raft group.
//!
//! Stands between consensus and the databases. Entries are applied one by one, in log order (INV-APPLY-ORDER), on every node
//! alike: whatever decides about an entry is a function of the entries before it. The node's own captured groups take the short way
//! (their version is made visible), everything else is applied from its bytes.
//!
//! - [`command`]: the commands and their bytes;
//! - [`catalog`]: what is checkpointed beside the databases: membership, names, log position;
//! - [`snapshot`]: a pinned state to send, a received one to install.

pub mod catalog;
pub mod command;
pub mod feed;
pub mod observer;
pub mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tracing::Instrument as _;

use catalog::Catalog;
use command::Command;
use feed::{Feed, Tables};
use observer::ApplyObserver;
use snapshot::SendCounters;

use crate::database::DatabaseError;
use crate::database::job::Job;
use crate::database::pipeline::{Answers, Origin, SharedPipeline};
use crate::database::reader_pool::ReaderPool;
use crate::database::replica::{ApplyError, LogPosition, PinnedVersion, Replica, ReplicaOptions};
use crate::database::writer_thread::{Proposer, WriterSetup, WriterThread};
use crate::metrics::recorder::Recorder;
use crate::page::{PageDamage, Version};

/// How often a new database tries again to take the place of a dropped one's file.
const FORGET_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Any other failure stops the node: it would not go away by itself.
fn is_full_disk(error: &DatabaseError) -> bool {
    matches!(error, DatabaseError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
}

/// What applying a command told: the same on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandOutcome {
    /// Blank and membership entries, and commands that cannot fail.
    Done,
    /// A database was to be made that exists, or to be dropped that does not: it changed nothing.
    Unchanged,
    /// A PageSet was computed on a version that is not the database's: it changed nothing.
    BaseMismatch,
    /// The database of the command does not exist (dropped in between): it changed nothing.
    NoSuchDatabase,
}

impl std::fmt::Display for CommandOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// An `InvalidData` error.
pub(crate) fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// A membership as its bytes (see `consensus`), with the position of the entry that set it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MembershipRecord {
    /// The entry that set it; None before any.
    pub position: Option<LogPosition>,
    /// The bytes of a log entry of kind 2; empty before any.
    pub bytes: Bytes,
}

/// One database on this node.
pub(crate) struct DatabaseState {
    pub replica: Replica,
    pub pipeline: SharedPipeline,
    pub writer: WriterThread,
    pub feed: Feed,
    /// Entries up to this index are in the file this database was opened from.
    restored_index: AtomicU64,
}

#[derive(Clone, Debug, Default)]
struct Applied {
    position: Option<LogPosition>,
    membership: MembershipRecord,
}

/// What the state machine is made with.
pub(crate) struct MachineSetup {
    pub node: u64,
    /// DATA/db
    pub directory: PathBuf,
    pub options: ReplicaOptions,
    pub observers: Vec<Arc<dyn ApplyObserver>>,
    pub proposer: Arc<dyn Proposer>,
    pub readers: Arc<ReaderPool>,
}

struct Inner {
    setup: MachineSetup,
    databases: RwLock<BTreeMap<String, Arc<DatabaseState>>>,
    /// Names whose files go with the next checkpoint.
    dropped: Mutex<BTreeSet<String>>,
    /// Nothing waits for anything any more.
    stopping: AtomicBool,
    applied: Mutex<Applied>,
    applied_index: watch::Sender<u64>,
    /// Index up to which the checkpoint on disk contains the log: what may be purged (INV-PURGE-AFTER-CHECKPOINT).
    checkpointed: Arc<AtomicU64>,
    /// One checkpoint or install at a time.
    files: tokio::sync::Mutex<()>,
    /// Why this node serves no more, if so.
    broken: Mutex<Option<String>>,
    send_counters: Arc<SendCounters>,
}

/// The state machine of this node; clones share it.
#[derive(Clone)]
pub(crate) struct Machine {
    inner: Arc<Inner>,
}

impl Machine {
    /// Opens what the last checkpoint left in `setup.directory`.
    pub fn open(setup: MachineSetup) -> Result<Machine, DatabaseError> {
        let disk = &*setup.options.disk;
        disk.make_folder(&setup.directory).map_err(|error| DatabaseError::io(&setup.directory, error))?;
        let catalog = Catalog::read(disk, &setup.directory)?;
        let checkpointed = catalog.position.map_or(0, |position| position.index);
        let machine = Machine {
            inner: Arc::new(Inner {
                databases: RwLock::default(),
                dropped: Mutex::default(),
                stopping: AtomicBool::new(false),
                applied: Mutex::new(Applied { position: catalog.position, membership: catalog.membership.clone() }),
                applied_index: watch::channel(checkpointed).0,
                checkpointed: Arc::new(AtomicU64::new(checkpointed)),
                files: tokio::sync::Mutex::new(()),
                broken: Mutex::new(None),
                send_counters: Arc::default(),
                setup,
            }),
        };
        if catalog.databases.is_empty() {
            machine.inner.setup.options.preparation.rehearse()?;
        }
        for (name, version) in &catalog.databases {
            let state = machine.open_database(name, catalog.position, Version(*version))?;
            state.replica.rehearse()?;
            machine.inner.databases.write().insert(name.clone(), state);
        }
        Ok(machine)
    }

    /// The catalog says that `name` stood at `version` at `position`; None: it was made now, empty, at that version.
    fn open_database(
        &self,
        name: &str,
        position: Option<LogPosition>,
        version: Version,
    ) -> Result<Arc<DatabaseState>, DatabaseError> {
        let setup = &self.inner.setup;
        let options = ReplicaOptions { born: version, ..setup.options.clone() };
        let (replica, mark) = Replica::open(&setup.directory, name, options)?;
        // A checkpoint that wrote the database but not yet the catalog leaves the database ahead: its entries are then skipped.
        let restored = match (mark, position) {
            (_, None) => 0,
            (Some(mark), Some(position)) if mark.version == version => mark.position.index.max(position.index),
            (Some(mark), Some(_)) if mark.version > version => mark.position.index,
            (mark, Some(position)) => {
                let holds = mark.map_or("nothing".into(), |mark| format!("version {}", mark.version));
                return Err(DatabaseError::Damaged {
                    path: setup.directory.join(format!("{name}.sqlite")),
                    offset: 0,
                    why: format!(
                        "the last checkpoint, at log index {}, has written version {version}, the file holds {holds}: was it replaced or removed?",
                        position.index
                    ),
                });
            }
        };
        let pipeline = SharedPipeline::default();
        let observers = setup.observers.clone();
        let database = name.to_owned();
        let writer = WriterThread::start(WriterSetup {
            node: setup.node,
            database: name.to_owned(),
            replica: replica.clone(),
            pipeline: pipeline.clone(),
            proposer: setup.proposer.clone(),
            recorder: setup.options.recorder.clone(),
            on_reset: Box::new(move || observers.iter().for_each(|observer| observer.writer_reset(&database))),
        })
        .map_err(|error| DatabaseError::io(&setup.directory, error))?;
        let (feed, restored_index) = (Feed::new(replica.committed()), AtomicU64::new(restored));
        let state = Arc::new(DatabaseState { replica, pipeline, writer, feed, restored_index });
        self.notify_restored(name, &state)?;
        Ok(state)
    }

    fn notify_restored(&self, name: &str, state: &DatabaseState) -> Result<(), DatabaseError> {
        if self.inner.setup.observers.is_empty() {
            return Ok(());
        }
        let reader = state.replica.open_reader()?;
        let version = reader.begin()?;
        for observer in &self.inner.setup.observers {
            observer.restored(name, version, reader.connection());
        }
        reader.end()
    }

    /// The database, if it exists at this node's applied index.
    pub fn database(&self, name: &str) -> Option<Arc<DatabaseState>> {
        self.inner.databases.read().get(name).cloned()
    }

    /// Names of all databases, sorted.
    pub fn database_names(&self) -> Vec<String> {
        self.inner.databases.read().keys().cloned().collect()
    }

    /// Follows the applied index; 0 = nothing.
    pub fn applied_index(&self) -> watch::Receiver<u64> {
        self.inner.applied_index.subscribe()
    }

    /// The newest applied entry and the membership in force.
    pub fn applied_state(&self) -> (Option<LogPosition>, MembershipRecord) {
        let applied = self.inner.applied.lock();
        (applied.position, applied.membership.clone())
    }

    /// See [`crate::consensus::storage::LogStorage::new`].
    pub fn checkpointed(&self) -> Arc<AtomicU64> {
        self.inner.checkpointed.clone()
    }

    /// Why this node serves no more, if so.
    pub fn broken(&self) -> Option<String> {
        self.inner.broken.lock().clone()
    }

    /// A damaged page of some database's file, if one was found.
    pub fn damage(&self) -> Option<PageDamage> {
        self.states().iter().find_map(|state| state.replica.damage())
    }

    /// Where this node counts.
    pub fn recorder(&self) -> &Recorder {
        &self.inner.setup.options.recorder
    }

    /// What was sent of snapshots.
    pub fn send_counters(&self) -> &Arc<SendCounters> {
        &self.inner.send_counters
    }

    /// Readers of all databases.
    pub fn readers(&self) -> &Arc<ReaderPool> {
        &self.inner.setup.readers
    }

    /// An entry without effect on the databases was committed.
    pub fn apply_blank(&self, position: LogPosition) {
        self.advance(position, None);
    }

    /// A membership entry was committed.
    pub fn apply_membership(&self, position: LogPosition, bytes: Bytes) {
        self.advance(position, Some(MembershipRecord { position: Some(position), bytes }));
    }

    /// A command was committed.
    ///
    /// # Errors
    /// This replica is damaged, or not able to go on: the node must stop serving. Never for what is wrong with a command alone: that
    /// is an outcome, equal on all nodes.
    pub async fn apply_command(&self, position: LogPosition, bytes: Bytes) -> io::Result<CommandOutcome> {
        let began = Instant::now();
        let span = tracing::debug_span!("apply", term = position.term, index = position.index, bytes = bytes.len());
        let applied = match Command::decode(bytes)? {
            Command::Pages { database, tables, origin, sidecars, page_set } => {
                let tables = tables.map(Arc::from);
                self.apply_pages(position, &database, tables, origin, &sidecars, &page_set).instrument(span).await
            }
            Command::CreateDatabase { database } => {
                self.create_database(&database, position).await.map(|outcome| (outcome, None))
            }
            Command::DropDatabase { database } => Ok((self.drop_database(&database).await, None)),
        };
        match applied {
            Ok((outcome, answers)) => {
                self.advance(position, None);
                self.recorder().apply_time.time(began.elapsed());
                if let Some(answers) = answers {
                    self.recorder().proposal_time.time(answers.proposed().elapsed());
                    answers.send();
                }
                Ok(outcome)
            }
            Err(error) => {
                let text = format!("entry {}.{}: {error}", position.term, position.index);
                tracing::error!("{text}");
                *self.inner.broken.lock() = Some(text.clone());
                Err(io::Error::other(text))
            }
        }
    }

    fn advance(&self, position: LogPosition, membership: Option<MembershipRecord>) {
        let mut applied = self.inner.applied.lock();
        applied.position = Some(position);
        if let Some(membership) = membership {
            applied.membership = membership;
        }
        drop(applied);
        self.inner.applied_index.send_replace(position.index);
    }

    async fn apply_pages(
        &self,
        position: LogPosition,
        name: &str,
        tables: Tables,
        origin: Origin,
        sidecars: &[Bytes],
        page_set: &[u8],
    ) -> Result<(CommandOutcome, Option<Answers>), DatabaseError> {
        let Some(state) = self.database(name) else {
            return Ok((CommandOutcome::NoSuchDatabase, None));
        };
        if position.index <= state.restored_index.load(Ordering::Acquire) {
            return Ok((CommandOutcome::Done, None));
        }
        let (version, answers) = match state.pipeline.commit_own(origin, &state.replica) {
            Some(answers) => (state.replica.committed(), Some(answers?)),
            None => match self.apply_foreign(&state, page_set).await? {
                Some(version) => (version, None),
                None => return Ok((CommandOutcome::BaseMismatch, None)),
            },
        };
        for observer in &self.inner.setup.observers {
            observer.applied(name, version, sidecars);
        }
        state.feed.publish(version, tables);
        if answers.is_some() {
            state.writer.applied();
        }
        Ok((CommandOutcome::Done, answers))
    }

    /// None: refused by the base check, here as on every node.
    async fn apply_foreign(&self, state: &DatabaseState, page_set: &[u8]) -> Result<Option<Version>, DatabaseError> {
        loop {
            match state.replica.apply(page_set) {
                Ok(version) => return Ok(Some(version)),
                Err(ApplyError::BaseMismatch { base, committed }) => {
                    self.recorder().base_mismatches.add(1);
                    tracing::info!(%base, %committed, "a PageSet was refused: computed on a version that did not happen");
                    return Ok(None);
                }
                // A leader that has lost its leadership without having been told yet.
                Err(ApplyError::CapturedVersionsExist) => {
                    state.writer.close("another leader's entry was committed").await
                }
                Err(error) => {
                    if matches!(error, ApplyError::HashMismatch { .. }) {
                        self.recorder().hash_mismatches.add(1);
                    }
                    return Err(error.into());
                }
            }
        }
    }

    async fn create_database(&self, name: &str, position: LogPosition) -> Result<CommandOutcome, DatabaseError> {
        if self.database(name).is_some() {
            return Ok(CommandOutcome::Unchanged);
        }
        self.forget_dropped(name).await?;
        while let Err(error) = self.make_database(name, position) {
            self.wait_for_room(name, error, "a database cannot be made yet").await?;
        }
        Ok(CommandOutcome::Done)
    }

    fn make_database(&self, name: &str, position: LogPosition) -> Result<(), DatabaseError> {
        Replica::remove_leftovers(&*self.inner.setup.options.disk, &self.inner.setup.directory, name)?;
        self.add_database(name, Version(position.index)).map(drop)
    }

    /// On a full disk waits a little, as the log does until there is room; what else may have gone wrong would not go away by itself.
    async fn wait_for_room(&self, name: &str, error: DatabaseError, what: &str) -> Result<(), DatabaseError> {
        if !is_full_disk(&error) || self.is_stopping() {
            return Err(error);
        }
        tracing::warn!(database = name, %error, "{what}: trying again");
        tokio::time::sleep(FORGET_RETRY_INTERVAL).await;
        Ok(())
    }

    /// A new, empty database. Its versions begin at the index of the entry that made it, so that none is ever the same as one of a
    /// dropped database of its name: what was computed on that fails the base check.
    fn add_database(&self, name: &str, born: Version) -> Result<Arc<DatabaseState>, DatabaseError> {
        let state = self.open_database(name, None, born)?;
        self.inner.databases.write().insert(name.to_owned(), state.clone());
        Ok(state)
    }

    /// The catalog on disk names a dropped database of this name until the next checkpoint, and a restart would replay on its file: it
    /// has to be forgotten before the file may go.
    async fn forget_dropped(&self, name: &str) -> Result<(), DatabaseError> {
        while self.inner.dropped.lock().contains(name) {
            if let Err(error) = self.checkpoint(self.pin()).await {
                let what = "a database of this name was dropped, and its file cannot go yet";
                self.wait_for_room(name, error, what).await?;
            }
        }
        Ok(())
    }

    async fn drop_database(&self, name: &str) -> CommandOutcome {
        let Some(state) = self.inner.databases.write().remove(name) else {
            return CommandOutcome::Unchanged;
        };
        state.writer.close("the database was dropped").await;
        state.writer.stop();
        self.part_from(&state);
        // The file goes after the next catalog no longer names it: until then a restart may have to replay on it.
        self.inner.dropped.lock().insert(name.to_owned());
        CommandOutcome::Done
    }

    /// Tells those who read a dropped database, or follow it.
    fn part_from(&self, state: &DatabaseState) {
        state.feed.end();
        state.replica.mark_dropped();
        self.inner.setup.readers.forget_dropped();
    }

    /// Whether files of dropped databases take room on the disk.
    pub fn has_dropped_files(&self) -> bool {
        !self.inner.dropped.lock().is_empty()
    }

    /// From now on nothing waits for room on the disk.
    pub fn begin_stop(&self) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        self.states().iter().for_each(|state| state.feed.end());
    }

    /// Whether [`Self::begin_stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.inner.stopping.load(Ordering::SeqCst)
    }

    /// Submits a job to a database's writer; gives it back if there is no such database here yet.
    pub fn submit(&self, name: &str, job: Box<dyn Job>) -> Result<(), Box<dyn Job>> {
        match self.database(name) {
            Some(state) => {
                state.writer.submit(job);
                Ok(())
            }
            None => Err(job),
        }
    }

    /// Opens a new database's writer for the leadership of `term`.
    pub async fn open_writer(&self, name: &str, term: u64) -> Result<(), DatabaseError> {
        match self.database(name) {
            Some(state) => state.writer.open(term).await,
            None => Ok(()),
        }
    }

    /// Opens all writers for the leadership of `term`. All entries of earlier terms must be applied.
    pub async fn open_writers(&self, term: u64) -> Result<(), DatabaseError> {
        for state in self.states() {
            state.writer.open(term).await?;
        }
        Ok(())
    }

    /// Closes all writers, discarding what was captured and not committed.
    pub async fn close_writers(&self, why: &str) {
        for state in self.states() {
            state.writer.close(why).await;
        }
    }

    /// Whether some writer is closed although it was opened (after a failed proposal, or for a new database).
    pub fn has_closed_writer(&self) -> bool {
        self.states().iter().any(|state| !state.writer.is_open())
    }

    /// Page images of all databases in memory, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.states().iter().map(|state| state.replica.statistics().memory_bytes as u64).sum()
    }

    /// Whether some database has content and no file yet. Its first checkpoint writes everything twice: better while it is small.
    pub fn has_database_without_file(&self) -> bool {
        self.states().iter().any(|state| !state.replica.has_file())
    }

    /// Names and states of all databases.
    pub fn named_states(&self) -> Vec<(String, Arc<DatabaseState>)> {
        self.inner.databases.read().iter().map(|(name, state)| (name.clone(), state.clone())).collect()
    }

    fn states(&self) -> Vec<Arc<DatabaseState>> {
        self.inner.databases.read().values().cloned().collect()
    }

    /// Pins the state at the newest applied entry. Must be called between two entries (by the task that applies them).
    pub fn pin(&self) -> PinnedState {
        let applied = self.inner.applied.lock().clone();
        let databases = self
            .inner
            .databases
            .read()
            .iter()
            .map(|(name, state)| (name.clone(), state.replica.clone(), state.replica.pin()))
            .collect();
        PinnedState { position: applied.position, membership: applied.membership, databases }
    }

    /// Writes a pinned state to the disk; blocking I/O runs on a thread of its own. The log may be purged up to it afterwards.
    pub async fn checkpoint(&self, state: PinnedState) -> Result<(), DatabaseError> {
        let Some(position) = state.position else {
            return Ok(());
        };
        let _files = self.inner.files.lock().await;
        if position.index < self.inner.checkpointed.load(Ordering::Acquire) {
            // A snapshot was installed while this one waited.
            return Ok(());
        }
        let machine = self.clone();
        let began = Instant::now();
        let span = tracing::info_span!("checkpoint", term = position.term, index = position.index);
        let done = tokio::task::spawn_blocking(move || span.in_scope(|| machine.write_checkpoint(position, state)))
            .await
            .map_err(|error| DatabaseError::Internal(format!("the checkpoint ended early: {error}")))?;
        match done {
            Ok(()) => self.recorder().checkpoint_time.time(began.elapsed()),
            Err(_) => self.recorder().checkpoints_failed.add(1),
        }
        done
    }

    fn write_checkpoint(&self, position: LogPosition, state: PinnedState) -> Result<(), DatabaseError> {
        let mut catalog =
            Catalog { position: Some(position), membership: state.membership, databases: BTreeMap::new() };
        for (name, replica, pin) in state.databases {
            catalog.databases.insert(name, pin.version().0);
            replica.checkpoint(pin, position)?;
        }
        self.write_catalog(&catalog, position)
    }

    /// The databases of `catalog` are on disk up to it.
    fn write_catalog(&self, catalog: &Catalog, position: LogPosition) -> Result<(), DatabaseError> {
        let disk = &*self.inner.setup.options.disk;
        catalog.write(disk, &self.inner.setup.directory)?;
        // What was dropped after the state was pinned still stands in the catalog.
        let forgotten: Vec<String> =
            self.inner.dropped.lock().iter().filter(|name| !catalog.databases.contains_key(*name)).cloned().collect();
        for name in forgotten {
            Replica::remove_files(disk, &self.inner.setup.directory, &name)?;
            self.inner.dropped.lock().remove(&name);
        }
        self.inner.checkpointed.fetch_max(position.index, Ordering::AcqRel);
        Ok(())
    }

    /// The last steps of a clean stop: checkpoint, and nothing but plain SQLite files left.
    pub async fn close(&self) -> Result<(), DatabaseError> {
        for state in self.states() {
            state.writer.stop();
        }
        self.inner.setup.readers.stop();
        self.checkpoint(self.pin()).await
    }

    /// DATA/db
    pub fn directory(&self) -> &Path {
        &self.inner.setup.directory
    }
}

/// The state of all databases after one log entry, held for as long as this lives.
pub(crate) struct PinnedState {
    pub position: Option<LogPosition>,
    pub membership: MembershipRecord,
    pub databases: Vec<(String, Replica, PinnedVersion)>,
}

impl PinnedState {
    /// The same state, pinned a second time.
    pub fn again(&self) -> PinnedState {
        PinnedState {
            position: self.position,
            membership: self.membership.clone(),
            databases: self
                .databases
                .iter()
                .map(|(name, replica, pin)| (name.clone(), replica.clone(), pin.clone()))
                .collect(),
        }
    }
}
