//! A page that is not as it was written.

use std::io;
use std::path::PathBuf;

/// A page of a database's file does not have the checksum that it was written with. Nothing was changed or deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{path} is damaged: page {page}, from byte {offset} on, does not have its checksum: keep the file, and restore this member from its \
     peers: stop it, remove it, empty its data directory, add it again"
)]
pub struct PageDamage {
    /// The database's file.
    pub path: PathBuf,
    /// The page's number, from 1.
    pub page: u32,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
}

impl PageDamage {
    /// For ways that know I/O errors only; [`Self::of`] finds it again.
    pub(crate) fn into_io(self) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, self)
    }

    /// The damage that an I/O error stands for.
    pub(crate) fn of(error: &io::Error) -> Option<&PageDamage> {
        error.get_ref()?.downcast_ref()
    }
}
