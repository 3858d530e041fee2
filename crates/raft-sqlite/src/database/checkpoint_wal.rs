//! NAME.sqlite-wal during a checkpoint: a real SQLite WAL, so that plain SQLite could open what a crash leaves, with our mark behind it.
//!
//! The log holds deltas, and a delta cannot repair a torn page. So a checkpoint first writes the changed pages here and syncs; then
//! into the database; then the mark; then this file goes. After a crash a WAL whose frames and mark are complete is written into the
//! database again, any other is dropped: the database was not touched yet.
//!
//! Layout: SQLite's WAL header (big-endian checksums), one frame per page, the last with the database's size; then a slot as in
//! [`super::mark`]. The salts are the version. Source: SQLite's "WAL-mode File Format".

use std::io;

use super::mark::{self, AppliedMark, MARK_BYTES, Slot};
use crate::page::source::DiskFile;
use crate::page::{PageNumber, PageSize, be32};

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;
/// Magic for checksums of big-endian words, and the format's version.
const MAGIC: u32 = 0x377f_0683;
const WAL_FORMAT: u32 = 3_007_000;
/// Frames written at a time.
const BATCH_BYTES: usize = 1 << 20;

/// SQLite's running WAL checksum over big-endian words. `bytes.len()` is a multiple of 8.
fn checksum(bytes: &[u8], state: &mut (u32, u32)) {
    for pair in bytes.chunks_exact(8) {
        state.0 = state.0.wrapping_add(be32(pair, 0)).wrapping_add(state.1);
        state.1 = state.1.wrapping_add(be32(pair, 4)).wrapping_add(state.0);
    }
}

/// Writes a complete WAL and its mark; on disk when it returns.
pub(crate) fn write<'a>(
    file: &dyn DiskFile,
    page_size: PageSize,
    page_count: u32,
    pages: impl ExactSizeIterator<Item = (PageNumber, &'a [u8])>,
    mark: &AppliedMark,
) -> io::Result<()> {
    file.set_length(0)?;
    let salts = mark.version.0.to_be_bytes();
    let mut state = (0, 0);
    let mut batch = Vec::with_capacity(BATCH_BYTES + page_size.bytes() * 2);
    for word in [MAGIC, WAL_FORMAT, page_size.bytes() as u32, 0] {
        batch.extend(word.to_be_bytes());
    }
    batch.extend(salts);
    checksum(&batch, &mut state);
    batch.extend(state.0.to_be_bytes());
    batch.extend(state.1.to_be_bytes());
    let mut offset = 0;
    let last = pages.len();
    for (at, (number, image)) in pages.enumerate() {
        let from = batch.len();
        batch.extend(number.0.to_be_bytes());
        batch.extend(if at + 1 == last { page_count } else { 0 }.to_be_bytes());
        checksum(&batch[from..], &mut state);
        checksum(image, &mut state);
        batch.extend(salts);
        batch.extend(state.0.to_be_bytes());
        batch.extend(state.1.to_be_bytes());
        batch.extend_from_slice(image);
        if batch.len() >= BATCH_BYTES {
            file.write_at(&batch, offset)?;
            offset += batch.len() as u64;
            batch.clear();
        }
    }
    batch.extend(mark::encode(mark, 0));
    file.write_at(&batch, offset)?;
    file.sync()
}

/// What a crash left.
pub(crate) struct CompleteWal {
    pub mark: AppliedMark,
    pub page_count: u32,
    pub page_size: PageSize,
    /// Where the images lie in the file.
    pub images: Vec<(PageNumber, u64)>,
}

/// What a WAL is.
pub(crate) enum Content {
    Complete(CompleteWal),
    /// Up to this offset it is good.
    Incomplete(u64),
}

/// Reads all of it.
pub(crate) fn read(file: &dyn DiskFile) -> io::Result<Content> {
    let mut header = [0; HEADER_BYTES];
    if file.read_at(&mut header, 0)? < HEADER_BYTES {
        return Ok(Content::Incomplete(0));
    }
    let mut state = (0, 0);
    checksum(&header[..24], &mut state);
    if be32(&header, 0) != MAGIC || be32(&header, 24) != state.0 || be32(&header, 28) != state.1 {
        return Ok(Content::Incomplete(0));
    }
    let Some(page_size) = PageSize::new(be32(&header, 8)) else {
        return Ok(Content::Incomplete(0));
    };
    let mut frame = vec![0; FRAME_HEADER_BYTES + page_size.bytes()];
    let mut images = Vec::new();
    let mut offset = HEADER_BYTES as u64;
    loop {
        if file.read_at(&mut frame, offset)? < frame.len() {
            return Ok(Content::Incomplete(offset));
        }
        checksum(&frame[..8], &mut state);
        checksum(&frame[FRAME_HEADER_BYTES..], &mut state);
        if frame[8..16] != header[16..24] || be32(&frame, 16) != state.0 || be32(&frame, 20) != state.1 {
            return Ok(Content::Incomplete(offset));
        }
        images.push((PageNumber(be32(&frame, 0)), offset + FRAME_HEADER_BYTES as u64));
        offset += frame.len() as u64;
        let page_count = be32(&frame, 4);
        if page_count > 0 {
            let mut slot = [0; MARK_BYTES];
            let read = file.read_at(&mut slot, offset)?;
            return Ok(match mark::decode(&slot[..read]) {
                Slot::Valid(_, mark) => Content::Complete(CompleteWal { mark, page_count, page_size, images }),
                _ => Content::Incomplete(offset),
            });
        }
    }
}
