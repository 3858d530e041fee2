//! The sidecar of a txn: what it did, for the observers of all nodes.
//!
//! It travels in the Raft entry beside the pages, is covered by that entry's checksum, and is decoded without copying:
//! keys and values of the events are slices of it. Layout, version 1 (numbers are LEB128: seven bits a byte, the lowest
//! first, the top bit set on all bytes but the last; signed ones are taken as unsigned 64-bit):
//!
//! ```text
//! 1 byte    version: 1
//! number    the store's revision before it, plus one: the revision the events happened at
//! number    row of the first event; each further event has the next one
//! items, to the end:
//!   1 byte  1 PUT        number length, key; number length, value; number create revision; number version; number lease
//!           2 DELETE     number length, key
//!           3 GRANT      number lease; number TTL in seconds
//!           4 END LEASE  number lease
//!           5 COMPACT    number revision
//!           6 REMOVED    number revision (the rows that nobody needs after COMPACT of that revision are gone)
//! ```
//!
//! Bounds: no length exceeds what is there; nothing is allocated before it is checked.

use super::ValueId;
use bytes::{BufMut, Bytes};

const VERSION: u8 = 1;
const PUT: u8 = 1;
const DELETE: u8 = 2;
const GRANT: u8 = 3;
const END_LEASE: u8 = 4;
const COMPACT: u8 = 5;
const REMOVED: u8 = 6;
/// Bytes an item takes beside its key and value, about.
const ITEM_BYTES: usize = 32;

/// One thing that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    Put { key: Bytes, value: Bytes, create_revision: i64, version: i64, lease: i64 },
    Delete { key: Bytes },
    Grant { id: i64, ttl_seconds: i64 },
    EndLease { id: i64 },
    Compact { revision: i64 },
    Removed { revision: i64 },
}

/// Why a sidecar cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("sidecar version {0} is unknown: run the version of the program that wrote it, or a newer one")]
    Version(u8),
    #[error("the sidecar is damaged at byte {0}")]
    Damaged(usize),
}

/// Writes a sidecar. What is not finished can be thrown away.
#[derive(Debug)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
    header: usize,
}

impl Encoder {
    /// For events at `revision`, one more than the store's, whose rows start at `first_id`.
    pub(crate) fn new(revision: i64, first_id: ValueId, capacity: usize) -> Encoder {
        let mut bytes = Vec::with_capacity(capacity + ITEM_BYTES);
        bytes.put_u8(VERSION);
        put_number(&mut bytes, revision);
        put_number(&mut bytes, first_id.0);
        let header = bytes.len();
        Encoder { bytes, header }
    }

    /// Whether nothing was done.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.len() == self.header
    }

    pub(crate) fn put(&mut self, key: &[u8], value: &[u8], create_revision: i64, version: i64, lease: i64) {
        self.bytes.reserve(key.len() + value.len() + ITEM_BYTES);
        self.bytes.put_u8(PUT);
        put_slice(&mut self.bytes, key);
        put_slice(&mut self.bytes, value);
        put_number(&mut self.bytes, create_revision);
        put_number(&mut self.bytes, version);
        put_number(&mut self.bytes, lease);
    }

    pub(crate) fn delete(&mut self, key: &[u8]) {
        self.bytes.reserve(key.len() + ITEM_BYTES);
        self.bytes.put_u8(DELETE);
        put_slice(&mut self.bytes, key);
    }

    pub(crate) fn grant(&mut self, id: i64, ttl_seconds: i64) {
        self.numbers(GRANT, &[id, ttl_seconds]);
    }

    pub(crate) fn end_lease(&mut self, id: i64) {
        self.numbers(END_LEASE, &[id]);
    }

    pub(crate) fn compact(&mut self, revision: i64) {
        self.numbers(COMPACT, &[revision]);
    }

    pub(crate) fn removed(&mut self, revision: i64) {
        self.numbers(REMOVED, &[revision]);
    }

    fn numbers(&mut self, kind: u8, numbers: &[i64]) {
        self.bytes.put_u8(kind);
        numbers.iter().for_each(|n| put_number(&mut self.bytes, *n));
    }

    /// The bytes.
    pub(crate) fn finish(self) -> Bytes {
        Bytes::from(self.bytes)
    }
}

fn put_number(bytes: &mut Vec<u8>, number: i64) {
    let mut rest = number.cast_unsigned();
    while rest >= 0x80 {
        bytes.put_u8(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.put_u8(rest as u8);
}

fn put_slice(bytes: &mut Vec<u8>, slice: &[u8]) {
    put_number(bytes, slice.len().cast_signed() as i64);
    bytes.put_slice(slice);
}

/// Reads a sidecar, item by item.
#[derive(Debug)]
pub(crate) struct Decoder {
    bytes: Bytes,
    at: usize,
    /// The revision the events happened at, if there are any.
    pub(crate) revision: i64,
    /// The row of the first event.
    pub(crate) first_id: ValueId,
}

impl Decoder {
    /// Reads the header.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub(crate) fn new(bytes: Bytes) -> Result<Decoder, DecodeError> {
        let version = *bytes.first().ok_or(DecodeError::Damaged(0))?;
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let mut decoder = Decoder { bytes, at: 1, revision: 0, first_id: ValueId(0) };
        decoder.revision = decoder.number()?;
        decoder.first_id = ValueId(decoder.number()?);
        Ok(decoder)
    }

    /// The next item, or none at the end.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub(crate) fn item(&mut self) -> Result<Option<Item>, DecodeError> {
        let Some(kind) = self.bytes.get(self.at).copied() else {
            return Ok(None);
        };
        self.at += 1;
        Ok(Some(match kind {
            PUT => Item::Put {
                key: self.slice()?,
                value: self.slice()?,
                create_revision: self.number()?,
                version: self.number()?,
                lease: self.number()?,
            },
            DELETE => Item::Delete { key: self.slice()? },
            GRANT => Item::Grant { id: self.number()?, ttl_seconds: self.number()? },
            END_LEASE => Item::EndLease { id: self.number()? },
            COMPACT => Item::Compact { revision: self.number()? },
            REMOVED => Item::Removed { revision: self.number()? },
            _ => return Err(DecodeError::Damaged(self.at - 1)),
        }))
    }

    fn number(&mut self) -> Result<i64, DecodeError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at).ok_or(DecodeError::Damaged(self.at))?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit; a zero at the end would be a second way to write the same number.
            if (shift == 63 && bits > 1) || (shift > 0 && byte == 0) {
                break;
            }
            self.at += 1;
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number.cast_signed());
            }
        }
        Err(DecodeError::Damaged(self.at))
    }

    fn slice(&mut self) -> Result<Bytes, DecodeError> {
        let length = usize::try_from(self.number()?).ok();
        let end = length.and_then(|length| self.at.checked_add(length)).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(DecodeError::Damaged(self.at))?;
        let slice = self.bytes.slice(self.at..end);
        self.at = end;
        Ok(slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(revision: i64, first: ValueId, items: &[Item]) -> Bytes {
        let mut encoder = Encoder::new(revision, first, 0);
        for item in items {
            match item {
                Item::Put { key, value, create_revision, version, lease } => {
                    encoder.put(key, value, *create_revision, *version, *lease);
                }
                Item::Delete { key } => encoder.delete(key),
                Item::Grant { id, ttl_seconds } => encoder.grant(*id, *ttl_seconds),
                Item::EndLease { id } => encoder.end_lease(*id),
                Item::Compact { revision } => encoder.compact(*revision),
                Item::Removed { revision } => encoder.removed(*revision),
            }
        }
        assert_eq!(encoder.is_empty(), items.is_empty());
        encoder.finish()
    }

    fn decode(bytes: Bytes) -> Result<(i64, ValueId, Vec<Item>), DecodeError> {
        let mut decoder = Decoder::new(bytes)?;
        let mut items = Vec::new();
        while let Some(item) = decoder.item()? {
            items.push(item);
        }
        Ok((decoder.revision, decoder.first_id, items))
    }

    fn item() -> impl Strategy<Value = Item> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from);
        prop_oneof![
            (bytes(), bytes(), any::<i64>(), any::<i64>(), any::<i64>()).prop_map(|(key, value, c, v, lease)| {
                Item::Put { key, value, create_revision: c, version: v, lease }
            }),
            bytes().prop_map(|key| Item::Delete { key }),
            (any::<i64>(), any::<i64>()).prop_map(|(id, ttl_seconds)| Item::Grant { id, ttl_seconds }),
            any::<i64>().prop_map(|id| Item::EndLease { id }),
            any::<i64>().prop_map(|revision| Item::Compact { revision }),
            any::<i64>().prop_map(|revision| Item::Removed { revision }),
        ]
    }

    #[test]
    fn layout_of_version_1() {
        let items = [
            Item::Put { key: "a".into(), value: "xyz".into(), create_revision: 300, version: 2, lease: -1 },
            Item::Delete { key: "bc".into() },
            Item::Grant { id: 7, ttl_seconds: 60 },
            Item::EndLease { id: 128 },
            Item::Compact { revision: 5 },
            Item::Removed { revision: 4 },
        ];
        let golden: &[u8] = &[
            1, 0xAD, 0x02, 9, // version, revision 301, first row 9
            1, 1, b'a', 3, b'x', b'y', b'z', 0xAC, 0x02, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            1, //
            2, 2, b'b', b'c', //
            3, 7, 60, //
            4, 0x80, 1, //
            5, 5, //
            6, 4,
        ];
        assert_eq!(encode(301, ValueId(9), &items), golden);
        assert_eq!(decode(Bytes::from_static(golden)), Ok((301, ValueId(9), items.to_vec())));
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        assert_eq!(decode(Bytes::from_static(&[2, 0, 0])), Err(DecodeError::Version(2)));
        assert_eq!(decode(Bytes::new()), Err(DecodeError::Damaged(0)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(revision: i64, id: i64, items in proptest::collection::vec(item(), 0..12)) {
            let bytes = encode(revision, ValueId(id), &items);
            prop_assert_eq!(decode(bytes), Ok((revision, ValueId(id), items)));
        }

        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), valid: bool) {
            if valid && !bytes.is_empty() {
                bytes[0] = VERSION;
            }
            if let Ok((revision, id, items)) = decode(Bytes::from(bytes.clone())) {
                prop_assert_eq!(encode(revision, id, &items), bytes);
            }
        }

        #[test]
        fn a_cut_is_noticed_or_falls_between_items(items in proptest::collection::vec(item(), 1..5), cut: proptest::sample::Index) {
            let bytes = encode(3, ValueId(3), &items);
            let short = bytes.slice(..cut.index(bytes.len()));
            if let Ok((_, _, fewer)) = decode(short) {
                prop_assert!(fewer.len() < items.len() && items.starts_with(&fewer));
            }
        }
    }
}
