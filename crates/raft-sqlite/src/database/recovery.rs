//! Putting a database's files in order: after a crash in a checkpoint or in an install, and the install itself.
//!
//! ```text
//! install:  NAME.sqlite.new ◄─ the received file        until NAME.applied.new is complete: the old state stands
//!           NAME.sums.new   ◄─ its pages' checksums
//!           NAME.applied.new  (synced: from here the new state stands)
//!           NAME.sqlite-wal removed, .new files renamed over the old ones
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mark::{self, AppliedMark};
use super::{DatabaseError, checkpoint_wal, sums};
use crate::page::source::{Disk, DiskFile};
use crate::page::{
    DATABASE_SIZE_AT, PageDamage, PageNumber, PageNumbers, PageSize, StateHash, be32, page_hash, page_sum,
};

/// The names of a database's files.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    pub folder: PathBuf,
    pub database: PathBuf,
    pub wal: PathBuf,
    pub shm: PathBuf,
    pub applied: PathBuf,
    pub sums: PathBuf,
    pub new_database: PathBuf,
    pub new_sums: PathBuf,
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
            sums: file("sums"),
            new_database: file("sqlite.new"),
            new_sums: file("sums.new"),
            new_applied: file("applied.new"),
        }
    }

    /// The mark of an install that was decided comes after what it stands for.
    pub fn all(&self) -> [&Path; 8] {
        let Self { database, wal, shm, applied, sums, new_database, new_sums, new_applied, .. } = self;
        [database, wal, shm, applied, sums, new_database, new_sums, new_applied]
    }
}

/// A database's files in order.
pub(crate) struct Recovered {
    pub file: Arc<dyn DiskFile>,
    pub sums_file: Arc<dyn DiskFile>,
    /// A checksum for each page of the file; none: the file is empty, the database is new.
    pub sums: Vec<u64>,
    /// Sequence of the newest mark; 0 before the first.
    pub sequence: u64,
    pub mark: Option<AppliedMark>,
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
            checkpoint_wal::Content::Complete(complete)
                if newest.is_none_or(|(_, mark)| complete.mark.position >= mark.position) =>
            {
                let sequence = newest.map_or(1, |(sequence, _)| sequence + 1);
                redo(disk, paths, &*wal, &complete)?;
                let applied = open(disk, &paths.applied)?;
                mark::write(&*applied, sequence, &complete.mark).map_err(io(&paths.applied))?;
                newest = Some((sequence, complete.mark));
            }
            checkpoint_wal::Content::Complete(_) => {}
            checkpoint_wal::Content::Incomplete(offset) => check_untouched(disk, paths, newest, offset)?,
        }
        drop(wal);
        disk.remove(&paths.wal).map_err(io(&paths.wal))?;
    }
    // Made by a curious sqlite3, never by us.
    disk.remove(&paths.shm).map_err(io(&paths.shm))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    let file = open(disk, &paths.database)?;
    let sums_file = open(disk, &paths.sums)?;
    let mut recovered = Recovered {
        file,
        sums_file,
        sums: Vec::new(),
        sequence: newest.map_or(0, |(sequence, _)| sequence),
        mark: newest.map(|(_, mark)| mark),
        page_size: None,
    };
    let Some(mark) = &recovered.mark else {
        check_new(disk, paths, &*recovered.file)?;
        return Ok(recovered);
    };
    let (page_count, page_size) = measure(&*recovered.file, &paths.database)?;
    // Before anything is believed of the header, or cut off.
    check_first_page(&*recovered.file, &*recovered.sums_file, paths, page_size)?;
    check_length(&*recovered.file, &paths.database, page_count, page_size)?;
    recovered.sums = match read_sums(disk, paths, page_size, page_count, mark)? {
        Some(sums) => sums,
        None => {
            let sums = rebuild_sums(disk, paths, &*recovered.file, page_size, page_count, mark)?;
            recovered.sums_file = open(disk, &paths.sums)?;
            sums
        }
    };
    let length = u64::from(page_count) * page_size.bytes() as u64;
    if recovered.file.length().map_err(io(&paths.database))? > length {
        // A checkpoint that was cut short has left it.
        recovered.file.set_length(length).map_err(io(&paths.database))?;
    }
    recovered.page_size = Some(page_size);
    Ok(recovered)
}

/// There is no mark: then there was no checkpoint, and the file is empty.
fn check_new(disk: &dyn Disk, paths: &Paths, file: &dyn DiskFile) -> Result<(), DatabaseError> {
    if file.length().map_err(|error| DatabaseError::io(&paths.database, error))? == 0 {
        return Ok(());
    }
    Err(match mark::damaged_slot(disk, &paths.applied)? {
        Some(offset) => damaged(&paths.applied, offset, "the applied mark does not have its checksum"),
        None => damaged(&paths.database, 0, "there is a database but no applied mark beside it (NAME.applied)"),
    })
}

fn damaged(path: &Path, offset: u64, why: impl Into<String>) -> DatabaseError {
    DatabaseError::Damaged { path: path.to_owned(), offset, why: why.into() }
}

/// A WAL that is not complete was cut short by a crash while it was written, and then the database was not touched; or it was damaged
/// afterwards, and then nothing else can repair the database.
fn check_untouched(
    disk: &dyn Disk,
    paths: &Paths,
    newest: Option<(u64, AppliedMark)>,
    offset: u64,
) -> Result<(), DatabaseError> {
    let io = |error| DatabaseError::io(&paths.database, error);
    let file = open(disk, &paths.database)?;
    let is_whole = match newest {
        None => file.length().map_err(io)? == 0,
        Some((_, mark)) => match measure(&*file, &paths.database) {
            Ok((page_count, page_size)) if check_length(&*file, &paths.database, page_count, page_size).is_ok() => {
                sums::of_file(&*file, page_size, page_count).map_err(io)?.0 == mark.state_hash
            }
            _ => false,
        },
    };
    match is_whole {
        true => Ok(()),
        false => Err(damaged(
            &paths.wal,
            offset,
            format!("it is not as it was written from here on, and {} needs it", paths.database.display()),
        )),
    }
}

/// It says how large the database is. Nothing is said where its checksum cannot be read.
fn check_first_page(
    file: &dyn DiskFile,
    sums_file: &dyn DiskFile,
    paths: &Paths,
    page_size: PageSize,
) -> Result<(), DatabaseError> {
    let Some(content) = sums::read(sums_file, &paths.sums, page_size, 1)?.filter(|content| content.bad.is_empty())
    else {
        return Ok(());
    };
    let mut image = vec![0; page_size.bytes()];
    file.read_at(&mut image, 0).map_err(|error| DatabaseError::io(&paths.database, error))?;
    match page_sum(page_hash(PageNumber(1), &image)) == content.sums[0] {
        true => Ok(()),
        false => Err(PageDamage { path: paths.database.clone(), page: 1, offset: 0 }.into()),
    }
}

/// The checksums of the file's pages, which together are those of the mark. None: there are none.
fn read_sums(
    disk: &dyn Disk,
    paths: &Paths,
    page_size: PageSize,
    page_count: u32,
    mark: &AppliedMark,
) -> Result<Option<Vec<u64>>, DatabaseError> {
    let file = open(disk, &paths.sums)?;
    let Some(content) = sums::read(&*file, &paths.sums, page_size, page_count)? else {
        return Ok(None);
    };
    if let Some(bad) = content.bad.first() {
        return Err(bad.error(&paths.sums));
    }
    if !sums::is_of(&content.sums, mark.state_hash) {
        return Err(match mark::damaged_slot(disk, &paths.applied)? {
            Some(offset) => damaged(&paths.applied, offset, "the newest applied mark does not have its checksum"),
            None => damaged(
                &paths.sums,
                0,
                format!("the checksums are not those of version {}: was a file replaced?", mark.version),
            ),
        });
    }
    Ok(Some(content.sums))
}

/// Whether the checksums and the mark on the disk are those that this process has written: `sums`, and the mark of `sequence`.
pub(super) fn check_sums(
    disk: &dyn Disk,
    paths: &Paths,
    page_size: PageSize,
    sequence: u64,
    sums: &[u64],
) -> Result<(), DatabaseError> {
    let mark = match mark::read(disk, &paths.applied)? {
        Some((found, mark)) if found == sequence => mark,
        _ => {
            let offset = mark::damaged_slot(disk, &paths.applied)?.unwrap_or(0);
            return Err(damaged(&paths.applied, offset, "the newest applied mark is not there as it was written"));
        }
    };
    // It is always in memory, so nobody else looks at it.
    check_first_page(&*open(disk, &paths.database)?, &*open(disk, &paths.sums)?, paths, page_size)?;
    match read_sums(disk, paths, page_size, sums.len() as u32, &mark)? {
        Some(found) if found == sums => Ok(()),
        _ => Err(damaged(&paths.sums, 0, "the checksums are not those that were written")),
    }
}

/// Somebody has taken the checksums away: the state hash vouches for the database.
fn rebuild_sums(
    disk: &dyn Disk,
    paths: &Paths,
    file: &dyn DiskFile,
    page_size: PageSize,
    page_count: u32,
    mark: &AppliedMark,
) -> Result<Vec<u64>, DatabaseError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| DatabaseError::io(&path, error)
    };
    let (hash, sums) = sums::of_file(file, page_size, page_count).map_err(io(&paths.database))?;
    if hash != mark.state_hash {
        return Err(damaged(
            &paths.database,
            0,
            format!(
                "it does not have the state hash of version {}, and there are no checksums of its pages",
                mark.version
            ),
        ));
    }
    let new = open(disk, &paths.new_sums)?;
    sums::write_all(&*new, page_size, &sums).map_err(io(&paths.new_sums))?;
    disk.rename(&paths.new_sums, &paths.sums).map_err(io(&paths.sums))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    tracing::info!(path = %paths.sums.display(), "the checksums of the pages were not there: made anew");
    Ok(sums)
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
    let sums_file = open(disk, &paths.sums)?;
    let mut sums = kept_sums(&*sums_file, paths, complete)?;
    for (number, at) in &complete.images {
        wal.read_at(&mut image, *at).map_err(|error| DatabaseError::io(&paths.wal, error))?;
        if let Some(sum) = sums.as_mut().and_then(|sums| sums.get_mut(number.0 as usize - 1)) {
            *sum = page_sum(page_hash(*number, &image));
        }
        file.write_at(&image, u64::from(number.0 - 1) * bytes as u64).map_err(io)?;
    }
    file.set_length(u64::from(complete.page_count) * bytes as u64).map_err(io)?;
    file.sync().map_err(io)?;
    match sums {
        Some(sums) => sums::write_all(&*sums_file, complete.page_size, &sums)
            .map_err(|error| DatabaseError::io(&paths.sums, error)),
        None => Ok(()),
    }
}

/// The checksums that a WAL's pages are laid over. None: they were taken away, and will be made anew.
///
/// # Errors
/// Some are damaged that the WAL does not bring.
fn kept_sums(
    file: &dyn DiskFile,
    paths: &Paths,
    complete: &checkpoint_wal::CompleteWal,
) -> Result<Option<Vec<u64>>, DatabaseError> {
    let in_wal: PageNumbers = complete.images.iter().map(|(number, _)| number.0).collect();
    let brings = |mut pages: std::ops::Range<u32>| pages.all(|page| in_wal.contains(&page));
    let end = complete.page_count.saturating_add(1);
    let all = 1..end;
    let Some(content) = sums::read(file, &paths.sums, complete.page_size, complete.page_count)? else {
        return Ok(brings(all).then(|| vec![0; complete.page_count as usize]));
    };
    let lost = content.bad.iter().find(|bad| match bad.pages() {
        // The header, as the first checkpoint may have left it.
        pages if pages.is_empty() => !brings(all.clone()),
        pages => !brings(pages.start..pages.end.min(end)),
    });
    match lost {
        Some(bad) => Err(bad.error(&paths.sums)),
        None => Ok(Some(content.sums)),
    }
}

/// Pages and page size of a database file, by its own header. It may be longer.
fn measure(file: &dyn DiskFile, path: &Path) -> Result<(u32, PageSize), DatabaseError> {
    let length = file.length().map_err(|error| DatabaseError::io(path, error))?;
    let mut header = [0; 100];
    if file.read_at(&mut header, 0).map_err(|error| DatabaseError::io(path, error))? < header.len() {
        return Err(damaged(path, length, "it is shorter than its header"));
    }
    if &header[..16] != b"SQLite format 3\0" {
        return Err(damaged(path, 0, "it does not begin as an SQLite database"));
    }
    let stated = u32::from(u16::from_be_bytes([header[16], header[17]]));
    let page_size = PageSize::new(if stated == 1 { 65536 } else { stated })
        .ok_or_else(|| damaged(path, 16, format!("page size {stated}")))?;
    Ok((be32(&header, DATABASE_SIZE_AT), page_size))
}

fn check_length(file: &dyn DiskFile, path: &Path, pages: u32, page_size: PageSize) -> Result<(), DatabaseError> {
    let length = file.length().map_err(|error| DatabaseError::io(path, error))?;
    if pages == 0 || length < u64::from(pages) * page_size.bytes() as u64 {
        return Err(damaged(path, length, format!("it should have {pages} pages of {} bytes", page_size.bytes())));
    }
    Ok(())
}

/// The state hash of a whole file.
pub(crate) fn hash_file(file: &dyn DiskFile, page_size: PageSize, page_count: u32) -> io::Result<StateHash> {
    sums::of_file(file, page_size, page_count).map(|(hash, _)| hash)
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
    let (page_count, page_size) = measure(&*file, received)?;
    let length = file.length().map_err(io(received))?;
    if page_count == 0 || length != u64::from(page_count) * page_size.bytes() as u64 {
        return Err(damaged(
            received,
            length,
            format!("it should have {page_count} pages of {} bytes", page_size.bytes()),
        ));
    }
    let (hash, sums) = sums::of_file(&*file, page_size, page_count).map_err(io(received))?;
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
    let new_sums = open(disk, &paths.new_sums)?;
    sums::write_all(&*new_sums, page_size, &sums).map_err(io(&paths.new_sums))?;
    drop(new_sums);
    disk.rename(received, &paths.new_database).map_err(io(&paths.new_database))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    let applied = open(disk, &paths.new_applied)?;
    mark::write(&*applied, sequence, mark).map_err(io(&paths.new_applied))?;
    drop(applied);
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))
}

/// Removes what an install that came to nothing has left, the mark first.
pub(crate) fn abandon_install(disk: &dyn Disk, paths: &Paths) -> Result<(), DatabaseError> {
    for path in [&paths.new_applied, &paths.new_database, &paths.new_sums] {
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
    for (new, path) in [(&paths.new_database, &paths.database), (&paths.new_sums, &paths.sums)] {
        if disk.open(new, false).map_err(io(new))?.is_some() {
            disk.rename(new, path).map_err(io(path))?;
        }
    }
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))?;
    disk.rename(&paths.new_applied, &paths.applied).map_err(io(&paths.applied))?;
    disk.sync_folder(&paths.folder).map_err(io(&paths.folder))
}
