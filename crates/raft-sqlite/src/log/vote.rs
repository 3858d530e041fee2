//! The vote file: two slots, both with the newest vote.
//!
//! Saving writes and syncs one slot, then the other, so at every moment one of them is whole, and a
//! slot that is damaged later has its copy beside it. An election is rare enough for two syncs.
//! docs/formats.md, "Raft log".

use std::sync::Arc;

use bytes::Bytes;

use super::LogError;
use super::disk::{Disk, DiskFile};
use super::record::FORMAT_VERSION;

/// Name of the file.
pub(super) const VOTE_FILE: &str = "vote";
/// The file while it is made.
const NEW_VOTE_FILE: &str = "vote.new";
/// Largest vote in bytes; it is a term and a member, and has to stay within one disk block.
pub const MAX_VOTE_BYTES: usize = 1024;
/// Distance of the slots: disk blocks of their own.
const SLOT_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"RSQLVOTE";
const HEADER_BYTES: usize = 32;
const CRC_AT: usize = 28;

/// The open vote file and what both its slots hold.
#[derive(Debug)]
pub(super) struct VoteFile {
    file: Arc<dyn DiskFile>,
    sequence: u64,
    vote: Option<Bytes>,
}

/// What was found in a vote file, and what is to be done to make both slots equal.
#[derive(Debug)]
pub(super) struct FoundVote {
    file: VoteFile,
    /// The slot that does not hold the newest vote.
    stale_slot: Option<usize>,
}

impl FoundVote {
    /// Reads the file; `None` when it is not there. Changes nothing.
    pub(super) fn read(disk: &dyn Disk, names: &[String]) -> Result<Option<Self>, LogError> {
        if !names.iter().any(|name| name == VOTE_FILE) {
            return Ok(None);
        }
        let failed = |source| LogError::Io { action: "reading", path: disk.path(VOTE_FILE), source };
        let file = disk.open(VOTE_FILE).map_err(failed)?;
        let damaged = |offset: usize, detail: &str| LogError::Damaged {
            path: disk.path(VOTE_FILE),
            offset: offset as u64,
            detail: detail.to_owned(),
        };
        if file.length().map_err(failed)? < 2 * SLOT_BYTES as u64 {
            return Err(damaged(0, "the file is shorter than its two slots"));
        }
        let mut bytes = vec![0; 2 * SLOT_BYTES];
        file.read_at(&mut bytes, 0).map_err(failed)?;
        let (first, second) = bytes.split_at(SLOT_BYTES);
        let slots = [decode_slot(first), decode_slot(second)];
        let mut newest: Option<(usize, u64, Option<Bytes>)> = None;
        for (number, slot) in slots.iter().enumerate() {
            match slot {
                Slot::Newer(found) => {
                    return Err(LogError::NewerFormat {
                        path: disk.path(VOTE_FILE),
                        found: *found,
                        supported: FORMAT_VERSION,
                    });
                }
                Slot::Good(sequence, vote) if newest.as_ref().is_none_or(|newest| newest.1 < *sequence) => {
                    newest = Some((number, *sequence, vote.clone()));
                }
                Slot::Good(..) | Slot::Bad => {}
            }
        }
        let Some((number, sequence, vote)) = newest else {
            return Err(damaged(0, "neither copy of the vote can be read"));
        };
        let other = 1 - number;
        let stale_slot = (slots[other] != slots[number]).then_some(other);
        Ok(Some(Self { file: VoteFile { file, sequence, vote }, stale_slot }))
    }

    /// Makes both slots equal and durable.
    pub(super) fn repair(self, disk: &dyn Disk) -> Result<VoteFile, LogError> {
        if let Some(stale) = self.stale_slot {
            // After a failed sync the newest slot may be in the kernel's memory only. It is written
            // again first: until it is durable, the other slot is the one that is.
            self.file.write(&[1 - stale, stale], true).map_err(|source| LogError::Io {
                action: "writing",
                path: disk.path(VOTE_FILE),
                source,
            })?;
        }
        Ok(self.file)
    }
}

impl VoteFile {
    /// Makes the file with no vote in it, durably.
    pub(super) fn create(disk: &dyn Disk, names: &[String]) -> Result<Self, LogError> {
        let failed = |source| LogError::Io { action: "making", path: disk.path(VOTE_FILE), source };
        if names.iter().any(|name| name == NEW_VOTE_FILE) {
            disk.remove(NEW_VOTE_FILE).map_err(failed)?;
        }
        let file = disk.create(NEW_VOTE_FILE, 2 * SLOT_BYTES as u64).map_err(failed)?;
        let file = Self { file, sequence: 1, vote: None };
        file.write(&[0, 1], true).map_err(failed)?;
        disk.rename(NEW_VOTE_FILE, VOTE_FILE).map_err(failed)?;
        disk.sync_directory().map_err(failed)?;
        Ok(file)
    }

    /// The vote in both slots.
    pub(super) fn vote(&self) -> Option<&Bytes> {
        self.vote.as_ref()
    }

    /// Replaces the vote; durable when it returns, with `sync`.
    pub(super) fn save(&mut self, vote: Bytes, sync: bool) -> std::io::Result<()> {
        self.sequence += 1;
        self.vote = Some(vote);
        self.write(&[0, 1], sync)
    }

    fn write(&self, slots: &[usize], sync: bool) -> std::io::Result<()> {
        let bytes = encode_slot(self.sequence, self.vote.as_deref());
        for slot in slots {
            self.file.write_at(&bytes, (slot * SLOT_BYTES) as u64)?;
            if sync {
                self.file.sync()?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Slot {
    Good(u64, Option<Bytes>),
    Bad,
    Newer(u32),
}

/// The bytes of a slot, without the rest of its block.
pub(super) fn encode_slot(sequence: u64, vote: Option<&[u8]>) -> Vec<u8> {
    let payload = vote.unwrap_or_default();
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&sequence.to_le_bytes());
    bytes[24] = u8::from(vote.is_some());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_AT]), payload);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn decode_slot(bytes: &[u8]) -> Slot {
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let payload_bytes = u32_at(12) as usize;
    if &bytes[..8] != MAGIC || payload_bytes > SLOT_BYTES - HEADER_BYTES {
        return Slot::Bad;
    }
    let payload = &bytes[HEADER_BYTES..HEADER_BYTES + payload_bytes];
    if crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_AT]), payload) != u32_at(CRC_AT) {
        return Slot::Bad;
    }
    match u32_at(8) {
        0 => return Slot::Bad,
        version if version > FORMAT_VERSION => return Slot::Newer(version),
        _ => {}
    }
    let sequence = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
    Slot::Good(sequence, (bytes[24] != 0).then(|| Bytes::copy_from_slice(payload)))
}
