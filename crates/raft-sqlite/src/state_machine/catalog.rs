//! What a checkpoint keeps beside the database files: DATA/db/catalog.json.
//!
//! Written (new file, synced, renamed, folder synced) after all databases of the checkpoint are on disk. A database may therefore be
//! ahead of the catalog, never behind it.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::MembershipRecord;
use crate::database::DatabaseError;
use crate::database::replica::LogPosition;
use crate::page::source::{Disk, read_file, write_synced};

const FILE_NAME: &str = "catalog.json";
const FORMAT_VERSION: u32 = 1;

/// The state of the node's databases at one log position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    /// The last entry contained; None before any.
    pub position: Option<LogPosition>,
    /// The membership in force.
    pub membership: MembershipRecord,
    /// Name and version of each database.
    pub databases: BTreeMap<String, u64>,
}

#[derive(Serialize, Deserialize)]
struct Position {
    term: u64,
    index: u64,
}

#[derive(Serialize, Deserialize)]
struct CatalogJson {
    format_version: u32,
    position: Option<Position>,
    membership_position: Option<Position>,
    /// The bytes of a log entry of kind 2, which are text: kept as they are, so that no JSON library's order of keys comes into the
    /// checksum.
    membership: Option<String>,
    databases: BTreeMap<String, u64>,
    /// CRC32C of the file's JSON with this field 0.
    crc32c: u32,
}

/// What every version has.
#[derive(Deserialize)]
pub(crate) struct Versioned {
    pub format_version: u32,
}

fn position(from: Option<LogPosition>) -> Option<Position> {
    from.map(|LogPosition { term, index }| Position { term, index })
}

fn log_position(from: Option<Position>) -> Option<LogPosition> {
    from.map(|Position { term, index }| LogPosition { term, index })
}

impl Catalog {
    /// The catalog in `directory`; an empty one if there is none.
    ///
    /// # Errors
    /// Damage, a newer format, or an I/O error, with the file's name.
    pub(crate) fn read(disk: &dyn Disk, directory: &Path) -> Result<Catalog, DatabaseError> {
        let path = directory.join(FILE_NAME);
        let Some(text) = read_file(disk, &path).map_err(|error| DatabaseError::io(&path, error))? else {
            return Ok(Catalog::default());
        };
        let damaged = |why: String| DatabaseError::Damaged { path: path.clone(), offset: 0, why };
        // First: a newer one may have other fields.
        let version: Versioned = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if version.format_version > FORMAT_VERSION {
            let (found, known) = (version.format_version, FORMAT_VERSION);
            return Err(DatabaseError::NewerFormat { path: path.clone(), found, known });
        }
        let mut json: CatalogJson = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let stated = std::mem::take(&mut json.crc32c);
        if stated != checksum(&json) {
            return Err(damaged("its checksum does not match its content".into()));
        }
        let bytes = json.membership.map_or_else(Bytes::new, Bytes::from);
        Ok(Catalog {
            position: log_position(json.position),
            membership: MembershipRecord { position: log_position(json.membership_position), bytes },
            databases: json.databases,
        })
    }

    /// Replaces the catalog in `directory`; on disk when it returns.
    pub(crate) fn write(&self, disk: &dyn Disk, directory: &Path) -> Result<(), DatabaseError> {
        let path = directory.join(FILE_NAME);
        let membership =
            match self.membership.bytes.as_ref() {
                [] => None,
                bytes => Some(String::from_utf8(bytes.to_vec()).map_err(|error| {
                    DatabaseError::Internal(format!("the membership to write is not UTF-8: {error}"))
                })?),
            };
        let mut json = CatalogJson {
            format_version: FORMAT_VERSION,
            position: position(self.position),
            membership_position: position(self.membership.position),
            membership,
            databases: self.databases.clone(),
            crc32c: 0,
        };
        json.crc32c = checksum(&json);
        let text = serde_json::to_vec_pretty(&json).expect("invariant: a catalog is plain JSON");
        write_synced(disk, &path, &text).map_err(|error| DatabaseError::io(&path, error))
    }
}

fn checksum(json: &CatalogJson) -> u32 {
    crc32c::crc32c(&serde_json::to_vec(json).expect("invariant: a catalog is plain JSON"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::page::source::SystemDisk;

    fn catalog() -> Catalog {
        Catalog {
            position: Some(LogPosition { term: 3, index: 99 }),
            membership: MembershipRecord {
                position: Some(LogPosition { term: 1, index: 1 }),
                bytes: Bytes::from_static(br#"{"voters":[[1]],"nodes":{}}"#),
            },
            databases: BTreeMap::from([("etcd".to_owned(), 42)]),
        }
    }

    /// By hand; the checksum is of the compact form with `crc32c` 0.
    const GOLDEN: &str = r#"{
  "format_version": 1,
  "position": {
    "term": 3,
    "index": 99
  },
  "membership_position": {
    "term": 1,
    "index": 1
  },
  "membership": "{\"voters\":[[1]],\"nodes\":{}}",
  "databases": {
    "etcd": 42
  },
  "crc32c": 1242702891
}"#;

    #[test]
    fn golden_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        fs::write(&path, GOLDEN).unwrap();
        assert_eq!(Catalog::read(&SystemDisk, folder.path()).unwrap(), catalog());
        catalog().write(&SystemDisk, folder.path()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), GOLDEN);
    }

    #[test]
    fn a_newer_version_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        // Also with fields that this version does not know, and without some that it does.
        for text in [&GOLDEN.replace("n\": 1,", "n\": 2,"), r#"{"format_version": 7, "other": [], "crc32c": "?"}"#] {
            fs::write(folder.path().join(FILE_NAME), text).unwrap();
            let error = Catalog::read(&SystemDisk, folder.path()).unwrap_err();
            assert!(matches!(error, DatabaseError::NewerFormat { .. }), "{error}");
            assert!(error.to_string().contains("use the version that wrote it, or a newer one"), "{error}");
        }
    }

    #[test]
    fn reads_what_it_wrote_and_refuses_a_changed_byte() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Catalog::read(&SystemDisk, folder.path()).unwrap(), Catalog::default());
        catalog().write(&SystemDisk, folder.path()).unwrap();
        let read = Catalog::read(&SystemDisk, folder.path()).unwrap();
        assert_eq!((read.position, read.databases.clone()), (catalog().position, catalog().databases));
        let path = folder.path().join(FILE_NAME);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("42", "43")).unwrap();
        assert!(Catalog::read(&SystemDisk, folder.path()).unwrap_err().to_string().contains("checksum"));
        fs::write(&path, text.replace("\"format_version\": 1", "\"format_version\": 2")).unwrap();
        assert!(matches!(Catalog::read(&SystemDisk, folder.path()), Err(DatabaseError::NewerFormat { found: 2, .. })));
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_damage(bytes: Vec<u8>, at in 0..GOLDEN.len(), byte: u8) {
            let folder = tempfile::tempdir().unwrap();
            let mut changed = GOLDEN.as_bytes().to_vec();
            changed[at] = byte;
            for bytes in [bytes, changed] {
                fs::write(folder.path().join(FILE_NAME), &bytes).unwrap();
                if let Ok(read) = Catalog::read(&SystemDisk, folder.path()) {
                    // White space does not count.
                    proptest::prop_assert_eq!(read, catalog());
                }
            }
        }
    }
}
