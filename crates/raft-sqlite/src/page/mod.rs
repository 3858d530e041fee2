//! Pages, their versions, and sets of them.
//!
//! - [`image`]: one page's bytes at one version;
//! - [`damage`]: a page of the file that is not as it was written;
//! - [`store`]: the versions of a database's pages in memory, above its file;
//! - [`page_set`]: the pages that one group of transactions changed, as bytes for the log.
//!
//! Nothing here knows SQLite's API or Raft.

pub(crate) mod damage;
pub(crate) mod image;
pub(crate) mod page_set;
pub(crate) mod source;
pub(crate) mod store;

pub use damage::PageDamage;
pub(crate) use image::Page;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

/// A page's number, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PageNumber(pub u32);

/// Spreads page numbers over a hash table: they are dense and nobody's choice, so one multiplication does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageNumberHasher(u64);

impl Hasher for PageNumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        // 2^64 divided by the golden ratio; the table looks at the low and at the highest bits.
        let spread = (self.0 ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = spread ^ (spread >> 32);
    }
}

/// A map from page numbers.
pub(crate) type PageMap<T> = HashMap<u32, T, BuildHasherDefault<PageNumberHasher>>;
/// A set of page numbers.
pub(crate) type PageNumbers = HashSet<u32, BuildHasherDefault<PageNumberHasher>>;

/// Bytes in a page: a power of two from 512 to 65,536.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageSize(u32);

impl PageSize {
    /// None: SQLite knows no such page size.
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (512..=65536).contains(&bytes)).then_some(Self(bytes))
    }

    /// In bytes.
    pub fn bytes(self) -> usize {
        self.0 as usize
    }
}

impl Default for PageSize {
    fn default() -> Self {
        Self(4096)
    }
}

/// The version of a database: 0 when it is made, one more with each group of transactions that is committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Version {
    /// The one after it.
    pub(crate) fn next(self) -> Version {
        Version(self.0 + 1)
    }
}

/// A hash of a whole database: the wrapping sum over its pages of a hash of (page number, image), so that it can be kept up to date
/// page by page. A page of zeros counts 0, so that one that was never written equals one of zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StateHash(pub u128);

impl StateHash {
    /// Counts a page in.
    pub fn add(&mut self, page_hash: u128) {
        self.0 = self.0.wrapping_add(page_hash);
    }

    /// Counts a page out.
    pub fn subtract(&mut self, page_hash: u128) {
        self.0 = self.0.wrapping_sub(page_hash);
    }
}

/// The part of one page in the state hash: XXH3-128 of the image, seeded with the page number; 0 for a page of zeros.
pub(crate) fn page_hash(number: PageNumber, image: &[u8]) -> u128 {
    if image.iter().all(|byte| *byte == 0) {
        return 0;
    }
    xxhash_rust::xxh3::xxh3_128_with_seed(image, u64::from(number.0))
}

/// The checksum of a page in a database's file: the lower half of its part in the state hash. So the sum of all of them is the lower half of
/// the state hash.
pub(crate) fn page_sum(page_hash: u128) -> u64 {
    page_hash as u64
}

/// Four bytes, big endian, as SQLite writes its numbers. `at + 4` must be within `bytes`.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("invariant: four bytes"))
}

/// Where page 1 keeps the database's size in pages.
pub(crate) const DATABASE_SIZE_AT: usize = 28;
/// Where page 1 keeps the number of free pages.
pub(crate) const FREE_PAGES_AT: usize = 36;

/// Page 1 of a database without tables, in WAL mode: built by hand, so that all replicas begin with equal bytes.
/// Source: SQLite's "Database File Format", section 1.3.
pub(crate) fn first_page(page_size: PageSize) -> Vec<u8> {
    let size = page_size.bytes();
    let mut page = vec![0; size];
    page[..16].copy_from_slice(b"SQLite format 3\0");
    // 65,536 is written as 1.
    page[16..18].copy_from_slice(&if size == 65536 { 1u16 } else { size as u16 }.to_be_bytes());
    // Read and write version: WAL. Payload fractions: fixed by the format.
    page[18..20].copy_from_slice(&[2, 2]);
    page[21..24].copy_from_slice(&[64, 32, 32]);
    // File change counter, database size in pages.
    page[24..28].copy_from_slice(&1u32.to_be_bytes());
    page[28..32].copy_from_slice(&1u32.to_be_bytes());
    // Schema format 4, UTF-8.
    page[44..48].copy_from_slice(&4u32.to_be_bytes());
    page[56..60].copy_from_slice(&1u32.to_be_bytes());
    // Version-valid-for, and the SQLite version that introduced nothing we depend on.
    page[92..96].copy_from_slice(&1u32.to_be_bytes());
    page[96..100].copy_from_slice(&3_046_000u32.to_be_bytes());
    // An empty table leaf; its cell area begins at the page's end (65,536 is written as 0).
    page[100] = 0x0d;
    page[105..107].copy_from_slice(&if size == 65536 { 0u16 } else { size as u16 }.to_be_bytes());
    page
}
