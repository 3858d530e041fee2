//! What raft-sqlite's errors mean here: the one place that knows both.

use super::writer::{Refusal, from_sql};
use crate::error::KvError;
use raft_sqlite::{CallError, ReadError, WriteError};

/// How an attempt to write failed.
#[derive(Debug)]
pub(super) enum Failed {
    /// It had no effect, for a reason that may pass: try again, on whoever leads then.
    TryLater,
    /// It had no effect, and there is nothing to wait for: try again at once.
    TryAgain,
    /// This is the answer.
    For(KvError),
}

pub(super) fn of_write(error: WriteError<Refusal>) -> Failed {
    match error {
        WriteError::NotLeader { .. } | WriteError::Timeout(_) => Failed::TryLater,
        WriteError::Rejected(reason) => Failed::For(KvError::Internal(reason)),
        WriteError::Sql(error) => Failed::For(from_sql(&error)),
        WriteError::Overloaded => Failed::For(KvError::TooManyRequests),
        WriteError::TooLarge { .. } => Failed::For(KvError::RequestTooLarge),
        WriteError::DiskFull => Failed::For(KvError::NoSpace),
        WriteError::Closure(Refusal::Kv(error)) => Failed::For(error),
        WriteError::Closure(Refusal::Again) => Failed::TryAgain,
        WriteError::OutcomeUnknown(reason) => {
            tracing::debug!(reason, "the outcome of a write is not known");
            Failed::For(KvError::Timeout)
        }
        WriteError::Damaged(damage) => Failed::For(KvError::Internal(damage.to_string())),
        WriteError::Fatal(reason) => Failed::For(KvError::Internal(reason)),
    }
}

pub(super) fn of_call(error: CallError) -> Failed {
    match error {
        CallError::NoLeader | CallError::NotSent(_) | CallError::Stopped => Failed::TryLater,
        CallError::OutcomeUnknown(reason) => {
            tracing::debug!(reason, "the outcome of a forwarded write is not known");
            Failed::For(KvError::TimeoutDueToConnectionLost)
        }
        // What the handler answers if it does not lead (any more): it did nothing.
        CallError::Handler(bytes) => match KvError::decode(&bytes) {
            KvError::NotLeader => Failed::TryLater,
            error => Failed::For(error),
        },
    }
}

/// Whether a read found no database: nothing has ever been written.
pub(super) fn is_absent(error: &ReadError) -> bool {
    matches!(error, ReadError::NoSuchDatabase(_))
}

pub(super) fn of_read(error: ReadError) -> KvError {
    match error {
        ReadError::NoLeader(_) => KvError::NoLeader,
        ReadError::Timeout(_) | ReadError::DeadlinePassed(_) => KvError::Timeout,
        ReadError::Overloaded => KvError::TooManyRequests,
        other @ (ReadError::NoSuchDatabase(_)
        | ReadError::TooOld { .. }
        | ReadError::HoldsTooMuch { .. }
        | ReadError::Sql(_)
        | ReadError::Row(_)
        | ReadError::Prepare(_)
        | ReadError::Panicked
        | ReadError::Damaged(_)
        | ReadError::Fatal(_)) => KvError::Internal(other.to_string()),
    }
}
