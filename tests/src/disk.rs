//! Small disks that can be filled and freed, and what lies on a disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::FallocateFlags;

/// Name of the file that takes what is left.
const FILLER: &str = "filler";

/// A file system in memory of bounded size, mounted on a folder; unmounted when this is dropped, used or not.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts one on `path`, which is made. None, with a line printed, when this process may not mount.
    ///
    /// # Errors
    /// The folder could not be made.
    pub fn mount(path: &Path, size_mib: u64) -> Result<Option<SmallDisk>> {
        fs::create_dir_all(path)?;
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size_mib}m"), "tmpfs"]).arg(path).output();
        match mounted {
            Ok(output) if output.status.success() => Ok(Some(SmallDisk { path: path.to_owned() })),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).into_owned();
                println!("SKIPPED: a file system cannot be mounted here: {}", why.trim());
                Ok(None)
            }
            Err(error) => {
                println!("SKIPPED: a file system cannot be mounted here: {error}");
                Ok(None)
            }
        }
    }

    /// Takes all the room that is left.
    ///
    /// # Errors
    /// The filler could not be made.
    pub fn fill(&self) -> Result<()> {
        let file = File::create(self.path.join(FILLER))?;
        let room = |path: &Path| Ok::<_, anyhow::Error>(rustix::fs::statvfs(path)?);
        // Others may be writing: until nothing is left.
        let mut length = 0;
        loop {
            let now = room(&self.path)?;
            if now.f_bavail == 0 {
                return Ok(());
            }
            let more = now.f_bavail * now.f_frsize;
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), length, more) {
                Ok(()) => length += more,
                Err(rustix::io::Errno::NOSPC) => {}
                Err(error) => return Err(error).context("the filler"),
            }
        }
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// The filler could not be removed.
    pub fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.path.join(FILLER))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a node may still run on it.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// Every file under `folder` with its contents, by relative path; but the lock file, which says who came last.
///
/// # Errors
/// One could not be read.
pub fn contents(folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("LOCK") {
                files.insert(path.strip_prefix(folder)?.to_owned(), fs::read(&path)?);
            }
        }
    }
    Ok(files)
}

/// Copies a folder; what was at `to` is replaced.
///
/// # Errors
/// What could not be copied.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    for (name, bytes) in contents(from)? {
        let path = to.join(name);
        fs::create_dir_all(path.parent().context("a file has a folder")?)?;
        fs::write(path, bytes)?;
    }
    ensure!(to.is_dir(), "{} is empty", from.display());
    Ok(())
}
