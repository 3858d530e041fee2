//! The bytes on disk, as docs/formats.md has them. A change here is a change of the format: it
//! needs a new version.

use proptest::prelude::*;

use super::id;
use crate::log::record::{
    Decoded, RecordHeader, RecordType, SEGMENT_HEADER_BYTES, SegmentHeader, decode_record, encode_record,
};
use crate::log::vote::encode_slot;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_record() {
    let header = RecordHeader {
        record_type: RecordType::Entry,
        kind: 2,
        payload_bytes: 5,
        synced: 0x1000,
        segment: 7,
        salt: 0xdead_beef,
        epoch: 3,
        id: id(0x0102, 0x0304),
    };
    let mut bytes = Vec::new();
    encode_record(&mut bytes, &header, b"hello");
    assert_eq!(
        hex(&bytes),
        "92 bb e0 63 4c bb 71 9a 05 00 00 00 00 10 00 00 \
         07 00 00 00 ef be ad de 02 01 00 00 00 00 00 00 \
         04 03 00 00 00 00 00 00 03 00 00 00 01 02 00 00 \
         68 65 6c 6c 6f 00 00 00"
    );
    match decode_record(&bytes, 7, 0xdead_beef) {
        Decoded::Record(decoded, payload) => {
            assert_eq!((decoded, payload), (header, &b"hello"[..]))
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(decode_record(&bytes, 8, 0xdead_beef), Decoded::Nothing));
    assert!(matches!(decode_record(&bytes, 7, 0xdead_bee0), Decoded::Nothing));
    assert!(matches!(decode_record(&bytes[..50], 7, 0xdead_beef), Decoded::BadPayload(_)));
    assert!(matches!(decode_record(&bytes[..40], 7, 0xdead_beef), Decoded::Nothing));
}

#[test]
fn a_segment_header() {
    let header = SegmentHeader {
        number: 7,
        length: 16 * 1024 * 1024,
        salt: 0xdead_beef,
        epoch: 3,
        previous_end: 0x00ff_fff0,
        purged: Some(id(1, 2)),
        last: Some(id(3, 4)),
        committed: None,
    };
    let bytes = header.encode();
    assert_eq!(
        hex(&bytes),
        "52 53 51 4c 4c 4f 47 00 01 00 00 00 07 00 00 00 \
         00 00 00 01 ef be ad de 03 00 00 00 f0 ff ff 00 \
         03 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 \
         01 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00 \
         03 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00 \
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 \
         00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 \
         00 00 00 00 00 00 00 00 00 00 00 00 c0 4b 86 66"
    );
    assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
    assert_eq!(bytes.len(), SEGMENT_HEADER_BYTES);
}

#[test]
fn a_vote_slot() {
    assert_eq!(
        hex(&encode_slot(9, Some(b"vote"))),
        "52 53 51 4c 56 4f 54 45 01 00 00 00 04 00 00 00 \
         09 00 00 00 00 00 00 00 01 00 00 00 ff 79 24 ec \
         76 6f 74 65"
    );
    assert_eq!(
        hex(&encode_slot(1, None)),
        "52 53 51 4c 56 4f 54 45 01 00 00 00 00 00 00 00 \
         01 00 00 00 00 00 00 00 00 00 00 00 e1 fe ee ce"
    );
}

proptest! {
    #[test]
    fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), payload_bytes: u32, kind in 0u8..9) {
        let _ = decode_record(&bytes, 7, 0xdead_beef);
        if bytes.len() >= 48 {
            // Past the checks of number, salt and checksum.
            let mut bytes = bytes.clone();
            bytes[8..12].copy_from_slice(&payload_bytes.to_le_bytes());
            bytes[16..24].copy_from_slice(&[7, 0, 0, 0, 0xef, 0xbe, 0xad, 0xde]);
            bytes[44] = kind;
            let crc = crc32c::crc32c(&bytes[4..48]);
            bytes[..4].copy_from_slice(&crc.to_le_bytes());
            let _ = decode_record(&bytes, 7, 0xdead_beef);
        }
        if bytes.len() >= SEGMENT_HEADER_BYTES {
            let mut bytes: [u8; SEGMENT_HEADER_BYTES] = bytes[..SEGMENT_HEADER_BYTES].try_into().unwrap();
            let _ = SegmentHeader::decode(&bytes);
            bytes[..12].copy_from_slice(b"RSQLLOG\0\x01\0\0\0");
            let crc = crc32c::crc32c(&bytes[..124]);
            bytes[124..].copy_from_slice(&crc.to_le_bytes());
            let _ = SegmentHeader::decode(&bytes);
        }
    }
}
