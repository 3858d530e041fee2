//! NAME.sums: a checksum for each page of NAME.sqlite, so that a page that the disk has changed is found before it is used.
//!
//! A page's checksum is the lower half of its part in the state hash. So all of them together, added up, are the lower half of the state
//! hash in the applied mark, and the file is checked as a whole without reading the database. They are written by whoever writes the pages
//! (checkpoint, install, redo of a checkpoint's WAL), and are on the disk before the mark.
//!
//! Blocks of 512 bytes, which a disk writes whole or not at all; little endian (docs/formats.md, "Checksums of pages"):
//! ```text
//! block 0:  0 8 bytes "RSQSUMS\0"   8 u32 format version = 1   12 u32 page size   16 zeros   508 u32 CRC32C of bytes 0 to 507
//! block n:  0 63 x u64, of the pages from 63 x (n - 1) + 1 on   504 u32 n          508 u32 CRC32C of bytes 0 to 507
//! ```

use std::io;
use std::path::Path;

use super::DatabaseError;
use crate::page::source::DiskFile;
use crate::page::{PageNumber, PageSize, StateHash, page_hash, page_sum};

const MAGIC: &[u8; 8] = b"RSQSUMS\0";
const FORMAT_VERSION: u32 = 1;
const BLOCK_BYTES: usize = 512;
const CRC_AT: usize = BLOCK_BYTES - 4;
const NUMBER_AT: usize = BLOCK_BYTES - 8;
/// Checksums in a block.
pub(super) const SUMS_PER_BLOCK: usize = 63;

/// A part of the file that is not as it was written.
pub(super) struct BadBlock {
    number: u32,
    why: String,
}

impl BadBlock {
    /// The pages whose checksums are lost; none for the header.
    pub fn pages(&self) -> std::ops::Range<u32> {
        match self.number {
            0 => 0..0,
            number => {
                let first = (number - 1) * SUMS_PER_BLOCK as u32 + 1;
                first..first + SUMS_PER_BLOCK as u32
            }
        }
    }

    pub fn error(&self, path: &Path) -> DatabaseError {
        DatabaseError::Damaged {
            path: path.to_owned(),
            offset: u64::from(self.number) * BLOCK_BYTES as u64,
            why: format!(
                "{} (moved away while the node is stopped, it is made anew, provided that the database is whole)",
                self.why
            ),
        }
    }
}

/// What the file holds.
pub(super) struct Content {
    /// Of pages 1 to the count asked for; 0 where it cannot be read.
    pub sums: Vec<u64>,
    pub bad: Vec<BadBlock>,
}

fn block_count(pages: usize) -> usize {
    1 + pages.div_ceil(SUMS_PER_BLOCK)
}

/// Bytes of the file for so many pages.
pub(super) fn length(pages: u32) -> u64 {
    (block_count(pages as usize) * BLOCK_BYTES) as u64
}

fn seal(block: &mut [u8]) {
    let crc = crc32c::crc32c(&block[..CRC_AT]);
    block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("invariant: four bytes"))
}

fn header(page_size: PageSize) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[..8].copy_from_slice(MAGIC);
    block[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    block[12..16].copy_from_slice(&(page_size.bytes() as u32).to_le_bytes());
    seal(&mut block);
    block
}

/// Block `number`, from 1, of all `sums`.
fn encode(number: usize, sums: &[u64]) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    let first = (number - 1) * SUMS_PER_BLOCK;
    for (place, sum) in block.chunks_exact_mut(8).zip(sums.iter().skip(first).take(SUMS_PER_BLOCK)) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
    block[NUMBER_AT..CRC_AT].copy_from_slice(&(number as u32).to_le_bytes());
    seal(&mut block);
    block
}

/// The checksums of pages 1 to `page_count`. None: the file is empty, it was never written.
///
/// # Errors
/// I/O errors; [`DatabaseError::NewerFormat`]. What is damaged is told in the content.
pub(super) fn read(
    file: &dyn DiskFile,
    path: &Path,
    page_size: PageSize,
    page_count: u32,
) -> Result<Option<Content>, DatabaseError> {
    let io = |error| DatabaseError::io(path, error);
    if file.length().map_err(io)? == 0 {
        return Ok(None);
    }
    let pages = page_count as usize;
    let mut bytes = vec![0; block_count(pages) * BLOCK_BYTES];
    let there = file.read_at(&mut bytes, 0).map_err(io)?;
    let mut content = Content { sums: vec![0; pages], bad: Vec::new() };
    for (number, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
        let mut bad = |why: &str| content.bad.push(BadBlock { number: number as u32, why: why.to_owned() });
        if there < (number + 1) * BLOCK_BYTES {
            bad("it ends before this block of checksums");
        } else if le32(block, CRC_AT) != crc32c::crc32c(&block[..CRC_AT]) {
            bad("a block of checksums does not have its own");
        } else if number > 0 {
            if le32(block, NUMBER_AT) as usize != number {
                bad("a block of checksums is in the place of another");
                continue;
            }
            let first = (number - 1) * SUMS_PER_BLOCK;
            for (sum, bytes) in content.sums[first..].iter_mut().zip(block[..NUMBER_AT].chunks_exact(8)) {
                *sum = u64::from_le_bytes(bytes.try_into().expect("invariant: eight bytes"));
            }
        } else if &block[..8] != MAGIC {
            bad("it does not begin as a file of checksums");
        } else if le32(block, 8) != FORMAT_VERSION {
            let found = le32(block, 8);
            return Err(DatabaseError::NewerFormat { path: path.to_owned(), found, known: FORMAT_VERSION });
        } else if le32(block, 12) as usize != page_size.bytes() {
            bad("it is of another page size");
        }
    }
    Ok(Some(content))
}

/// Writes everything; on disk when it returns.
pub(super) fn write_all(file: &dyn DiskFile, page_size: PageSize, sums: &[u64]) -> io::Result<()> {
    let mut bytes = header(page_size).to_vec();
    (1..block_count(sums.len())).for_each(|number| bytes.extend(encode(number, sums)));
    file.write_at(&bytes, 0)?;
    file.set_length(bytes.len() as u64)?;
    file.sync()
}

/// Writes those of the pages given, numbers ascending, into a file that has `old`; on disk when it returns.
pub(super) fn update(
    file: &dyn DiskFile,
    page_size: PageSize,
    mut sums: Vec<u64>,
    new: impl Iterator<Item = (PageNumber, u64)>,
) -> io::Result<()> {
    let is_new = sums.is_empty();
    let mut blocks: Vec<usize> = Vec::new();
    for (number, sum) in new {
        let at = number.0 as usize - 1;
        if sums.len() <= at {
            sums.resize(at + 1, 0);
        }
        sums[at] = sum;
        let block = 1 + at / SUMS_PER_BLOCK;
        if blocks.last() != Some(&block) {
            blocks.push(block);
        }
    }
    if is_new {
        return write_all(file, page_size, &sums);
    }
    for run in blocks.chunk_by(|a, b| a + 1 == *b) {
        let bytes: Vec<u8> = run.iter().flat_map(|number| encode(*number, &sums)).collect();
        file.write_at(&bytes, (run[0] * BLOCK_BYTES) as u64)?;
    }
    file.sync()
}

/// What all pages together must have.
pub(super) fn is_of(sums: &[u64], hash: StateHash) -> bool {
    sums.iter().fold(0u64, |total, sum| total.wrapping_add(*sum)) == page_sum(hash.0)
}

/// The state hash of a whole file, and the checksums of its pages.
///
/// # Errors
/// `UnexpectedEof`: it is shorter.
pub(super) fn of_file(file: &dyn DiskFile, page_size: PageSize, page_count: u32) -> io::Result<(StateHash, Vec<u64>)> {
    /// Pages read at a time.
    const BATCH: u32 = 256;
    let bytes = page_size.bytes();
    let mut hash = StateHash::default();
    let mut sums = Vec::with_capacity(page_count as usize);
    let mut buffer = vec![0; bytes * BATCH.min(page_count) as usize];
    let mut first = 1;
    while first <= page_count {
        let count = BATCH.min(page_count - first + 1);
        let part = &mut buffer[..bytes * count as usize];
        if file.read_at(part, u64::from(first - 1) * bytes as u64)? < part.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (at, image) in part.chunks_exact(bytes).enumerate() {
            let page = page_hash(PageNumber(first + at as u32), image);
            hash.add(page);
            sums.push(page_sum(page));
        }
        first += count;
    }
    Ok((hash, sums))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::source::{Disk as _, SystemDisk};

    fn file(folder: &Path) -> std::sync::Arc<dyn DiskFile> {
        SystemDisk.open(&folder.join("a.sums"), true).unwrap().unwrap()
    }

    #[test]
    fn golden_bytes_and_every_flipped_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sums");
        let file = file(folder.path());
        let page_size = PageSize::new(4096).unwrap();
        let sums: Vec<u64> = (1..=64).map(|page| page * 0x0101).collect();
        write_all(&*file, page_size, &sums).unwrap();
        let mut want = b"RSQSUMS\0\x01\0\0\0\0\x10\0\0".to_vec();
        want.resize(508, 0);
        want.extend(crc32c::crc32c(&want).to_le_bytes());
        for (number, sums) in [(1u32, 1..=63u64), (2, 64..=64)] {
            let mut block: Vec<u8> = sums.flat_map(|page| (page * 0x0101).to_le_bytes()).collect();
            block.resize(504, 0);
            block.extend(number.to_le_bytes());
            block.extend(crc32c::crc32c(&block).to_le_bytes());
            want.extend(block);
        }
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes, want);
        assert_eq!(read(&*file, &path, page_size, 64).unwrap().unwrap().sums, sums);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            let content = read(&*file, &path, page_size, 64).unwrap().unwrap();
            assert_eq!(content.bad.len(), 1, "bit {bit}");
            let offset = (bit / 8 / 512 * 512) as u64;
            let error = content.bad[0].error(&path);
            assert!(matches!(error, DatabaseError::Damaged { offset: at, .. } if at == offset), "bit {bit}: {error}");
        }
        std::fs::write(&path, &bytes[..1100]).unwrap();
        assert_eq!(read(&*file, &path, page_size, 64).unwrap().unwrap().bad[0].pages(), 64..127);
    }

    #[test]
    fn updated_in_place_it_is_as_if_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sums");
        let file = file(folder.path());
        let page_size = PageSize::new(512).unwrap();
        update(&*file, page_size, Vec::new(), (1..=100).map(|page| (PageNumber(page), u64::from(page)))).unwrap();
        let old: Vec<u64> = (1..=100).collect();
        assert_eq!(read(&*file, &path, page_size, 100).unwrap().unwrap().sums, old);
        let changed = [1, 63, 64, 126, 127, 300].map(|page| (PageNumber(page), 7));
        update(&*file, page_size, old.clone(), changed.into_iter()).unwrap();
        let mut new = old;
        new.resize(300, 0);
        changed.iter().for_each(|(number, sum)| new[number.0 as usize - 1] = *sum);
        // Of a block that nothing was written to, a checkpoint has no pages: here there are, and they are told.
        let content = read(&*file, &path, page_size, 300).unwrap().unwrap();
        assert_eq!(content.sums, new);
        assert_eq!(content.bad.iter().map(|bad| bad.number).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn a_newer_version_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sums");
        let mut block = header(PageSize::default());
        block[8] = 2;
        seal(&mut block);
        std::fs::write(&path, block).unwrap();
        let error = read(&*file(folder.path()), &path, PageSize::default(), 0).err().unwrap();
        assert!(matches!(error, DatabaseError::NewerFormat { found: 2, known: 1, .. }), "{error}");
        assert!(error.to_string().contains("use the version that wrote it, or a newer one"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn reading_never_panics(bytes: Vec<u8>, pages in 0u32..500) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.sums");
            std::fs::write(&path, bytes).unwrap();
            let _ = read(&*file(folder.path()), &path, PageSize::default(), pages);
        }
    }
}
