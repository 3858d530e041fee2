//! Snapshots on the move: a pinned state cut into chunks, and chunks put together to files.
//!
//! Sending holds a few hundred pages at a time, whatever the size of the database; the state stays pinned until the last chunk is
//! made. Receiving writes plain SQLite files into DATA/incoming, synced and checked against the state hash before they are installed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};

use super::command::check_database_name;
use super::{Machine, MembershipRecord, PinnedState, invalid};
use crate::database::DatabaseError;
use crate::database::replica::{AppliedMark, LogPosition, PinnedVersion, Replica};
use crate::page::{PageNumber, StateHash, Version};

/// About how many bytes of page images go into one chunk.
const CHUNK_BYTES: usize = 512 * 1024;
/// Largest chunk taken from a peer, decompressed.
const MAX_CHUNK_BYTES: usize = 4 * 1024 * 1024;

/// One piece of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// A database begins.
    Begin { name: String, page_size: u32, page_count: u32, version: u64, state_hash: u128 },
    /// Page images that follow each other.
    Pages { first_page: u32, page_count: u32, images: Bytes, lz4: bool, crc32c: u32 },
    /// The database is complete.
    End,
}

/// A pinned state, read as chunks. Blocking I/O: run it off the async workers.
pub(crate) struct Outgoing {
    databases: std::vec::IntoIter<(String, Replica, PinnedVersion)>,
    current: Option<(PinnedVersion, u32)>,
}

impl Outgoing {
    pub fn new(state: PinnedState) -> Self {
        Self { databases: state.databases.into_iter(), current: None }
    }

    fn pages(pin: &PinnedVersion, first: u32) -> Result<(Chunk, u32), DatabaseError> {
        let page_size = pin.page_size().bytes();
        let count = ((CHUNK_BYTES / page_size).max(1) as u32).min(pin.page_count() - first + 1);
        let mut images = BytesMut::with_capacity(count as usize * page_size);
        for number in first..first + count {
            images.extend_from_slice(pin.read_page(PageNumber(number))?.bytes());
        }
        let crc32c = crc32c::crc32c(&images);
        let compressed = lz4_flex::block::compress_prepend_size(&images);
        let (images, lz4) =
            if compressed.len() < images.len() { (Bytes::from(compressed), true) } else { (images.freeze(), false) };
        Ok((Chunk::Pages { first_page: first, page_count: count, images, lz4, crc32c }, first + count))
    }
}

impl Iterator for Outgoing {
    type Item = Result<Chunk, DatabaseError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.current.take() {
            None => {
                let (name, _, pin) = self.databases.next()?;
                let chunk = Chunk::Begin {
                    name,
                    page_size: pin.page_size().bytes() as u32,
                    page_count: pin.page_count(),
                    version: pin.version().0,
                    state_hash: pin.state_hash().0,
                };
                self.current = Some((pin, 1));
                Some(Ok(chunk))
            }
            Some((pin, first)) if first > pin.page_count() => Some(Ok(Chunk::End)),
            Some((pin, first)) => match Self::pages(&pin, first) {
                Ok((chunk, next)) => {
                    self.current = Some((pin, next));
                    Some(Ok(chunk))
                }
                Err(error) => Some(Err(error)),
            },
        }
    }
}

struct ReceivedDatabase {
    name: String,
    path: PathBuf,
    version: Version,
    state_hash: StateHash,
}

/// A complete snapshot on this node's disk; its files go when this is dropped without having been installed.
pub(crate) struct ReceivedSnapshot {
    directory: PathBuf,
    databases: Vec<ReceivedDatabase>,
}

impl Drop for ReceivedSnapshot {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

struct Open {
    database: ReceivedDatabase,
    file: File,
    page_size: usize,
    page_count: u32,
    next_page: u32,
}

/// Puts a snapshot together from its chunks. Blocking I/O.
pub(crate) struct Incoming {
    received: ReceivedSnapshot,
    open: Option<Open>,
    expected: usize,
}

impl Incoming {
    /// `directory` is made, and must be this snapshot's own; `databases` is how many will come.
    pub fn new(directory: PathBuf, databases: usize) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { received: ReceivedSnapshot { directory, databases: Vec::new() }, open: None, expected: databases })
    }

    /// Takes the next chunk.
    ///
    /// # Errors
    /// `InvalidData` when it does not follow from those before; I/O errors.
    pub fn accept(&mut self, chunk: Chunk) -> io::Result<()> {
        match (chunk, self.open.take()) {
            (Chunk::Begin { name, page_size, page_count, version, state_hash }, None) => {
                check_database_name(&name).map_err(invalid)?;
                if self.received.databases.iter().any(|database| database.name == name) {
                    return Err(invalid(format!("the snapshot has the database {name:?} twice")));
                }
                let path = self.received.directory.join(format!("{name}.sqlite"));
                let file = File::create(&path)?;
                let database =
                    ReceivedDatabase { name, path, version: Version(version), state_hash: StateHash(state_hash) };
                self.open = Some(Open { database, file, page_size: page_size as usize, page_count, next_page: 1 });
                Ok(())
            }
            (Chunk::Pages { first_page, page_count, images, lz4, crc32c }, Some(mut open)) => {
                let images = decompress(images, lz4)?;
                let fits = first_page == open.next_page
                    && u64::from(first_page) + u64::from(page_count) <= u64::from(open.page_count) + 1
                    && Some(images.len()) == open.page_size.checked_mul(page_count as usize);
                if !fits {
                    return Err(invalid(format!(
                        "pages {first_page} to {} do not follow",
                        first_page.saturating_add(page_count)
                    )));
                }
                if crc32c::crc32c(&images) != crc32c {
                    return Err(invalid(format!("the checksum of pages from {first_page} on does not match")));
                }
                open.file.write_all(&images)?;
                open.next_page = first_page + page_count;
                self.open = Some(open);
                Ok(())
            }
            (Chunk::End, Some(open)) => {
                if u64::from(open.next_page) != u64::from(open.page_count) + 1 {
                    return Err(invalid(format!("database {:?} ends at page {}", open.database.name, open.next_page)));
                }
                open.file.sync_all()?;
                self.received.databases.push(open.database);
                Ok(())
            }
            (chunk, _) => Err(invalid(format!("a snapshot chunk out of order: {}", kind(&chunk)))),
        }
    }

    /// The snapshot, if it is complete.
    pub fn finish(self) -> io::Result<ReceivedSnapshot> {
        if self.open.is_some() || self.received.databases.len() != self.expected {
            return Err(invalid(format!(
                "the snapshot ends after {} of {} databases",
                self.received.databases.len(),
                self.expected
            )));
        }
        File::open(&self.received.directory)?.sync_all()?;
        Ok(self.received)
    }
}

fn kind(chunk: &Chunk) -> &'static str {
    match chunk {
        Chunk::Begin { .. } => "begin",
        Chunk::Pages { .. } => "pages",
        Chunk::End => "end",
    }
}

fn decompress(images: Bytes, lz4: bool) -> io::Result<Bytes> {
    if !lz4 {
        return Ok(images);
    }
    let size = images.get(..4).and_then(|size| size.try_into().ok()).map_or(0, u32::from_le_bytes) as usize;
    if size > MAX_CHUNK_BYTES {
        return Err(invalid(format!("a snapshot chunk of {size} bytes is larger than {MAX_CHUNK_BYTES}")));
    }
    lz4_flex::block::decompress_size_prepended(&images)
        .map(Bytes::from)
        .map_err(|error| invalid(format!("a snapshot chunk does not decompress: {error}")))
}

/// Writes a pinned state into `directory` as if it had come from a peer. Blocking I/O.
pub(crate) fn materialise(state: PinnedState, directory: &Path) -> io::Result<ReceivedSnapshot> {
    let mut incoming = Incoming::new(directory.to_owned(), state.databases.len())?;
    for chunk in Outgoing::new(state) {
        incoming.accept(chunk.map_err(io::Error::other)?)?;
    }
    incoming.finish()
}

impl Machine {
    /// DATA/incoming/NAME: where a snapshot that is being received goes.
    pub fn incoming_directory(&self) -> PathBuf {
        let name = format!("{:016x}", rand::random::<u64>());
        self.directory().parent().unwrap_or(self.directory()).join("incoming").join(name)
    }

    /// Replaces the whole state of this node by a received snapshot; on disk when it returns.
    pub async fn install(
        &self,
        position: LogPosition,
        membership: MembershipRecord,
        snapshot: ReceivedSnapshot,
    ) -> Result<(), DatabaseError> {
        self.close_writers("a snapshot is installed").await;
        let _files = self.inner.files.lock().await;
        let machine = self.clone();
        let span = tracing::info_span!("install_snapshot", term = position.term, index = position.index);
        let install = move || span.in_scope(|| machine.install_files(position, membership, &snapshot));
        let result = tokio::task::spawn_blocking(install).await;
        result.map_err(|error| DatabaseError::Internal(format!("the install ended early: {error}")))?
    }

    fn install_files(
        &self,
        position: LogPosition,
        membership: MembershipRecord,
        snapshot: &ReceivedSnapshot,
    ) -> Result<(), DatabaseError> {
        let kept: BTreeSet<&str> = snapshot.databases.iter().map(|database| database.name.as_str()).collect();
        let gone: Vec<String> =
            self.database_names().into_iter().filter(|name| !kept.contains(name.as_str())).collect();
        for name in gone {
            if let Some(state) = self.inner.databases.write().remove(&name) {
                state.writer.stop();
            }
            self.inner.dropped.lock().insert(name);
        }
        let mut catalog = super::catalog::Catalog {
            position: Some(position),
            membership: membership.clone(),
            databases: Default::default(),
        };
        for received in &snapshot.databases {
            let mark = AppliedMark { position, version: received.version, state_hash: received.state_hash };
            let state = match self.database(&received.name) {
                Some(state) => state,
                None => {
                    self.inner.dropped.lock().remove(&received.name);
                    self.add_database(&received.name, received.version)?
                }
            };
            state.replica.install(&received.path, mark)?;
            state.restored_index.store(position.index, std::sync::atomic::Ordering::Release);
            catalog.databases.insert(received.name.clone(), received.version.0);
            self.notify_restored(&received.name, &state)?;
        }
        self.write_catalog(&catalog, position)?;
        self.advance(position, Some(membership));
        Ok(())
    }
}
