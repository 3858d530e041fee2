//! Ranges of keys as etcd's requests name them.

use bytes::Bytes;
use std::cmp::Ordering;

/// A range of keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyRange {
    start: Bytes,
    end: RangeEnd,
}

/// Where a range ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RangeEnd {
    /// The range is the one key it starts at.
    Single,
    /// The first key that is no longer in the range.
    Before(Bytes),
    /// There is no end.
    Unbounded,
}

impl KeyRange {
    /// As in etcd's requests: an empty `range_end` names the one key, `"\0"` everything from `key` on.
    #[must_use]
    pub fn new(key: Bytes, range_end: Bytes) -> KeyRange {
        let end = if range_end.is_empty() {
            RangeEnd::Single
        } else if range_end.as_ref() == [0] {
            RangeEnd::Unbounded
        } else {
            RangeEnd::Before(range_end)
        };
        KeyRange { start: key, end }
    }

    /// The range of one key.
    #[must_use]
    pub fn single(key: Bytes) -> KeyRange {
        KeyRange { start: key, end: RangeEnd::Single }
    }

    /// Every key there is.
    #[must_use]
    pub fn all() -> KeyRange {
        KeyRange { start: Bytes::new(), end: RangeEnd::Unbounded }
    }

    /// The first key that can be in the range.
    #[must_use]
    pub fn start(&self) -> &Bytes {
        &self.start
    }

    /// Where the range ends.
    #[must_use]
    pub fn end(&self) -> &RangeEnd {
        &self.end
    }

    /// Whether this is the range of one key.
    #[must_use]
    pub fn is_single(&self) -> bool {
        self.end == RangeEnd::Single
    }

    /// Whether no key at all can be in the range.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(&self.end, RangeEnd::Before(end) if *end <= self.start)
    }

    /// Whether `key` is in the range.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            RangeEnd::Single => key == self.start.as_ref(),
            RangeEnd::Before(end) => key >= self.start.as_ref() && key < end.as_ref(),
            RangeEnd::Unbounded => key >= self.start.as_ref(),
        }
    }

    /// Whether `key` is past the end of the range: neither it nor any greater key is in it.
    #[must_use]
    pub fn is_past(&self, key: &[u8]) -> bool {
        match &self.end {
            RangeEnd::Single => key > self.start.as_ref(),
            RangeEnd::Before(end) => key.cmp(end.as_ref()) != Ordering::Less,
            RangeEnd::Unbounded => false,
        }
    }
}
