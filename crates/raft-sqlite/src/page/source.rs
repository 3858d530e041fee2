//! Where pages come from that are not in memory: the database file, behind the seam through which faults are injected.

use std::io;
use std::path::Path;
use std::sync::Arc;

/// A file: positional reads and writes, explicit syncs. The only way this crate's database files are touched.
pub(crate) trait DiskFile: Send + Sync {
    /// Fills `buffer` from `offset`; the bytes that are there, fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts or extends it to `length` bytes.
    fn set_length(&self, length: u64) -> io::Result<()>;
    /// Its length, in bytes.
    fn length(&self) -> io::Result<u64>;
    /// Everything written so far survives a crash when this returns.
    fn sync(&self) -> io::Result<()>;
}

/// A folder of files.
pub(crate) trait Disk: Send + Sync {
    /// Makes a folder and those above it; fine if it is there.
    fn make_folder(&self, folder: &Path) -> io::Result<()>;
    /// Opens a file for reading and writing; makes it if `create`. None: it is not there.
    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Arc<dyn DiskFile>>>;
    /// Renames over whatever is there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file; fine if it is not there.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Renames and removals in `folder` so far survive a crash when this returns.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
}

/// The whole content of a small file; None: it is not there.
pub(crate) fn read_file(disk: &dyn Disk, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let Some(file) = disk.open(path, false)? else { return Ok(None) };
    let length = usize::try_from(file.length()?).map_err(io::Error::other)?;
    let mut content = vec![0; length];
    let count = file.read_at(&mut content, 0)?;
    content.truncate(count);
    Ok(Some(content))
}

/// Replaces a small file so that after a crash either the old or the new content is there; on disk when it returns.
pub(crate) fn write_synced(disk: &dyn Disk, path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let file = disk.open(&new, true)?.ok_or(io::ErrorKind::NotFound)?;
    file.set_length(0)?;
    file.write_at(content, 0)?;
    file.sync()?;
    disk.rename(&new, path)?;
    path.parent().map_or(Ok(()), |folder| disk.sync_folder(folder))
}

/// The operating system's files.
#[derive(Debug, Default)]
pub(crate) struct SystemDisk;

impl DiskFile for std::fs::File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match std::os::unix::fs::FileExt::read_at(self, &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

impl Disk for SystemDisk {
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        std::fs::create_dir_all(folder)
    }

    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Arc<dyn DiskFile>>> {
        match std::fs::File::options().read(true).write(true).create(create).truncate(false).open(path) {
            Ok(file) => Ok(Some(Arc::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        std::fs::File::open(folder)?.sync_all()
    }
}
