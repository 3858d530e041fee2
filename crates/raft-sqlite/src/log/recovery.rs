//! Reading the log back from its files. Nothing is changed here: what has to be put right is done
//! in [`super::open`], once all files are known to be good.
//!
//! A segment that is not the newest was synced to its end before the next one was made, and the
//! next one's header says where it ends: every byte up to there must be good. In the newest segment
//! the records end at the first place X where no good record stands. It is a torn write, and cut
//! off, unless some record behind X says (`synced`) that X had been synced before that record was
//! written: then X is damage. What was acknowledged is thus lost without notice only if the very
//! last batch is damaged and nothing was written after it, not even the mark of an idle or a
//! stopped log; no format can tell that case from a torn write.

use std::collections::VecDeque;
use std::sync::Arc;

use super::disk::Disk;
use super::index::Index;
use super::placement::{Segment, segment_name};
use super::record::{
    Decoded, FORMAT_VERSION, HeaderError, Position, RECORD_ALIGNMENT, RECORD_HEADER_BYTES, RECORDS_START, RecordHeader,
    RecordType, SEGMENT_HEADER_BYTES, SegmentHeader, decode_record, record_bytes,
};
use super::vote::{FoundVote, VOTE_FILE};
use super::{EntryId, LogError};

/// A log as its files have it.
#[derive(Debug)]
pub(super) struct Recovered {
    /// In order, without a gap; at least one.
    pub(super) segments: VecDeque<Arc<Segment>>,
    /// Segments from before a purge whose removal a crash undid.
    pub(super) leftover: Vec<u32>,
    pub(super) index: Index,
    pub(super) committed: Option<EntryId>,
    /// The largest epoch seen.
    pub(super) epoch: u32,
    pub(super) tail: Tail,
    pub(super) vote: Option<FoundVote>,
}

/// The end of the newest segment.
#[derive(Debug)]
pub(super) struct Tail {
    /// Records before this offset are known to have been synced.
    pub(super) synced: u32,
    /// Where the next record goes.
    pub(super) end: u32,
    /// The bytes in between: read, but perhaps only from the kernel's memory.
    pub(super) unsynced: Vec<u8>,
}

/// Reads all files; `None` when there is no log.
///
/// # Errors
/// [`LogError::Damaged`], [`LogError::Missing`], [`LogError::NewerFormat`], [`LogError::Io`].
pub(super) fn recover(disk: &dyn Disk, names: &[String]) -> Result<Option<Recovered>, LogError> {
    let vote = FoundVote::read(disk, names)?;
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| segment_number(name)).collect();
    numbers.sort_unstable();
    let Some(&newest) = numbers.last() else {
        return match vote {
            None => Ok(None),
            Some(_) => Err(LogError::Missing {
                path: disk.path(&segment_name(1)),
                detail: "there is a vote file, but no segment".to_owned(),
            }),
        };
    };
    // Without a gap up to the newest.
    let run = numbers.iter().rev().zip((1..=newest).rev()).take_while(|(found, expected)| *found == expected).count();
    let leftover = numbers[..numbers.len() - run].to_vec();
    let numbers = &numbers[numbers.len() - run..];

    let mut opened = Vec::with_capacity(numbers.len());
    for &number in numbers {
        opened.push(open_segment(disk, number)?);
    }
    let first = opened[0].1;
    let mut replay = Replay {
        index: Index::new(first.purged, first.last),
        committed: first.committed,
        epoch: first.epoch,
        synced: RECORDS_START,
    };
    let mut tail = None;
    for (place, (segment, header)) in opened.iter().enumerate() {
        replay.begin(disk, header)?;
        let mut bytes = vec![0; segment.length as usize];
        segment.file.read_at(&mut bytes, 0).map_err(|source| reading(disk, segment.number, source))?;
        match opened.get(place + 1) {
            Some((_, next)) => replay.sealed(disk, segment, &bytes, next.previous_end)?,
            None => {
                let end = replay.newest(disk, segment, &bytes)?;
                let synced = replay.synced;
                tail = Some(Tail { synced, end, unsynced: bytes[synced as usize..end as usize].to_vec() });
            }
        }
    }
    if replay.index.missing() {
        return Err(LogError::Missing {
            path: disk.path(&segment_name(opened[0].0.number.saturating_sub(1))),
            detail: format!(
                "segment {} goes on after entry {}, and entries before it are not purged",
                opened[0].0.number,
                first.last.map_or(0, |last| last.index)
            ),
        });
    }
    let tail = tail.expect("invariant: there is a newest segment");
    // The vote file is made right after the first segment, before any record.
    if vote.is_none() && (newest > 1 || tail.end > RECORDS_START) {
        return Err(LogError::Missing {
            path: disk.path(VOTE_FILE),
            detail: "without it this member could vote twice in one term".to_owned(),
        });
    }
    replay.forget_committed_beyond_last();
    Ok(Some(Recovered {
        segments: opened.into_iter().map(|(segment, _)| segment).collect(),
        leftover,
        committed: replay.committed,
        index: replay.index,
        epoch: replay.epoch,
        tail,
        vote,
    }))
}

/// The number in a segment's name.
fn segment_number(name: &str) -> Option<u32> {
    let number = name.strip_prefix("segment-")?.parse().ok()?;
    (number > 0 && segment_name(number) == name).then_some(number)
}

fn reading(disk: &dyn Disk, number: u32, source: std::io::Error) -> LogError {
    LogError::Io { action: "reading", path: disk.path(&segment_name(number)), source }
}

fn damaged(disk: &dyn Disk, number: u32, offset: u32, detail: impl Into<String>) -> LogError {
    LogError::Damaged { path: disk.path(&segment_name(number)), offset: u64::from(offset), detail: detail.into() }
}

/// Opens a segment and reads its header, which was synced before the file got its name.
fn open_segment(disk: &dyn Disk, number: u32) -> Result<(Arc<Segment>, SegmentHeader), LogError> {
    let file = disk.open(&segment_name(number)).map_err(|source| reading(disk, number, source))?;
    let length = file.length().map_err(|source| reading(disk, number, source))?;
    if length < u64::from(RECORDS_START) {
        return Err(damaged(disk, number, 0, format!("the file has only {length} bytes")));
    }
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    file.read_at(&mut bytes, 0).map_err(|source| reading(disk, number, source))?;
    let header = SegmentHeader::decode(&bytes).map_err(|error| match error {
        HeaderError::Damaged(detail) => damaged(disk, number, 0, detail),
        HeaderError::Newer(found) => {
            LogError::NewerFormat { path: disk.path(&segment_name(number)), found, supported: FORMAT_VERSION }
        }
    })?;
    if header.number != number {
        return Err(damaged(disk, number, 0, format!("it is segment {} under another name", header.number)));
    }
    if header.length < RECORDS_START || length < u64::from(header.length) {
        return Err(damaged(
            disk,
            number,
            0,
            format!("the file has {length} bytes, and was made with {}", header.length),
        ));
    }
    Ok((Arc::new(Segment { number, length: header.length, salt: header.salt, file }), header))
}

/// The state of the log as records are read.
struct Replay {
    index: Index,
    committed: Option<EntryId>,
    epoch: u32,
    /// The largest `synced` of the segment being read.
    synced: u32,
}

impl Replay {
    /// Checks that a segment begins where the one before it ended.
    fn begin(&mut self, disk: &dyn Disk, header: &SegmentHeader) -> Result<(), LogError> {
        if header.purged != self.index.purged() || header.last != self.index.last() || header.epoch < self.epoch {
            return Err(damaged(
                disk,
                header.number,
                0,
                format!(
                    "it begins after entry {:?} (purged {:?}), but the segment before it ends with {:?} (purged {:?})",
                    header.last,
                    header.purged,
                    self.index.last(),
                    self.index.purged()
                ),
            ));
        }
        self.epoch = header.epoch;
        self.committed = header.committed;
        self.synced = RECORDS_START;
        Ok(())
    }

    /// Replays a segment whose records must be good up to `end`.
    fn sealed(&mut self, disk: &dyn Disk, segment: &Segment, bytes: &[u8], end: u32) -> Result<(), LogError> {
        let stopped = self.records(disk, segment, &bytes[..bytes.len().min(end as usize)])?;
        if stopped == end {
            return Ok(());
        }
        Err(damaged(
            disk,
            segment.number,
            stopped,
            format!("no good record is there, and the segment was complete up to {end}"),
        ))
    }

    /// Replays the newest segment and returns where its records end.
    fn newest(&mut self, disk: &dyn Disk, segment: &Segment, bytes: &[u8]) -> Result<u32, LogError> {
        let end = self.records(disk, segment, bytes)?;
        let mut behind = end + RECORD_ALIGNMENT;
        let mut torn_records = 0u32;
        while let Some(candidate) = bytes.get(behind as usize..)
            && candidate.len() >= RECORD_HEADER_BYTES as usize
        {
            if let Decoded::Record(header, _) | Decoded::BadPayload(header) =
                decode_record(candidate, segment.number, segment.salt)
            {
                if header.synced > end {
                    return Err(damaged(
                        disk,
                        segment.number,
                        end,
                        format!(
                            "no good record is there, but the record at {behind} was written when all up to {} was on disk",
                            header.synced
                        ),
                    ));
                }
                torn_records += 1;
            }
            behind += RECORD_ALIGNMENT;
        }
        if torn_records > 0 {
            tracing::warn!(
                segment = segment.number,
                offset = end,
                torn_records,
                "the Raft log ends in a write that a crash cut short; what it held was never acknowledged and is dropped"
            );
        }
        Ok(end)
    }

    /// Replays records up to the first place where there is none; returns that place.
    fn records(&mut self, disk: &dyn Disk, segment: &Segment, bytes: &[u8]) -> Result<u32, LogError> {
        let mut offset = RECORDS_START;
        while let Some(rest) = bytes.get(offset as usize..) {
            let Decoded::Record(header, payload) = decode_record(rest, segment.number, segment.salt) else {
                break;
            };
            if header.epoch < self.epoch {
                // The remains of a torn write that an earlier open cut off, behind what was written
                // since.
                break;
            }
            if header.synced > offset || header.synced < self.synced {
                let detail = format!("the record claims that all up to {} was on disk", header.synced);
                return Err(damaged(disk, segment.number, offset, detail));
            }
            let size = record_bytes(payload.len());
            if size as usize > rest.len() {
                break;
            }
            if !self.apply(&header, Position::new(segment.number, offset)) {
                let detail = format!(
                    "entry {} stands where the log goes on at {}",
                    header.id.index,
                    self.index.next().unwrap_or(0)
                );
                return Err(damaged(disk, segment.number, offset, detail));
            }
            self.epoch = header.epoch;
            self.synced = header.synced;
            offset += size;
        }
        Ok(offset)
    }

    fn forget_committed_beyond_last(&mut self) {
        let last = self.index.last().map(|last| last.index);
        self.committed = self.committed.filter(|committed| Some(committed.index) <= last);
    }

    /// False when the record cannot stand here.
    fn apply(&mut self, header: &RecordHeader, position: Position) -> bool {
        match header.record_type {
            RecordType::Entry => return self.index.push(header.id, position, header.payload_bytes),
            RecordType::TruncateAfter => {
                self.index.truncate_after(header.id);
                self.forget_committed_beyond_last();
            }
            RecordType::TruncateAll => {
                self.index.truncate_all();
                self.forget_committed_beyond_last();
            }
            RecordType::Purge => self.index.purge(header.id),
            RecordType::Committed => self.committed = Some(header.id),
            RecordType::Mark => {}
        }
        true
    }
}
