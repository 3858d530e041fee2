//! The receiving end: puts the databases of a snapshot together in DATA/incoming.
//!
//! Each range of a database is taken from what an earlier attempt has left there, or else from this node's own database, and corrected
//! by what the sender sends. The node's own files are only read. Before a snapshot counts as received its files are synced, read again,
//! and have the state hash; one that has not is sent whole the next time, from nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::files::IncomingFiles;
use super::{
    Action, Answer, Begin, Chunk, MAX_CHUNK_BYTES, Ranges, ReceivedDatabase, ReceivedSnapshot, hash_range, invalid,
};
use crate::database::recovery::hash_file;
use crate::database::replica::Replica;
use crate::page::page_set::{DecodedPageSet, PageChange, apply_runs};
use crate::page::source::DiskFile;
use crate::page::{PageNumber, PageSize, StateHash, Version};
use crate::state_machine::Machine;
use crate::state_machine::command::check_database_name;

/// Bytes written before they are synced: so that the disk is not taken by one long sync while others wait for theirs.
const SYNC_BYTES: usize = 8 * 1024 * 1024;

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At {
    version: Version,
    page_count: u32,
    state_hash: StateHash,
}

/// A database that comes in.
struct Receiving {
    file: Arc<dyn DiskFile>,
    page_size: PageSize,
    ranges: Ranges,
    target: At,
    /// Bytes of the file that an earlier attempt has left.
    left: u64,
    own: Option<Replica>,
    action: Action,
    /// Its pages are of this version and later; None: not all of them have come yet.
    copied: Option<At>,
    /// Where the redo stands.
    now: At,
    unsynced_bytes: usize,
}

/// What is being received; lives over several calls. Blocking I/O.
pub(crate) struct Incoming {
    machine: Machine,
    files: IncomingFiles,
    /// The sender's number of the transfer that `databases` are of.
    transfer: u64,
    databases: BTreeMap<String, Receiving>,
    /// Databases that did not get their state hash: nothing here is a source for them any more.
    distrusted: BTreeSet<String>,
    /// Of this call.
    expected: usize,
    begun: BTreeMap<String, Action>,
    current: Option<String>,
}

impl Incoming {
    pub fn new(machine: &Machine) -> Self {
        Self {
            machine: machine.clone(),
            files: machine.incoming_files(),
            transfer: 0,
            databases: BTreeMap::new(),
            distrusted: BTreeSet::new(),
            expected: 0,
            begun: BTreeMap::new(),
            current: None,
        }
    }

    /// A sender calls, for the first time or again: a snapshot of so many `databases` up to the log entry `index`.
    pub fn begin(&mut self, transfer: u64, index: u64, databases: usize) -> io::Result<()> {
        if self.transfer != transfer {
            self.databases.clear();
            self.transfer = transfer;
        }
        self.expected = databases;
        self.begun.clear();
        self.current = None;
        self.files.begin(index)
    }

    /// The files are about to go.
    pub fn forget(&mut self) {
        self.databases.clear();
        self.transfer = 0;
    }

    /// Takes the next chunk; what to answer.
    ///
    /// # Errors
    /// `InvalidData` when it does not follow from those before; I/O errors.
    pub fn accept(&mut self, chunk: Chunk) -> io::Result<Option<Answer>> {
        match (chunk, self.current.take()) {
            (Chunk::Begin(begin), None) => self.begin_database(begin).map(|action| Some(Answer::Action(action))),
            (Chunk::Ranges { first, hashes }, Some(name)) => {
                let differs = self.receiving(&name)?.compare(first, &hashes)?;
                self.current = Some(name);
                Ok(Some(Answer::Differs(differs)))
            }
            (Chunk::Pages { numbers, images, lz4, crc32c }, Some(name)) => {
                self.receiving(&name)?.write_pages(&numbers, images, lz4, crc32c)?;
                self.current = Some(name);
                Ok(None)
            }
            (Chunk::Copied, Some(name)) => {
                let receiving = self.receiving(&name)?;
                receiving.copied = Some(receiving.target);
                receiving.now = receiving.target;
                Ok(None)
            }
            (Chunk::Redo { name, page_set }, None) if self.begun.get(&name) == Some(&Action::Continue) => {
                self.receiving(&name)?.redo(&page_set)?;
                Ok(None)
            }
            (Chunk::Finish { exact }, None) => {
                self.finish(exact).map(|mismatched| Some(Answer::Finished { mismatched }))
            }
            (chunk, _) => Err(invalid(format!("a snapshot chunk out of turn: {}", kind(&chunk)))),
        }
    }

    fn receiving(&mut self, name: &str) -> io::Result<&mut Receiving> {
        self.databases.get_mut(name).ok_or_else(|| invalid(format!("the snapshot has not begun the database {name:?}")))
    }

    fn begin_database(&mut self, begin: Begin) -> io::Result<Action> {
        let Begin { name, page_size, page_count, version, state_hash, continues } = begin;
        check_database_name(&name).map_err(invalid)?;
        let page_size = PageSize::new(page_size).ok_or_else(|| invalid(format!("a page size of {page_size}")))?;
        let target = At { version: Version(version), page_count, state_hash: StateHash(state_hash) };
        if page_count == 0 || self.begun.contains_key(&name) {
            return Err(invalid(format!("the snapshot has the database {name:?} twice, or without a page")));
        }
        let trusted = !self.distrusted.contains(&name);
        let own = self.machine.database(&name).map(|state| state.replica.clone()).filter(|_| trusted);
        if own.as_ref().is_some_and(|own| is_same(own, &target)) {
            self.databases.remove(&name);
            self.begun.insert(name, Action::Same);
            return Ok(Action::Same);
        }
        let known = self.databases.get_mut(&name).filter(|known| {
            let copied = known.copied.is_some_and(|copied| copied.version.0 == continues);
            copied && continues > 0 && known.page_size == page_size
        });
        let action = match known {
            Some(known) => {
                // From the beginning, whatever an interrupted call has redone: it comes to the same.
                known.now = known.copied.unwrap_or(known.now);
                known.target = target;
                known.action = Action::Continue;
                Action::Continue
            }
            None => {
                let own = own.filter(|own| {
                    let pin = own.pin();
                    pin.version() > Version(0) && pin.page_size() == page_size
                });
                let file = self.files.open(&name)?;
                if !trusted {
                    file.set_length(0)?;
                }
                let left = file.length()?;
                let action = if left == 0 && own.is_none() { Action::Whole } else { Action::Compare };
                let receiving = Receiving {
                    file,
                    page_size,
                    ranges: Ranges::new(page_size, page_count),
                    target,
                    left,
                    own,
                    action,
                    copied: None,
                    now: target,
                    unsynced_bytes: 0,
                };
                self.databases.insert(name.clone(), receiving);
                self.current = Some(name.clone());
                action
            }
        };
        self.begun.insert(name, action);
        Ok(action)
    }

    /// The databases that do not have their state hash.
    fn finish(&mut self, exact: bool) -> io::Result<Vec<String>> {
        if self.begun.len() != self.expected {
            return Err(invalid(format!(
                "the snapshot ends after {} of {} databases",
                self.begun.len(),
                self.expected
            )));
        }
        if !exact {
            return Ok(Vec::new());
        }
        let mut mismatched = Vec::new();
        for (name, action) in &self.begun {
            if *action == Action::Same {
                continue;
            }
            let receiving = self.databases.get_mut(name).filter(|receiving| receiving.copied.is_some());
            let Some(receiving) = receiving else {
                return Err(invalid(format!("the database {name:?} has not come as a whole")));
            };
            if !receiving.is_proven()? {
                mismatched.push(name.clone());
            }
        }
        for name in &mismatched {
            tracing::error!(database = name, "what came of a snapshot does not have the sender's state hash");
            self.databases.remove(name);
            self.distrusted.insert(name.clone());
        }
        Ok(mismatched)
    }

    /// The snapshot, after a [`Chunk::Finish`] that was exact and found nothing mismatched. None: it was not.
    pub fn complete(&mut self) -> io::Result<ReceivedSnapshot> {
        let databases: Vec<ReceivedDatabase> = std::mem::take(&mut self.begun)
            .into_iter()
            .filter_map(|(name, action)| {
                if action == Action::Same {
                    let own = self.machine.database(&name)?.replica.pin();
                    let (version, state_hash) = (own.version(), own.state_hash());
                    return Some(ReceivedDatabase { name, version, state_hash, same: true });
                }
                let At { version, state_hash, .. } = self.databases.get(&name)?.now;
                Some(ReceivedDatabase { name, version, state_hash, same: false })
            })
            .collect();
        if databases.len() != self.expected {
            return Err(invalid("a database of the snapshot went away".into()));
        }
        self.databases.clear();
        self.transfer = 0;
        self.files.sync()?;
        Ok(ReceivedSnapshot { files: self.files.clone(), databases, lock: None })
    }
}

/// Whether the node's own database is at this version, and whole.
fn is_same(own: &Replica, target: &At) -> bool {
    let pin = own.pin();
    if (pin.version(), pin.state_hash()) != (target.version, target.state_hash) {
        return false;
    }
    match own.verify() {
        Ok(whole) => whole,
        Err(error) => {
            tracing::warn!(%error, "this node's own database cannot be read: it comes from the leader");
            false
        }
    }
}

impl Receiving {
    /// What this node has of a range. True: so does the incoming file, which a hole in it makes zeros of.
    fn base(&self, range: u32, images: &mut [u8]) -> io::Result<bool> {
        let numbers = self.ranges.pages(range);
        let bytes = self.page_size.bytes();
        let from = u64::from(numbers.start() - 1) * bytes as u64;
        if self.left >= from + images.len() as u64 {
            let read = self.file.read_at(images, from)?;
            images[read..].fill(0);
            return Ok(true);
        }
        images.fill(0);
        let Some(own) = &self.own else {
            return Ok(true);
        };
        let pin = own.pin();
        for (number, image) in numbers.zip(images.chunks_exact_mut(bytes)) {
            // One that cannot be read is one that is not there.
            if number <= pin.page_count() && pin.copy_page(PageNumber(number), image).is_err() {
                image.fill(0);
            }
        }
        Ok(false)
    }

    fn compare(&mut self, first: u32, theirs: &[u128]) -> io::Result<Vec<(u32, Vec<u64>)>> {
        let count = u32::try_from(theirs.len()).unwrap_or(u32::MAX);
        if self.action != Action::Compare || first.checked_add(count).is_none_or(|end| end > self.ranges.count()) {
            return Err(invalid(format!("hashes of {count} ranges from {first} on do not follow")));
        }
        let mut differs = Vec::new();
        let mut images = Vec::new();
        for (range, theirs) in (first..).zip(theirs) {
            let numbers = self.ranges.pages(range);
            images.resize(numbers.clone().count() * self.page_size.bytes(), 0);
            let in_place = self.base(range, &mut images)?;
            let (ours, pages) = hash_range(*numbers.start(), &images, self.page_size);
            if !in_place {
                self.write(*numbers.start(), &images)?;
            }
            if ours != *theirs {
                differs.push((range, pages));
            }
        }
        Ok(differs)
    }

    fn write_pages(&mut self, numbers: &[u32], images: Bytes, lz4: bool, crc32c: u32) -> io::Result<()> {
        let images = decompress(images, lz4)?;
        let bytes = self.page_size.bytes();
        let ascend = numbers.windows(2).all(|pair| pair[0] < pair[1]);
        let within = numbers.first().is_some_and(|first| *first > 0)
            && numbers.last().is_some_and(|last| *last <= self.target.page_count);
        if !ascend || !within || Some(images.len()) != numbers.len().checked_mul(bytes) {
            return Err(invalid(format!("a chunk of {} pages does not fit the database", numbers.len())));
        }
        if crc32c::crc32c(&images) != crc32c {
            return Err(invalid(format!("the checksum of the pages from {} on does not match", numbers[0])));
        }
        let mut at = 0;
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            let end = at + run.len() * bytes;
            self.write(run[0], &images[at..end])?;
            at = end;
        }
        Ok(())
    }

    fn write(&mut self, first: u32, images: &[u8]) -> io::Result<()> {
        self.file.write_at(images, u64::from(first - 1) * self.page_size.bytes() as u64)?;
        self.unsynced_bytes += images.len();
        if self.unsynced_bytes >= SYNC_BYTES {
            self.file.sync()?;
            self.unsynced_bytes = 0;
        }
        Ok(())
    }

    /// Lays a PageSet over the file.
    fn redo(&mut self, page_set: &[u8]) -> io::Result<()> {
        let set = DecodedPageSet::decode(page_set)?;
        let header = set.header;
        if header.base != self.now.version || header.page_size != self.page_size {
            let text = format!("a PageSet on version {} does not follow version {}", header.base, self.now.version);
            return Err(invalid(text));
        }
        let bytes = self.page_size.bytes();
        let base_count = self.now.page_count;
        let mut image = vec![0; bytes];
        set.for_each(|number, change| -> io::Result<()> {
            match change {
                PageChange::Image(whole) => image.copy_from_slice(whole),
                PageChange::Zeros => image.fill(0),
                PageChange::Runs(runs, count) => {
                    let mut read = 0;
                    if number.0 <= base_count {
                        read = self.file.read_at(&mut image, u64::from(number.0 - 1) * bytes as u64)?;
                    }
                    image[read..].fill(0);
                    apply_runs(runs, count, &mut image);
                }
            }
            self.write(number.0, &image)
        })?;
        self.now = At { version: header.version, page_count: header.page_count, state_hash: header.state_hash };
        Ok(())
    }

    /// Whether the file, on disk, is what it must be.
    fn is_proven(&mut self) -> io::Result<bool> {
        if self.now != self.target {
            return Err(invalid(format!("version {} came, {} was to come", self.now.version, self.target.version)));
        }
        let page_count = self.target.page_count;
        self.file.set_length(u64::from(page_count) * self.page_size.bytes() as u64)?;
        self.file.sync()?;
        self.unsynced_bytes = 0;
        Ok(hash_file(&*self.file, self.page_size, page_count)? == self.target.state_hash)
    }
}

fn kind(chunk: &Chunk) -> &'static str {
    match chunk {
        Chunk::Begin { .. } => "begin",
        Chunk::Ranges { .. } => "ranges",
        Chunk::Pages { .. } => "pages",
        Chunk::Copied => "copied",
        Chunk::Redo { .. } => "redo",
        Chunk::Finish { .. } => "finish",
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
