//! Which segment, and where in it, each record goes; and the files that wait to become segments.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::disk::{Disk, DiskFile};
use super::record::{Position, RECORDS_START, SegmentHeader, new_salt};
use super::{EntryId, LogError};

/// Room at the end of each segment that only records other than entries may use, so that a purge
/// can be recorded, and give room back, on a full disk.
pub(super) const CONTROL_RESERVE_BYTES: u32 = 4096;
/// Files have a multiple of this length.
const LENGTH_UNIT: u64 = 4096;
const MIN_SEGMENT_BYTES: u64 = 16 * 1024;
const MAX_SEGMENT_BYTES: u64 = 1024 * 1024 * 1024;

/// Name of the segment with this number.
pub(super) fn segment_name(number: u32) -> String {
    format!("segment-{number:010}")
}

/// Name of the spare file with this number.
pub(super) fn spare_name(number: u64) -> String {
    format!("spare-{number:010}")
}

/// The length of ordinary segments for this option.
pub(super) fn segment_length(segment_bytes: u64) -> u32 {
    // Fits: the bound is 1 GiB.
    segment_bytes.clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES).next_multiple_of(LENGTH_UNIT) as u32
}

/// An open segment file.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u32,
    pub(super) length: u32,
    pub(super) salt: u32,
    pub(super) file: Arc<dyn DiskFile>,
}

/// A file with its room reserved, waiting to become a segment.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) name: String,
    pub(super) length: u32,
    pub(super) file: Arc<dyn DiskFile>,
}

/// A segment that is to be begun.
#[derive(Debug)]
pub(super) struct Rotation {
    pub(super) segment: Arc<Segment>,
    pub(super) spare_name: String,
    pub(super) header: SegmentHeader,
}

/// The log right before a record: what the header says if the record begins a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Before {
    pub(super) purged: Option<EntryId>,
    pub(super) last: Option<EntryId>,
    pub(super) committed: Option<EntryId>,
}

/// How far placing had come, to take a call's places back.
#[derive(Debug)]
pub(super) struct Savepoint {
    segments: usize,
    cursor: u32,
}

/// The segments in use and the place for the next record.
#[derive(Debug)]
pub(super) struct Placement {
    /// In order of their numbers, which have no gaps; the next record goes into the last one. Never
    /// empty.
    pub(super) segments: VecDeque<Arc<Segment>>,
    /// Where in it.
    pub(super) cursor: u32,
    pub(super) spares: Vec<Spare>,
    pub(super) next_spare: u64,
    /// Length of ordinary segments.
    pub(super) segment_length: u32,
    /// Number of this open.
    pub(super) epoch: u32,
}

impl Placement {
    /// Where the next record goes if it fits.
    pub(super) fn end(&self) -> Position {
        Position::new(self.newest().number, self.cursor)
    }

    pub(super) fn newest(&self) -> &Arc<Segment> {
        self.segments.back().expect("invariant: a log has a segment")
    }

    pub(super) fn segment(&self, number: u32) -> &Arc<Segment> {
        let first = self.segments.front().expect("invariant: a log has a segment").number;
        &self.segments[(number - first) as usize]
    }

    /// Takes a place in the newest segment, leaving `reserve` bytes at its end.
    pub(super) fn place_here(&mut self, bytes: u32, reserve: u32) -> Option<Position> {
        let room = self.newest().length.saturating_sub(reserve).saturating_sub(self.cursor);
        (bytes <= room).then(|| {
            let position = self.end();
            self.cursor += bytes;
            position
        })
    }

    /// Takes a place, in a new segment if need be.
    ///
    /// # Errors
    /// Without effect: [`LogError::DiskFull`], [`LogError::Io`].
    pub(super) fn place(
        &mut self,
        disk: &dyn Disk,
        bytes: u32,
        reserve: u32,
        before: Before,
    ) -> Result<(Option<Rotation>, Position), LogError> {
        if let Some(position) = self.place_here(bytes, reserve) {
            return Ok((None, position));
        }
        let needed = u64::from(RECORDS_START) + u64::from(bytes) + u64::from(CONTROL_RESERVE_BYTES);
        // Fits: a record is at most 1 GiB and a bit.
        let spare = self.take_spare(disk, needed.next_multiple_of(LENGTH_UNIT) as u32)?;
        let number = self.newest().number + 1;
        let segment = Arc::new(Segment { number, length: spare.length, salt: new_salt(), file: spare.file });
        let header = SegmentHeader {
            number,
            length: segment.length,
            salt: segment.salt,
            epoch: self.epoch,
            previous_end: self.cursor,
            purged: before.purged,
            last: before.last,
            committed: before.committed,
        };
        self.segments.push_back(Arc::clone(&segment));
        self.cursor = RECORDS_START;
        let position =
            self.place_here(bytes, reserve).expect("invariant: a new segment has room for the record it is made for");
        Ok((Some(Rotation { segment, spare_name: spare.name, header }), position))
    }

    pub(super) fn savepoint(&self) -> Savepoint {
        Savepoint { segments: self.segments.len(), cursor: self.cursor }
    }

    /// Takes back all places since the savepoint, with the segments begun for them.
    pub(super) fn roll_back(
        &mut self,
        disk: &dyn Disk,
        savepoint: Savepoint,
        rotations: impl Iterator<Item = Rotation>,
    ) {
        self.segments.truncate(savepoint.segments);
        self.cursor = savepoint.cursor;
        for Rotation { segment, spare_name: name, .. } in rotations {
            if segment.length == self.segment_length {
                let file = Arc::clone(&segment.file);
                self.spares.push(Spare { name, length: segment.length, file });
            } else if let Err(error) = disk.remove(&name) {
                // The next open deletes it.
                tracing::warn!(%error, name, "an unused file of the Raft log could not be deleted");
            }
        }
    }

    /// A spare of at least `needed` bytes, made if there is none.
    fn take_spare(&mut self, disk: &dyn Disk, needed: u32) -> Result<Spare, LogError> {
        // A file that a reader still holds as an old segment must not be written to; no new reader
        // can come.
        let free = self.spares.iter().position(|spare| spare.length >= needed && Arc::strong_count(&spare.file) == 1);
        if let Some(free) = free {
            return Ok(self.spares.swap_remove(free));
        }
        let length = needed.max(self.segment_length);
        let name = self.new_spare_name();
        create_spare(disk, name, length)
    }

    /// A name for a spare file that is about to be made.
    pub(super) fn new_spare_name(&mut self) -> String {
        let name = spare_name(self.next_spare);
        self.next_spare += 1;
        name
    }

    /// Bytes of records that fit without a new file.
    pub(super) fn ready_bytes(&self) -> u64 {
        let room = |length: u32, start: u32| u64::from(length.saturating_sub(CONTROL_RESERVE_BYTES + start));
        let spare: u64 = self.spares.iter().map(|spare| room(spare.length, RECORDS_START)).sum();
        room(self.newest().length, self.cursor) + spare
    }
}

/// Makes a spare file.
///
/// # Errors
/// [`LogError::DiskFull`], [`LogError::Io`]; nothing is left behind.
pub(super) fn create_spare(disk: &dyn Disk, name: String, length: u32) -> Result<Spare, LogError> {
    match disk.create(&name, u64::from(length)) {
        Ok(file) => Ok(Spare { name, length, file }),
        Err(source) if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            Err(LogError::DiskFull { path: disk.path(&name), source })
        }
        Err(source) => Err(LogError::Io { action: "making", path: disk.path(&name), source }),
    }
}
