//! A PageSet: what one group of transactions changed, as bytes for the log.
//!
//! Layout, little endian (docs/formats.md, "PageSet"):
//! ```text
//!  0  u8   format version = 1
//!  1  u8   flags: bit 0 = the body is compressed (LZ4 block)
//!  2  u16  reserved, 0
//!  4  u32  bytes in a page
//!  8  u64  base version            16  u64  version (base + 1)
//! 24  u32  pages in the database   28  u32  pages in the body
//! 32  u32  bytes of the body, uncompressed   36  u32  reserved, 0
//! 40  u128 state hash after it
//! 56  body: per page u32 number, u8 kind, then
//!       0 image: the whole page   1 runs: u16 count, each u16 offset/8, u16 length/8, bytes   2 zeros: nothing
//!  .. u64  XXH3-64 of everything before
//! ```
//! Runs replace parts of the image that the base version has. Frame headers, salts and WAL checksums are no part of the state and
//! are not carried. Pages come in ascending order, each once, and every page that the database grew by is among them: so a PageSet
//! says the same to whoever applies it, whatever lies in the base version's file behind its end.

use std::io;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::{PageNumber, PageSize, StateHash, Version};

const FORMAT_VERSION: u8 = 1;
const FLAG_LZ4: u8 = 1;
const HEADER_BYTES: usize = 56;
const CHECKSUM_BYTES: usize = 8;
const KIND_IMAGE: u8 = 0;
const KIND_RUNS: u8 = 1;
const KIND_ZEROS: u8 = 2;
/// Runs are counted in words of this many bytes.
const WORD: usize = 8;
/// Bodies shorter than this are not worth compressing.
const MIN_COMPRESSED_BYTES: usize = 256;
/// Largest body made or taken, uncompressed.
const MAX_BODY_BYTES: usize = 1 << 30;
/// An LZ4 block grows at most this much when it is decompressed: so a header cannot make us allocate much more than was sent.
const MAX_LZ4_RATIO: usize = 255;
/// Most pages in a database (SQLite's own limit).
const MAX_PAGE_COUNT: u32 = u32::MAX - 1;

/// Everything but the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageSetHeader {
    pub page_size: PageSize,
    pub base: Version,
    pub version: Version,
    /// Pages in the database after it.
    pub page_count: u32,
    /// The whole database's hash after it.
    pub state_hash: StateHash,
}

/// Collects pages into the bytes of a PageSet.
pub(crate) struct PageSetEncoder {
    body: BytesMut,
    pages: u32,
}

impl PageSetEncoder {
    pub fn new() -> Self {
        Self { body: BytesMut::new(), pages: 0 }
    }

    /// Adds a page; numbers ascend. `base`: the image that the base version has; None: it has none (zeros).
    pub fn page(&mut self, number: PageNumber, image: &[u8], base: Option<&[u8]>) {
        self.pages += 1;
        self.body.put_u32_le(number.0);
        let at = self.body.len();
        self.body.put_u8(KIND_RUNS);
        self.body.put_u16_le(0);
        let runs = put_runs(&mut self.body, image, base, image.len());
        match runs {
            Some(0) if base.is_none() => {
                self.body.truncate(at);
                self.body.put_u8(KIND_ZEROS);
            }
            Some(runs) => self.body[at + 1..at + 3].copy_from_slice(&runs.to_le_bytes()),
            None => {
                self.body.truncate(at);
                self.body.put_u8(KIND_IMAGE);
                self.body.put_slice(image);
            }
        }
    }

    /// The bytes.
    ///
    /// # Errors
    /// `InvalidInput`: there is more in it than anybody would take.
    pub fn finish(self, header: PageSetHeader) -> io::Result<Bytes> {
        let body_bytes = self.body.len() as u32;
        if self.body.len() > MAX_BODY_BYTES || header.page_count > MAX_PAGE_COUNT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a group of {} bytes, {} pages in the database: too large", self.body.len(), header.page_count),
            ));
        }
        let compressed = (self.body.len() >= MIN_COMPRESSED_BYTES)
            .then(|| lz4_flex::block::compress(&self.body))
            .filter(|compressed| compressed.len() < self.body.len());
        let body: &[u8] = compressed.as_deref().unwrap_or(&self.body);
        let mut out = BytesMut::with_capacity(HEADER_BYTES + body.len() + CHECKSUM_BYTES);
        out.put_u8(FORMAT_VERSION);
        out.put_u8(if compressed.is_some() { FLAG_LZ4 } else { 0 });
        out.put_u16_le(0);
        out.put_u32_le(header.page_size.bytes() as u32);
        out.put_u64_le(header.base.0);
        out.put_u64_le(header.version.0);
        out.put_u32_le(header.page_count);
        out.put_u32_le(self.pages);
        out.put_u32_le(body_bytes);
        out.put_u32_le(0);
        out.put_u128_le(header.state_hash.0);
        out.put_slice(body);
        let checksum = xxhash_rust::xxh3::xxh3_64(&out);
        out.put_u64_le(checksum);
        Ok(out.freeze())
    }
}

/// Appends the runs in which `image` differs from `base`. None: they would be no shorter than `limit`; the body is then to be cut back.
fn put_runs(body: &mut BytesMut, image: &[u8], base: Option<&[u8]>, limit: usize) -> Option<u16> {
    let start = body.len();
    let words = image.len() / WORD;
    let word = |bytes: &[u8], at: usize| -> u64 {
        u64::from_ne_bytes(bytes[at * WORD..at * WORD + WORD].try_into().expect("invariant: eight bytes"))
    };
    let old = |at: usize| base.map_or(0, |base| word(base, at));
    let mut runs: u16 = 0;
    let mut at = 0;
    while at < words {
        if word(image, at) == old(at) {
            at += 1;
            continue;
        }
        let from = at;
        while at < words && word(image, at) != old(at) {
            at += 1;
        }
        if body.len() - start + 4 + (at - from) * WORD >= limit {
            return None;
        }
        body.put_u16_le(from as u16);
        body.put_u16_le((at - from) as u16);
        body.put_slice(&image[from * WORD..at * WORD]);
        runs += 1;
    }
    Some(runs)
}

/// One page of a decoded PageSet.
pub(crate) enum PageChange<'a> {
    Image(&'a [u8]),
    /// To be laid over the base image with [`apply_runs`].
    Runs(&'a [u8], u16),
    Zeros,
}

/// A PageSet's bytes, checked, with the body decompressed.
pub(crate) struct DecodedPageSet {
    pub header: PageSetHeader,
    pages: u32,
    body: Bytes,
}

/// The base version of a PageSet and its own, from its first bytes alone.
///
/// # Errors
/// `InvalidData`: it is too short, or of another format.
pub(crate) fn versions(bytes: &[u8]) -> io::Result<(Version, Version)> {
    match bytes.get(8..24) {
        Some(mut versions) if bytes[0] == FORMAT_VERSION => {
            Ok((Version(versions.get_u64_le()), Version(versions.get_u64_le())))
        }
        _ => Err(corrupt("it does not begin as one")),
    }
}

fn corrupt(why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a PageSet is damaged: {why}"))
}

impl DecodedPageSet {
    /// Checks everything that can be checked without the database.
    ///
    /// # Errors
    /// `InvalidData`: damaged, or of a newer format.
    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        if bytes.len() < HEADER_BYTES + CHECKSUM_BYTES {
            return Err(corrupt(format!("{} bytes are too few", bytes.len())));
        }
        if bytes[0] != FORMAT_VERSION {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "a PageSet has format version {}, this program knows {FORMAT_VERSION}: run the version that wrote it, or a newer one",
                    bytes[0]
                ),
            ));
        }
        let (content, mut checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
        if xxhash_rust::xxh3::xxh3_64(content) != checksum.get_u64_le() {
            return Err(corrupt("its checksum does not match"));
        }
        let (mut head, body) = content.split_at(HEADER_BYTES);
        head.advance(1);
        let flags = head.get_u8();
        head.advance(2);
        let page_size = PageSize::new(head.get_u32_le()).ok_or_else(|| corrupt("its page size is none"))?;
        let base = Version(head.get_u64_le());
        let version = Version(head.get_u64_le());
        let page_count = head.get_u32_le();
        let pages = head.get_u32_le();
        let body_bytes = head.get_u32_le() as usize;
        head.advance(4);
        let state_hash = StateHash(head.get_u128_le());
        if base.0.checked_add(1) != Some(version.0)
            || !(1..=MAX_PAGE_COUNT).contains(&page_count)
            || body_bytes > MAX_BODY_BYTES.min(body.len().saturating_mul(MAX_LZ4_RATIO))
        {
            return Err(corrupt("its header contradicts itself"));
        }
        let body = match flags {
            0 => Bytes::copy_from_slice(body),
            FLAG_LZ4 => lz4_flex::block::decompress(body, body_bytes).map(Bytes::from).map_err(corrupt)?,
            other => return Err(corrupt(format!("unknown flags {other}"))),
        };
        if body.len() != body_bytes {
            return Err(corrupt("its body has another length"));
        }
        Ok(Self { header: PageSetHeader { page_size, base, version, page_count, state_hash }, pages, body })
    }

    /// Gives each page to `take`, in ascending order.
    ///
    /// # Errors
    /// `InvalidData` at the first page that is not as it should be; what `take` returns.
    pub fn for_each<E: From<io::Error>>(
        &self,
        mut take: impl FnMut(PageNumber, PageChange<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let page_bytes = self.header.page_size.bytes();
        let mut rest: &[u8] = &self.body;
        let mut previous = 0;
        for _ in 0..self.pages {
            if rest.len() < 5 {
                return Err(corrupt("its body ends early").into());
            }
            let number = PageNumber(rest.get_u32_le());
            if number.0 <= previous || number.0 > self.header.page_count {
                return Err(corrupt(format!("page {} after {previous} of {}", number.0, self.header.page_count)).into());
            }
            previous = number.0;
            let change = match rest.get_u8() {
                KIND_IMAGE if rest.len() >= page_bytes => {
                    let (image, after) = rest.split_at(page_bytes);
                    rest = after;
                    PageChange::Image(image)
                }
                KIND_RUNS if rest.len() >= 2 => {
                    let count = rest.get_u16_le();
                    let length = runs_length(rest, count, page_bytes)?;
                    let (runs, after) = rest.split_at(length);
                    rest = after;
                    PageChange::Runs(runs, count)
                }
                KIND_ZEROS => PageChange::Zeros,
                _ => return Err(corrupt("a page of unknown kind, or cut short").into()),
            };
            take(number, change)?;
        }
        if rest.is_empty() { Ok(()) } else { Err(corrupt("its body is too long").into()) }
    }
}

/// Bytes that `count` runs take; checks that each lies within the page.
fn runs_length(bytes: &[u8], count: u16, page_bytes: usize) -> io::Result<usize> {
    let mut rest = bytes;
    for _ in 0..count {
        if rest.len() < 4 {
            return Err(corrupt("a run ends early"));
        }
        let offset = usize::from(rest.get_u16_le()) * WORD;
        let length = usize::from(rest.get_u16_le()) * WORD;
        if offset + length > page_bytes || rest.len() < length {
            return Err(corrupt("a run lies outside its page"));
        }
        rest.advance(length);
    }
    Ok(bytes.len() - rest.len())
}

/// Lays checked runs over `image`.
pub(crate) fn apply_runs(mut runs: &[u8], count: u16, image: &mut [u8]) {
    for _ in 0..count {
        let offset = usize::from(runs.get_u16_le()) * WORD;
        let length = usize::from(runs.get_u16_le()) * WORD;
        image[offset..offset + length].copy_from_slice(&runs[..length]);
        runs.advance(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> PageSetHeader {
        PageSetHeader {
            page_size: PageSize::new(512).unwrap(),
            base: Version(6),
            version: Version(7),
            page_count: 9,
            state_hash: StateHash(0x0102_0304),
        }
    }

    /// Decodes and applies to the bases that the closure gives.
    fn decoded(bytes: &[u8], base: impl Fn(u32) -> Option<Vec<u8>>) -> io::Result<Vec<(u32, Vec<u8>)>> {
        let set = DecodedPageSet::decode(bytes)?;
        let mut pages = Vec::new();
        set.for_each(|number, change| {
            let mut image = base(number.0).unwrap_or_else(|| vec![0; 512]);
            match change {
                PageChange::Image(bytes) => image.copy_from_slice(bytes),
                PageChange::Runs(runs, count) => apply_runs(runs, count, &mut image),
                PageChange::Zeros => image.fill(0),
            }
            pages.push((number.0, image));
            io::Result::Ok(())
        })?;
        Ok(pages)
    }

    #[test]
    fn golden_bytes() {
        let mut encoder = PageSetEncoder::new();
        let base = vec![1; 512];
        let mut image = base.clone();
        image[16] = 9;
        encoder.page(PageNumber(3), &image, Some(&base));
        encoder.page(PageNumber(4), &[0; 512], None);
        let bytes = encoder.finish(header()).unwrap();
        let mut want = vec![1, 0, 0, 0, 0, 2, 0, 0];
        want.extend(6u64.to_le_bytes());
        want.extend(7u64.to_le_bytes());
        want.extend([9, 0, 0, 0, 2, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0]);
        want.extend(0x0102_0304u128.to_le_bytes());
        want.extend([3, 0, 0, 0, 1, 1, 0, 2, 0, 1, 0, 9, 1, 1, 1, 1, 1, 1, 1]);
        want.extend([4, 0, 0, 0, 2]);
        want.extend(xxhash_rust::xxh3::xxh3_64(&want).to_le_bytes());
        assert_eq!(bytes.as_ref(), want);
        let pages = decoded(&bytes, |number| (number == 3).then(|| base.clone())).unwrap();
        assert_eq!(pages, [(3, image), (4, vec![0; 512])]);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut encoder = PageSetEncoder::new();
        encoder.page(PageNumber(1), &[7; 512], None);
        let bytes = encoder.finish(header()).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(DecodedPageSet::decode(&flipped).is_err(), "bit {bit}");
        }
    }

    /// A PageSet of version 7 with a checksum that fits, whatever is in it.
    fn sealed(page_count: u32, pages: u32, body_bytes: u32, flags: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, flags, 0, 0, 0, 2, 0, 0];
        bytes.extend(6u64.to_le_bytes());
        bytes.extend(7u64.to_le_bytes());
        for number in [page_count, pages, body_bytes, 0] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(0u128.to_le_bytes());
        bytes.extend(body);
        bytes.extend(xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    #[test]
    fn what_no_encoder_writes_is_refused() {
        let zeros = |number: u8| [number, 0, 0, 0, KIND_ZEROS];
        assert_eq!(decoded(&sealed(9, 2, 10, 0, &[zeros(3), zeros(4)].concat()), |_| None).unwrap().len(), 2);
        for (why, bytes) in [
            ("a page twice", sealed(9, 2, 10, 0, &[zeros(3), zeros(3)].concat())),
            ("pages that descend", sealed(9, 2, 10, 0, &[zeros(4), zeros(3)].concat())),
            ("page 0", sealed(9, 1, 5, 0, &zeros(0))),
            ("a page beyond the end", sealed(9, 1, 5, 0, &zeros(10))),
            ("an empty database", sealed(0, 0, 0, 0, &[])),
            ("more pages than SQLite knows", sealed(u32::MAX, 1, 5, 0, &zeros(3))),
            ("more pages than there are", sealed(9, 2, 5, 0, &zeros(3))),
            ("a body that goes on", sealed(9, 1, 10, 0, &[zeros(3), zeros(4)].concat())),
            ("a body that grows without bound", sealed(9, 1, 1 << 30, FLAG_LZ4, &zeros(3))),
            ("an unknown flag", sealed(9, 1, 5, 2, &zeros(3))),
            ("an unknown kind", sealed(9, 1, 5, 0, &[3, 0, 0, 0, 9])),
            (
                "a run outside its page",
                sealed(9, 1, 19, 0, &[3, 0, 0, 0, 1, 1, 0, 64, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
            ),
        ] {
            assert!(decoded(&bytes, |_| None).is_err(), "{why}");
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let mut bytes = sealed(9, 0, 0, 0, &[]);
        bytes[0] = 2;
        let error = DecodedPageSet::decode(&bytes).err().unwrap().to_string();
        assert!(error.contains("format version 2"), "{error}");
    }

    /// A page that the encoder is given, and what its base has.
    fn page() -> impl Strategy<Value = (Vec<u8>, Option<Vec<u8>>)> {
        let bytes = || prop_oneof![Just(vec![0; 512]), proptest::collection::vec(0u8..3, 512)];
        let near =
            (bytes(), proptest::collection::vec((0usize..512, any::<u8>()), 0..20)).prop_map(|(base, changes)| {
                let mut image = base.clone();
                changes.into_iter().for_each(|(at, byte)| image[at] = byte);
                (image, Some(base))
            });
        prop_oneof![bytes().prop_map(|image| (image, None)), (bytes(), bytes()).prop_map(|(a, b)| (a, Some(b))), near]
    }

    proptest! {
        #[test]
        fn round_trip(pages in proptest::collection::btree_map(1u32..9, page(), 1..6)) {
            let mut encoder = PageSetEncoder::new();
            for (number, (image, base)) in &pages {
                encoder.page(PageNumber(*number), image, base.as_deref());
            }
            let bytes = encoder.finish(header()).unwrap();
            let got = decoded(&bytes, |number| pages[&number].1.clone()).unwrap();
            let want: Vec<_> = pages.iter().map(|(number, (image, _))| (*number, image.clone())).collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn decoding_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 64..300), fix: bool) {
            if fix {
                // Past the version and the checksum, so that what is behind them is reached.
                bytes[0] = FORMAT_VERSION;
                let at = bytes.len() - 8;
                let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..at]);
                bytes[at..].copy_from_slice(&checksum.to_le_bytes());
            }
            let _ = decoded(&bytes, |_| None);
        }

        #[test]
        fn decoding_bodies_never_panics(
            body in proptest::collection::vec(prop_oneof![3 => 0u8..4, 1 => any::<u8>()], 0..200), pages in 0u32..5, lz4: bool, size in 0u32..2000,
        ) {
            let size = if lz4 { size } else { body.len() as u32 };
            let _ = decoded(&sealed(9, pages, size, u8::from(lz4), &body), |_| None);
        }
    }
}
