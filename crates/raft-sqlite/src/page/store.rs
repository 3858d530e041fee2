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
//!
//! INV-PAGE-SUMS: no image that was read from the file is used before it has been compared with its checksum. The checksum is taken before
//! the second look at the chain, and changes after a checkpoint has put the old image there and before the new one leaves: so whoever finds
//! nothing in the chain has the checksum of the image that was read.
//!
//! So a pin costs the images that its version sees and the file no longer has, once each. Newer ones that the file has leave memory
//! all the same: the chain then only notes which version the file's image has.

mod pin;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::source::DiskFile;
use super::{
    DATABASE_SIZE_AT, Page, PageDamage, PageMap, PageNumber, PageNumbers, PageSize, StateHash, Version, be32,
    page_hash, page_sum,
};

/// Locks over the chains: a page's chain is under the lock of its number modulo this.
const SHARDS: usize = 64;

/// The versions of a page.
#[derive(Default)]
struct Chain {
    /// Newest first.
    pages: Vec<Arc<Page>>,
    /// The version of the image that the file has, where the chain has older ones, and does not have it itself.
    in_file: Option<Version>,
    /// The page was cut off: what is here is for older pins alone.
    cut_off: bool,
    /// Bytes of images that only pins need.
    held_bytes: usize,
}

impl Chain {
    /// The newest image at or below `version`, if it is in memory. None: the file has it, or nobody.
    fn at(&self, version: Version) -> Option<&Arc<Page>> {
        let page = self.pages.iter().find(|page| page.version() <= version)?;
        let replaced = self.in_file.is_some_and(|in_file| page.version() < in_file && in_file <= version);
        (!replaced).then_some(page)
    }

    fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// Which bound a pin has run into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PinBound {
    /// How long it may be held.
    Age(Duration),
    /// What all pins of a database together may keep in memory, in bytes; the oldest ones end.
    Bytes(usize),
}

/// Bounds on pins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PinBounds {
    pub max_age: Duration,
    pub max_bytes: usize,
}

struct PinState {
    version: Version,
    since: Instant,
    expired: OnceLock<PinBound>,
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
    /// Of `file`, for reports.
    path: PathBuf,
    /// Pages in the file that count: those beyond are leftovers or not there.
    file_pages: AtomicU64,
    /// Their checksums.
    sums: RwLock<Vec<u64>>,
    /// Pages of the file that were found not to have theirs, until a checkpoint overwrites them.
    damaged: Mutex<BTreeSet<u32>>,
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
    /// Of these, what only pins need.
    held_bytes: AtomicUsize,
    bounds: PinBounds,
}

/// Why a page could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    #[error("the reader has held its version for too long ({0:?}): end long reads, or raise the bound")]
    TooOld(PinBound),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl PageStore {
    /// A store above `file`, named `path`, which holds the pages of `sums` at `version` with state hash `hash`.
    pub fn new(
        page_size: PageSize,
        file: Arc<dyn DiskFile>,
        path: PathBuf,
        sums: Vec<u64>,
        version: Version,
        hash: StateHash,
        bounds: PinBounds,
    ) -> Self {
        Self {
            page_size,
            file,
            path,
            file_pages: AtomicU64::new(sums.len() as u64),
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            pins: Mutex::new(Pins { committed: version, hash, by_version: BTreeMap::new() }),
            committed: AtomicU64::new(version.0),
            captured: AtomicU64::new(version.0),
            history: Mutex::default(),
            changed: Mutex::default(),
            held: Mutex::default(),
            released: AtomicBool::new(false),
            resident: Mutex::default(),
            checkpointed: Mutex::new((!sums.is_empty()).then_some(version)),
            sums: RwLock::new(sums),
            damaged: Mutex::default(),
            memory_bytes: AtomicUsize::new(0),
            held_bytes: AtomicUsize::new(0),
            bounds,
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
    /// The file could not be read, or the page is damaged.
    pub fn load_first_page(&self) -> io::Result<()> {
        let number = PageNumber(1);
        let mut buffer = Page::buffer(self.page_size);
        let sum = self.read_file(number, &mut buffer)?;
        let page = Page::new(number, Version(0), buffer);
        self.compare(number, page.hash(), sum)?;
        self.put(number, page);
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

    /// Of these, bytes of images that only pins need.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes.load(Ordering::Relaxed)
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

    /// The file's image, or zeros where it has none, and the checksum that it must have; None: it has none.
    fn read_file(&self, number: PageNumber, buffer: &mut [u8]) -> io::Result<Option<u64>> {
        let size = self.page_size.bytes();
        let sum = match u64::from(number.0) > self.file_pages.load(Ordering::Acquire) {
            true => None,
            false => self.sums.read().get(number.0 as usize - 1).copied(),
        };
        // What is missing at the file's end does not have its checksum, unless it was zeros.
        let read = match sum {
            Some(_) => self.file.read_at(&mut buffer[..size], self.offset(number))?,
            None => 0,
        };
        buffer[read..size].fill(0);
        Ok(sum)
    }

    fn offset(&self, number: PageNumber) -> u64 {
        u64::from(number.0 - 1) * self.page_size.bytes() as u64
    }

    /// Whether the file's image, whose hash is given, has its checksum.
    fn compare(&self, number: PageNumber, hash: u128, sum: Option<u64>) -> io::Result<()> {
        match sum {
            Some(sum) if sum != page_sum(hash) => Err(self.damage_of(number).into_io()),
            _ => Ok(()),
        }
    }

    fn damage_of(&self, number: PageNumber) -> PageDamage {
        PageDamage { path: self.path.clone(), page: number.0, offset: self.offset(number) }
    }

    /// Remembers damage.
    fn noted<T>(&self, read: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &read
            && let Some(damage) = PageDamage::of(error)
            && self.damaged.lock().insert(damage.page)
        {
            tracing::error!(%damage, "a damaged page");
        }
        read
    }

    /// The first page known to be damaged.
    pub fn damage(&self) -> Option<PageDamage> {
        self.damaged.lock().first().map(|number| self.damage_of(PageNumber(*number)))
    }

    /// Pages known to be damaged.
    pub fn damaged_pages(&self) -> usize {
        self.damaged.lock().len()
    }

    /// The checksums of the file's pages.
    pub fn sums(&self) -> Vec<u64> {
        self.sums.read().clone()
    }

    /// The image that `version` sees; None: it was never written (zeros). The caller holds a pin at or below `version`, or is the writer.
    ///
    /// # Errors
    /// The file could not be read, or the page is damaged: [`PageDamage::of`].
    pub fn page_at(&self, number: PageNumber, version: Version) -> io::Result<Option<Arc<Page>>> {
        self.noted(self.find_page(number, version))
    }

    fn find_page(&self, number: PageNumber, version: Version) -> io::Result<Option<Arc<Page>>> {
        if let Some(page) = self.cached_at(number, version) {
            return Ok(Some(page));
        }
        let mut buffer = Page::buffer(self.page_size);
        let read = self.read_file(number, &mut buffer);
        // A checkpoint may have overwritten the page meanwhile: then it has put the old image into the chain before.
        if let Some(page) = self.cached_at(number, version) {
            return Ok(Some(page));
        }
        let sum = read?;
        let page = Page::new(number, Version(0), buffer);
        self.compare(number, page.hash(), sum)?;
        Ok(sum.map(|_| Arc::new(page)))
    }

    /// Only from memory, without copying.
    pub fn cached_at(&self, number: PageNumber, version: Version) -> Option<Arc<Page>> {
        self.shard(number).read().get(&number.0)?.at(version).cloned()
    }

    /// Copies `buffer.len()` bytes from `offset` within the page that `version` sees. False: never written, zeros.
    ///
    /// # Errors
    /// As [`Self::page_at`].
    pub fn copy_at(&self, number: PageNumber, version: Version, offset: usize, buffer: &mut [u8]) -> io::Result<bool> {
        self.noted(self.find_bytes(number, version, offset, buffer))
    }

    fn find_bytes(&self, number: PageNumber, version: Version, offset: usize, buffer: &mut [u8]) -> io::Result<bool> {
        let from_chain = |buffer: &mut [u8]| {
            let shard = self.shard(number).read();
            let page = shard.get(&number.0)?.at(version)?;
            buffer.copy_from_slice(&page.bytes()[offset..offset + buffer.len()]);
            Some(())
        };
        if from_chain(buffer).is_some() {
            return Ok(true);
        }
        let mut whole = Vec::new();
        let is_whole = offset == 0 && buffer.len() == self.page_size.bytes();
        let image: &mut [u8] = if is_whole {
            &mut *buffer
        } else {
            whole.resize(self.page_size.bytes(), 0);
            &mut whole
        };
        let read = self.read_file(number, image);
        // As in `find_page`.
        if from_chain(buffer).is_some() {
            return Ok(true);
        }
        let sum = read?;
        if sum.is_some() {
            self.compare(number, page_hash(number, if is_whole { &*buffer } else { &whole }), sum)?;
        }
        if !is_whole {
            buffer.copy_from_slice(&whole[offset..offset + buffer.len()]);
        }
        Ok(sum.is_some())
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
        chain.cut_off = false;
        match chain.pages.first_mut() {
            Some(head) if head.version() == page.version() => {
                grown -= head.memory_bytes().min(grown);
                *head = page;
            }
            _ => chain.pages.insert(0, page),
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
        if chain.pages.first().is_some_and(|head| head.version() == version) {
            let page = chain.pages.remove(0);
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
                while let Some(head) = chain.pages.first()
                    && head.version() > committed
                {
                    self.memory_bytes.fetch_sub(head.memory_bytes(), Ordering::Relaxed);
                    chain.pages.remove(0);
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
        let state = Arc::new(PinState { version, since: Instant::now(), expired: OnceLock::new() });
        pins.by_version.entry(version).or_default().push(state.clone());
        let hash = pins.hash;
        Pin { store: self.clone(), state, hash, page_count: OnceLock::new() }
    }

    /// The versions that somebody looks at, `committed` among them, oldest first. Pins that are too old count no more: their readers get
    /// an error.
    fn visible_versions(&self) -> Vec<Version> {
        self.visible_within(usize::MAX)
    }

    /// The same; while pins keep more than `max_bytes` those of the oldest version count no more either.
    fn visible_within(&self, max_bytes: usize) -> Vec<Version> {
        let mut pins = self.pins.lock();
        let max_age = self.bounds.max_age;
        let committed = pins.committed;
        let mut too_much = self.held_bytes() > max_bytes;
        pins.by_version.retain(|version, states| {
            // One version at a time: what is left is known when its images are gone.
            let ends = too_much && *version < committed;
            too_much &= !ends;
            states.retain(|pin| {
                let bound = match pin.since.elapsed() > max_age {
                    true => PinBound::Age(max_age),
                    false if ends => PinBound::Bytes(max_bytes),
                    false => return true,
                };
                let _ = pin.expired.set(bound);
                self.released.store(true, Ordering::SeqCst);
                false
            });
            !states.is_empty()
        });
        let mut versions: Vec<Version> = pins.by_version.keys().copied().collect();
        if versions.last() != Some(&pins.committed) {
            versions.push(pins.committed);
        }
        versions
    }

    /// Drops the images that nobody can see.
    fn collect(&self) {
        let mut held = self.held.lock();
        // Before the pins are looked at: one that goes in between counts the next time.
        let released = self.released.swap(false, Ordering::SeqCst);
        let visible = self.visible_within(self.bounds.max_bytes);
        // Those that ended just now keep nothing already.
        let released = released | self.released.swap(false, Ordering::SeqCst);
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
        let Some(chain) = shard.get_mut(&number.0) else {
            return false;
        };
        let holds = self.prune(chain, visible);
        if chain.is_empty() {
            shard.remove(&number.0);
        }
        holds
    }

    /// Keeps of a chain what is above the committed version, and for each visible version the newest image at or below it. True: an image
    /// is left that is not the newest at or below the committed version.
    fn prune(&self, chain: &mut Chain, visible: &[Version]) -> bool {
        let committed = visible[visible.len() - 1];
        let mut newer = Version(u64::MAX);
        let mut in_file = chain.in_file;
        let mut held_bytes = 0;
        // A page that was cut off has its newest image for pins alone, too.
        let mut is_newest = !chain.cut_off;
        chain.pages.retain(|page| {
            let version = page.version();
            if in_file.is_some_and(|in_file| version < in_file) {
                newer = in_file.take().unwrap_or(newer);
                is_newest = false;
            }
            let seen = visible.iter().any(|pin| version <= *pin && *pin < newer);
            let keep = version > committed || seen;
            if version <= committed {
                newer = version;
                held_bytes += if keep && !is_newest { page.memory_bytes() } else { 0 };
                is_newest = false;
            }
            if !keep {
                self.memory_bytes.fetch_sub(page.memory_bytes(), Ordering::Relaxed);
            }
            keep
        });
        if chain.in_file == in_file {
            // Nothing older is left of what it was noted for.
            chain.in_file = None;
        }
        self.set_held(chain, held_bytes);
        held_bytes > 0
    }

    /// Takes images out of a chain.
    fn evict(&self, chain: &mut Chain, goes: impl Fn(Version) -> bool) {
        chain.pages.retain(|page| {
            let goes = goes(page.version());
            if goes {
                self.memory_bytes.fetch_sub(page.memory_bytes(), Ordering::Relaxed);
            }
            !goes
        });
    }

    fn set_held(&self, chain: &mut Chain, held_bytes: usize) {
        self.held_bytes.fetch_add(held_bytes, Ordering::Relaxed);
        self.held_bytes.fetch_sub(chain.held_bytes, Ordering::Relaxed);
        chain.held_bytes = held_bytes;
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
        let visible = self.visible_versions();
        let smallest = visible[0];
        if smallest >= upto {
            return Ok(());
        }
        let old_pages = self.file_page_count();
        let cut = (page_count + 1..=old_pages).map(|number| (PageNumber(number), true));
        for (number, cut_off) in numbers.map(|number| (number, false)).chain(cut) {
            let Some(version) = self.due_in_memory(number, upto, &visible) else {
                continue;
            };
            let mut buffer = Page::buffer(self.page_size);
            let Some(sum) = self.read_file(number, &mut buffer)? else {
                continue;
            };
            let page = Arc::new(Page::new(number, version, buffer));
            // Whoever still sees this page must not get the next one instead: the checkpoint waits for them to end.
            self.noted(self.compare(number, page.hash(), Some(sum)))?;
            self.memory_bytes.fetch_add(page.memory_bytes(), Ordering::Relaxed);
            {
                let mut shard = self.shard(number).write();
                let chain = shard.entry(number.0).or_default();
                let held_bytes = chain.held_bytes + page.memory_bytes();
                let at = chain.pages.partition_point(|other| other.version() > version);
                chain.pages.insert(at, page);
                chain.in_file = None;
                chain.cut_off |= cut_off;
                self.set_held(chain, held_bytes);
            }
            if cut_off {
                self.resident.lock().entry(number.0).or_insert(None);
            }
            self.held.lock().insert(number.0);
            // The pin may have gone meanwhile.
            self.released.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// The version of the file's image of a page, if some pin below `upto` sees it there.
    fn due_in_memory(&self, number: PageNumber, upto: Version, visible: &[Version]) -> Option<Version> {
        let shard = self.shard(number).read();
        let Some(chain) = shard.get(&number.0) else {
            return Some(Version(0));
        };
        let (in_file, newer) = match chain.in_file {
            Some(in_file) => {
                (in_file, chain.pages.iter().rev().map(|page| page.version()).find(|page| *page > in_file))
            }
            // Older than all of the chain; how much does not matter.
            None => (Version(0), chain.pages.last().map(|page| page.version())),
        };
        // From `upto` on it is another one, or cut off.
        let newer = newer.map_or(upto, |newer| newer.min(upto));
        visible.iter().any(|pin| in_file <= *pin && *pin < newer).then_some(in_file)
    }

    /// The file now is the database at `version`, `page_count` pages long.
    pub fn checkpointed(&self, version: Version, page_count: u32, written: &[(PageNumber, Arc<Page>)]) {
        {
            // Before any image leaves its chain.
            let mut sums = self.sums.write();
            sums.resize(page_count as usize, 0);
            for (number, page) in written {
                sums[number.0 as usize - 1] = page_sum(page.hash());
            }
            let mut damaged = self.damaged.lock();
            let is_written = |page: &u32| written.binary_search_by_key(page, |(number, _)| number.0).is_ok();
            damaged.retain(|page| *page <= page_count && !is_written(page));
        }
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
        let mut held = self.held.lock();
        resident.retain(|number, in_file| {
            let mut shard = self.shard(PageNumber(*number)).write();
            let Some(chain) = shard.get_mut(number) else {
                return false;
            };
            let mut stays = false;
            if *number > page_count {
                // The file has nothing: the images are needed until nobody looks at an older version.
                stays = smallest < version;
                chain.cut_off = chain.pages.first().is_none_or(|page| page.version() <= version);
                if !stays {
                    self.evict(chain, |page| page <= version);
                }
            } else if *number != 1 {
                // Without this image older ones would be taken for it.
                let older = |page: &Arc<Page>| in_file.is_some_and(|in_file| page.version() < in_file);
                let there = chain.pages.iter().any(|page| Some(page.version()) == *in_file);
                chain.in_file = in_file.filter(|_| there && chain.pages.iter().any(older));
                self.evict(chain, |page| Some(page) == *in_file);
            }
            if self.prune(chain, &visible) {
                held.insert(*number);
            }
            if chain.is_empty() {
                shard.remove(number);
            }
            stays
        });
        drop(held);
        self.resident.lock().extend(resident);
        // Pins may have been released since the last commit.
        self.collect();
    }
}
