//! Bringing NAME.sqlite up to a pinned version, so that the log can be purged and memory freed.
//!
//! ```text
//!  0 new pages ──────► beyond NAME.sqlite's end, synced; their checksums into NAME.sums, synced
//!  1 changed pages ──► NAME.sqlite-wal, synced     a crash before this is complete: the old file stands, by its own header's size
//!  2 the same ───────► NAME.sqlite, synced         from here to 4 a crash: 2 and 3 are done again from the WAL
//!    their checksums ► NAME.sums, synced
//!  3 the mark ───────► NAME.applied, synced
//!  4 the WAL is removed; memory lets go of what the file has
//! ```
//! Nothing refers to what lies beyond the end before the WAL is complete, so new pages are written once, where a database that grows
//! has most of its changes. INV-BEYOND-END: nothing there is written or cut off while a WAL of an earlier attempt may come back.
//!
//! INV-WAL-BEFORE-FILE: from the first write of step 2 until step 3 is on disk, the complete WAL stays as it is. So a checkpoint that
//! fails there (a full disk) is finished first, from the same pages, before another one may write a WAL of its own.

use std::path::Path;
use std::sync::Arc;

use super::mark::{self, AppliedMark, LogPosition};
use super::recovery::{Paths, Recovered, open};
use super::{DatabaseError, checkpoint_wal, sums};
use crate::page::source::{Disk, DiskFile};
use crate::page::store::{PageError, PageStore, Pin};
use crate::page::{Page, PageNumber, page_sum};

/// What is open of a database's files. Whoever holds it is the only one who writes them.
pub(super) struct Files {
    pub database: Arc<dyn DiskFile>,
    pub sums: Arc<dyn DiskFile>,
    /// Of the newest applied mark; 0 before the first.
    pub sequence: u64,
    /// Pages written by all checkpoints that came to their end.
    pub written_pages: u64,
    /// A checkpoint that failed in step 1 has left a WAL whose removal is not on disk.
    pub wal_left: bool,
    /// A checkpoint that has come past step 1 and not to its end.
    pub started: Option<Started>,
    pub install: Install,
}

/// What an install that failed has left on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Install {
    None,
    /// Perhaps files of a state that must never stand.
    Abandoned,
    /// The new state stands on disk, and memory still has the old one.
    Decided,
}

/// What steps 2 to 4 need.
pub(super) struct Started {
    mark: AppliedMark,
    page_count: u32,
    /// Sorted. Empty: only the mark moves, there is no WAL.
    pages: Vec<(PageNumber, Arc<Page>)>,
    /// So many of them, the first, go through the WAL; those after them lie beyond the file's end.
    in_wal: usize,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> DatabaseError {
    move |error| DatabaseError::io(path, error)
}

impl Files {
    pub fn new(recovered: &Recovered) -> Self {
        Self {
            database: recovered.file.clone(),
            sums: recovered.sums_file.clone(),
            sequence: recovered.sequence,
            written_pages: 0,
            wal_left: false,
            started: None,
            install: Install::None,
        }
    }

    /// Does all steps, after those that an earlier attempt left undone. A pin below what the file has already changes nothing.
    pub fn checkpoint(
        &mut self,
        disk: &dyn Disk,
        paths: &Paths,
        pin: Pin,
        position: LogPosition,
    ) -> Result<(), DatabaseError> {
        let store = pin.store().clone();
        self.finish(disk, paths, &store)?;
        if store.checkpointed_version().is_some_and(|version| pin.version() < version) {
            return Ok(());
        }
        let mark = AppliedMark { position, version: pin.version(), state_hash: pin.hash() };
        let page_count = pin.page_count().map_err(|error| page_error(error, &paths.database))?;
        let mut pages = store.changed_at(&pin).map_err(|error| page_error(error, &paths.database))?;
        pages.retain(|(number, _)| number.0 <= page_count);
        let old_count = store.file_page_count();
        // A database's first checkpoint is all in the WAL: before it there is no mark, and so no file.
        let in_wal = match pages.partition_point(|(number, _)| number.0 <= old_count) {
            0 => pages.len(),
            in_wal => in_wal,
        };
        let started = Started { mark, page_count, pages, in_wal };
        if let Err(error) = self.start(&started, disk, paths, &store) {
            // Nothing depends on what was written, and on a full disk its room is needed.
            let tidied = self.remove_wal(disk, paths).and_then(|()| {
                let old_length = u64::from(old_count) * store.page_size().bytes() as u64;
                self.database.set_length(old_length).map_err(io(&paths.database))
            });
            if let Err(error) = tidied {
                tracing::warn!(path = %paths.database.display(), %error, "what an incomplete checkpoint has left is not removed yet");
            }
            return Err(error);
        }
        self.started = Some(started);
        // The images are held by themselves from here on.
        drop(pin);
        self.finish(disk, paths, &store)
    }

    /// Steps 0 and 1.
    fn start(
        &mut self,
        started: &Started,
        disk: &dyn Disk,
        paths: &Paths,
        store: &PageStore,
    ) -> Result<(), DatabaseError> {
        if started.pages.is_empty() {
            return Ok(());
        }
        let new = &started.pages[started.in_wal..];
        if !new.is_empty() {
            self.remove_wal(disk, paths)?;
            self.write_pages(new, store).and_then(|()| self.database.sync()).map_err(io(&paths.database))?;
            self.write_sums(new, store).map_err(io(&paths.sums))?;
        }
        self.wal_left = true;
        started.write_wal(disk, paths, store)?;
        self.wal_left = false;
        Ok(())
    }

    /// So that no crash brings it back.
    fn remove_wal(&mut self, disk: &dyn Disk, paths: &Paths) -> Result<(), DatabaseError> {
        if self.wal_left {
            disk.remove(&paths.wal).map_err(io(&paths.wal))?;
            disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
            self.wal_left = false;
        }
        Ok(())
    }

    fn write_pages(&self, pages: &[(PageNumber, Arc<Page>)], store: &PageStore) -> std::io::Result<()> {
        let bytes = store.page_size().bytes() as u64;
        pages
            .iter()
            .try_for_each(|(number, page)| self.database.write_at(page.bytes(), u64::from(number.0 - 1) * bytes))
    }

    /// On disk when it returns.
    fn write_sums(&self, pages: &[(PageNumber, Arc<Page>)], store: &PageStore) -> std::io::Result<()> {
        let new = pages.iter().map(|(number, page)| (*number, page_sum(page.hash())));
        sums::update(&*self.sums, store.page_size(), store.sums(), new)
    }

    /// Steps 2 to 4 of the checkpoint that was started, if one was.
    fn finish(&mut self, disk: &dyn Disk, paths: &Paths, store: &Arc<PageStore>) -> Result<(), DatabaseError> {
        let Some(Started { mark, page_count, pages, in_wal }) = &self.started else {
            return Ok(());
        };
        if !pages.is_empty() {
            let numbers = pages.iter().map(|(number, _)| *number);
            store.preserve(numbers, *page_count, mark.version).map_err(io(&paths.database))?;
            self.write_pages(&pages[..*in_wal], store).map_err(io(&paths.database))?;
            let bytes = store.page_size().bytes() as u64;
            self.database.set_length(u64::from(*page_count) * bytes).map_err(io(&paths.database))?;
            self.database.sync().map_err(io(&paths.database))?;
            self.write_sums(pages, store).map_err(io(&paths.sums))?;
            if *page_count < store.file_page_count() {
                self.sums.set_length(sums::length(*page_count)).map_err(io(&paths.sums))?;
            }
        }
        let applied = open(disk, &paths.applied)?;
        mark::write(&*applied, self.sequence + 1, mark).map_err(io(&paths.applied))?;
        if self.sequence == 0 {
            disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
        }
        if !pages.is_empty() {
            disk.remove(&paths.wal).map_err(io(&paths.wal))?;
            disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
        }
        self.sequence += 1;
        self.written_pages += pages.len() as u64;
        store.checkpointed(mark.version, *page_count, pages);
        self.started = None;
        Ok(())
    }
}

impl Started {
    /// Step 1. When it returns, the file and its WAL are the database at this version, for us and for plain SQLite.
    fn write_wal(&self, disk: &dyn Disk, paths: &Paths, store: &PageStore) -> Result<(), DatabaseError> {
        let wal = open(disk, &paths.wal)?;
        let images = self.pages[..self.in_wal].iter().map(|(number, page)| (*number, page.bytes()));
        checkpoint_wal::write(&*wal, store.page_size(), self.page_count, images, &self.mark).map_err(io(&paths.wal))?;
        disk.sync_folder(&paths.folder).map_err(io(&paths.folder))
    }
}

/// A page of a pinned version could not be read.
pub(super) fn page_error(error: PageError, path: &Path) -> DatabaseError {
    match error {
        PageError::Io(error) => DatabaseError::io(path, error),
        PageError::TooOld(bound) => bound.into(),
    }
}
