//! One page's bytes at one version.

use std::sync::OnceLock;

use super::{PageNumber, PageSize, Version, page_hash};

/// Bytes behind each image: SQLite may read a little past the end of a page that it was given by address.
const SLACK_BYTES: usize = 256;

/// An image of a page. Never changed once others can see it.
#[derive(Debug)]
pub(crate) struct Page {
    number: PageNumber,
    version: Version,
    hash: OnceLock<u128>,
    /// The image and SLACK_BYTES.
    bytes: Box<[u8]>,
}

impl Page {
    /// An image of zeros with its slack, to be filled and given to [`Self::new`].
    pub fn buffer(page_size: PageSize) -> Box<[u8]> {
        vec![0; page_size.bytes() + SLACK_BYTES].into_boxed_slice()
    }

    /// A buffer that begins with `image`.
    pub fn buffer_from(image: &[u8]) -> Box<[u8]> {
        let mut bytes = Vec::with_capacity(image.len() + SLACK_BYTES);
        bytes.extend_from_slice(image);
        bytes.resize(image.len() + SLACK_BYTES, 0);
        bytes.into_boxed_slice()
    }

    /// `bytes`: as made by [`Self::buffer`].
    pub fn new(number: PageNumber, version: Version, bytes: Box<[u8]>) -> Self {
        assert!(bytes.len() > SLACK_BYTES, "invariant: page buffers have slack");
        Self { number, version, hash: OnceLock::new(), bytes }
    }

    /// The image.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.bytes.len() - SLACK_BYTES]
    }

    /// The version that brought it.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its part in the state hash, computed when first asked for.
    pub fn hash(&self) -> u128 {
        *self.hash.get_or_init(|| page_hash(self.number, self.bytes()))
    }

    /// Bytes of memory it takes, about.
    pub fn memory_bytes(&self) -> usize {
        self.bytes.len() + 128
    }
}
