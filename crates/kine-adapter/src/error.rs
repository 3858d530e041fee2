//! What can go wrong in the etcd layer, in etcd's own words.
//!
//! One enum for all of it, since clients compare texts: `Display` is the exact text of etcd's `rpctypes/error.go`. The
//! gRPC code belongs to `rpc/status.rs`. Every variant has a [`Class`], and a number by which it crosses from the leader
//! to the node that forwarded a request.
//!
//! Etcd answers `Unavailable` for an unknown outcome ("request timed out") too; the class is what our own code goes by.

use bytes::{BufMut, Bytes, BytesMut};

/// What an error says about the effect of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// It had no effect, and asking again as it is will not help.
    Rejected,
    /// It had no effect; asking again may help.
    Retryable,
    /// It may or may not have had, or may yet have, an effect.
    OutcomeUnknown,
    /// This node must not go on.
    Fatal,
}

macro_rules! errors {
    ($($variant:ident, $class:ident, $number:literal, $text:literal, $doc:literal;)*) => {
        /// An error of the etcd layer.
        #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
        pub enum KvError {
            $(#[doc = $doc] #[error($text)] $variant,)*
            /// A failure of our own that is none of etcd's, with what happened.
            #[error("raft-sqlite: {0}")]
            Internal(String),
        }

        impl KvError {
            /// Every variant that has a fixed text, with that text: for tests that compare it to etcd's table.
            pub const TABLE: &'static [(KvError, &'static str)] = &[$((KvError::$variant, $text),)*];

            /// What the error says about the effect of the request.
            #[must_use]
            pub fn class(&self) -> Class {
                match self {
                    $(KvError::$variant => Class::$class,)*
                    KvError::Internal(_) => Class::OutcomeUnknown,
                }
            }

            /// The number by which peers know this variant; 0 for `Internal`. Numbers are never used again for
            /// something else.
            fn number(&self) -> u8 {
                match self {
                    $(KvError::$variant => $number,)*
                    KvError::Internal(_) => 0,
                }
            }

            fn from_number(number: u8) -> Option<KvError> {
                match number {
                    $($number => Some(KvError::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

errors! {
    KeyMissing, Rejected, 1, "etcdserver: key is not provided", "A request without a key.";
    KeyNotFound, Rejected, 2, "etcdserver: key not found", "ignore_value or ignore_lease on a key that does not exist.";
    ValueProvided, Rejected, 3, "etcdserver: value is provided", "ignore_value together with a value.";
    LeaseProvided, Rejected, 4, "etcdserver: lease is provided", "ignore_lease together with a lease.";
    TooManyOps, Rejected, 5, "etcdserver: too many operations in txn request", "A txn over max-txn-ops.";
    DuplicateKey, Rejected, 6, "etcdserver: duplicate key given in txn request", "A txn that writes one key twice.";
    InvalidClientApiVersion, Rejected, 7, "etcdserver: invalid client api version", "Metadata names an unknown client API version.";
    InvalidSortOption, Rejected, 8, "etcdserver: invalid sort option", "An unknown sort order or target.";
    Compacted, Rejected, 9, "etcdserver: mvcc: required revision has been compacted", "The revision asked for is gone.";
    FutureRevision, Rejected, 10, "etcdserver: mvcc: required revision is a future revision", "The revision asked for does not exist yet.";
    NoSpace, Rejected, 11, "etcdserver: mvcc: database space exceeded", "The quota is used up, or the disk is full.";
    LeaseNotFound, Rejected, 12, "etcdserver: requested lease not found", "No lease with that id.";
    LeaseExists, Rejected, 13, "etcdserver: lease already exists", "A lease with that id exists.";
    LeaseTtlTooLarge, Rejected, 14, "etcdserver: too large lease TTL", "A TTL over nine billion seconds.";
    WatchCanceled, Rejected, 15, "etcdserver: watch canceled", "The watch stream was given up by the server.";
    MemberExists, Rejected, 16, "etcdserver: member ID already exist", "A member with that id exists.";
    PeerUrlExists, Rejected, 17, "etcdserver: Peer URLs already exists", "Another member has that peer URL.";
    MemberNotEnoughStarted, Rejected, 18, "etcdserver: re-configuration failed due to not enough started members", "The change would leave no working majority.";
    MemberBadUrls, Rejected, 19, "etcdserver: given member URLs are invalid", "Peer URLs that cannot be read.";
    MemberNotFound, Rejected, 20, "etcdserver: member not found", "No member with that id.";
    MemberNotLearner, Rejected, 21, "etcdserver: can only promote a learner member", "The member votes already.";
    LearnerNotReady, Rejected, 22, "etcdserver: can only promote a learner member which is in sync with leader", "The learner is too far behind.";
    TooManyLearners, Rejected, 23, "etcdserver: too many learner members in cluster", "No room for another learner.";
    ClusterIdMismatch, Rejected, 24, "etcdserver: cluster ID mismatch", "The request names another cluster.";
    RequestTooLarge, Rejected, 25, "etcdserver: request is too large", "A request over max-request-bytes.";
    TooManyRequests, Retryable, 26, "etcdserver: too many requests", "A bounded queue is full; nothing was done.";
    RootUserNotExist, Rejected, 27, "etcdserver: root user does not exist", "Authentication needs the user root.";
    RootRoleNotExist, Rejected, 28, "etcdserver: root user does not have root role", "Authentication needs root to have the role root.";
    UserExists, Rejected, 29, "etcdserver: user name already exists", "A user of that name exists.";
    UserEmpty, Rejected, 30, "etcdserver: user name is empty", "No user name, or no token while authentication is on.";
    UserNotFound, Rejected, 31, "etcdserver: user name not found", "No user of that name.";
    RoleExists, Rejected, 32, "etcdserver: role name already exists", "A role of that name exists.";
    RoleNotFound, Rejected, 33, "etcdserver: role name not found", "No role of that name.";
    RoleEmpty, Rejected, 34, "etcdserver: role name is empty", "No role name.";
    AuthFailed, Rejected, 35, "etcdserver: authentication failed, invalid user ID or password", "Name and password do not match.";
    PermissionNotGiven, Rejected, 36, "etcdserver: permission not given", "A grant without a permission.";
    PermissionDenied, Rejected, 37, "etcdserver: permission denied", "The user may not do that.";
    RoleNotGranted, Rejected, 38, "etcdserver: role is not granted to the user", "The user does not have that role.";
    PermissionNotGranted, Rejected, 39, "etcdserver: permission is not granted to the role", "The role does not have that permission.";
    AuthNotEnabled, Rejected, 40, "etcdserver: authentication is not enabled", "Only possible while authentication is on.";
    InvalidAuthToken, Rejected, 41, "etcdserver: invalid auth token", "The token is unknown or has expired.";
    InvalidAuthManagement, Rejected, 42, "etcdserver: invalid auth management", "A change that would lock everybody out.";
    AuthOldRevision, Retryable, 43, "etcdserver: revision of auth store is old", "Permissions changed since the token was checked.";
    NoLeader, Retryable, 44, "etcdserver: no leader", "There is no leader; nothing was done.";
    NotLeader, Rejected, 45, "etcdserver: not leader", "Only the leader can do that.";
    LeaderChanged, OutcomeUnknown, 46, "etcdserver: leader changed", "The leader changed while the request was on its way.";
    NotCapable, Rejected, 47, "etcdserver: not capable", "The cluster does not offer that.";
    Stopped, Retryable, 48, "etcdserver: server stopped", "This node is shutting down; nothing was done.";
    Timeout, OutcomeUnknown, 49, "etcdserver: request timed out", "It cannot be told whether the request had an effect.";
    TimeoutDueToLeaderFail, OutcomeUnknown, 50, "etcdserver: request timed out, possibly due to previous leader failure", "As Timeout, after the leader failed.";
    TimeoutDueToConnectionLost, OutcomeUnknown, 51, "etcdserver: request timed out, possibly due to connection lost", "As Timeout, after the connection to the leader failed.";
    TimeoutWaitAppliedIndex, Retryable, 52, "etcdserver: request timed out, waiting for the applied index took too long", "This node is too far behind to answer a read.";
    Unhealthy, Retryable, 53, "etcdserver: unhealthy cluster", "Too few members are up for a change of membership.";
    Corrupt, Fatal, 54, "etcdserver: corrupt cluster", "This node's state can no longer be trusted.";
    NotSupportedForLearner, Rejected, 55, "etcdserver: rpc not supported for learner", "A learner does not serve this.";
    BadLeaderTransferee, Rejected, 56, "etcdserver: bad leader transferee", "Leadership cannot move to that member.";
    WrongDowngradeVersionFormat, Rejected, 57, "etcdserver: wrong downgrade target version format", "Not a version.";
    InvalidDowngradeTargetVersion, Rejected, 58, "etcdserver: invalid downgrade target version", "Not a version that can be gone back to.";
    ClusterVersionUnavailable, Rejected, 59, "etcdserver: cluster version not found during downgrade", "The cluster's version is not known yet.";
    DowngradeInProcess, Rejected, 60, "etcdserver: cluster has a downgrade job in progress", "One downgrade at a time.";
    NoInflightDowngrade, Rejected, 61, "etcdserver: no inflight downgrade job", "Nothing to cancel.";
    Canceled, OutcomeUnknown, 62, "etcdserver: request canceled", "The caller gave up.";
    DeadlineExceeded, OutcomeUnknown, 63, "etcdserver: context deadline exceeded", "The caller's deadline passed.";
}

impl KvError {
    /// For the way back from the leader: one byte for the variant, then the text in UTF-8.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let text = self.to_string();
        let mut out = BytesMut::with_capacity(1 + text.len());
        out.put_u8(self.number());
        out.put_slice(text.as_bytes());
        out.freeze()
    }

    /// Reads what [`KvError::encode`] wrote; an unknown number (a newer leader) becomes `Internal` with the text.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> KvError {
        let (number, text) = bytes.split_first().map_or((0, &[][..]), |(n, text)| (*n, text));
        KvError::from_number(number).unwrap_or_else(|| {
            let text = String::from_utf8_lossy(text);
            KvError::Internal(text.strip_prefix("raft-sqlite: ").unwrap_or(&text).to_owned())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_the_way_back_from_the_leader() {
        for (error, text) in KvError::TABLE {
            assert_eq!(&error.to_string(), text);
            assert_eq!(&KvError::decode(&error.encode()), error);
        }
        let own = KvError::Internal("no such table".into());
        assert_eq!(KvError::decode(&own.encode()), own);
        assert_eq!(KvError::decode(&[]), KvError::Internal(String::new()));
        assert_eq!(KvError::decode(b"\xfeetcdserver: new"), KvError::Internal("etcdserver: new".into()));
    }

    #[test]
    fn numbers_are_unique() {
        let mut numbers: Vec<u8> = KvError::TABLE.iter().map(|(e, _)| e.number()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), KvError::TABLE.len());
    }
}
