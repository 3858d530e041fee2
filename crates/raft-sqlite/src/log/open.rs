//! Opening the log: recovery reads, and what has to be put right is put right here.
//!
//! Order: lock; read everything (an error leaves all files as they are); make both copies of the
//! vote equal; rewrite what was read but perhaps never synced, with a mark behind it, and sync;
//! only then set free what is not needed.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::disk::Disk;
use super::index::Index;
use super::placement::{Placement, Segment, Spare, create_spare, segment_length, segment_name, spare_name};
use super::record::{
    RECORD_HEADER_BYTES, RECORDS_START, RecordHeader, RecordType, SegmentHeader, encode_record, new_salt,
};
use super::recovery::{Recovered, Tail, recover};
use super::recycle::begin_segment;
use super::state::State;
use super::vote::VoteFile;
use super::writer::{Shared, Writer};
use super::{EntryId, LogError, LogOptions};

/// Number of the first segment of a log.
const FIRST_SEGMENT: u32 = 1;

/// An open log whose writer is not running yet.
pub(super) struct Opened {
    pub(super) shared: Arc<Shared>,
    pub(super) writer: Writer,
    /// To be held until the writer has ended.
    pub(super) lock: Box<dyn Any + Send>,
}

/// Opens or makes the log in `disk`.
pub(super) fn open(disk: Arc<dyn Disk>, options: &LogOptions) -> Result<Opened, LogError> {
    let lock = disk.lock()?;
    let names = disk.list().map_err(|source| LogError::Io { action: "listing", path: disk.path(""), source })?;
    let recovered = recover(&*disk, &names)?;
    let mut spares = SpareFiles::new(&*disk, &names, options);
    let recovered = match recovered {
        Some(recovered) => recovered,
        None => first_segment(&mut spares)?,
    };
    let Recovered { mut segments, leftover, index, committed, epoch, tail, vote } = recovered;
    let vote_file = match vote {
        Some(found) => found.repair(&*disk)?,
        None => VoteFile::create(&*disk, &names)?,
    };
    let epoch = epoch + 1;
    let newest = segments.back().expect("invariant: a log has a segment");
    let cursor = secure_tail(&*disk, newest, &tail, epoch)?;

    let needed = index.first_position().map_or(newest.number, |position| position.segment());
    let mut free = leftover;
    while segments.front().is_some_and(|segment| segment.number < needed) {
        free.extend(segments.pop_front().map(|segment| segment.number));
    }
    spares.collect(&names, &free)?;

    let placement = Placement {
        segments,
        cursor,
        spares: spares.files,
        next_spare: spares.next,
        segment_length: segment_length(options.segment_bytes),
        epoch,
    };
    let vote = vote_file.vote().cloned();
    let state = State::new(index, placement, committed, vote, options.cache_bytes);
    let shared = Arc::new(Shared { disk, state: Mutex::new(state), work: Condvar::new(), room: Condvar::new() });
    let writer = Writer::new(Arc::clone(&shared), vote_file, options);
    Ok(Opened { shared, writer, lock })
}

/// Makes the first segment of a new log.
fn first_segment(spares: &mut SpareFiles<'_>) -> Result<Recovered, LogError> {
    let disk = spares.disk;
    let length = segment_length(spares.options.segment_bytes);
    let name = spare_name(spares.next);
    spares.next += 1;
    let Spare { file, .. } = create_spare(disk, name.clone(), length)?;
    let segment = Segment { number: FIRST_SEGMENT, length, salt: new_salt(), file };
    let header = SegmentHeader {
        number: FIRST_SEGMENT,
        length,
        salt: segment.salt,
        epoch: 0,
        previous_end: 0,
        purged: None,
        last: None,
        committed: None,
    };
    begin_segment(disk, &segment, &name, &header)?;
    Ok(Recovered {
        segments: VecDeque::from([Arc::new(segment)]),
        leftover: Vec::new(),
        index: Index::new(None, None),
        committed: None,
        epoch: 0,
        tail: Tail { synced: RECORDS_START, end: RECORDS_START, unsynced: Vec::new() },
        vote: None,
    })
}

/// Puts the end of the newest segment on disk and returns where the next record goes.
///
/// The bytes are written again: after a failed sync the kernel may hold them as clean without the
/// disk having them. The mark carries the new epoch, so the remains of a torn write behind it are
/// never taken for records, whatever is written in front of them.
fn secure_tail(disk: &dyn Disk, segment: &Segment, tail: &Tail, epoch: u32) -> Result<u32, LogError> {
    let mut bytes = tail.unsynced.clone();
    let mut end = tail.end;
    if RECORD_HEADER_BYTES <= segment.length.saturating_sub(end) {
        let mark = RecordHeader {
            record_type: RecordType::Mark,
            kind: 0,
            payload_bytes: 0,
            synced: tail.synced,
            segment: segment.number,
            salt: segment.salt,
            epoch,
            id: EntryId { term: 0, index: 0 },
        };
        encode_record(&mut bytes, &mark, &[]);
        end += RECORD_HEADER_BYTES;
    }
    segment
        .file
        .write_at(&bytes, u64::from(tail.synced))
        .and_then(|()| segment.file.sync())
        .map_err(|source| LogError::Io { action: "writing", path: disk.path(&segment_name(segment.number)), source })?;
    Ok(end)
}

/// Files that wait to become segments.
struct SpareFiles<'a> {
    disk: &'a dyn Disk,
    options: &'a LogOptions,
    files: Vec<Spare>,
    next: u64,
}

impl<'a> SpareFiles<'a> {
    fn new(disk: &'a dyn Disk, names: &[String], options: &'a LogOptions) -> Self {
        let next = names.iter().filter_map(|name| spare_number(name)).max().map_or(1, |number| number + 1);
        Self { disk, options, files: Vec::new(), next }
    }

    /// Takes the spare files that are there and the segments that are free; deletes what is not
    /// wanted.
    fn collect(&mut self, names: &[String], free: &[u32]) -> Result<(), LogError> {
        let disk = self.disk;
        let failed = |name: &str, source| LogError::Io { action: "recycling", path: disk.path(name), source };
        let length = segment_length(self.options.segment_bytes);
        for &number in free {
            let name = segment_name(number);
            let spare = spare_name(self.next);
            self.next += 1;
            disk.rename(&name, &spare).map_err(|source| failed(&name, source))?;
            self.take(&spare, length).map_err(|source| failed(&spare, source))?;
        }
        for name in names.iter().filter(|name| spare_number(name).is_some()) {
            if self.files.iter().any(|spare| &spare.name == name) {
                continue;
            }
            self.take(name, length).map_err(|source| failed(name, source))?;
        }
        disk.sync_directory().map_err(|source| failed("", source))
    }

    fn take(&mut self, name: &str, length: u32) -> io::Result<()> {
        let file = self.disk.open(name)?;
        if self.files.len() < self.options.recycle && file.length()? == u64::from(length) {
            self.files.push(Spare { name: name.to_owned(), length, file });
            return Ok(());
        }
        self.disk.remove(name)
    }
}

fn spare_number(name: &str) -> Option<u64> {
    let number = name.strip_prefix("spare-")?.parse().ok()?;
    (spare_name(number) == name).then_some(number)
}
