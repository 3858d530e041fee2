//! The sending end: what to say, as the receiver's answers ask for it.
//!
//! Blocking; runs on a thread of its own, of low priority. Holds a few ranges' hashes and one chunk of pages at a time.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::{Action, Answer, Begin, CHUNK_BYTES, Chunk, Ranges, SendCounters, hash_range};
use crate::database::DatabaseError;
use crate::database::replica::Replica;
use crate::page::{PageNumber, PageSize, Version, page_set};
use crate::state_machine::command::Command;
use crate::state_machine::{Machine, PinnedState, invalid};

/// Ranges whose hashes go into one chunk.
const RANGES_IN_CHUNK: u32 = 16;
/// Chunks of hashes on their way before an answer is waited for.
const COMPARED_AHEAD: usize = 2;
/// Bytes of log entries read at a time.
const ENTRIES_BYTES: usize = 2 * 1024 * 1024;

/// Why sending ended early. The receiver keeps what it has got.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The network's end is gone, and knows why.
    #[error("the receiver is not reached any more")]
    Gone,
    #[error("a page could not be read: {0}")]
    Database(#[from] DatabaseError),
    #[error("the log could not be read: {0}")]
    Log(#[from] io::Error),
    /// The log had to be purged: the receiver was too slow for what may be kept for it.
    #[error("the log that the receiver needs is not there any more: the transfer goes on with a newer snapshot")]
    LogPurged,
    #[error("the receiver answered out of turn: {0}")]
    Protocol(String),
    /// What arrived does not have the state hash: everything is to be sent.
    #[error("at the receiver {0:?} did not get the state hash of the sender: sent whole the next time")]
    Mismatch(Vec<String>),
}

/// The network to the receiver.
pub(crate) trait Link {
    /// Says something; waits while too much is on its way.
    fn send(&mut self, chunk: Chunk) -> Result<(), SendError>;
    /// Waits for an answer.
    fn answer(&mut self) -> Result<Answer, SendError>;
}

/// This node's log.
pub(crate) trait Entries {
    /// The entries of `range`, from its first on and at most about `max_bytes`; the payload of those that are commands. Empty: the first
    /// is not there.
    fn read(&self, range: Range<u64>, max_bytes: usize) -> io::Result<Vec<(u64, Option<Bytes>)>>;
    /// False: entries that this transfer needs may be purged.
    fn are_held(&self) -> bool;
}

/// A snapshot to be sent: versions and hashes, nothing pinned.
pub(crate) struct Target {
    pub index: u64,
    databases: Vec<TargetDatabase>,
}

struct TargetDatabase {
    name: String,
    replica: Replica,
    page_size: PageSize,
    page_count: u32,
    version: Version,
    state_hash: u128,
}

impl Target {
    pub fn new(state: &PinnedState) -> Self {
        let database = |(name, replica, pin): &(String, Replica, _)| {
            let pin: &crate::database::replica::PinnedVersion = pin;
            TargetDatabase {
                name: name.clone(),
                replica: replica.clone(),
                page_size: pin.page_size(),
                page_count: pin.page_count(),
                version: pin.version(),
                state_hash: pin.state_hash().0,
            }
        };
        let databases = state.databases.iter().map(database).collect();
        Self { index: state.position.map_or(0, |position| position.index), databases }
    }

    pub fn databases(&self) -> usize {
        self.databases.len()
    }
}

/// A database that the receiver has copied: pages of `version` and later.
#[derive(Debug)]
struct Copied {
    replica: usize,
    version: Version,
    /// The log entry that `version` stands at.
    index: u64,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The receiver has the snapshot.
    Complete,
    /// It has pages of later versions too: another call with a newer snapshot goes on from here.
    Newer,
}

/// The sending of snapshots to one receiver, over as many calls as it takes.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub id: u64,
    copied: BTreeMap<String, Copied>,
}

impl Transfer {
    pub fn new() -> Self {
        Self { id: rand::random(), copied: BTreeMap::new() }
    }

    /// Log entries after this index are needed, once a snapshot at `index` is being sent.
    pub fn needs_log_after(&self, index: u64) -> u64 {
        self.copied.values().map(|copied| copied.index).min().map_or(index, |first| first.min(index))
    }

    /// Sends what the receiver lacks.
    ///
    /// # Errors
    /// See [`SendError`]. What was copied stays known unless it is of no use.
    pub fn send(
        &mut self,
        target: &Target,
        link: &mut dyn Link,
        entries: &dyn Entries,
        pace: &mut Pace,
    ) -> Result<Sent, SendError> {
        let mut behind = BTreeMap::new();
        let mut fresh = Vec::new();
        for database in &target.databases {
            match self.begin(database, link)? {
                Action::Same => {
                    self.copied.remove(&database.name);
                }
                Action::Continue => {
                    let Some(Copied { version, index, .. }) = self.copied.get(&database.name) else {
                        return Err(SendError::Protocol("there is nothing to go on with".into()));
                    };
                    behind.insert(database.name.as_str(), Behind { version: *version, index: *index });
                }
                action => {
                    self.copied.remove(&database.name);
                    match action {
                        Action::Compare => database.compare(link, pace)?,
                        _ => database.send_whole(link, pace)?,
                    }
                    link.send(Chunk::Copied)?;
                    self.note(database, target);
                    fresh.push(database);
                }
            }
        }
        self.copied.retain(|name, _| target.databases.iter().any(|database| database.name == *name));
        if let Err(error) = redo(target, behind, link, entries, pace) {
            if matches!(error, SendError::LogPurged) {
                self.copied.clear();
            }
            return Err(error);
        }
        // What was copied in this call may have pages of versions that came meanwhile.
        let exact = fresh.iter().all(|database| database.replica.committed() == database.version);
        link.send(Chunk::Finish { exact })?;
        let mismatched = match link.answer()? {
            Answer::Finished { mismatched } => mismatched,
            other => return Err(SendError::Protocol(format!("{other:?} to the end"))),
        };
        if !mismatched.is_empty() {
            self.copied.retain(|name, _| !mismatched.contains(name));
            return Err(SendError::Mismatch(mismatched));
        }
        for database in &target.databases {
            if self.copied.contains_key(&database.name) {
                self.note(database, target);
            }
        }
        if exact {
            SendCounters::add(&pace.counters.completed, 1);
        }
        Ok(if exact { Sent::Complete } else { Sent::Newer })
    }

    /// The receiver has pages of the target's version and later.
    fn note(&mut self, database: &TargetDatabase, target: &Target) {
        let (replica, version) = (database.replica.identity(), database.version);
        self.copied.insert(database.name.clone(), Copied { replica, version, index: target.index });
    }

    fn begin(&self, database: &TargetDatabase, link: &mut dyn Link) -> Result<Action, SendError> {
        // The page size of an empty database may still change: that is no PageSet's to redo.
        let known = self.copied.get(&database.name).filter(|copied| {
            let same = copied.replica == database.replica.identity();
            same && copied.version > Version(0) && copied.version <= database.version
        });
        link.send(Chunk::Begin(Begin {
            name: database.name.clone(),
            page_size: database.page_size.bytes() as u32,
            page_count: database.page_count,
            version: database.version.0,
            state_hash: database.state_hash,
            continues: known.map_or(0, |copied| copied.version.0),
        }))?;
        match link.answer()? {
            Answer::Action(Action::Continue) if known.is_none() => {
                Err(SendError::Protocol("there is nothing to go on with".into()))
            }
            Answer::Action(action) => Ok(action),
            other => Err(SendError::Protocol(format!("{other:?} to a database's beginning"))),
        }
    }
}

/// Where the redo of a database stands.
struct Behind {
    version: Version,
    index: u64,
}

/// Sends the PageSets that lead to the target's versions.
fn redo(
    target: &Target,
    mut behind: BTreeMap<&str, Behind>,
    link: &mut dyn Link,
    entries: &dyn Entries,
    pace: &mut Pace,
) -> Result<(), SendError> {
    let Some(first) = behind.values().map(|behind| behind.index + 1).min() else {
        return Ok(());
    };
    let mut next = first;
    while next <= target.index {
        let began = Instant::now();
        let batch = entries.read(next..target.index + 1, ENTRIES_BYTES)?;
        if batch.is_empty() || !entries.are_held() {
            return Err(SendError::LogPurged);
        }
        for (index, command) in batch {
            if index != next {
                return Err(SendError::LogPurged);
            }
            next = index + 1;
            let Some(Command::Pages { database, page_set, .. }) = command.map(Command::decode).transpose()? else {
                continue;
            };
            let Some(behind) = behind.get_mut(database.as_str()).filter(|behind| index > behind.index) else {
                continue;
            };
            let (base, version) = page_set::versions(&page_set)?;
            // Any other was refused on every node.
            if base == behind.version {
                behind.version = version;
                SendCounters::add(&pace.counters.sent_bytes, page_set.len());
                link.send(Chunk::Redo { name: database, page_set })?;
            }
        }
        pace.rest(began.elapsed());
    }
    for database in &target.databases {
        let reached = behind.get(database.name.as_str()).map(|behind| behind.version);
        if let Some(version) = reached.filter(|version| *version != database.version) {
            let text = format!("the log leads {:?} to version {version}, not {}", database.name, database.version);
            return Err(SendError::Log(invalid(text)));
        }
    }
    Ok(())
}

impl TargetDatabase {
    /// Images of pages as they are committed now; zeros for those that are gone meanwhile.
    fn read(&self, numbers: impl Iterator<Item = u32>, images: &mut BytesMut) -> Result<(), DatabaseError> {
        let pin = self.replica.pin();
        let count = pin.page_count();
        for number in numbers {
            let from = images.len();
            images.resize(from + self.page_size.bytes(), 0);
            if number <= count {
                pin.copy_page(PageNumber(number), &mut images[from..])?;
            }
        }
        Ok(())
    }

    fn send_whole(&self, link: &mut dyn Link, pace: &mut Pace) -> Result<(), SendError> {
        let in_chunk = (CHUNK_BYTES / self.page_size.bytes()).max(1) as u32;
        let mut first = 1;
        while first <= self.page_count {
            let last = self.page_count.min(first - 1 + in_chunk);
            self.send_pages((first..=last).collect(), link, pace)?;
            first = last + 1;
        }
        Ok(())
    }

    /// One chunk of pages.
    fn send_pages(&self, numbers: Vec<u32>, link: &mut dyn Link, pace: &mut Pace) -> Result<(), SendError> {
        let began = Instant::now();
        let mut images = BytesMut::with_capacity(numbers.len() * self.page_size.bytes());
        self.read(numbers.iter().copied(), &mut images)?;
        let crc32c = crc32c::crc32c(&images);
        let compressed = lz4_flex::block::compress_prepend_size(&images);
        let (images, lz4) =
            if compressed.len() < images.len() { (Bytes::from(compressed), true) } else { (images.freeze(), false) };
        SendCounters::add(&pace.counters.sent_bytes, images.len() + numbers.len() * 4);
        SendCounters::add(&pace.counters.sent_pages, numbers.len());
        let worked = began.elapsed();
        link.send(Chunk::Pages { numbers, images, lz4, crc32c })?;
        pace.rest(worked);
        Ok(())
    }

    /// Hashes first; of what differs the pages.
    fn compare(&self, link: &mut dyn Link, pace: &mut Pace) -> Result<(), SendError> {
        let ranges = Ranges::new(self.page_size, self.page_count);
        let in_chunk = CHUNK_BYTES / self.page_size.bytes();
        let mut on_their_way: VecDeque<(u32, Vec<Vec<u64>>)> = VecDeque::new();
        let mut next = 0;
        loop {
            while on_their_way.len() < COMPARED_AHEAD && next < ranges.count() {
                let last = ranges.count().min(next + RANGES_IN_CHUNK);
                let (hashes, pages) = self.hash(ranges, next..last, pace)?;
                SendCounters::add(&pace.counters.sent_bytes, hashes.len() * 16);
                link.send(Chunk::Ranges { first: next, hashes })?;
                on_their_way.push_back((next, pages));
                next = last;
            }
            let Some((first, hashes)) = on_their_way.pop_front() else {
                return Ok(());
            };
            let differs = match link.answer()? {
                Answer::Differs(differs) => differs,
                other => return Err(SendError::Protocol(format!("{other:?} to hashes"))),
            };
            for (range, theirs) in differs {
                let ours = range.checked_sub(first).and_then(|at| hashes.get(at as usize));
                let Some(ours) = ours.filter(|ours| ours.len() == theirs.len()) else {
                    return Err(SendError::Protocol(format!("hashes of the range {range}, which was not asked for")));
                };
                let pairs = ours.iter().zip(&theirs).zip(ranges.pages(range));
                let numbers: Vec<u32> =
                    pairs.filter(|((ours, theirs), _)| ours != theirs).map(|(_, number)| number).collect();
                for numbers in numbers.chunks(in_chunk.max(1)) {
                    self.send_pages(numbers.to_vec(), link, pace)?;
                }
            }
        }
    }

    /// The hash of each range, and of its pages.
    #[allow(clippy::type_complexity, reason = "two columns of one table")]
    fn hash(
        &self,
        ranges: Ranges,
        wanted: Range<u32>,
        pace: &mut Pace,
    ) -> Result<(Vec<u128>, Vec<Vec<u64>>), SendError> {
        let mut hashes = (Vec::new(), Vec::new());
        for range in wanted {
            let began = Instant::now();
            let numbers = ranges.pages(range);
            let first = *numbers.start();
            let mut images = BytesMut::with_capacity(numbers.clone().count() * self.page_size.bytes());
            self.read(numbers.clone(), &mut images)?;
            let (whole, pages) = hash_range(first, &images, self.page_size);
            SendCounters::add(&pace.counters.compared_pages, pages.len());
            hashes.0.push(whole);
            hashes.1.push(pages);
            pace.rest(began.elapsed());
        }
        Ok(hashes)
    }
}

/// Leaves processor and disk to the writers: while entries are applied, a transfer rests twice as long as it works.
pub(crate) struct Pace {
    machine: Machine,
    pub counters: Arc<SendCounters>,
    applied: u64,
    looked: Instant,
    busy: bool,
    /// Rest that is due.
    owed: Duration,
}

/// How often it is looked whether entries are applied.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// So much rest is taken at once: shorter sleeps take longer than they are asked to.
const MIN_REST: Duration = Duration::from_millis(2);
const MAX_REST: Duration = Duration::from_millis(100);

impl Pace {
    pub fn new(machine: &Machine) -> Self {
        let counters = machine.send_counters().clone();
        let applied = *machine.applied_index().borrow();
        let looked = Instant::now();
        Self { machine: machine.clone(), counters, applied, looked, busy: true, owed: Duration::ZERO }
    }

    fn rest(&mut self, worked: Duration) {
        if self.looked.elapsed() >= LOOK_INTERVAL {
            let applied = *self.machine.applied_index().borrow();
            self.busy = applied != self.applied;
            (self.applied, self.looked) = (applied, Instant::now());
        }
        self.owed = if self.busy { self.owed + worked * 2 } else { Duration::ZERO };
        if self.owed >= MIN_REST {
            std::thread::sleep(self.owed.min(MAX_REST));
            self.owed = Duration::ZERO;
        }
    }
}
