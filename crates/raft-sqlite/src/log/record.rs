//! The bytes of a segment: its header and its records. docs/formats.md, "Raft log", is the
//! specification.
//!
//! All integers are little-endian. A record starts at a multiple of 8 and never spans segments. Its
//! header has a checksum of its own, so that a record is recognised, with its length, even where
//! its payload is damaged. Segment number and salt keep the remains of an earlier use of the file
//! from being taken for records, as well as payloads that look like records.

use std::hash::{BuildHasher, Hasher, RandomState};

use super::EntryId;

/// Format version of segments and the vote file that this program writes.
pub(super) const FORMAT_VERSION: u32 = 1;
/// Where records start in a segment; before it stands the segment header, in a disk block of its
/// own.
pub(super) const RECORDS_START: u32 = 4096;
/// Bytes of a record before its payload.
pub(super) const RECORD_HEADER_BYTES: u32 = 48;
/// Records start at multiples of this.
pub(super) const RECORD_ALIGNMENT: u32 = 8;
/// Largest payload of one entry in bytes: keeps offsets within 32 bits with ample room.
pub const MAX_PAYLOAD_BYTES: usize = 1024 * 1024 * 1024;

/// Bytes of a segment header that carry meaning.
pub(super) const SEGMENT_HEADER_BYTES: usize = 128;
const SEGMENT_MAGIC: &[u8; 8] = b"RSQLLOG\0";
const SEGMENT_CRC_AT: usize = SEGMENT_HEADER_BYTES - 4;
const FLAG_PURGED: u32 = 1;
const FLAG_LAST: u32 = 2;
const FLAG_COMMITTED: u32 = 4;

/// A place in the log: segment number and offset in it. Places grow in the order of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position(u64);

impl Position {
    pub(super) fn new(segment: u32, offset: u32) -> Self {
        Self(u64::from(segment) << 32 | u64::from(offset))
    }

    pub(super) fn segment(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn offset(self) -> u32 {
        self.0 as u32
    }
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RecordType {
    /// The entry (term, index), with its payload.
    Entry = 1,
    /// Entries after (term, index) are dropped.
    TruncateAfter = 2,
    /// All entries are dropped that are not purged.
    TruncateAll = 3,
    /// Entries up to (term, index) are purged.
    Purge = 4,
    /// Entries up to (term, index) are known to be committed.
    Committed = 5,
    /// Nothing but what every record says: how far the segment is synced.
    Mark = 6,
}

impl RecordType {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => RecordType::Entry,
            2 => RecordType::TruncateAfter,
            3 => RecordType::TruncateAll,
            4 => RecordType::Purge,
            5 => RecordType::Committed,
            6 => RecordType::Mark,
            _ => return None,
        })
    }
}

/// A record's header, without its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub(super) record_type: RecordType,
    /// [`super::Entry::kind`]; 0 in other records.
    pub(super) kind: u8,
    pub(super) payload_bytes: u32,
    /// Everything before this offset of the segment was synced before this record was written.
    pub(super) synced: u32,
    pub(super) segment: u32,
    pub(super) salt: u32,
    /// Grows by one at each open.
    pub(super) epoch: u32,
    /// (0, 0) where the type has no use for it.
    pub(super) id: EntryId,
}

/// Bytes a record takes in a segment.
pub(super) fn record_bytes(payload_bytes: usize) -> u32 {
    // Payloads are at most MAX_PAYLOAD_BYTES, so this neither overflows nor truncates.
    (payload_bytes as u32 + RECORD_HEADER_BYTES).next_multiple_of(RECORD_ALIGNMENT)
}

/// Appends the bytes of a record; `payload` must have the header's length.
pub(super) fn encode_record(buffer: &mut Vec<u8>, header: &RecordHeader, payload: &[u8]) {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    buffer.extend_from_slice(&header.payload_bytes.to_le_bytes());
    buffer.extend_from_slice(&header.synced.to_le_bytes());
    buffer.extend_from_slice(&header.segment.to_le_bytes());
    buffer.extend_from_slice(&header.salt.to_le_bytes());
    buffer.extend_from_slice(&header.id.term.to_le_bytes());
    buffer.extend_from_slice(&header.id.index.to_le_bytes());
    buffer.extend_from_slice(&header.epoch.to_le_bytes());
    buffer.extend_from_slice(&[header.record_type as u8, header.kind, 0, 0]);
    let crc = crc32c::crc32c(&buffer[start + 4..]);
    buffer[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    buffer.extend_from_slice(payload);
    buffer.resize(start + record_bytes(payload.len()) as usize, 0);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// What stands where a record could be.
#[derive(Debug)]
pub(super) enum Decoded<'a> {
    /// A whole record.
    Record(RecordHeader, &'a [u8]),
    /// A header that is good, with a payload that is not.
    BadPayload(RecordHeader),
    /// No record of this segment.
    Nothing,
}

/// Reads the record at the start of `bytes` if one of this segment is there.
pub(super) fn decode_record(bytes: &[u8], segment: u32, salt: u32) -> Decoded<'_> {
    let header_bytes = RECORD_HEADER_BYTES as usize;
    // Number and salt first: the search for records behind damage tries every place.
    if bytes.len() < header_bytes || u32_at(bytes, 16) != segment || u32_at(bytes, 20) != salt {
        return Decoded::Nothing;
    }
    let Some(record_type) = RecordType::from_byte(bytes[44]) else {
        return Decoded::Nothing;
    };
    if crc32c::crc32c(&bytes[4..header_bytes]) != u32_at(bytes, 0) {
        return Decoded::Nothing;
    }
    let header = RecordHeader {
        record_type,
        kind: bytes[45],
        payload_bytes: u32_at(bytes, 8),
        synced: u32_at(bytes, 12),
        segment,
        salt,
        epoch: u32_at(bytes, 40),
        id: EntryId { term: u64_at(bytes, 24), index: u64_at(bytes, 32) },
    };
    let payload = bytes[header_bytes..].get(..header.payload_bytes as usize);
    match payload {
        Some(payload) if crc32c::crc32c(payload) == u32_at(bytes, 4) => Decoded::Record(header, payload),
        _ => Decoded::BadPayload(header),
    }
}

/// The first block of a segment: the log's state before its first record, so that replay can start
/// at any segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) number: u32,
    /// Length of the file in bytes.
    pub(super) length: u32,
    pub(super) salt: u32,
    pub(super) epoch: u32,
    /// Where the records of the segment before end; 0 when this is the first one ever.
    pub(super) previous_end: u32,
    pub(super) purged: Option<EntryId>,
    /// The newest entry, or `purged`.
    pub(super) last: Option<EntryId>,
    pub(super) committed: Option<EntryId>,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        let mut flags = 0;
        for (id, flag, at) in
            [(self.purged, FLAG_PURGED, 48), (self.last, FLAG_LAST, 64), (self.committed, FLAG_COMMITTED, 80)]
        {
            if let Some(id) = id {
                flags |= flag;
                bytes[at..at + 8].copy_from_slice(&id.term.to_le_bytes());
                bytes[at + 8..at + 16].copy_from_slice(&id.index.to_le_bytes());
            }
        }
        bytes[..8].copy_from_slice(SEGMENT_MAGIC);
        for (value, at) in [
            (FORMAT_VERSION, 8),
            (self.number, 12),
            (self.length, 16),
            (self.salt, 20),
            (self.epoch, 24),
            (self.previous_end, 28),
            (flags, 32),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[..SEGMENT_CRC_AT]);
        bytes[SEGMENT_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`HeaderError`]. Magic, version and checksum keep their places in every version, so a
    /// damaged header is not taken for one of a newer version.
    pub(super) fn decode(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Result<Self, HeaderError> {
        if &bytes[..8] != SEGMENT_MAGIC {
            return Err(HeaderError::Damaged("it does not start as a segment"));
        }
        if crc32c::crc32c(&bytes[..SEGMENT_CRC_AT]) != u32_at(bytes, SEGMENT_CRC_AT) {
            return Err(HeaderError::Damaged("the segment header's checksum is wrong"));
        }
        let version = u32_at(bytes, 8);
        if version > FORMAT_VERSION {
            return Err(HeaderError::Newer(version));
        }
        if version == 0 {
            return Err(HeaderError::Damaged("format version 0 does not exist"));
        }
        let flags = u32_at(bytes, 32);
        let id =
            |flag, at| (flags & flag != 0).then(|| EntryId { term: u64_at(bytes, at), index: u64_at(bytes, at + 8) });
        Ok(Self {
            number: u32_at(bytes, 12),
            length: u32_at(bytes, 16),
            salt: u32_at(bytes, 20),
            epoch: u32_at(bytes, 24),
            previous_end: u32_at(bytes, 28),
            purged: id(FLAG_PURGED, 48),
            last: id(FLAG_LAST, 64),
            committed: id(FLAG_COMMITTED, 80),
        })
    }
}

/// Why a header cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    Damaged(&'static str),
    Newer(u32),
}

/// A number that neither an earlier use of a file nor a client that writes payloads can know.
pub(super) fn new_salt() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}
