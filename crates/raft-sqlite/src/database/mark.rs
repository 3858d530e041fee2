//! The applied mark: which log entry, version and state hash a database file holds.
//!
//! NAME.applied has two slots of 512 bytes, written in turn and synced; the valid one with the higher sequence counts. Layout of a
//! slot, little endian (docs/formats.md, "Applied mark"):
//! ```text
//!  0  8 bytes "RSQMARK\0"   8  u32 format version = 1   12  u32 reserved, 0
//! 16  u64 sequence         24  u64 term                 32  u64 index
//! 40  u64 version          48  u128 state hash          64  u32 CRC32C of bytes 0 to 63
//! ```

use std::path::Path;

use bytes::{Buf as _, BufMut as _};

use super::DatabaseError;
use crate::page::source::{Disk, DiskFile};
use crate::page::{StateHash, Version};

const MAGIC: &[u8; 8] = b"RSQMARK\0";
const FORMAT_VERSION: u32 = 1;
/// Bytes of a slot that are used.
pub(crate) const MARK_BYTES: usize = 68;
const SLOT_BYTES: u64 = 512;

/// A Raft log id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPosition {
    /// The leader's term.
    pub term: u64,
    /// The entry's index.
    pub index: u64,
}

/// What a database file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AppliedMark {
    pub position: LogPosition,
    pub version: Version,
    pub state_hash: StateHash,
}

/// A slot's bytes.
pub(crate) fn encode(mark: &AppliedMark, sequence: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(MARK_BYTES);
    out.put_slice(MAGIC);
    out.put_u32_le(FORMAT_VERSION);
    out.put_u32_le(0);
    out.put_u64_le(sequence);
    out.put_u64_le(mark.position.term);
    out.put_u64_le(mark.position.index);
    out.put_u64_le(mark.version.0);
    out.put_u128_le(mark.state_hash.0);
    let checksum = crc32c::crc32c(&out);
    out.put_u32_le(checksum);
    out
}

pub(crate) enum Slot {
    /// Never written, or torn.
    Invalid,
    Newer(u32),
    Valid(u64, AppliedMark),
}

pub(crate) fn decode(mut bytes: &[u8]) -> Slot {
    let Some((content, mut checksum)) = bytes.get(..MARK_BYTES).map(|slot| slot.split_at(MARK_BYTES - 4)) else {
        return Slot::Invalid;
    };
    if &content[..8] != MAGIC || crc32c::crc32c(content) != checksum.get_u32_le() {
        return Slot::Invalid;
    }
    bytes.advance(8);
    let format = bytes.get_u32_le();
    if format != FORMAT_VERSION {
        return Slot::Newer(format);
    }
    bytes.advance(4);
    let sequence = bytes.get_u64_le();
    let position = LogPosition { term: bytes.get_u64_le(), index: bytes.get_u64_le() };
    let version = Version(bytes.get_u64_le());
    let state_hash = StateHash(bytes.get_u128_le());
    Slot::Valid(sequence, AppliedMark { position, version, state_hash })
}

/// The newest mark in a file and its sequence; None: no file, or no mark in it yet.
pub(crate) fn read(disk: &dyn Disk, path: &Path) -> Result<Option<(u64, AppliedMark)>, DatabaseError> {
    let io = |error| DatabaseError::io(path, error);
    let Some(file) = disk.open(path, false).map_err(io)? else {
        return Ok(None);
    };
    let mut newest: Option<(u64, AppliedMark)> = None;
    for slot in 0..2 {
        let mut bytes = [0; MARK_BYTES];
        let read = file.read_at(&mut bytes, slot * SLOT_BYTES).map_err(io)?;
        match decode(&bytes[..read]) {
            Slot::Valid(sequence, mark) if newest.is_none_or(|(other, _)| sequence > other) => {
                newest = Some((sequence, mark));
            }
            Slot::Newer(found) => {
                return Err(DatabaseError::NewerFormat { path: path.to_owned(), found, known: FORMAT_VERSION });
            }
            _ => {}
        }
    }
    Ok(newest)
}

/// Where a slot stands that was written and cannot be read. None: there is none.
pub(crate) fn damaged_slot(disk: &dyn Disk, path: &Path) -> Result<Option<u64>, DatabaseError> {
    let io = |error| DatabaseError::io(path, error);
    let Some(file) = disk.open(path, false).map_err(io)? else {
        return Ok(None);
    };
    for offset in [0, SLOT_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        let read = file.read_at(&mut bytes, offset).map_err(io)?;
        if matches!(decode(&bytes[..read]), Slot::Invalid) && bytes.iter().any(|byte| *byte != 0) {
            return Ok(Some(offset));
        }
    }
    Ok(None)
}

/// Writes the next mark into the slot that is not the newest; on disk when it returns.
pub(crate) fn write(file: &dyn DiskFile, sequence: u64, mark: &AppliedMark) -> std::io::Result<()> {
    file.write_at(&encode(mark, sequence), (sequence % 2) * SLOT_BYTES)?;
    file.sync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_version_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("app.applied");
        let position = LogPosition { term: 2, index: 3 };
        let mut bytes = encode(&AppliedMark { position, version: Version(4), state_hash: StateHash(5) }, 1);
        bytes[8] = 2;
        let checksum = crc32c::crc32c(&bytes[..MARK_BYTES - 4]);
        bytes[MARK_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let error = read(&crate::page::source::SystemDisk, &path).unwrap_err();
        assert!(matches!(error, DatabaseError::NewerFormat { found: 2, known: 1, .. }), "{error}");
        assert!(error.to_string().contains("use the version that wrote it, or a newer one"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn decoding_never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn golden_bytes_and_every_flipped_bit() {
        let mark =
            AppliedMark { position: LogPosition { term: 2, index: 3 }, version: Version(4), state_hash: StateHash(5) };
        let bytes = encode(&mark, 1);
        let mut want = b"RSQMARK\0\x01\0\0\0\0\0\0\0".to_vec();
        for number in [1u64, 2, 3, 4] {
            want.extend(number.to_le_bytes());
        }
        want.extend(5u128.to_le_bytes());
        want.extend(crc32c::crc32c(&want).to_le_bytes());
        assert_eq!(bytes, want);
        assert!(matches!(decode(&bytes), Slot::Valid(1, read) if read == mark));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode(&flipped), Slot::Invalid), "bit {bit}");
        }
    }
}
