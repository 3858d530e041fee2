//! The page store: the versions of a database's pages in memory, above its checkpointed file.
//!
//! For each page number a chain of images, newest first. `committed` is the newest version that Raft has committed; the leader's
//! writer is ahead of it by what is captured. A reader pins `committed` and sees, of each page, the newest image at or below its pin;
//! a page without such an image is read from the file.
//!
//! ```text
//!           captured ──► 12 │  9 │ 12 │        writer view: the newest
//!           committed ─► 11 │    │ 10 │        reader views: the newest <= their pin
//!           checkpoint ─►  (file)              what no chain has
//! ```
//! Invariants: INV-PIN-ATOMIC: a pin is taken together with reading `committed`. INV-FILE-BELOW-PINS: the file holds, of a page whose
//! chain has nothing at or below a pin, the image that pin has to see; so a checkpoint first puts the file's old image into the
//! chain where an older pin still needs it, and an image leaves a chain only when the file has it and nothing older is left.
//! Whoever finds no image in a chain reads the file without a lock and then looks at the chain once more: if a checkpoint was about to
//! overwrite the page, the old image is there by then. Page 1, which says how large the database is, always has an image in memory.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::source::DiskFile;
use super::{DATABASE_SIZE_AT, Page, PageMap, PageNumber, PageNumbers, PageSize, StateHash, Version, be32};

/// Locks over the chains: a page's chain is under the lock of its number modulo this.
const SHARDS: usize = 64;

type Chain = Vec<Arc<Page>>;

struct PinState {
    version: Version,
    since: Instant,
    expired: AtomicBool,
}

/// Holds a version: its images stay for as long as this lives.
pub(crate) struct Pin {
    store: Arc<PageStore>,
    state: Arc<PinState>,
    hash: StateHash,
    page_count: OnceLock<u32>,
}

#[derive(Default)]
struct Pins {
    committed: Version,
    hash: StateHash,
    by_version: BTreeMap<Version, Vec<Arc<PinState>>>,
}

/// See the module.
pub(crate) struct PageStore {
    page_size: PageSize,
    file: Arc<dyn DiskFile>,
    /// Pages in the file that count: those beyond are leftovers or not there.
    file_pages: AtomicU64,
    shards: Vec<RwLock<PageMap<Chain>>>,
    pins: Mutex<Pins>,
    committed: AtomicU64,
    /// Newest captured version, or `committed`.
    captured: AtomicU64,
    /// Pages of the versions above `committed`, and of those not yet collected; oldest version first.
    history: Mutex<VecDeque<(Version, Vec<PageNumber>)>>,
    /// Pages changed by committed versions since the last checkpoint.
    changed: Mutex<PageNumbers>,
    /// Pages of which an older image was kept for a pin, and whether pins were released since they were looked at.
    held: Mutex<PageNumbers>,
    released: AtomicBool,
    /// Pages whose images leave memory when nothing older is left in their chain: the version of the image that the file has. None: the
    /// file has none, the page was cut off.
    resident: Mutex<PageMap<Option<Version>>>,
    /// The last checkpoint; None before the first.
    checkpointed: Mutex<Option<Version>>,
    memory_bytes: AtomicUsize,
    max_reader_age: Duration,
}

/// Why a page could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    #[error("the reader has held its version for longer than {} s: end long reads, or raise the bound", .0.as_secs())]
    TooOld(Duration),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl PageStore {
    /// A store above `file`, which holds `pages` pages at `version` with state hash `hash`.
    pub fn new(
        page_size: PageSize,
        file: Arc<dyn DiskFile>,
        pages: u32,
        version: Version,
        hash: StateHash,
        max_reader_age: Duration,
    ) -> Self {
        Self {
            page_size,
            file,
            file_pages: AtomicU64::new(u64::from(pages)),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            pins: Mutex::new(Pins { committed: version, hash, by_version: BTreeMap::new() }),
            committed: AtomicU64::new(version.0),
            captured: AtomicU64::new(version.0),
            history: Mutex::default(),
            changed: Mutex::default(),
            held: Mutex::default(),
            released: AtomicBool::new(false),
            resident: Mutex::default(),
            checkpointed: Mutex::new((pages > 0).then_some(version)),
            memory_bytes: AtomicUsize::new(0),
            max_reader_age,
        }
    }

    /// A new database: page 1 only, in memory until the first checkpoint.
    pub fn put_first_page(&self, image: &[u8]) {
        let page = Page::new(PageNumber(1), Version(0), Page::buffer_from(image));
        self.pins.lock().hash = StateHash(page.hash());
        self.put(PageNumber(1), page);
        self.changed.lock().insert(1);
    }

    /// A database that has a file: takes page 1 into memory. Before anything else is done with it.
    ///
    /// # Errors
    /// The file could not be read.
    pub fn load_first_page(&self) -> io::Result<()> {
        let mut buffer = Page::buffer(self.page_size);
        self.read_file(PageNumber(1), &mut buffer)?;
        self.put(PageNumber(1), Page::new(PageNumber(1), Version(0), buffer));
        Ok(())
    }

    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    pub fn committed(&self) -> Version {
        Version(self.committed.load(Ordering::Acquire))
    }

    pub fn captured(&self) -> Version {
        Version(self.captured.load(Ordering::Acquire))
    }

    /// The newest committed version and the state hash at it.
    pub fn committed_state(&self) -> (Version, StateHash) {
        let pins = self.pins.lock();
        (pins.committed, pins.hash)
    }

    /// Bytes of page images in memory, about.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes.load(Ordering::Relaxed)
    }

    /// Of these, bytes of images older than the committed version's, kept for pins; about.
    pub fn pinned_bytes(&self) -> usize {
        let committed = self.committed();
        let held: Vec<u32> = self.held.lock().iter().copied().collect();
        let older = |number: u32| {
            let shard = self.shard(PageNumber(number)).read();
            let settled = shard.get(&number)?.iter().skip_while(|page| page.version() > committed);
            Some(settled.skip(1).map(|page| page.memory_bytes()).sum::<usize>())
        };
        held.into_iter().filter_map(older).sum()
    }

    /// Bytes of images of committed pages that no checkpoint has written yet, about.
    pub fn unwritten_bytes(&self) -> usize {
        self.changed.lock().len() * self.page_size.bytes()
    }

    /// Pins, readers' and others.
    pub fn pin_count(&self) -> usize {
        self.pins.lock().by_version.values().map(Vec::len).sum()
    }

    /// How long the oldest pin has been held.
    pub fn oldest_pin_age(&self) -> Option<Duration> {
        let pins = self.pins.lock();
        pins.by_version.values().flatten().map(|pin| pin.since.elapsed()).max()
    }

    fn shard(&self, number: PageNumber) -> &RwLock<PageMap<Chain>> {
        &self.shards[number.0 as usize % SHARDS]
    }

    /// The file's image, or zeros where it has none. The second: whether it has one.
    fn read_file(&self, number: PageNumber, buffer: &mut [u8]) -> io::Result<bool> {
        let size = self.page_size.bytes();
        if u64::from(number.0) > self.file_pages.load(Ordering::Acquire) {
            buffer[..size].fill(0);
            return Ok(false);
        }
        let read = self.file.read_at(&mut buffer[..size], u64::from(number.0 - 1) * size as u64)?;
        if read < size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the database file ends inside page {} (it was cut by something else)", number.0),
            ));
        }
        Ok(true)
    }

    /// The newest image at or below `version` in memory.
    fn in_chain(chain: Option<&Chain>, version: Version) -> Option<&Arc<Page>> {
        chain?.iter().find(|page| page.version() <= version)
    }

    /// The image that `version` sees; None: it was never written (zeros). The caller holds a pin at or below `version`, or is the writer.
    ///
    /// # Errors
    /// The file could not be read.
    pub fn page_at(&self, number: PageNumber, version: Version) -> io::Result<Option<Arc<Page>>> {
        if let Some(page) = self.cached_at(number, version) {
            return Ok(Some(page));
        }
        let mut buffer = Page::buffer(self.page_size);
        let read = self.read_file(number, &mut buffer);
        // A checkpoint may have overwritten the page meanwhile: then it has put the old image into the chain before.
        if let Some(page) = self.cached_at(number, version) {
            return Ok(Some(page));
        }
        Ok(read?.then(|| Arc::new(Page::new(number, Version(0), buffer))))
    }

    /// Only from memory, without copying.
    pub fn cached_at(&self, number: PageNumber, version: Version) -> Option<Arc<Page>> {
        Self::in_chain(self.shard(number).read().get(&number.0), version).cloned()
    }

    /// Copies `buffer.len()` bytes from `offset` within the page that `version` sees. False: never written, zeros.
    ///
    /// # Errors
    /// The file could not be read.
    pub fn copy_at(&self, number: PageNumber, version: Version, offset: usize, buffer: &mut [u8]) -> io::Result<bool> {
        let from_chain = |buffer: &mut [u8]| {
            let shard = self.shard(number).read();
            let page = Self::in_chain(shard.get(&number.0), version)?;
            buffer.copy_from_slice(&page.bytes()[offset..offset + buffer.len()]);
            Some(())
        };
        if from_chain(buffer).is_some() {
            return Ok(true);
        }
        let read = if offset == 0 && buffer.len() == self.page_size.bytes() {
            self.read_file(number, buffer)
        } else {
            let mut page = vec![0; self.page_size.bytes()];
            let read = self.read_file(number, &mut page);
            buffer.copy_from_slice(&page[offset..offset + buffer.len()]);
            read
        };
        // As in `page_at`.
        if from_chain(buffer).is_some() { Ok(true) } else { read }
    }

    /// Size of the database in pages as `version` sees it.
    pub fn page_count_at(&self, version: Version) -> io::Result<u32> {
        let mut size = [0; 4];
        self.copy_at(PageNumber(1), version, DATABASE_SIZE_AT, &mut size)?;
        Ok(be32(&size, 0))
    }

    /// Captured: puts images on top as `version`, replacing those of the same version. Not visible to readers.
    pub fn put_captured(&self, version: Version, pages: impl IntoIterator<Item = (PageNumber, Box<[u8]>)>) {
        for (number, bytes) in pages {
            self.put(number, Page::new(number, version, bytes));
        }
        self.captured.store(version.0, Ordering::Release);
    }

    /// Applied from bytes: puts images on top. Not visible before [`Self::commit`].
    pub fn put_applied(&self, pages: Vec<(PageNumber, Page)>) {
        for (number, page) in pages {
            self.put(number, page);
        }
    }

    fn put(&self, number: PageNumber, page: Page) {
        let page = Arc::new(page);
        let mut grown = page.memory_bytes();
        let mut shard = self.shard(number).write();
        let chain = shard.entry(number.0).or_default();
        match chain.first_mut() {
            Some(head) if head.version() == page.version() => {
                grown -= head.memory_bytes().min(grown);
                *head = page;
            }
            _ => chain.insert(0, page),
        }
        drop(shard);
        self.memory_bytes.fetch_add(grown, Ordering::Relaxed);
    }

    /// Takes an image of a captured version out again.
    pub fn remove_captured(&self, number: PageNumber, version: Version) {
        let mut shard = self.shard(number).write();
        let Some(chain) = shard.get_mut(&number.0) else {
            return;
        };
        if chain.first().is_some_and(|head| head.version() == version) {
            let page = chain.remove(0);
            self.memory_bytes.fetch_sub(page.memory_bytes(), Ordering::Relaxed);
        }
        if chain.is_empty() {
            shard.remove(&number.0);
        }
    }

    /// A captured or applied version is complete: it changed `pages`.
    pub fn record(&self, version: Version, pages: Vec<PageNumber>) {
        self.history.lock().push_back((version, pages));
        self.captured.store(version.0, Ordering::Release);
    }

    /// Makes `version` visible to readers. `hash`: the state hash at it.
    pub fn commit(&self, version: Version, hash: StateHash) {
        {
            let history = self.history.lock();
            let mut changed = self.changed.lock();
            let pages = history.iter().rev().find(|(recorded, _)| *recorded == version);
            changed.extend(pages.into_iter().flat_map(|(_, pages)| pages).map(|page| page.0));
        }
        let mut pins = self.pins.lock();
        assert!(version == pins.committed.next(), "invariant: versions are committed one by one");
        pins.committed = version;
        pins.hash = hash;
        self.committed.store(version.0, Ordering::Release);
        drop(pins);
        self.collect();
    }

    /// Drops every version above `committed`.
    pub fn discard(&self) {
        let committed = self.committed();
        let mut history = self.history.lock();
        while let Some((version, _)) = history.back()
            && *version > committed
        {
            history.pop_back();
        }
        drop(history);
        // The open group is in no history: look at every chain. Rare, and what is captured is in memory anyway.
        for shard in &self.shards {
            shard.write().retain(|_, chain| {
                while let Some(head) = chain.first()
                    && head.version() > committed
                {
                    self.memory_bytes.fetch_sub(head.memory_bytes(), Ordering::Relaxed);
                    chain.remove(0);
                }
                !chain.is_empty()
            });
        }
        self.captured.store(committed.0, Ordering::Release);
    }

    /// Pins the committed version.
    pub fn pin(self: &Arc<Self>) -> Pin {
        let mut pins = self.pins.lock();
        let version = pins.committed;
        let state = Arc::new(PinState { version, since: Instant::now(), expired: AtomicBool::new(false) });
        pins.by_version.entry(version).or_default().push(state.clone());
        let hash = pins.hash;
        Pin { store: self.clone(), state, hash, page_count: OnceLock::new() }
    }

    /// The versions that somebody looks at, `committed` among them, oldest first. Pins that are too old count no more: their readers
    /// get an error.
    fn visible_versions(&self) -> Vec<Version> {
        let mut pins = self.pins.lock();
        let max_age = self.max_reader_age;
        pins.by_version.retain(|_, states| {
            states.retain(|pin| {
                let expired = pin.since.elapsed() > max_age;
                if expired {
                    pin.expired.store(true, Ordering::SeqCst);
                    self.released.store(true, Ordering::SeqCst);
                }
                !expired
            });
            !states.is_empty()
        });
        let mut versions: Vec<Version> = pins.by_version.keys().copied().collect();
        if versions.last() != Some(&pins.committed) {
            versions.push(pins.committed);
        }
        versions
    }

    fn smallest_pin(&self) -> Version {
        self.visible_versions()[0]
    }

    /// Drops the images that nobody can see.
    fn collect(&self) {
        let mut held = self.held.lock();
        // Before the pins are looked at: one that goes in between counts the next time.
        let released = self.released.swap(false, Ordering::SeqCst);
        let visible = self.visible_versions();
        let committed = visible[visible.len() - 1];
        if released {
            held.retain(|number| self.collect_page(PageNumber(*number), &visible));
        }
        loop {
            let mut history = self.history.lock();
            match history.front() {
                Some((version, _)) if *version <= committed => {}
                _ => return,
            }
            let Some((_, pages)) = history.pop_front() else {
                return;
            };
            drop(history);
            for number in pages {
                if self.collect_page(number, &visible) {
                    held.insert(number.0);
                }
            }
        }
    }

    /// True: an older image is kept for a pin.
    fn collect_page(&self, number: PageNumber, visible: &[Version]) -> bool {
        let mut shard = self.shard(number).write();
        shard.get_mut(&number.0).is_some_and(|chain| self.prune(chain, visible))
    }

    /// Keeps of a chain what is above the committed version, and for each visible version the newest image at or below it. True: more
    /// than one image at or below the committed version is left.
    fn prune(&self, chain: &mut Chain, visible: &[Version]) -> bool {
        let committed = visible[visible.len() - 1];
        let mut newer = Version(u64::MAX);
        let mut settled = 0;
        chain.retain(|page| {
            let version = page.version();
            let seen = visible.iter().any(|pin| version <= *pin && *pin < newer);
            let keep = version > committed || seen;
            if version <= committed {
                newer = version;
                settled += usize::from(keep);
            }
            if !keep {
                self.memory_bytes.fetch_sub(page.memory_bytes(), Ordering::Relaxed);
            }
            keep
        });
        settled > 1
    }

    // ---- checkpoint: called by one thread at a time, in this order

    /// What the file holds; None before the first checkpoint.
    pub fn checkpointed_version(&self) -> Option<Version> {
        *self.checkpointed.lock()
    }

    /// Pages in the file, as of the last checkpoint; 0 before the first.
    pub fn file_page_count(&self) -> u32 {
        self.file_pages.load(Ordering::Acquire) as u32
    }

    /// The pages to write for a checkpoint at `pin`, sorted.
    ///
    /// # Errors
    /// The pin is too old.
    pub fn changed_at(&self, pin: &Pin) -> Result<Vec<(PageNumber, Arc<Page>)>, PageError> {
        let last = self.checkpointed_version();
        let mut numbers: Vec<u32> = self.changed.lock().iter().copied().collect();
        numbers.sort_unstable();
        let image = |number: u32| {
            let page = self.cached_at(PageNumber(number), pin.version())?;
            (last.is_none_or(|last| page.version() > last)).then_some((PageNumber(number), page))
        };
        let pages = numbers.into_iter().filter_map(image).collect();
        pin.check()?;
        Ok(pages)
    }

    /// INV-FILE-BELOW-PINS: before the file's pages of `numbers`, and those beyond `page_count`, are overwritten.
    pub fn preserve(
        &self,
        numbers: impl Iterator<Item = PageNumber>,
        page_count: u32,
        upto: Version,
    ) -> io::Result<()> {
        let smallest = self.smallest_pin();
        if smallest >= upto {
            return Ok(());
        }
        let old_pages = self.file_page_count();
        let cut = (page_count + 1..=old_pages).map(PageNumber);
        for number in numbers.chain(cut) {
            if self.cached_at(number, smallest).is_some() {
                continue;
            }
            let mut buffer = Page::buffer(self.page_size);
            if self.read_file(number, &mut buffer)? {
                let page = Page::new(number, Version(0), buffer);
                self.memory_bytes.fetch_add(page.memory_bytes(), Ordering::Relaxed);
                self.shard(number).write().entry(number.0).or_default().push(Arc::new(page));
                // Pages that are about to be written get the version of that image when they are.
                self.resident.lock().entry(number.0).or_insert(None);
            }
        }
        Ok(())
    }

    /// The file now is the database at `version`, `page_count` pages long.
    pub fn checkpointed(&self, version: Version, page_count: u32, written: &[(PageNumber, Arc<Page>)]) {
        self.file_pages.store(u64::from(page_count), Ordering::Release);
        *self.checkpointed.lock() = Some(version);
        let mut resident = std::mem::take(&mut *self.resident.lock());
        {
            let mut changed = self.changed.lock();
            resident.extend(written.iter().map(|(number, page)| (number.0, Some(page.version()))));
            // Changed and then cut off: nothing was written of it, and nothing is due.
            resident.extend(changed.iter().filter(|number| **number > page_count).map(|number| (*number, None)));
            for number in resident.keys() {
                let newest = self.cached_at(PageNumber(*number), Version(u64::MAX));
                // Changed again since, perhaps by a version that is just being committed: stays due.
                if newest.is_none_or(|page| page.version() <= version) {
                    changed.remove(number);
                }
            }
        }
        let visible = self.visible_versions();
        let smallest = visible[0];
        resident.retain(|number, in_file| {
            let mut shard = self.shard(PageNumber(*number)).write();
            let Some(chain) = shard.get_mut(number) else {
                return false;
            };
            self.prune(chain, &visible);
            let below = chain.iter().filter(|page| page.version() <= version).count();
            let oldest = chain.last().map(|page| page.version());
            let replaced = if *number > page_count {
                // The file has nothing: the image is needed until nobody looks at an older version.
                smallest >= version
            } else {
                // The file has the same. Page 1 stays.
                oldest == *in_file && *number != 1
            };
            let evict = below == 1 && replaced && oldest.is_some_and(|oldest| oldest <= smallest);
            if evict && let Some(page) = chain.pop() {
                self.memory_bytes.fetch_sub(page.memory_bytes(), Ordering::Relaxed);
            }
            if chain.is_empty() {
                shard.remove(number);
            }
            below > 0 && !evict
        });
        self.resident.lock().extend(resident);
        // Pins may have been released since the last commit.
        self.collect();
    }
}

impl Pin {
    pub fn version(&self) -> Version {
        self.state.version
    }

    pub fn hash(&self) -> StateHash {
        self.hash
    }

    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// An error once the pin counts no more. To be asked after a page was looked up.
    fn check(&self) -> Result<(), PageError> {
        if self.state.expired.load(Ordering::SeqCst) {
            return Err(PageError::TooOld(self.store.max_reader_age));
        }
        Ok(())
    }

    pub fn page(&self, number: PageNumber) -> Result<Option<Arc<Page>>, PageError> {
        let page = self.store.page_at(number, self.version())?;
        self.check()?;
        Ok(page)
    }

    pub fn cached(&self, number: PageNumber) -> Option<Arc<Page>> {
        let page = self.store.cached_at(number, self.version());
        self.check().ok()?;
        page
    }

    pub fn copy(&self, number: PageNumber, offset: usize, buffer: &mut [u8]) -> Result<bool, PageError> {
        let there = self.store.copy_at(number, self.version(), offset, buffer)?;
        self.check()?;
        Ok(there)
    }

    pub fn page_count(&self) -> Result<u32, PageError> {
        if let Some(count) = self.page_count.get() {
            return Ok(*count);
        }
        let count = self.store.page_count_at(self.version())?;
        self.check()?;
        Ok(*self.page_count.get_or_init(|| count))
    }

    /// The same version, pinned a second time.
    pub fn again(&self) -> Pin {
        let mut pins = self.store.pins.lock();
        let expired = self.state.expired.load(Ordering::SeqCst);
        let state =
            Arc::new(PinState { version: self.version(), since: self.state.since, expired: AtomicBool::new(expired) });
        if !expired {
            pins.by_version.entry(self.version()).or_default().push(state.clone());
        }
        Pin { store: self.store.clone(), state, hash: self.hash, page_count: self.page_count.clone() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.store.pins.lock();
        if let Some(states) = pins.by_version.get_mut(&self.state.version) {
            states.retain(|state| !Arc::ptr_eq(state, &self.state));
            if states.is_empty() {
                pins.by_version.remove(&self.state.version);
                self.store.released.store(true, Ordering::SeqCst);
            }
        }
    }
}
