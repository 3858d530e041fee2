//! DATA/incoming: a database file for each database of a snapshot that is being received, and which snapshot that is.
//!
//! `NAME.sqlite` has whatever has arrived, in any state; `target.json` says up to which log entry the snapshot goes: when this node has
//! applied that entry some other way, the folder is of no more use. Nothing here is trusted after a restart: pages are compared again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::page::source::{Disk, DiskFile};

const TARGET_FILE: &str = "target.json";
const FORMAT_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Target {
    format_version: u32,
    /// The snapshot's last log entry.
    index: u64,
}

/// The folder.
#[derive(Clone)]
pub(crate) struct IncomingFiles {
    folder: PathBuf,
    disk: Arc<dyn Disk>,
}

impl IncomingFiles {
    pub fn new(folder: PathBuf, disk: Arc<dyn Disk>) -> Self {
        Self { folder, disk }
    }

    /// Makes the folder, and notes which snapshot comes.
    pub fn begin(&self, index: u64) -> io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let target = serde_json::to_vec(&Target { format_version: FORMAT_VERSION, index })?;
        std::fs::write(self.folder.join(TARGET_FILE), target)
    }

    /// A database's file; made if it is not there.
    pub fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.disk.open(&self.path(name), true)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Where a database's file is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.sqlite"))
    }

    /// The files' names survive a crash when this returns.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.sync_folder(&self.folder)
    }

    /// Removes everything.
    pub fn remove_all(&self) {
        remove(&self.folder);
    }
}

/// Removes DATA/incoming; fine if it is not there.
pub(crate) fn remove(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %folder.display(), %error, "what is left of a received snapshot is not removed yet");
        }
        _ => {}
    }
}

/// The last log entry of the snapshot that lies there; None: nothing of use does.
pub(super) fn target_index(folder: &Path) -> Option<u64> {
    let text = std::fs::read(folder.join(TARGET_FILE)).ok()?;
    let target: Target = serde_json::from_slice(&text).ok()?;
    (target.format_version == FORMAT_VERSION).then_some(target.index)
}
