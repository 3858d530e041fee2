//! What can go wrong with the log, and what became of the call.

use std::io;
use std::path::PathBuf;

use crate::error::ErrorClass;

/// Why the log could not be opened, or refused or failed a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// No room for another segment. Nothing was written and the log is as before; later calls may
    /// succeed.
    #[error("no space is left for the Raft log at {}: free some; the log goes on by itself", path.display())]
    DiskFull {
        /// The file that could not be made.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The entries do not follow the last one. No effect.
    #[error("entry {found} does not follow the log, which goes on at {expected}")]
    NotNext {
        /// The index that has to come next.
        expected: u64,
        /// The index that was given.
        found: u64,
    },
    /// The call reaches into what is purged. No effect.
    #[error("entry {index} is purged (up to {purged})")]
    Purged {
        /// What was asked for.
        index: u64,
        /// Up to where the log is purged, inclusive.
        purged: u64,
    },
    /// An entry or a vote is larger than the format can hold. No effect.
    #[error("{what} of {bytes} bytes is larger than the log can hold ({limit_bytes})")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Its size in bytes.
        bytes: usize,
        /// The bound in bytes.
        limit_bytes: usize,
    },
    /// Bytes that had been synced cannot be read any more. Nothing was changed.
    #[error(
        "the Raft log is damaged: {} at offset {offset}: {detail}. Nothing was changed. Entries or votes that this member has \
         acknowledged may be lost: restore this member from its peers (remove it, empty its data directory, add it again), or \
         replace the disk's contents from a good copy",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes from its start.
        offset: u64,
        /// What is wrong there.
        detail: String,
    },
    /// A file of the log is not there. Nothing was changed.
    #[error(
        "the Raft log is incomplete: {} is missing: {detail}. Nothing was changed. Put it back, or restore this member from its \
         peers (remove it, empty its data directory, add it again)",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// How it is known to be missing.
        detail: String,
    },
    /// Written by a newer version of this program. Nothing was changed.
    #[error(
        "{} has format version {found}; this program reads up to {supported}: use the newer program, or restore this member \
         from its peers",
        path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// Another process has the log open.
    #[error("the Raft log in {} is in use{}", directory.display(), owner.as_ref().map(|owner| format!(" by {owner}")).unwrap_or_default())]
    Locked {
        /// The log's directory.
        directory: PathBuf,
        /// Who holds it, as it said itself.
        owner: Option<String>,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An earlier write or sync failed: the log acknowledges nothing more until it is opened again.
    #[error("the Raft log has stopped: {reason}")]
    Failed {
        /// The first failure.
        reason: String,
    },
    /// [`super::Log::shutdown`] was called. No effect.
    #[error("the Raft log is closed")]
    Closed,
}

impl LogError {
    /// What became of the call.
    pub fn class(&self) -> ErrorClass {
        match self {
            LogError::DiskFull { .. } => ErrorClass::Retryable,
            LogError::NotNext { .. } | LogError::Purged { .. } | LogError::TooLarge { .. } | LogError::Closed => {
                ErrorClass::Rejected
            }
            LogError::Damaged { .. }
            | LogError::Missing { .. }
            | LogError::NewerFormat { .. }
            | LogError::Locked { .. }
            | LogError::Io { .. }
            | LogError::Failed { .. } => ErrorClass::Fatal,
        }
    }

    /// The kind that tells this error's nature where only an [`io::Error`] fits.
    pub(super) fn io_kind(&self) -> io::ErrorKind {
        match self {
            LogError::DiskFull { .. } => io::ErrorKind::StorageFull,
            LogError::NotNext { .. } | LogError::Purged { .. } | LogError::TooLarge { .. } => {
                io::ErrorKind::InvalidInput
            }
            LogError::Damaged { .. } | LogError::NewerFormat { .. } => io::ErrorKind::InvalidData,
            LogError::Missing { .. } => io::ErrorKind::NotFound,
            LogError::Locked { .. } => io::ErrorKind::ResourceBusy,
            LogError::Io { source, .. } => source.kind(),
            LogError::Failed { .. } | LogError::Closed => io::ErrorKind::BrokenPipe,
        }
    }
}

impl From<LogError> for io::Error {
    fn from(error: LogError) -> Self {
        io::Error::new(error.io_kind(), error)
    }
}
