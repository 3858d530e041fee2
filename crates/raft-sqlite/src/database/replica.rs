//! One database on this node: the verbs between SQLite and Raft.
//!
//! Leader: `open_writer`, transactions, `seal`, and when the entry comes back `commit_captured`. Everybody else: `apply`. Both end
//! with the same bytes, and prove it with the state hash (INV-STATE-HASH). `checkpoint` brings the file up to a pinned version,
//! `install` replaces everything by a received file.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use super::checkpoint::{Files, Install, page_error};
pub(crate) use super::mark::AppliedMark;
pub use super::mark::LogPosition;
use super::prepare::{ConnectionRole, Preparation, PrepareError};
use super::recovery::{self, Paths, Recovered};
use super::{DatabaseError, Reader, Writer};
use crate::error::ErrorClass;
use crate::metrics::recorder::Recorder;
use crate::page::page_set::{DecodedPageSet, PageChange, apply_runs};
use crate::page::source::{Disk, SystemDisk};
use crate::page::store::{PageStore, Pin, PinBounds};
use crate::page::{FREE_PAGES_AT, Page, PageDamage, PageNumber, PageSize, StateHash, Version, be32, first_page};
use crate::vfs::capture::Capture;

/// Largest bound for a transaction, in bytes of page images: with the rest of its group it still fits a PageSet.
const MAX_TRANSACTION_BYTES: usize = 512 * 1024 * 1024;

/// How a replica is set up.
#[derive(Clone)]
pub(crate) struct ReplicaOptions {
    /// Of databases that are made here; an existing file keeps its own, and an empty database takes over its leader's.
    pub page_size: PageSize,
    /// Largest transaction, in bytes of page images. More than 512 MiB count as that.
    pub max_transaction_bytes: usize,
    /// A reader that holds its version longer than this gets an error.
    pub max_reader_age: Duration,
    /// What readers keep in memory of page images that are theirs alone, in bytes; beyond it the oldest get an error.
    pub max_reader_bytes: usize,
    /// Note which tables a leader's transactions change.
    pub track_tables: bool,
    /// What the program does to each connection first.
    pub preparation: Preparation,
    /// Where the checkpoints' pages are counted.
    pub recorder: Arc<Recorder>,
    /// Where the files are.
    pub disk: Arc<dyn Disk>,
    /// Version of a database that has no file: it is empty.
    pub born: Version,
}

impl Default for ReplicaOptions {
    fn default() -> Self {
        Self {
            page_size: PageSize::default(),
            max_transaction_bytes: 64 * 1024 * 1024,
            max_reader_age: Duration::from_secs(600),
            max_reader_bytes: 256 * 1024 * 1024,
            track_tables: false,
            preparation: Preparation::default(),
            recorder: Arc::default(),
            disk: Arc::new(SystemDisk),
            born: Version::default(),
        }
    }
}

impl ReplicaOptions {
    fn pin_bounds(&self) -> PinBounds {
        PinBounds { max_age: self.max_reader_age, max_bytes: self.max_reader_bytes }
    }
}

/// Why a PageSet was not applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// It was computed on a version that is not the database's. Deterministic: every node refuses it.
    #[error("the PageSet is based on version {base}, the database is at {committed}")]
    BaseMismatch {
        /// What it was computed on.
        base: Version,
        /// What the database is at.
        committed: Version,
    },
    /// This node's writer is ahead; it has to be closed first.
    #[error("the writer has captured versions that are not committed")]
    CapturedVersionsExist,
    /// The result is not what the leader has: this replica (or the leader) is damaged.
    #[error(
        "the state hash after version {version} is {got:032x}, the leader had {want:032x}: this replica differs from the leader and must be restored from a peer"
    )]
    HashMismatch {
        /// The version that was to be applied.
        version: Version,
        /// The leader's hash.
        want: u128,
        /// This node's.
        got: u128,
    },
    /// A page that it changes is damaged in this replica's file. It was not applied.
    #[error(transparent)]
    Damaged(#[from] PageDamage),
    /// The bytes are not a PageSet, or the file could not be read.
    #[error("{0}")]
    Io(#[source] io::Error),
}

impl From<io::Error> for ApplyError {
    fn from(error: io::Error) -> Self {
        match PageDamage::of(&error) {
            Some(damage) => ApplyError::Damaged(damage.clone()),
            None => ApplyError::Io(error),
        }
    }
}

impl ApplyError {
    /// What became of the PageSet. `Rejected`: on every node alike.
    pub fn class(&self) -> ErrorClass {
        match self {
            ApplyError::BaseMismatch { .. } => ErrorClass::Rejected,
            ApplyError::CapturedVersionsExist => ErrorClass::Retryable,
            ApplyError::HashMismatch { .. } | ApplyError::Damaged(_) | ApplyError::Io(_) => ErrorClass::Fatal,
        }
    }
}

/// Figures about a replica.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReplicaStatistics {
    pub version: Version,
    pub state_hash: StateHash,
    pub page_count: u32,
    pub free_pages: u32,
    /// Bytes in a page.
    pub page_size: usize,
    /// Bytes of page images in memory, about.
    pub memory_bytes: usize,
    /// Of these, bytes kept for readers of older versions alone, and bytes that no checkpoint has written.
    pub held_bytes: usize,
    pub unwritten_bytes: usize,
    /// Read transactions, and others that hold a version.
    pub readers: usize,
    /// How long the oldest reader has held its version.
    pub oldest_reader: Option<Duration>,
    /// Pages of the file that were found to be damaged.
    pub damaged_pages: usize,
}

struct Inner {
    identity: usize,
    name: String,
    paths: Paths,
    options: ReplicaOptions,
    /// Replaced by an install; readers keep the one they began on.
    store: RwLock<Arc<PageStore>>,
    files: Mutex<Files>,
    /// State hashes of sealed groups that are not committed, oldest first.
    captured: Mutex<VecDeque<(Version, StateHash)>>,
    /// Held while a PageSet is applied, a writer is opened or a file installed: each of them begins at a committed version that must
    /// not move under it.
    verbs: Mutex<()>,
    writer_open: Arc<AtomicBool>,
    dropped: AtomicBool,
}

/// One database on this node; clones share it.
#[derive(Clone)]
pub(crate) struct Replica {
    inner: Arc<Inner>,
}

/// A version of a database, held.
pub(crate) struct PinnedVersion {
    pin: Pin,
}

impl Replica {
    /// Opens a database, recovering from a crash; a missing one is made, at the version [`ReplicaOptions::born`]
    /// (in memory, until its first checkpoint). The mark says what its file holds.
    pub fn open(
        folder: &Path,
        name: &str,
        options: ReplicaOptions,
    ) -> Result<(Replica, Option<AppliedMark>), DatabaseError> {
        static IDENTITY: AtomicUsize = AtomicUsize::new(1);
        let paths = Paths::new(folder, name);
        let recovered = recovery::recover(&*options.disk, &paths)?;
        let mark = recovered.mark;
        let files = Files::new(&recovered);
        let store = new_store(&recovered, &options, &paths)?;
        let inner = Inner {
            identity: IDENTITY.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            paths,
            options,
            store: RwLock::new(Arc::new(store)),
            files: Mutex::new(files),
            captured: Mutex::default(),
            verbs: Mutex::default(),
            writer_open: Arc::default(),
            dropped: AtomicBool::new(false),
        };
        Ok((Replica { inner: Arc::new(inner) }, mark))
    }

    /// Distinguishes replicas within the process.
    pub fn identity(&self) -> usize {
        self.inner.identity
    }

    pub(super) fn path(&self) -> &Path {
        &self.inner.paths.database
    }

    /// Runs the program's preparation by way of a connection's own `prepare`.
    pub(super) fn prepare(
        &self,
        role: ConnectionRole,
        on: impl FnOnce(
            &dyn Fn(&rusqlite::Connection) -> Result<(), String>,
        ) -> rusqlite::Result<Option<Result<(), String>>>,
    ) -> Result<(), PrepareError> {
        self.inner.options.preparation.run(&self.inner.name, role, on)
    }

    /// Prepares one connection of each role and closes them again: a program that cannot is told when it starts.
    pub fn rehearse(&self) -> Result<(), DatabaseError> {
        if self.inner.options.preparation.is_empty() {
            return Ok(());
        }
        self.open_reader()?;
        self.open_writer()?.connect().map(drop)
    }

    fn store(&self) -> Arc<PageStore> {
        self.inner.store.read().clone()
    }

    #[cfg(test)]
    pub(super) fn store_for_tests(&self) -> Arc<PageStore> {
        self.store()
    }

    pub(super) fn is_current(&self, store: &Arc<PageStore>) -> bool {
        Arc::ptr_eq(&self.inner.store.read(), store)
    }

    /// The database was dropped: what is open on it is for those who read at this moment.
    pub fn mark_dropped(&self) {
        self.inner.dropped.store(true, Ordering::SeqCst);
    }

    pub fn is_dropped(&self) -> bool {
        self.inner.dropped.load(Ordering::SeqCst)
    }

    /// Newest committed version.
    pub fn committed(&self) -> Version {
        self.store().committed()
    }

    /// The single writer, on the committed version.
    ///
    /// # Errors
    /// [`DatabaseError::Closed`] when one is open already.
    pub fn open_writer(&self) -> Result<Writer, DatabaseError> {
        let _verb = self.inner.verbs.lock();
        if self.inner.writer_open.swap(true, Ordering::SeqCst) {
            return Err(DatabaseError::Closed);
        }
        let max_transaction_bytes = self.inner.options.max_transaction_bytes.min(MAX_TRANSACTION_BYTES);
        let capture = Arc::new(Capture::new(self.store(), max_transaction_bytes));
        Writer::new(self.clone(), capture, self.inner.writer_open.clone())
    }

    /// A read-only connection.
    pub fn open_reader(&self) -> Result<Reader, DatabaseError> {
        Reader::new(self.clone(), self.store())
    }

    pub(super) fn tracks_tables(&self) -> bool {
        self.inner.options.track_tables
    }

    pub(super) fn note_captured(&self, version: Version, hash: StateHash) {
        self.inner.captured.lock().push_back((version, hash));
    }

    pub(super) fn discard_captured(&self, store: &PageStore) {
        self.inner.captured.lock().clear();
        store.discard();
    }

    /// The leader's own group came back committed: makes it visible.
    ///
    /// # Errors
    /// None in a correct program: [`ApplyError::BaseMismatch`] when `version` is not the next one captured.
    pub fn commit_captured(&self, version: Version) -> Result<(), ApplyError> {
        let store = self.store();
        let mut captured = self.inner.captured.lock();
        match captured.front() {
            Some((next, hash)) if *next == version && version == store.committed().next() => {
                store.commit(version, *hash);
                captured.pop_front();
                Ok(())
            }
            _ => Err(ApplyError::BaseMismatch { base: version, committed: store.committed() }),
        }
    }

    /// Applies a PageSet: base check, images, hash check, and only then visible. Refused, it changed nothing.
    ///
    /// # Errors
    /// See [`ApplyError`].
    pub fn apply(&self, page_set: &[u8]) -> Result<Version, ApplyError> {
        let set = DecodedPageSet::decode(page_set)?;
        let _verb = self.inner.verbs.lock();
        let mut store = self.store();
        let (committed, mut hash) = store.committed_state();
        if set.header.base != committed {
            return Err(ApplyError::BaseMismatch { base: set.header.base, committed });
        }
        if store.captured() != committed || self.inner.writer_open.load(Ordering::SeqCst) {
            return Err(ApplyError::CapturedVersionsExist);
        }
        if set.header.page_size != store.page_size() && committed == self.inner.options.born {
            store = self.with_page_size(set.header.page_size);
            hash = store.committed_state().1;
        }
        if set.header.page_size != store.page_size() {
            return Err(invalid("a PageSet of another page size than the database's").into());
        }
        let version = set.header.version;
        let base_count = store.page_count_at(committed)?;
        let page_count = set.header.page_count;
        let mut pages: Vec<(PageNumber, Page)> = Vec::new();
        let mut grown = 0;
        set.for_each(|number, change| -> Result<(), ApplyError> {
            let old = if number.0 <= base_count { store.page_at(number, committed)? } else { None };
            grown += u32::from(number.0 > base_count);
            let image = match (change, &old) {
                (PageChange::Image(image), _) => Page::buffer_from(image),
                (PageChange::Zeros, _) => Page::buffer(store.page_size()),
                (PageChange::Runs(runs, count), old) => {
                    let mut image = match old {
                        Some(old) => Page::buffer_from(old.bytes()),
                        None => Page::buffer(store.page_size()),
                    };
                    apply_runs(runs, count, &mut image);
                    image
                }
            };
            let page = Page::new(number, version, image);
            hash.subtract(old.map_or(0, |old| old.hash()));
            hash.add(page.hash());
            pages.push((number, page));
            Ok(())
        })?;
        if grown != page_count.saturating_sub(base_count) {
            return Err(invalid("a PageSet without all the pages that the database grew by").into());
        }
        for cut in page_count + 1..=base_count {
            hash.subtract(store.page_at(PageNumber(cut), committed)?.map_or(0, |old| old.hash()));
        }
        if hash != set.header.state_hash {
            return Err(ApplyError::HashMismatch { version, want: set.header.state_hash.0, got: hash.0 });
        }
        let numbers = pages.iter().map(|(number, _)| *number).collect();
        store.put_applied(pages);
        store.record(version, numbers);
        if !self.is_current(&store) {
            *self.inner.store.write() = store.clone();
        }
        store.commit(version, hash);
        Ok(version)
    }

    /// The empty database with another page size: this node was set up with one, and the first leader with another.
    fn with_page_size(&self, page_size: PageSize) -> Arc<PageStore> {
        let file = self.inner.files.lock().database.clone();
        let store = PageStore::new(
            page_size,
            file,
            self.inner.paths.database.clone(),
            Vec::new(),
            self.inner.options.born,
            StateHash::default(),
            self.inner.options.pin_bounds(),
        );
        store.put_first_page(&first_page(page_size));
        Arc::new(store)
    }

    /// False: there is content, and no checkpoint of it yet.
    pub fn has_file(&self) -> bool {
        self.committed() == self.inner.options.born || self.store().checkpointed_version().is_some()
    }

    /// Pins the committed version.
    pub fn pin(&self) -> PinnedVersion {
        PinnedVersion { pin: self.store().pin() }
    }

    /// Brings the file up to a pinned version, which holds the log up to `position`. Blocking I/O; writers, apply and readers go on.
    ///
    /// # Errors
    /// I/O errors, such as a full disk: nothing is lost, and a later checkpoint does the work.
    pub fn checkpoint(&self, pinned: PinnedVersion, position: LogPosition) -> Result<(), DatabaseError> {
        let Inner { paths, options, files, .. } = &*self.inner;
        let mut files = files.lock();
        match files.install {
            Install::None => {}
            Install::Abandoned => {
                recovery::abandon_install(&*options.disk, paths)?;
                files.install = Install::None;
            }
            Install::Decided => self.open_installed(&mut files)?,
        }
        if !self.is_current(pinned.pin.store()) {
            // Installed over meanwhile: the file is newer than the pin.
            return Ok(());
        }
        let before = files.written_pages;
        let done = files.checkpoint(&*options.disk, paths, pinned.pin, position);
        let pages = files.written_pages - before;
        options.recorder.checkpoint_pages.add(pages);
        options.recorder.checkpoint_bytes.add(pages * self.store().page_size().bytes() as u64);
        done
    }

    /// Replaces everything by the complete SQLite file at `received`, whose state hash must be the mark's. The writer must be closed;
    /// open readers go on with the old state. On disk when it returns.
    ///
    /// # Errors
    /// [`DatabaseError::Damaged`] when the file is not what the mark says: the old state stands. After I/O errors the old state is
    /// served on; on disk either stands, and a later checkpoint, install or start brings both together.
    pub fn install(&self, received: &Path, mark: AppliedMark) -> Result<(), DatabaseError> {
        let _verb = self.inner.verbs.lock();
        if self.inner.writer_open.load(Ordering::SeqCst) {
            return Err(DatabaseError::Internal("a snapshot cannot be installed while the writer is open".into()));
        }
        let mut files = self.inner.files.lock();
        if files.install == Install::Decided {
            self.open_installed(&mut files)?;
        }
        let Inner { paths, options, .. } = &*self.inner;
        files.install = Install::Abandoned;
        recovery::prepare_install(&*options.disk, paths, received, files.sequence + 1, &mark)?;
        files.install = Install::Decided;
        self.open_installed(&mut files)
    }

    /// The installed file stands on disk: takes it over.
    fn open_installed(&self, files: &mut Files) -> Result<(), DatabaseError> {
        let Inner { paths, options, .. } = &*self.inner;
        let recovered = recovery::recover(&*options.disk, paths)?;
        let store = new_store(&recovered, options, paths)?;
        *files = Files::new(&recovered);
        *self.inner.store.write() = Arc::new(store);
        Ok(())
    }

    /// Bytes in a page, now.
    pub fn page_size(&self) -> PageSize {
        self.store().page_size()
    }

    /// The first page of the file that was found to be damaged.
    pub fn damage(&self) -> Option<PageDamage> {
        self.store().damage()
    }

    /// Reads up to `count` pages from `first` on, and compares them with their checksums; those that are in memory count as read.
    /// Where to go on; None: that was all. Damaged pages are remembered: [`Self::damage`].
    ///
    /// # Errors
    /// The file could not be read.
    pub fn scrub(&self, first: u32, count: u32) -> Result<Option<u32>, DatabaseError> {
        // Not held for longer than this part.
        let pin = self.store().pin();
        let path = &self.inner.paths.database;
        let page_count = pin.page_count().map_err(|error| page_error(error, path))?;
        let next = first.saturating_add(count);
        let mut image = vec![0; pin.store().page_size().bytes()];
        for number in first..next.min(page_count.saturating_add(1)) {
            match pin.copy(PageNumber(number), 0, &mut image).map_err(|error| page_error(error, path)) {
                Ok(_) | Err(DatabaseError::DamagedPage(_)) => {}
                Err(error) => return Err(error),
            }
            self.inner.options.recorder.scrubbed_pages.add(1);
        }
        Ok((next <= page_count).then_some(next))
    }

    /// Compares the checksums on the disk with those in memory, and with the applied mark.
    ///
    /// # Errors
    /// [`DatabaseError::Damaged`]; I/O errors.
    pub fn check_sums(&self) -> Result<(), DatabaseError> {
        let Inner { paths, options, files, .. } = &*self.inner;
        // No checkpoint meanwhile.
        let files = files.lock();
        let store = self.store();
        if files.started.is_some() || files.install != Install::None || store.file_page_count() == 0 {
            return Ok(());
        }
        recovery::check_sums(&*options.disk, paths, store.page_size(), files.sequence, &store.sums())
    }

    /// Recomputes the state hash of a pinned version from its images. False: this replica is damaged.
    pub fn verify(&self) -> Result<bool, DatabaseError> {
        let pinned = self.pin();
        let mut hash = StateHash::default();
        for number in 1..=pinned.page_count() {
            let page = pinned.read_page(PageNumber(number))?;
            hash.add(crate::page::page_hash(PageNumber(number), page.bytes()));
        }
        Ok(hash == pinned.state_hash())
    }

    pub fn statistics(&self) -> ReplicaStatistics {
        let store = self.store();
        // Before this call's own pin.
        let (readers, oldest_reader) = (store.pin_count(), store.oldest_pin_age());
        let pin = store.pin();
        let mut free = [0; 4];
        let _ = pin.copy(PageNumber(1), FREE_PAGES_AT, &mut free);
        ReplicaStatistics {
            version: pin.version(),
            state_hash: pin.hash(),
            page_count: pin.page_count().unwrap_or(0),
            free_pages: be32(&free, 0),
            page_size: store.page_size().bytes(),
            memory_bytes: store.memory_bytes(),
            held_bytes: store.held_bytes(),
            unwritten_bytes: store.unwritten_bytes(),
            readers,
            oldest_reader,
            damaged_pages: store.damaged_pages(),
        }
    }

    /// Removes the files of a database that was dropped.
    pub fn remove_files(disk: &dyn Disk, folder: &Path, name: &str) -> Result<(), DatabaseError> {
        let paths = Paths::new(folder, name);
        for path in paths.all() {
            disk.remove(path).map_err(|error| DatabaseError::io(path, error))?;
        }
        disk.sync_folder(folder).map_err(|error| DatabaseError::io(folder, error))
    }

    /// Removes what a crash has left of a database that is made anew: everything since its making is in the log. A file that somebody
    /// else has put there (nothing of ours stands beside it) is moved out of the way.
    pub fn remove_leftovers(disk: &dyn Disk, folder: &Path, name: &str) -> Result<(), DatabaseError> {
        let paths = Paths::new(folder, name);
        let exists = |path: &Path| disk.open(path, false).map(|file| file.is_some());
        let ours = [&paths.wal, &paths.applied, &paths.new_applied];
        let is_ours = ours.iter().try_fold(false, |found, path| Ok(found || exists(path)?));
        let is_stray = is_ours
            .and_then(|ours| {
                Ok(!ours
                    && disk
                        .open(&paths.database, false)?
                        .is_some_and(|file| file.length().is_ok_and(|length| length > 0)))
            })
            .map_err(|error| DatabaseError::io(&paths.database, error))?;
        if is_stray {
            let aside = folder.join(format!("{name}.sqlite.found-{:08x}", rand::random::<u32>()));
            disk.rename(&paths.database, &aside).map_err(|error| DatabaseError::io(&aside, error))?;
            tracing::warn!(path = %aside.display(), "a file that does not belong to this node stood in the place of a new database: moved");
        }
        Self::remove_files(disk, folder, name)
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn new_store(recovered: &Recovered, options: &ReplicaOptions, paths: &Paths) -> Result<PageStore, DatabaseError> {
    let page_size = recovered.page_size.unwrap_or(options.page_size);
    let (version, hash) =
        recovered.mark.map_or((options.born, StateHash::default()), |mark| (mark.version, mark.state_hash));
    let (file, path) = (recovered.file.clone(), paths.database.clone());
    let store = PageStore::new(page_size, file, path, recovered.sums.clone(), version, hash, options.pin_bounds());
    if recovered.sums.is_empty() {
        store.put_first_page(&first_page(page_size));
    } else {
        store.load_first_page().map_err(|error| DatabaseError::io(&paths.database, error))?;
    }
    Ok(store)
}

impl PinnedVersion {
    pub fn version(&self) -> Version {
        self.pin.version()
    }

    pub fn state_hash(&self) -> StateHash {
        self.pin.hash()
    }

    pub fn page_size(&self) -> PageSize {
        self.pin.store().page_size()
    }

    /// Pages in the database at this version.
    pub fn page_count(&self) -> u32 {
        self.pin.page_count().unwrap_or(0)
    }

    /// Copies a page of this version, of which `image` has the size; zeros if it was never written.
    pub fn copy_page(&self, number: PageNumber, image: &mut [u8]) -> Result<(), DatabaseError> {
        match self.pin.copy(number, 0, image) {
            Ok(true) => Ok(()),
            Ok(false) => {
                image.fill(0);
                Ok(())
            }
            Err(error) => Err(page_error(error, Path::new("a pinned version"))),
        }
    }

    /// A page of this version; zeros if it was never written.
    pub fn read_page(&self, number: PageNumber) -> Result<Arc<Page>, DatabaseError> {
        match self.pin.page(number) {
            Ok(Some(page)) => Ok(page),
            Ok(None) => Ok(Arc::new(Page::new(number, Version(0), Page::buffer(self.page_size())))),
            Err(error) => Err(page_error(error, Path::new("a pinned version"))),
        }
    }
}

impl Clone for PinnedVersion {
    fn clone(&self) -> Self {
        Self { pin: self.pin.again() }
    }
}
