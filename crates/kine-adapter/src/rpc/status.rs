//! The one conversion of our errors to gRPC.
//!
//! Clients compare code AND text (kube-apiserver, clientv3), so both are a contract: the text is [`KvError`]'s
//! `Display`, the code stands here, in one exhaustive match. The tests hold every row against the table of etcd's
//! api/v3rpc/rpctypes/error.go, written out a second time.
//!
//! Etcd answers `Unavailable` with "request timed out" where the outcome is unknown, and so do we: clientv3 sends a
//! write again only if the connection failed before anything was sent.

use tonic::{Code, Status};

use crate::error::KvError;

/// The gRPC code that etcd gives to this error.
#[must_use]
pub fn code(error: &KvError) -> Code {
    use KvError as E;
    match error {
        E::KeyMissing
        | E::KeyNotFound
        | E::ValueProvided
        | E::LeaseProvided
        | E::TooManyOps
        | E::DuplicateKey
        | E::InvalidClientApiVersion
        | E::InvalidSortOption
        | E::MemberBadUrls
        | E::RequestTooLarge
        | E::UserEmpty
        | E::RoleEmpty
        | E::AuthFailed
        | E::PermissionNotGiven
        | E::InvalidAuthManagement
        | E::AuthOldRevision
        | E::WrongDowngradeVersionFormat
        | E::InvalidDowngradeTargetVersion => Code::InvalidArgument,

        E::Compacted | E::FutureRevision | E::LeaseTtlTooLarge => Code::OutOfRange,

        E::NoSpace | E::TooManyRequests => Code::ResourceExhausted,

        E::LeaseNotFound | E::MemberNotFound => Code::NotFound,

        E::LeaseExists
        | E::MemberExists
        | E::PeerUrlExists
        | E::MemberNotEnoughStarted
        | E::MemberNotLearner
        | E::LearnerNotReady
        | E::TooManyLearners
        | E::ClusterIdMismatch
        | E::RootUserNotExist
        | E::RootRoleNotExist
        | E::UserExists
        | E::UserNotFound
        | E::RoleExists
        | E::RoleNotFound
        | E::RoleNotGranted
        | E::PermissionNotGranted
        | E::AuthNotEnabled
        | E::NotLeader
        | E::NotCapable
        | E::NotSupportedForLearner
        | E::BadLeaderTransferee
        | E::ClusterVersionUnavailable
        | E::DowngradeInProcess
        | E::NoInflightDowngrade => Code::FailedPrecondition,

        E::PermissionDenied => Code::PermissionDenied,
        E::InvalidAuthToken => Code::Unauthenticated,

        E::NoLeader
        | E::LeaderChanged
        | E::Stopped
        | E::Timeout
        | E::TimeoutDueToLeaderFail
        | E::TimeoutDueToConnectionLost
        | E::TimeoutWaitAppliedIndex
        | E::Unhealthy => Code::Unavailable,

        E::Corrupt => Code::DataLoss,
        E::WatchCanceled | E::Canceled => Code::Cancelled,
        E::DeadlineExceeded => Code::DeadlineExceeded,
        E::Internal(_) => Code::Unknown,
    }
}

/// The answer a client gets for this error.
#[must_use]
pub fn status(error: &KvError) -> Status {
    Status::new(code(error), error.to_string())
}

impl From<KvError> for Status {
    fn from(error: KvError) -> Self {
        status(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// etcd's table: code, text.
    const ETCD: &[(KvError, Code, &str)] = &[
        (KvError::KeyMissing, Code::InvalidArgument, "etcdserver: key is not provided"),
        (KvError::KeyNotFound, Code::InvalidArgument, "etcdserver: key not found"),
        (KvError::ValueProvided, Code::InvalidArgument, "etcdserver: value is provided"),
        (KvError::LeaseProvided, Code::InvalidArgument, "etcdserver: lease is provided"),
        (KvError::TooManyOps, Code::InvalidArgument, "etcdserver: too many operations in txn request"),
        (KvError::DuplicateKey, Code::InvalidArgument, "etcdserver: duplicate key given in txn request"),
        (KvError::InvalidClientApiVersion, Code::InvalidArgument, "etcdserver: invalid client api version"),
        (KvError::InvalidSortOption, Code::InvalidArgument, "etcdserver: invalid sort option"),
        (KvError::Compacted, Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted"),
        (KvError::FutureRevision, Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision"),
        (KvError::NoSpace, Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"),
        (KvError::LeaseNotFound, Code::NotFound, "etcdserver: requested lease not found"),
        (KvError::LeaseExists, Code::FailedPrecondition, "etcdserver: lease already exists"),
        (KvError::LeaseTtlTooLarge, Code::OutOfRange, "etcdserver: too large lease TTL"),
        (KvError::WatchCanceled, Code::Cancelled, "etcdserver: watch canceled"),
        (KvError::MemberExists, Code::FailedPrecondition, "etcdserver: member ID already exist"),
        (KvError::PeerUrlExists, Code::FailedPrecondition, "etcdserver: Peer URLs already exists"),
        (
            KvError::MemberNotEnoughStarted,
            Code::FailedPrecondition,
            "etcdserver: re-configuration failed due to not enough started members",
        ),
        (KvError::MemberBadUrls, Code::InvalidArgument, "etcdserver: given member URLs are invalid"),
        (KvError::MemberNotFound, Code::NotFound, "etcdserver: member not found"),
        (KvError::MemberNotLearner, Code::FailedPrecondition, "etcdserver: can only promote a learner member"),
        (
            KvError::LearnerNotReady,
            Code::FailedPrecondition,
            "etcdserver: can only promote a learner member which is in sync with leader",
        ),
        (KvError::TooManyLearners, Code::FailedPrecondition, "etcdserver: too many learner members in cluster"),
        (KvError::ClusterIdMismatch, Code::FailedPrecondition, "etcdserver: cluster ID mismatch"),
        (KvError::RequestTooLarge, Code::InvalidArgument, "etcdserver: request is too large"),
        (KvError::TooManyRequests, Code::ResourceExhausted, "etcdserver: too many requests"),
        (KvError::RootUserNotExist, Code::FailedPrecondition, "etcdserver: root user does not exist"),
        (KvError::RootRoleNotExist, Code::FailedPrecondition, "etcdserver: root user does not have root role"),
        (KvError::UserExists, Code::FailedPrecondition, "etcdserver: user name already exists"),
        (KvError::UserEmpty, Code::InvalidArgument, "etcdserver: user name is empty"),
        (KvError::UserNotFound, Code::FailedPrecondition, "etcdserver: user name not found"),
        (KvError::RoleExists, Code::FailedPrecondition, "etcdserver: role name already exists"),
        (KvError::RoleNotFound, Code::FailedPrecondition, "etcdserver: role name not found"),
        (KvError::RoleEmpty, Code::InvalidArgument, "etcdserver: role name is empty"),
        (KvError::AuthFailed, Code::InvalidArgument, "etcdserver: authentication failed, invalid user ID or password"),
        (KvError::PermissionNotGiven, Code::InvalidArgument, "etcdserver: permission not given"),
        (KvError::PermissionDenied, Code::PermissionDenied, "etcdserver: permission denied"),
        (KvError::RoleNotGranted, Code::FailedPrecondition, "etcdserver: role is not granted to the user"),
        (KvError::PermissionNotGranted, Code::FailedPrecondition, "etcdserver: permission is not granted to the role"),
        (KvError::AuthNotEnabled, Code::FailedPrecondition, "etcdserver: authentication is not enabled"),
        (KvError::InvalidAuthToken, Code::Unauthenticated, "etcdserver: invalid auth token"),
        (KvError::InvalidAuthManagement, Code::InvalidArgument, "etcdserver: invalid auth management"),
        (KvError::AuthOldRevision, Code::InvalidArgument, "etcdserver: revision of auth store is old"),
        (KvError::NoLeader, Code::Unavailable, "etcdserver: no leader"),
        (KvError::NotLeader, Code::FailedPrecondition, "etcdserver: not leader"),
        (KvError::LeaderChanged, Code::Unavailable, "etcdserver: leader changed"),
        (KvError::NotCapable, Code::FailedPrecondition, "etcdserver: not capable"),
        (KvError::Stopped, Code::Unavailable, "etcdserver: server stopped"),
        (KvError::Timeout, Code::Unavailable, "etcdserver: request timed out"),
        (
            KvError::TimeoutDueToLeaderFail,
            Code::Unavailable,
            "etcdserver: request timed out, possibly due to previous leader failure",
        ),
        (
            KvError::TimeoutDueToConnectionLost,
            Code::Unavailable,
            "etcdserver: request timed out, possibly due to connection lost",
        ),
        (
            KvError::TimeoutWaitAppliedIndex,
            Code::Unavailable,
            "etcdserver: request timed out, waiting for the applied index took too long",
        ),
        (KvError::Unhealthy, Code::Unavailable, "etcdserver: unhealthy cluster"),
        (KvError::Corrupt, Code::DataLoss, "etcdserver: corrupt cluster"),
        (KvError::NotSupportedForLearner, Code::FailedPrecondition, "etcdserver: rpc not supported for learner"),
        (KvError::BadLeaderTransferee, Code::FailedPrecondition, "etcdserver: bad leader transferee"),
        (
            KvError::WrongDowngradeVersionFormat,
            Code::InvalidArgument,
            "etcdserver: wrong downgrade target version format",
        ),
        (KvError::InvalidDowngradeTargetVersion, Code::InvalidArgument, "etcdserver: invalid downgrade target version"),
        (
            KvError::ClusterVersionUnavailable,
            Code::FailedPrecondition,
            "etcdserver: cluster version not found during downgrade",
        ),
        (KvError::DowngradeInProcess, Code::FailedPrecondition, "etcdserver: cluster has a downgrade job in progress"),
        (KvError::NoInflightDowngrade, Code::FailedPrecondition, "etcdserver: no inflight downgrade job"),
        (KvError::Canceled, Code::Cancelled, "etcdserver: request canceled"),
        (KvError::DeadlineExceeded, Code::DeadlineExceeded, "etcdserver: context deadline exceeded"),
    ];

    #[test]
    fn every_row_has_etcds_code_and_text() {
        for (error, code, text) in ETCD {
            let status = status(error);
            assert_eq!(status.code(), *code, "{error:?}");
            assert_eq!(status.message(), *text, "{error:?}");
        }
    }

    #[test]
    fn no_error_is_missing_from_the_table() {
        for (error, _) in KvError::TABLE {
            assert_eq!(ETCD.iter().filter(|(row, ..)| row == error).count(), 1, "{error:?}");
        }
        assert_eq!(ETCD.len(), KvError::TABLE.len());
    }

    #[test]
    fn our_own_failures_are_unknown_to_clients() {
        let status = Status::from(KvError::Internal("disk on fire".into()));
        assert_eq!((status.code(), status.message()), (Code::Unknown, "raft-sqlite: disk on fire"));
    }
}
