//! The commands of the replicated state machine and their bytes.
//!
//! Layout, little endian: format version u8 = 1, kind u8, then per kind
//! - 1 `Pages`: name length u16, name, origin (node id u64, incarnation u64, sequence u64), number of sidecars u32, each
//!   (length u32, bytes), and the PageSet to the end;
//! - 2 `CreateDatabase`, 3 `DropDatabase`: name length u16, name;
//! - 4 `Pages` with tables: name length u16, name, number of tables u16, each (length u16, bytes), then as kind 1 behind the name.
//!
//! Integrity is the log record's (CRC32C) and the PageSet's (its own checksum and state hash).

use std::io;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::invalid;
use crate::database::pipeline::Origin;

const FORMAT_VERSION: u8 = 1;
const KIND_PAGES: u8 = 1;
const KIND_CREATE_DATABASE: u8 = 2;
const KIND_DROP_DATABASE: u8 = 3;
const KIND_PAGES_OF_TABLES: u8 = 4;
/// Longest name of a database, in bytes.
pub const MAX_DATABASE_NAME: usize = 128;

/// One replicated command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A captured group of transactions. `tables`: those that they may have changed; None: not known.
    Pages { database: String, tables: Option<Vec<String>>, origin: Origin, sidecars: Vec<Bytes>, page_set: Bytes },
    /// A new, empty database; nothing if it exists.
    CreateDatabase { database: String },
    /// The database and its file go; nothing if it does not exist.
    DropDatabase { database: String },
}

impl Command {
    /// The bytes that go into the log.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.encoded_len());
        out.put_u8(FORMAT_VERSION);
        match self {
            Command::Pages { database, tables, origin, sidecars, page_set } => {
                out.put_u8(if tables.is_some() { KIND_PAGES_OF_TABLES } else { KIND_PAGES });
                put_name(&mut out, database);
                if let Some(tables) = tables {
                    out.put_u16_le(u16::try_from(tables.len()).expect("invariant: see bounded_tables"));
                    for table in tables {
                        put_name(&mut out, table);
                    }
                }
                out.put_u64_le(origin.node);
                out.put_u64_le(origin.incarnation);
                out.put_u64_le(origin.sequence);
                out.put_u32_le(u32::try_from(sidecars.len()).expect("invariant: a group is bounded"));
                for sidecar in sidecars {
                    out.put_u32_le(u32::try_from(sidecar.len()).expect("invariant: a sidecar is bounded"));
                    out.put_slice(sidecar);
                }
                out.put_slice(page_set);
            }
            Command::CreateDatabase { database } => {
                out.put_u8(KIND_CREATE_DATABASE);
                put_name(&mut out, database);
            }
            Command::DropDatabase { database } => {
                out.put_u8(KIND_DROP_DATABASE);
                put_name(&mut out, database);
            }
        }
        out.freeze()
    }

    fn encoded_len(&self) -> usize {
        match self {
            Command::Pages { database, tables, sidecars, page_set, .. } => {
                let tables = tables.as_ref().map_or(0, |tables| 2 + tables.iter().map(|t| 2 + t.len()).sum::<usize>());
                let sidecars = sidecars.iter().map(|s| 4 + s.len()).sum::<usize>();
                2 + 2 + database.len() + tables + 24 + 4 + sidecars + page_set.len()
            }
            Command::CreateDatabase { database } | Command::DropDatabase { database } => 4 + database.len(),
        }
    }

    /// Reads what [`Self::encode`] wrote; byte strings are slices of `bytes`, not copies.
    ///
    /// # Errors
    /// `InvalidData` when the bytes are not a command this version knows.
    pub fn decode(mut bytes: Bytes) -> io::Result<Command> {
        need(&bytes, 2)?;
        let version = bytes.get_u8();
        if version != FORMAT_VERSION {
            return Err(invalid(format!(
                "a command has format version {version}, this program knows {FORMAT_VERSION}: run the version that wrote it, or a newer one"
            )));
        }
        match bytes.get_u8() {
            kind @ (KIND_PAGES | KIND_PAGES_OF_TABLES) => {
                let database = get_name(&mut bytes)?;
                let tables = if kind == KIND_PAGES { None } else { Some(get_tables(&mut bytes)?) };
                need(&bytes, 28)?;
                let origin =
                    Origin { node: bytes.get_u64_le(), incarnation: bytes.get_u64_le(), sequence: bytes.get_u64_le() };
                let count = bytes.get_u32_le() as usize;
                // Each sidecar takes at least its length field: bounds the allocation by the input.
                need(&bytes, count.saturating_mul(4))?;
                let mut sidecars = Vec::with_capacity(count);
                for _ in 0..count {
                    need(&bytes, 4)?;
                    let len = bytes.get_u32_le() as usize;
                    need(&bytes, len)?;
                    sidecars.push(bytes.split_to(len));
                }
                Ok(Command::Pages { database, tables, origin, sidecars, page_set: bytes })
            }
            KIND_CREATE_DATABASE => Ok(Command::CreateDatabase { database: get_name(&mut bytes)? }),
            KIND_DROP_DATABASE => Ok(Command::DropDatabase { database: get_name(&mut bytes)? }),
            kind => Err(invalid(format!("a command has the unknown kind {kind}"))),
        }
    }
}

fn put_name(out: &mut BytesMut, name: &str) {
    out.put_u16_le(u16::try_from(name.len()).expect("invariant: names are checked before they are proposed"));
    out.put_slice(name.as_bytes());
}

fn get_name(bytes: &mut Bytes) -> io::Result<String> {
    need(bytes, 2)?;
    let len = usize::from(bytes.get_u16_le());
    need(bytes, len)?;
    let name = bytes.split_to(len);
    let name = std::str::from_utf8(&name).map_err(|_| invalid("a database name is not UTF-8".into()))?;
    check_database_name(name).map_err(invalid)?;
    Ok(name.to_owned())
}

fn get_tables(bytes: &mut Bytes) -> io::Result<Vec<String>> {
    need(bytes, 2)?;
    let count = usize::from(bytes.get_u16_le());
    let mut tables = Vec::new();
    for _ in 0..count {
        need(bytes, 2)?;
        let len = usize::from(bytes.get_u16_le());
        need(bytes, len)?;
        let name = bytes.split_to(len);
        let name = std::str::from_utf8(&name).map_err(|_| invalid("the name of a table is not UTF-8".into()))?;
        tables.push(name.to_owned());
    }
    Ok(tables)
}

/// What fits a command; None: too much of it, and any table may have changed.
pub fn bounded_tables(tables: Vec<String>) -> Option<Vec<String>> {
    let fits = tables.len() <= usize::from(u16::MAX) && tables.iter().all(|name| name.len() <= usize::from(u16::MAX));
    fits.then_some(tables)
}

fn need(bytes: &Bytes, len: usize) -> io::Result<()> {
    if bytes.len() < len {
        return Err(invalid(format!("a command ends early: {len} bytes wanted, {} there", bytes.len())));
    }
    Ok(())
}

/// Names become file names: letters, digits, `_`, `-`, `.` (not in front), 1 to 128 bytes.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn check_database_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > MAX_DATABASE_NAME || name.starts_with('.') || !name.chars().all(plain) {
        return Err(format!(
            "{name:?} is no name for a database: use 1 to {MAX_DATABASE_NAME} letters, digits, '_', '-' and '.', not starting with '.'"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages() -> Command {
        Command::Pages {
            database: "etcd".into(),
            tables: None,
            origin: Origin { node: 1, incarnation: 2, sequence: 3 },
            sidecars: vec![Bytes::from_static(b"ab"), Bytes::new()],
            page_set: Bytes::from_static(b"pages"),
        }
    }

    #[test]
    fn golden_bytes() {
        let want = b"\x01\x01\x04\x00etcd\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\x02\0\0\0ab\0\0\0\0pages";
        assert_eq!(pages().encode().as_ref(), want);
        assert_eq!(Command::decode(Bytes::from_static(want)).unwrap(), pages());
    }

    #[test]
    fn golden_bytes_of_tables() {
        let Command::Pages { database, origin, sidecars, page_set, .. } = pages() else { unreachable!() };
        let command =
            Command::Pages { database, tables: Some(vec!["a".into(), "bc".into()]), origin, sidecars, page_set };
        let want = b"\x01\x04\x04\x00etcd\x02\0\x01\0a\x02\0bc\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\x02\0\0\0ab\0\0\0\0pages";
        assert_eq!(command.encode().as_ref(), want);
        assert_eq!(command.encoded_len(), want.len());
        assert_eq!(Command::decode(Bytes::from_static(want)).unwrap(), command);
    }

    #[test]
    fn golden_bytes_of_databases() {
        for (command, want) in [
            (Command::CreateDatabase { database: "a.b".into() }, b"\x01\x02\x03\x00a.b"),
            (Command::DropDatabase { database: "a.b".into() }, b"\x01\x03\x03\x00a.b"),
        ] {
            assert_eq!(command.encode().as_ref(), want);
            assert_eq!(Command::decode(Bytes::from_static(want)).unwrap(), command);
        }
    }

    #[test]
    fn a_newer_version_is_refused_with_advice() {
        let mut bytes = pages().encode().to_vec();
        bytes[0] = 2;
        let error = Command::decode(bytes.into()).unwrap_err().to_string();
        assert!(error.contains("format version 2") && error.contains("run the version"), "{error}");
    }

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for name in ["", ".hidden", "a/b", "..", "a b", &"x".repeat(129)] {
            assert!(check_database_name(name).is_err(), "{name:?}");
        }
        for name in ["etcd", "a.b-c_D9", &"x".repeat(128)] {
            assert!(check_database_name(name).is_ok(), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 4..200), kind in 1u8..5) {
            let _ = Command::decode(bytes.clone().into());
            // Past the version, and with a name that may be one.
            let mut bytes = bytes;
            bytes[..4].copy_from_slice(&[FORMAT_VERSION, kind, 0, 0]);
            let _ = Command::decode(bytes.clone().into());
            bytes.splice(2..4, [1, 0, b'a']);
            let _ = Command::decode(bytes.into());
        }

        #[test]
        fn round_trip(sidecars in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..30), 0..5),
                      page_set in proptest::collection::vec(any::<u8>(), 0..50), sequence: u64,
                      tables in proptest::option::of(proptest::collection::vec(".{0,20}", 0..5))) {
            let command = Command::Pages {
                database: "x".into(),
                tables,
                origin: Origin { node: 7, incarnation: 8, sequence },
                sidecars: sidecars.into_iter().map(Bytes::from).collect(),
                page_set: page_set.into(),
            };
            prop_assert_eq!(Command::decode(command.encode()).unwrap(), command);
        }
    }
}
