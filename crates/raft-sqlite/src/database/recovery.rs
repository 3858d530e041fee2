//! Putting a database's files in order: after a crash in a checkpoint or in an install, and the install itself.
//!
//! ```text
//! install:  NAME.sqlite.new ◄─ the received file        until NAME.applied.new is complete: the old state stands
//!           NAME.applied.new  (synced: from here the new state stands)
//!           NAME.sqlite-wal removed, .new files renamed over the old ones
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mark::{self, AppliedMark};
use super::{DatabaseError, checkpoint_wal};
use crate::page::source::{Disk, DiskFile};
use crate::page::{DATABASE_SIZE_AT, PageNumber, PageSize, StateHash, be32, page_hash};

/// The names of a database's files.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub folder: PathBuf,
    pub database: PathBuf,
    pub wal: PathBuf,
    pub shm: PathBuf,
    pub applied: PathBuf,
    pub new_database: PathBuf,
    pub new_applied: PathBuf,
}

impl Paths {
    pub fn new(folder: &Path, name: &str) -> Self {
        let file = |ending: &str| folder.join(format!("{name}.{ending}"));
        Self {
            folder: folder.to_owned(),
            database: file("sqlite"),
            wal: file("sqlite-wal"),
            shm: file("sqlite-shm"),
            applied: file("applied"),
            new_database: file("sqlite.new"),
            new_applied: file("applied.new"),
        }
    }

    pub fn all(&self) -> [&Path; 6] {
        [&self.database, &self.wal, &self.shm, &self.applied, &self.new_database, &self.new_applied]
    }
}

/// A database's files in order.
pub(crate) struct Recovered {
    pub file: Arc<dyn DiskFile>,
    /// Sequence of the newest mark; 0 before the first.
    pub sequence: u64,
    pub mark: Option<AppliedMark>,
    /// 0: the file is empty, the database is new.
    pub page_count: u32,
    /// Of the file; None for a new database.
    pub page_size: Option<PageSize>,
}

/// Finishes or undoes what a crash interrupted, and opens the file.
pub(crate) fn recover(disk: &dyn Disk, paths: &Paths) -> Result<Recovered, DatabaseError> {
    finish_install(disk, paths)?;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| DatabaseError::io(&path, error)
    };
    let mut newest = mark::read(disk, &paths.applied)?;
    if let Some(wal) = disk.open(&paths.wal, false).map_err(io(&paths.wal))? {
        match checkpoint_wal::read(&*wal).map_err(io(&paths.wal))? {
            Some(complete) if newest.is_none_or(|(_, mark)| complete.mark.position >= mark.position) => {
                let sequence = newest.map_or(1, |(sequence, _)| sequence + 1);
                redo(disk, paths, &*wal, &complete)?;
                let applied = open(disk, &paths.applied)?;
                mark::write(&*applied, sequence, &complete.mark).map_err(io(&paths.applied))?;
                newest = Some((sequence, complete.mark));
            }
            _ => {}
        }
        drop(wal);
        disk.remove(&paths.wal).map_err(io(&paths.wal))?;
    }
    // Made by a curious sqlite3, never by us.
    disk.remove(&paths.shm).map_err(io(&paths.shm))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    let file = open(disk, &paths.database)?;
    let (page_count, page_size) = measure(&*file, paths, newest.is_some(), Beyond::CutOff)?;
    Ok(Recovered {
        file,
        sequence: newest.map_or(0, |(sequence, _)| sequence),
        mark: newest.map(|(_, mark)| mark),
        page_count,
        page_size,
    })
}

/// Opens a file, making it if it is not there.
pub(super) fn open(disk: &dyn Disk, path: &Path) -> Result<Arc<dyn DiskFile>, DatabaseError> {
    match disk.open(path, true) {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(DatabaseError::io(path, io::ErrorKind::NotFound.into())),
        Err(error) => Err(DatabaseError::io(path, error)),
    }
}

fn redo(
    disk: &dyn Disk,
    paths: &Paths,
    wal: &dyn DiskFile,
    complete: &checkpoint_wal::CompleteWal,
) -> Result<(), DatabaseError> {
    let file = open(disk, &paths.database)?;
    let io = |error| DatabaseError::io(&paths.database, error);
    let bytes = complete.page_size.bytes();
    let mut image = vec![0; bytes];
    for (number, at) in &complete.images {
        wal.read_at(&mut image, *at).map_err(|error| DatabaseError::io(&paths.wal, error))?;
        file.write_at(&image, u64::from(number.0 - 1) * bytes as u64).map_err(io)?;
    }
    file.set_length(u64::from(complete.page_count) * bytes as u64).map_err(io)?;
    file.sync().map_err(io)
}

/// What to do with bytes beyond the end that a database's header states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beyond {
    /// A checkpoint that was cut short has left them.
    CutOff,
    Refuse,
}

/// Pages and page size of a database file, by its own header.
fn measure(
    file: &dyn DiskFile,
    paths: &Paths,
    has_mark: bool,
    beyond: Beyond,
) -> Result<(u32, Option<PageSize>), DatabaseError> {
    let path = &paths.database;
    let length = file.length().map_err(|error| DatabaseError::io(path, error))?;
    let damaged = |offset: u64, why: String| DatabaseError::Damaged { path: path.clone(), offset, why };
    if !has_mark {
        if length > 0 {
            // The first checkpoint was cut short before its WAL was complete: impossible, since the WAL comes first.
            return Err(damaged(0, "there is a database but no applied mark beside it (NAME.applied)".into()));
        }
        return Ok((0, None));
    }
    let mut header = [0; 100];
    if file.read_at(&mut header, 0).map_err(|error| DatabaseError::io(path, error))? < header.len() {
        return Err(damaged(length, "it is shorter than its header".into()));
    }
    if &header[..16] != b"SQLite format 3\0" {
        return Err(damaged(0, "it does not begin as an SQLite database".into()));
    }
    let stated = u32::from(u16::from_be_bytes([header[16], header[17]]));
    let page_size = PageSize::new(if stated == 1 { 65536 } else { stated })
        .ok_or_else(|| damaged(16, format!("page size {stated}")))?;
    let pages = be32(&header, DATABASE_SIZE_AT);
    let stated = u64::from(pages) * page_size.bytes() as u64;
    if length > stated && beyond == Beyond::CutOff {
        file.set_length(stated).map_err(|error| DatabaseError::io(path, error))?;
    } else if length != stated {
        return Err(damaged(length, format!("it should have {pages} pages of {} bytes", page_size.bytes())));
    }
    Ok((pages, Some(page_size)))
}

/// The state hash of a whole file.
pub(crate) fn hash_file(file: &dyn DiskFile, page_size: PageSize, page_count: u32) -> io::Result<StateHash> {
    /// Pages read at a time.
    const BATCH: u32 = 256;
    let bytes = page_size.bytes();
    let mut hash = StateHash::default();
    let mut buffer = vec![0; bytes * BATCH as usize];
    let mut first = 1;
    while first <= page_count {
        let count = BATCH.min(page_count - first + 1);
        let part = &mut buffer[..bytes * count as usize];
        if file.read_at(part, u64::from(first - 1) * bytes as u64)? < part.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (at, image) in part.chunks_exact(bytes).enumerate() {
            hash.add(page_hash(PageNumber(first + at as u32), image));
        }
        first += count;
    }
    Ok(hash)
}

/// Puts the complete SQLite file at `received` (same file system) beside the database, with a mark that makes it stand: [`recover`]
/// then takes it over.
///
/// # Errors
/// The old state stands, once [`abandon_install`] has taken away what is left.
pub(crate) fn prepare_install(
    disk: &dyn Disk,
    paths: &Paths,
    received: &Path,
    sequence: u64,
    mark: &AppliedMark,
) -> Result<(), DatabaseError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| DatabaseError::io(&path, error)
    };
    let Some(file) = disk.open(received, false).map_err(io(received))? else {
        return Err(DatabaseError::io(received, io::ErrorKind::NotFound.into()));
    };
    file.sync().map_err(io(received))?;
    let probe = Paths { database: received.to_owned(), ..paths.clone() };
    let (page_count, page_size) = measure(&*file, &probe, true, Beyond::Refuse)?;
    let page_size =
        page_size.ok_or_else(|| DatabaseError::Internal("a received database without a page size".into()))?;
    let hash = hash_file(&*file, page_size, page_count).map_err(io(received))?;
    if hash != mark.state_hash {
        return Err(DatabaseError::Damaged {
            path: received.to_owned(),
            offset: 0,
            why: "the received database does not have the state hash that its sender gave".into(),
        });
    }
    drop(file);
    // No mark of an earlier attempt may meet the new file.
    abandon_install(disk, paths)?;
    disk.rename(received, &paths.new_database).map_err(io(&paths.new_database))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    let applied = open(disk, &paths.new_applied)?;
    mark::write(&*applied, sequence, mark).map_err(io(&paths.new_applied))?;
    drop(applied);
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))
}

/// Removes what an install that came to nothing has left, the mark first.
pub(crate) fn abandon_install(disk: &dyn Disk, paths: &Paths) -> Result<(), DatabaseError> {
    for path in [&paths.new_applied, &paths.new_database] {
        disk.remove(path).map_err(|error| DatabaseError::io(path, error))?;
        disk.sync_folder(&paths.folder).map_err(|error| DatabaseError::io(&paths.folder, error))?;
    }
    Ok(())
}

fn finish_install(disk: &dyn Disk, paths: &Paths) -> Result<(), DatabaseError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| DatabaseError::io(&path, error)
    };
    if mark::read(disk, &paths.new_applied)?.is_none() {
        return abandon_install(disk, paths);
    }
    disk.remove(&paths.wal).map_err(io(&paths.wal))?;
    if disk.open(&paths.new_database, false).map_err(io(&paths.new_database))?.is_some() {
        disk.rename(&paths.new_database, &paths.database).map_err(io(&paths.database))?;
    }
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    disk.rename(&paths.new_applied, &paths.applied).map_err(io(&paths.applied))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))
}
