//! Which cluster and which member a call means, carried in its metadata.
//!
//! A member that was given a wrong address, or a node of another cluster that was started on an old address, must not vote or append
//! here: the call is refused before it reaches Raft (INV-PEER-IDENTITY).

use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

use super::{PROTOCOL_VERSION, check_protocol};

/// Metadata key of the cluster id: 16 hex digits.
pub const CLUSTER_KEY: &str = "raft-sqlite-cluster";
/// Metadata key of the member id that the call is for: 16 hex digits.
pub const TO_KEY: &str = "raft-sqlite-to";
/// Metadata key of the version of the peer protocol that the caller speaks: decimal.
pub const PROTOCOL_KEY: &str = "raft-sqlite-protocol";
/// Metadata key of the caller's program version, for people.
pub const PROGRAM_KEY: &str = "raft-sqlite-version";

/// Marks outgoing calls.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    /// The cluster this node belongs to.
    pub cluster_id: u64,
    /// The member that is called.
    pub to: u64,
}

impl tonic::service::Interceptor for Outgoing {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let hex = |number: u64| {
            MetadataValue::try_from(format!("{number:016x}"))
                .map_err(|error| Status::internal(format!("an id is no metadata value: {error}")))
        };
        request.metadata_mut().insert(CLUSTER_KEY, hex(self.cluster_id)?);
        request.metadata_mut().insert(TO_KEY, hex(self.to)?);
        request.metadata_mut().insert(PROTOCOL_KEY, MetadataValue::from(PROTOCOL_VERSION));
        request.metadata_mut().insert(PROGRAM_KEY, MetadataValue::from_static(env!("CARGO_PKG_VERSION")));
        Ok(request)
    }
}

/// Marks a request that did not say which cluster and member it means; only `Identify` is answered then.
#[derive(Clone, Copy, Debug)]
pub struct Anonymous;

/// Checks incoming calls.
#[derive(Clone, Copy, Debug)]
pub struct Incoming {
    /// The cluster this node belongs to.
    pub cluster_id: u64,
    /// This node.
    pub node_id: u64,
}

impl tonic::service::Interceptor for Incoming {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let stated = |key: &str| {
            request
                .metadata()
                .get(key)
                .and_then(|value| value.to_str().ok())
                .and_then(|text| u64::from_str_radix(text, 16).ok())
        };
        match (stated(CLUSTER_KEY), stated(TO_KEY)) {
            (Some(cluster), _) if cluster != self.cluster_id => Err(Status::failed_precondition(format!(
                "wrong cluster id: the caller belongs to cluster {cluster:016x}, this member ({:016x}) to {:016x}; check the initial cluster and the data directories of both",
                self.node_id, self.cluster_id
            ))),
            (Some(_), Some(to)) if to != self.node_id => Err(Status::failed_precondition(format!(
                "wrong member id: the call is for member {to:016x}, this one is {:016x}; check which address belongs to which member",
                self.node_id
            ))),
            (Some(_), Some(_)) => {
                let text = |key: &str| request.metadata().get(key).and_then(|value| value.to_str().ok()).unwrap_or("");
                let version = text(PROTOCOL_KEY).parse().unwrap_or(0);
                check_protocol(version, text(PROGRAM_KEY)).map_err(Status::failed_precondition)?;
                Ok(request)
            }
            _ => {
                let mut request = request;
                request.extensions_mut().insert(Anonymous);
                Ok(request)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::service::Interceptor as _;

    use super::*;

    const HERE: Incoming = Incoming { cluster_id: 0xab, node_id: 0xcd };

    fn sent(cluster_id: u64, to: u64) -> Request<()> {
        Outgoing { cluster_id, to }.call(Request::new(())).unwrap()
    }

    #[test]
    fn golden_metadata() {
        let request = sent(0xab, 0xcd);
        let text = |key: &str| request.metadata().get(key).unwrap().to_str().unwrap().to_owned();
        assert_eq!(text("raft-sqlite-cluster"), "00000000000000ab");
        assert_eq!(text("raft-sqlite-to"), "00000000000000cd");
        assert_eq!(text("raft-sqlite-protocol"), "1");
        assert_eq!(text("raft-sqlite-version"), env!("CARGO_PKG_VERSION"));
        assert!(Incoming::call(&mut HERE.clone(), request).is_ok());
    }

    #[test]
    fn another_cluster_member_or_protocol_is_refused() {
        let refused = |request| {
            let status = Incoming::call(&mut HERE.clone(), request).unwrap_err();
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            status.message().to_owned()
        };
        assert!(refused(sent(0xac, 0xcd)).contains("wrong cluster id"));
        assert!(refused(sent(0xab, 0xce)).contains("wrong member id"));
        let mut newer = sent(0xab, 0xcd);
        newer.metadata_mut().insert(PROTOCOL_KEY, MetadataValue::from_static("2"));
        newer.metadata_mut().insert(PROGRAM_KEY, MetadataValue::from_static("9.9.9"));
        let why = refused(newer);
        for words in ["raft-sqlite 9.9.9) speaks version 2", env!("CARGO_PKG_VERSION"), "upgrade this member first"] {
            assert!(why.contains(words), "{why}");
        }
        for old in [None, Some("0"), Some("x"), Some("99999999999999999999")] {
            let mut request = sent(0xab, 0xcd);
            request.metadata_mut().remove(PROTOCOL_KEY);
            if let Some(old) = old {
                request.metadata_mut().insert(PROTOCOL_KEY, MetadataValue::from_static(old));
            }
            assert!(refused(request).contains("upgrade the peer first"), "{old:?}");
        }
    }

    #[test]
    fn who_says_nothing_is_anonymous() {
        let request = Incoming::call(&mut HERE.clone(), Request::new(())).unwrap();
        assert!(request.extensions().get::<Anonymous>().is_some());
    }
}
