//! One database on this node: its replica, the writer thread on the leader, readers, checkpoints.
//!
//! - [`replica`]: the verbs between SQLite and Raft: capture and seal, apply, commit, discard, checkpoint, install;
//! - [`checkpoint`], [`checkpoint_wal`], [`mark`], [`sums`], [`recovery`]: what lies on the disk, and how it is put in order after a crash;
//! - [`job`], [`writer_thread`], [`pipeline`]: callers' transactions, grouped and proposed;
//! - [`ticket`]: a caller's deadline, and whether it has begun;
//! - [`reader_pool`]: threads that read;
//! - [`prepare`]: what the program does to each connection first.

mod checkpoint;
pub(crate) mod checkpoint_wal;
mod connections;
pub(crate) mod job;
pub(crate) mod mark;
pub(crate) mod pipeline;
pub(crate) mod prepare;
pub(crate) mod reader_pool;
pub(crate) mod recovery;
pub(crate) mod replica;
mod sums;
pub(crate) mod ticket;
pub(crate) mod writer_thread;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub(crate) use connections::{Reader, Writer};

use crate::error::ErrorClass;
use crate::page::PageDamage;
use crate::page::store::PinBound;
pub(crate) use crate::vfs::refuse::{explain as explain_refusal, forget as forget_refusal};

/// What goes wrong with a database's files or connections.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatabaseError {
    /// A file could not be read or written. A checkpoint that fails with it is tried again; nothing is lost.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not as it was written. Nothing was changed or deleted.
    #[error(
        "{path} is damaged at byte {offset}: {why}; keep the file, and restore this member from its peers: remove it, empty its data directory, add it again"
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where, from its beginning.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// A page of a database's file is not as it was written. Nothing was changed or deleted.
    #[error(transparent)]
    DamagedPage(#[from] PageDamage),
    /// A file was written by a newer version.
    #[error(
        "{path} has format version {found}, this program knows {known}: use the version that wrote it, or a newer one"
    )]
    NewerFormat {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// SQLite refused.
    #[error("SQLite: {0}")]
    Sql(#[from] rusqlite::Error),
    /// The program's own preparation of a connection failed.
    #[error(transparent)]
    Prepare(#[from] prepare::PrepareError),
    /// A PageSet was not applied.
    #[error(transparent)]
    Apply(#[from] replica::ApplyError),
    /// A reader held its version for too long, and the images it needs are gone. Begin a new transaction.
    #[error("the reader has held its version for longer than {} s: split it into shorter ones", max_age.as_secs())]
    ReaderTooOld {
        /// The bound.
        max_age: std::time::Duration,
    },
    /// The oldest readers kept more page images in memory than they may, and this was one of them. Begin a new transaction.
    #[error(
        "the reader has held its version while more than {max_bytes} bytes of pages changed: split it into shorter ones, or raise max_reader_bytes"
    )]
    ReaderHoldsTooMuch {
        /// The bound, in bytes of page images that readers of one database keep.
        max_bytes: u64,
    },
    /// The writer is open already, or its thread has ended.
    #[error("the writer is not available")]
    Closed,
    /// A bug, or a thread that ended early.
    #[error("{0}")]
    Internal(String),
}

impl From<PinBound> for DatabaseError {
    fn from(bound: PinBound) -> Self {
        match bound {
            PinBound::Age(max_age) => DatabaseError::ReaderTooOld { max_age },
            PinBound::Bytes(max_bytes) => DatabaseError::ReaderHoldsTooMuch { max_bytes: max_bytes as u64 },
        }
    }
}

impl DatabaseError {
    /// What became of the call.
    pub fn class(&self) -> ErrorClass {
        match self {
            DatabaseError::Io { .. }
            | DatabaseError::ReaderTooOld { .. }
            | DatabaseError::ReaderHoldsTooMuch { .. }
            | DatabaseError::Closed => ErrorClass::Retryable,
            DatabaseError::Sql(_) | DatabaseError::Prepare(_) => ErrorClass::Rejected,
            DatabaseError::Apply(error) => error.class(),
            DatabaseError::Damaged { .. }
            | DatabaseError::DamagedPage(_)
            | DatabaseError::NewerFormat { .. }
            | DatabaseError::Internal(_) => ErrorClass::Fatal,
        }
    }

    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        match PageDamage::of(&source) {
            Some(damage) => DatabaseError::DamagedPage(damage.clone()),
            None => DatabaseError::Io { path: path.to_owned(), source },
        }
    }
}
