//! Who this node is: DATA/node.json, written on the first start and checked on every later one.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::NodeId;
use crate::config::{ClusterStart, NodeConfig, cluster_id, member_id};
use crate::error::StartError;
use crate::page::source::{SystemDisk, write_synced};

const FILE_NAME: &str = "node.json";
const FORMAT_VERSION: u32 = 1;

/// What never changes for a data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub cluster_id: u64,
    pub node_id: NodeId,
    pub name: String,
}

#[derive(Serialize, Deserialize)]
struct IdentityJson {
    format_version: u32,
    /// 16 hex digits each.
    cluster_id: String,
    node_id: String,
    name: String,
    program_version: String,
    /// CRC32C of the file's JSON with this field 0.
    crc32c: u32,
}

fn checksum(json: &IdentityJson) -> u32 {
    crc32c::crc32c(&serde_json::to_vec(json).expect("invariant: plain JSON"))
}

/// What every version has.
#[derive(Deserialize)]
struct VersionJson {
    format_version: u32,
    #[serde(default)]
    program_version: String,
}

fn io(path: &Path, source: std::io::Error) -> StartError {
    StartError::Io { path: path.to_owned(), source }
}

impl Identity {
    /// What a first start of `config` would be. None for a node that joins: the cluster tells it.
    pub fn of_config(config: &NodeConfig) -> Result<Option<Identity>, StartError> {
        match &config.cluster {
            ClusterStart::Static { members, token } => {
                let own = members.iter().find(|member| member.name == config.name).ok_or_else(|| {
                    StartError::Configuration(format!(
                        "the initial cluster has no member named {:?}: it must list this node too, under the name given with --name",
                        config.name
                    ))
                })?;
                let mut advertised = config.advertise_peer_urls.clone();
                let mut listed = own.peer_urls.clone();
                advertised.sort();
                listed.sort();
                if advertised != listed {
                    return Err(StartError::Configuration(format!(
                        "member {:?} advertises the peer addresses {} but the initial cluster lists {}: make them equal",
                        config.name,
                        advertised.join(","),
                        listed.join(",")
                    )));
                }
                Ok(Some(Identity {
                    cluster_id: cluster_id(members, token),
                    node_id: member_id(&own.peer_urls, token),
                    name: config.name.clone(),
                }))
            }
            ClusterStart::Join { .. } => Ok(None),
        }
    }

    /// The identity kept in `data_dir`, if there is one.
    pub fn read(data_dir: &Path) -> Result<Option<Identity>, StartError> {
        let path = data_dir.join(FILE_NAME);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(&path, error)),
        };
        let damaged = |why: String| StartError::Configuration(format!("{} is damaged: {why}", path.display()));
        // First: a newer one may have other fields.
        let version: VersionJson = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if version.format_version > FORMAT_VERSION {
            return Err(StartError::Configuration(format!(
                "{} has format version {}, written by raft-sqlite {}; this program ({}) knows up to {FORMAT_VERSION}: use that version or a newer one",
                data_dir.display(),
                version.format_version,
                version.program_version,
                env!("CARGO_PKG_VERSION"),
            )));
        }
        let mut json: IdentityJson = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let stated = std::mem::take(&mut json.crc32c);
        if stated != checksum(&json) {
            return Err(damaged("its checksum does not match its content".into()));
        }
        let id = |hex: &str| u64::from_str_radix(hex, 16).map_err(|error| damaged(format!("{hex:?}: {error}")));
        Ok(Some(Identity { cluster_id: id(&json.cluster_id)?, node_id: NodeId(id(&json.node_id)?), name: json.name }))
    }

    /// Writes it; on disk when it returns.
    pub fn write(&self, data_dir: &Path) -> Result<(), StartError> {
        let mut json = IdentityJson {
            format_version: FORMAT_VERSION,
            cluster_id: format!("{:016x}", self.cluster_id),
            node_id: format!("{:016x}", self.node_id.0),
            name: self.name.clone(),
            program_version: env!("CARGO_PKG_VERSION").into(),
            crc32c: 0,
        };
        json.crc32c = checksum(&json);
        let path = data_dir.join(FILE_NAME);
        let text = serde_json::to_vec_pretty(&json).expect("invariant: plain JSON");
        write_synced(&SystemDisk, &path, &text).map_err(|error| io(&path, error))
    }

    /// A data directory must be this node's own.
    pub fn check(&self, configured: &Identity, data_dir: &Path) -> Result<(), StartError> {
        if self.name != configured.name {
            return Err(StartError::Configuration(format!(
                "{} belongs to member {:?} of cluster {:016x}, but this node is started as {:?}: give the right --data-dir or --name",
                data_dir.display(),
                self.name,
                self.cluster_id,
                configured.name
            )));
        }
        if self.node_id != configured.node_id {
            tracing::warn!(
                data_dir = %data_dir.display(),
                "the data directory keeps member id {}, the flags would give {}; the flags for a first start are ignored",
                self.node_id,
                configured.node_id
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand; the checksum is of the compact form with `crc32c` 0.
    fn golden() -> String {
        let program = env!("CARGO_PKG_VERSION");
        let compact = format!(
            "{{\"format_version\":1,\"cluster_id\":\"00000000000000ab\",\"node_id\":\"0123456789abcdef\",\"name\":\"n1\",\
             \"program_version\":\"{program}\",\"crc32c\":0}}"
        );
        format!(
            "{{\n  \"format_version\": 1,\n  \"cluster_id\": \"00000000000000ab\",\n  \"node_id\": \"0123456789abcdef\",\n  \
             \"name\": \"n1\",\n  \"program_version\": \"{program}\",\n  \"crc32c\": {}\n}}",
            crc32c::crc32c(compact.as_bytes())
        )
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let golden = golden();
        for bit in 0..golden.len() * 8 {
            let mut flipped = golden.clone().into_bytes();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            let error = Identity::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains("is damaged") || error.contains("format version"), "bit {bit}: {error}");
            assert_eq!(std::fs::read(&path).unwrap(), flipped);
        }
    }

    #[test]
    fn golden_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        let identity = Identity { cluster_id: 0xab, node_id: NodeId(0x0123_4567_89ab_cdef), name: "n1".into() };
        std::fs::write(&path, golden()).unwrap();
        assert_eq!(Identity::read(folder.path()).unwrap(), Some(identity.clone()));
        identity.write(folder.path()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), golden());
    }

    #[test]
    fn a_newer_version_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let newer = r#"{"format_version": 2, "program_version": "9.9.9", "identity": {}}"#;
        std::fs::write(folder.path().join(FILE_NAME), newer).unwrap();
        let error = Identity::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("written by raft-sqlite 9.9.9") && error.contains("use that version"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_damage(bytes: Vec<u8>, at in 0..golden().len(), byte: u8) {
            let folder = tempfile::tempdir().unwrap();
            let mut changed = golden().into_bytes();
            changed[at] = byte;
            for bytes in [bytes, changed] {
                std::fs::write(folder.path().join(FILE_NAME), &bytes).unwrap();
                if let Err(error) = Identity::read(folder.path()) {
                    let error = error.to_string();
                    proptest::prop_assert!(error.contains("is damaged") || error.contains("format version"), "{}", error);
                }
            }
        }
    }
}
