//! The seam between the log and its directory: everything the log asks of a file system, and
//! nothing else.
//!
//! In a node it is [`DirectoryDisk`]; tests put a disk there that fails, fills up, or forgets
//! unsynced writes.

use std::any::Any;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use super::LogError;

/// Name of the file whose lock keeps a second process out.
const LOCK_FILE: &str = "LOCK";

/// Zeros are written in pieces of this size where a file system cannot reserve space.
const ZERO_CHUNK_BYTES: usize = 1024 * 1024;

/// Longest text read from the lock file.
const MAX_OWNER_BYTES: u64 = 256;

/// One directory.
pub(crate) trait Disk: Debug + Send + Sync {
    /// The path of a name, for messages.
    fn path(&self, name: &str) -> PathBuf;
    /// Keeps others out for as long as the result lives.
    fn lock(&self) -> Result<Box<dyn Any + Send>, LogError>;
    /// All names, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// A file that exists, for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// A new file of `length` bytes that has its space reserved; leaves nothing behind when it
    /// fails.
    fn create(&self, name: &str, length: u64) -> io::Result<Arc<dyn DiskFile>>;
    /// Renames; durable only after [`Disk::sync_directory`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes; durable only after [`Disk::sync_directory`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names durable.
    fn sync_directory(&self) -> io::Result<()>;
}

/// One open file.
pub(crate) trait DiskFile: Debug + Send + Sync {
    /// Length in bytes.
    fn length(&self) -> io::Result<u64>;
    /// Fills `buffer` from `offset` on.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// fdatasync: contents and length are on disk when it returns.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the operating system.
#[derive(Debug)]
pub(super) struct DirectoryDisk {
    path: PathBuf,
    /// Open for syncing.
    directory: File,
}

impl DirectoryDisk {
    /// Opens the directory, making it when it is not there.
    pub(super) fn open(path: &Path) -> Result<Self, LogError> {
        let failed = |action, source| LogError::Io { action, path: path.to_path_buf(), source };
        if !path.is_dir() {
            fs::create_dir_all(path).map_err(|source| failed("creating", source))?;
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                File::open(parent)
                    .and_then(|parent| parent.sync_all())
                    .map_err(|source| failed("syncing the parent of", source))?;
            }
        }
        let directory = File::open(path).map_err(|source| failed("opening", source))?;
        Ok(Self { path: path.to_path_buf(), directory })
    }
}

impl Disk for DirectoryDisk {
    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn lock(&self) -> Result<Box<dyn Any + Send>, LogError> {
        let path = self.path(LOCK_FILE);
        let failed = |action, source| LogError::Io { action, path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| failed("opening", source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let read = file.take(MAX_OWNER_BYTES).read_to_string(&mut owner);
                let owner = owner.trim();
                let owner = (read.is_ok() && !owner.is_empty()).then(|| owner.to_owned());
                return Err(LogError::Locked { directory: self.path.clone(), owner });
            }
            Err(TryLockError::Error(source)) => return Err(failed("locking", source)),
        }
        // Who holds the lock is a courtesy to whoever finds it taken: a failure to write it (a full
        // disk) harms nobody.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "process {}", std::process::id()));
        Ok(Box::new(file))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).open(self.path(name))?))
    }

    fn create(&self, name: &str, length: u64) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.path(name))?;
        match reserve(&file, length) {
            Ok(()) => Ok(Arc::new(file)),
            Err(error) => {
                fs::remove_file(self.path(name))?;
                Err(error)
            }
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.directory.sync_all()
    }
}

/// Gives the file its length and its blocks, so that writing into it later cannot run out of space.
fn reserve(file: &File, length: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            let zeros = vec![0; ZERO_CHUNK_BYTES];
            let mut offset = 0;
            while offset < length {
                let count = (length - offset).min(zeros.len() as u64);
                file.write_all_at(&zeros[..count as usize], offset)?;
                offset += count;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

impl DiskFile for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
