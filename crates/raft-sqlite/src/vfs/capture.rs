//! What the writer connection writes: its private WAL, and the transactions captured from it.
//!
//! SQLite runs in WAL mode on a WAL of ours that is nobody else's. Frames that it writes are pending until it releases the WAL's
//! write lock; if its wal-index then says that more frames are committed than before, those are the transaction, and their images go
//! into the page store as the open group's version. ("The last frame has the commit mark" would be wrong: a spill, ROLLBACK TO and
//! COMMIT leave stale frames behind the commit frame.)
//!
//! Of frames that are committed only the headers are kept: SQLite reads, through the WAL, only the newest frame of a page, and that is
//! the newest image in the page store. When the WAL is long, the wal-index is told that everything is checkpointed, and SQLite
//! starts its WAL anew by itself.
//!
//! Source: SQLite's "WAL-mode File Format", sections 1 and 2; wal.c.

use std::cmp::Ordering as Cmp;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::page::page_set::{PageSetEncoder, PageSetHeader};
use crate::page::store::PageStore;
use crate::page::{Page, PageDamage, PageMap, PageNumber, PageSize, StateHash, Version, be32};

/// Bytes of the WAL's header and of a frame's.
pub(super) const WAL_HEADER_BYTES: usize = 32;
pub(super) const FRAME_HEADER_BYTES: usize = 24;
/// Where a frame's header has the size of the database after its commit, in pages.
const FRAME_PAGE_COUNT_AT: usize = 4;
/// The private WAL is started anew when it has this many frames.
const RESTART_FRAMES: usize = 1000;
/// Words in one region of the wal-index (32 KiB, fixed by SQLite).
const INDEX_REGION_WORDS: usize = 8192;
/// Places in the wal-index, in bytes: mxFrame, and the checkpoint's nBackfill and nBackfillAttempted.
const MX_FRAME_AT: usize = 16;
const BACKFILL_AT: usize = 96;
const BACKFILL_ATTEMPTED_AT: usize = 128;

/// SQLite's result codes that the file methods answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The transaction is larger than the bound.
    Full,
    /// SQLite asked for what it never should.
    Io,
}

/// The transactions of the group that is not sealed yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct OpenGroup {
    /// Transactions that captured something, over the writer's whole life.
    pub transactions: u64,
    /// Pages in the open group.
    pub pages: usize,
    /// Bytes of their images.
    pub bytes: usize,
}

/// A group ready for the log.
#[derive(Clone, Debug)]
pub(crate) struct SealedGroup {
    pub version: Version,
    pub state_hash: StateHash,
    pub page_set: Bytes,
}

/// A region of the wal-index. SQLite has its address for as long as it has it mapped, so all access is through shared references.
#[repr(C, align(8))]
pub(super) struct IndexRegion([AtomicU32; INDEX_REGION_WORDS]);

impl IndexRegion {
    fn word(&self, at: usize) -> &AtomicU32 {
        &self.0[at / 4]
    }
}

struct State {
    wal_header: [u8; WAL_HEADER_BYTES],
    /// Headers of the committed frames since the WAL was started anew.
    frames: Vec<[u8; FRAME_HEADER_BYTES]>,
    /// Frames written and not committed; their images with slack (empty until written).
    pending: Vec<([u8; FRAME_HEADER_BYTES], Box<[u8]>)>,
    too_large: bool,
    /// A damaged page that SQLite has asked for.
    damaged: Option<PageDamage>,
    transactions: u64,
    /// Pages of the open group.
    group: BTreeSet<u32>,
    /// The newest sealed version and the state hash at it.
    sealed: Version,
    hash: StateHash,
    index: Vec<Arc<IndexRegion>>,
    /// Why nothing can be sealed any more: the writer has to be closed, which discards what it captured.
    failed: Option<String>,
}

/// The writer's view of a database.
pub(crate) struct Capture {
    store: Arc<PageStore>,
    max_transaction_bytes: usize,
    read_only: AtomicBool,
    state: Mutex<State>,
}

impl Capture {
    /// Starts at the committed version; nothing may be captured above it.
    pub fn new(store: Arc<PageStore>, max_transaction_bytes: usize) -> Self {
        let (sealed, hash) = store.committed_state();
        Self {
            store,
            max_transaction_bytes,
            read_only: AtomicBool::new(false),
            state: Mutex::new(State {
                wal_header: [0; WAL_HEADER_BYTES],
                frames: Vec::new(),
                pending: Vec::new(),
                too_large: false,
                damaged: None,
                transactions: 0,
                group: BTreeSet::new(),
                sealed,
                hash,
                index: Vec::new(),
                failed: None,
            }),
        }
    }

    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// While it is set, SQLite gets no write lock: whatever would change the database fails with SQLITE_READONLY.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Relaxed);
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    fn page_size(&self) -> PageSize {
        self.store.page_size()
    }

    /// The bound, if a transaction has hit it since the last call.
    pub fn take_too_large(&self) -> Option<u64> {
        std::mem::take(&mut self.state.lock().too_large).then_some(self.max_transaction_bytes as u64)
    }

    /// A damaged page, if SQLite has asked for one since the last call.
    pub fn take_damage(&self) -> Option<PageDamage> {
        self.state.lock().damaged.take()
    }

    /// A page could not be read.
    pub(super) fn note_failure(&self, error: &io::Error) {
        if let Some(damage) = PageDamage::of(error) {
            self.state.lock().damaged = Some(damage.clone());
        }
    }

    pub fn open_group(&self) -> OpenGroup {
        let state = self.state.lock();
        OpenGroup {
            transactions: state.transactions,
            pages: state.group.len(),
            bytes: state.group.len() * self.page_size().bytes(),
        }
    }

    /// Ends the open group; None: it captured nothing.
    ///
    /// Both sides of replication must agree about pages that SQLite left unwritten: those beyond the final size are dropped, those
    /// that the database grew by are written out as zeros.
    ///
    /// # Errors
    /// The file could not be read, or SQLite did what it never should. Every later call fails, too.
    pub fn seal(&self) -> io::Result<Option<SealedGroup>> {
        let mut state = self.state.lock();
        if let Some(why) = &state.failed {
            return Err(io::Error::other(why.clone()));
        }
        if state.group.is_empty() {
            return Ok(None);
        }
        let sealed = self.seal_group(&mut state);
        if let Err(error) = &sealed {
            state.failed = Some(format!("a group could not be sealed: {error}"));
        }
        sealed.map(Some)
    }

    fn seal_group(&self, state: &mut State) -> io::Result<SealedGroup> {
        let base = state.sealed;
        let version = base.next();
        let page_count = self.store.page_count_at(version)?;
        let base_count = self.store.page_count_at(base)?;
        let mut pages = std::mem::take(&mut state.group);
        for beyond in pages.split_off(&page_count.saturating_add(1)) {
            self.store.remove_captured(PageNumber(beyond), version);
        }
        let unwritten: Vec<u32> = (base_count + 1..=page_count).filter(|number| !pages.contains(number)).collect();
        let zeros = unwritten.iter().map(|number| (PageNumber(*number), Page::buffer(self.page_size())));
        self.store.put_captured(version, zeros);
        pages.extend(unwritten);

        let mut hash = state.hash;
        let mut encoder = PageSetEncoder::new();
        for number in pages.iter().map(|number| PageNumber(*number)) {
            let image = self
                .store
                .cached_at(number, version)
                .ok_or_else(|| io::Error::other(format!("page {} of an open group is gone", number.0)))?;
            let old = if number.0 <= base_count { self.store.page_at(number, base)? } else { None };
            hash.subtract(old.as_ref().map_or(0, |old| old.hash()));
            hash.add(image.hash());
            encoder.page(number, image.bytes(), old.as_ref().map(|old| old.bytes()));
        }
        for cut in page_count + 1..=base_count {
            hash.subtract(self.store.page_at(PageNumber(cut), base)?.map_or(0, |old| old.hash()));
        }
        let header = PageSetHeader { page_size: self.page_size(), base, version, page_count, state_hash: hash };
        let page_set = encoder.finish(header)?;
        self.store.record(version, pages.into_iter().map(PageNumber).collect());
        state.sealed = version;
        state.hash = hash;
        Ok(SealedGroup { version, state_hash: hash, page_set })
    }

    /// As if SQLite had written a page without having read it.
    #[cfg(test)]
    pub(crate) fn put_for_tests(&self, number: PageNumber, image: Vec<u8>) {
        let mut state = self.state.lock();
        self.store.put_captured(state.sealed.next(), [(number, Page::buffer_from(&image))]);
        state.group.insert(number.0);
    }

    // ---- what the file methods of the WAL call

    /// The connection is closed: its WAL and wal-index go. What is captured stays.
    pub(super) fn close_connection(&self) {
        let mut state = self.state.lock();
        state.frames.clear();
        state.pending.clear();
        state.index.clear();
    }

    pub(super) fn truncate_wal(&self) {
        let mut state = self.state.lock();
        state.frames.clear();
        state.pending.clear();
    }

    /// In bytes, as a file would have.
    pub(super) fn wal_size(&self) -> usize {
        let state = self.state.lock();
        match state.frames.len() + state.pending.len() {
            0 => 0,
            frames => WAL_HEADER_BYTES + frames * (FRAME_HEADER_BYTES + self.page_size().bytes()),
        }
    }

    /// Which frame a place in the WAL belongs to, and where in it.
    fn frame_at(&self, offset: usize) -> (usize, usize) {
        let frame_bytes = FRAME_HEADER_BYTES + self.page_size().bytes();
        ((offset - WAL_HEADER_BYTES) / frame_bytes, (offset - WAL_HEADER_BYTES) % frame_bytes)
    }

    pub(super) fn write_wal(&self, bytes: &[u8], offset: usize) -> Result<(), Refused> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if offset < WAL_HEADER_BYTES {
            if offset != 0 || bytes.len() != WAL_HEADER_BYTES {
                return Err(Refused::Io);
            }
            // A WAL started anew.
            state.wal_header.copy_from_slice(bytes);
            state.frames.clear();
            state.pending.clear();
            return Ok(());
        }
        let (frame, within) = self.frame_at(offset);
        // A committed frame is never rewritten.
        let at = frame.checked_sub(state.frames.len()).ok_or(Refused::Io)?;
        if within == 0 && bytes.len() == FRAME_HEADER_BYTES {
            let header: [u8; FRAME_HEADER_BYTES] = bytes.try_into().map_err(|_| Refused::Io)?;
            match at.cmp(&state.pending.len()) {
                Cmp::Less => state.pending[at].0 = header,
                Cmp::Equal => {
                    if (at + 1) * self.page_size().bytes() > self.max_transaction_bytes {
                        state.too_large = true;
                        return Err(Refused::Full);
                    }
                    state.pending.push((header, Box::default()));
                }
                Cmp::Greater => return Err(Refused::Io),
            }
            return Ok(());
        }
        match state.pending.get_mut(at) {
            Some((_, image)) if within == FRAME_HEADER_BYTES && bytes.len() == self.page_size().bytes() => {
                match image.get_mut(..bytes.len()) {
                    Some(image) => image.copy_from_slice(bytes),
                    None => *image = Page::buffer_from(bytes),
                }
                Ok(())
            }
            _ => Err(Refused::Io),
        }
    }

    /// Ok(false): the WAL ends before the buffer does; the rest is zeros.
    pub(super) fn read_wal(&self, buffer: &mut [u8], offset: usize) -> Result<bool, Refused> {
        let mut state = self.state.lock();
        let state = &mut *state;
        if offset < WAL_HEADER_BYTES {
            let part = state.wal_header.get(offset..offset + buffer.len()).ok_or(Refused::Io)?;
            buffer.copy_from_slice(part);
            return Ok(true);
        }
        let (mut frame, mut within) = self.frame_at(offset);
        let mut done = 0;
        while done < buffer.len() {
            let pending = frame.checked_sub(state.frames.len()).map(|at| state.pending.get(at));
            let header = match pending {
                None => &state.frames[frame],
                Some(Some((header, _))) => header,
                Some(None) => {
                    buffer[done..].fill(0);
                    return Ok(false);
                }
            };
            if within < FRAME_HEADER_BYTES {
                let count = (FRAME_HEADER_BYTES - within).min(buffer.len() - done);
                buffer[done..done + count].copy_from_slice(&header[within..within + count]);
                done += count;
                within += count;
            }
            if done < buffer.len() {
                let from = within - FRAME_HEADER_BYTES;
                let count = (self.page_size().bytes() - from).min(buffer.len() - done);
                let part = &mut buffer[done..done + count];
                match pending {
                    Some(Some((_, image))) => part.copy_from_slice(image.get(from..from + count).ok_or(Refused::Io)?),
                    _ => {
                        let number = PageNumber(be32(header, 0));
                        let newest = Version(u64::MAX);
                        self.store.copy_at(number, newest, from, part).map_err(|error| {
                            state.damaged = PageDamage::of(&error).cloned().or(state.damaged.take());
                            Refused::Io
                        })?;
                    }
                }
                done += count;
            }
            frame += 1;
            within = 0;
        }
        Ok(true)
    }

    /// A region of the wal-index; None: it is not there and `extend` is false. SQLite may write to it, by its address.
    pub(super) fn index_region(&self, region: usize, extend: bool) -> Option<Arc<IndexRegion>> {
        let mut state = self.state.lock();
        while region >= state.index.len() {
            if !extend {
                return None;
            }
            state.index.push(Arc::new(IndexRegion([const { AtomicU32::new(0) }; INDEX_REGION_WORDS])));
        }
        Some(state.index[region].clone())
    }

    /// The WAL's write lock was released: what the wal-index counts as committed is captured, the rest forgotten.
    pub(super) fn write_lock_released(&self) {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.pending.is_empty() {
            return;
        }
        let mut pending = std::mem::take(&mut state.pending);
        let Some(index) = state.index.first() else {
            return;
        };
        let committed = index.word(MX_FRAME_AT).load(Ordering::Acquire) as usize;
        let Some(new) = committed.checked_sub(state.frames.len()).filter(|new| *new > 0) else {
            return;
        };
        if new > pending.len() || pending[..new].iter().any(|(_, image)| image.is_empty()) {
            state.failed = Some(format!("SQLite counts {new} new frames, {} were written", pending.len()));
            return;
        }
        pending.truncate(new);
        let mut newest: PageMap<usize> = PageMap::with_capacity_and_hasher(new, Default::default());
        for (at, (header, _)) in pending.iter().enumerate() {
            newest.insert(be32(header, 0), at);
            state.frames.push(*header);
        }
        let page_count = be32(&pending[new - 1].0, FRAME_PAGE_COUNT_AT);
        let version = state.sealed.next();
        let group = &mut state.group;
        let images = pending.into_iter().enumerate().filter_map(|(at, (header, image))| {
            let number = be32(&header, 0);
            (newest.get(&number) == Some(&at)).then(|| {
                group.insert(number);
                (PageNumber(number), image)
            })
        });
        self.store.put_captured(version, images);
        state.transactions += 1;
        // The size that both sides of replication go by is page 1's.
        match self.store.page_count_at(version) {
            Ok(stated) if stated == page_count => {}
            stated => state.failed = Some(format!("SQLite committed {page_count} pages, page 1 says {stated:?}")),
        }
        if committed >= RESTART_FRAMES {
            // Every image is what a read of the main file gives anyway.
            index.word(BACKFILL_AT).store(committed as u32, Ordering::Release);
            index.word(BACKFILL_ATTEMPTED_AT).store(committed as u32, Ordering::Release);
        }
    }
}
