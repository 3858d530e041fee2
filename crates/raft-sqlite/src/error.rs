//! The errors a program that embeds raft-sqlite sees.
//!
//! Every variant says what became of the call: `Rejected` (no effect), `Retryable` (no effect; the same call may go through later),
//! `OutcomeUnknown` (it may have taken effect or may still) or `Fatal` (this node has stopped, or is damaged).

use std::fmt;

use crate::NodeId;
use crate::page::PageDamage;

/// What became of a call that ended with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// It had no effect, and the same call will fail again.
    Rejected,
    /// It had no effect; the same call may go through later or on another node.
    Retryable,
    /// It may have taken effect, or may still: look before repeating what is not idempotent.
    OutcomeUnknown,
    /// This node has stopped, or cannot do it because of what is damaged on its disk. The call had no effect.
    Fatal,
}

/// Why a write on this node did not end well.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E = std::convert::Infallible> {
    /// This node does not lead. No effect.
    #[error("this node is not the leader{}", at(*leader))]
    NotLeader {
        /// Who leads, as far as this node knows.
        leader: Option<NodeId>,
    },
    /// Too many writes wait on this node. No effect.
    #[error("too many writes are waiting on this node: try again later, or send less at once")]
    Overloaded,
    /// The transaction changed more than fits one replicated transaction. Rolled back.
    #[error("the transaction changes more than {limit_bytes} bytes of pages: split it, or raise max_transaction_bytes")]
    TooLarge {
        /// The bound, in bytes of page images.
        limit_bytes: u64,
    },
    /// No room for the log on this node's disk. No effect.
    #[error("no space is left for the log on this node: free some; writes go on by themselves")]
    DiskFull,
    /// The caller's deadline passed. No effect: it never began, or was interrupted and rolled back.
    #[error("the deadline has passed: {0}")]
    Timeout(String),
    /// SQLite refused to begin or to commit. Rolled back.
    #[error("SQLite: {0}")]
    Sql(#[source] rusqlite::Error),
    /// Refused for another reason. No effect.
    #[error("{0}")]
    Rejected(String),
    /// The caller's own error. Rolled back.
    #[error(transparent)]
    Closure(E),
    /// Proposed, but whether it is committed cannot be told.
    #[error("the outcome is unknown: {0}")]
    OutcomeUnknown(String),
    /// A page that the transaction needed is damaged in this node's file. No effect: another node has to lead.
    #[error(transparent)]
    Damaged(PageDamage),
    /// This node has stopped.
    #[error("this node has stopped: {0}")]
    Fatal(String),
}

impl<E> WriteError<E> {
    /// The same with another error of the caller's own.
    pub fn map_closure<F>(self, map: impl FnOnce(E) -> F) -> WriteError<F> {
        match self {
            WriteError::Closure(error) => WriteError::Closure(map(error)),
            WriteError::NotLeader { leader } => WriteError::NotLeader { leader },
            WriteError::Overloaded => WriteError::Overloaded,
            WriteError::TooLarge { limit_bytes } => WriteError::TooLarge { limit_bytes },
            WriteError::DiskFull => WriteError::DiskFull,
            WriteError::Timeout(why) => WriteError::Timeout(why),
            WriteError::Sql(error) => WriteError::Sql(error),
            WriteError::Rejected(why) => WriteError::Rejected(why),
            WriteError::OutcomeUnknown(why) => WriteError::OutcomeUnknown(why),
            WriteError::Damaged(damage) => WriteError::Damaged(damage),
            WriteError::Fatal(why) => WriteError::Fatal(why),
        }
    }

    /// What became of the call.
    pub fn class(&self) -> ErrorClass {
        match self {
            WriteError::NotLeader { .. } | WriteError::Overloaded | WriteError::DiskFull | WriteError::Timeout(_) => {
                ErrorClass::Retryable
            }
            WriteError::TooLarge { .. } | WriteError::Sql(_) | WriteError::Rejected(_) | WriteError::Closure(_) => {
                ErrorClass::Rejected
            }
            WriteError::OutcomeUnknown(_) => ErrorClass::OutcomeUnknown,
            WriteError::Damaged(_) | WriteError::Fatal(_) => ErrorClass::Fatal,
        }
    }
}

fn at(leader: Option<NodeId>) -> impl fmt::Display {
    struct At(Option<NodeId>);
    impl fmt::Display for At {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.0 {
                Some(leader) => write!(f, "; member {leader} is"),
                None => write!(f, ", and none is known"),
            }
        }
    }
    At(leader)
}

/// Why a read did not end well. Reads have no effect, so each may be repeated.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No leader confirmed that this node's state is new enough.
    #[error("no leader could be reached to confirm the read: {0}")]
    NoLeader(String),
    /// The leader answered, but its index was not applied here in time.
    #[error("this node did not catch up in time: {0}")]
    Timeout(String),
    /// There is no such database on this node.
    #[error("no database {0:?}: create it by writing to it, or check the name")]
    NoSuchDatabase(String),
    /// Too many reads wait on this node.
    #[error("too many reads are waiting on this node: try again later")]
    Overloaded,
    /// It held its version for so long that the page images it needs are gone. Read again, in shorter transactions.
    #[error("the read has held its version for longer than {} s: split it into shorter ones", max_age.as_secs())]
    TooOld {
        /// The bound.
        max_age: std::time::Duration,
    },
    /// The page images it needs, with those of readers as old, took more memory than they may, and are gone. Read again, in shorter
    /// transactions.
    #[error(
        "the read has held its version while more than {max_bytes} bytes of pages changed: split it into shorter ones, or raise max_reader_bytes"
    )]
    HoldsTooMuch {
        /// The bound, in bytes of page images that readers of one database keep.
        max_bytes: u64,
    },
    /// SQLite's own error.
    #[error("SQLite: {0}")]
    Sql(#[source] rusqlite::Error),
    /// The query went well, but its result is not what was asked for.
    #[error(transparent)]
    Row(#[from] crate::client::RowError),
    /// The program's own preparation of the connection failed.
    #[error(transparent)]
    Prepare(#[from] crate::database::prepare::PrepareError),
    /// The closure panicked.
    #[error("the closure of the read panicked")]
    Panicked,
    /// The caller's deadline passed: the read was interrupted, or never began.
    #[error("the deadline has passed: {0}")]
    DeadlinePassed(String),
    /// A page that it needed is damaged in this node's file: ask another node.
    #[error(transparent)]
    Damaged(PageDamage),
    /// This node has stopped.
    #[error("this node has stopped: {0}")]
    Fatal(String),
}

impl ReadError {
    /// What became of the call: reads have no effect, so only whether the same one may go through.
    pub fn class(&self) -> ErrorClass {
        match self {
            ReadError::NoLeader(_)
            | ReadError::Timeout(_)
            | ReadError::Overloaded
            | ReadError::TooOld { .. }
            | ReadError::HoldsTooMuch { .. }
            | ReadError::DeadlinePassed(_) => ErrorClass::Retryable,
            ReadError::NoSuchDatabase(_)
            | ReadError::Sql(_)
            | ReadError::Row(_)
            | ReadError::Prepare(_)
            | ReadError::Panicked => ErrorClass::Rejected,
            ReadError::Damaged(_) | ReadError::Fatal(_) => ErrorClass::Fatal,
        }
    }
}

/// Why a call of a handler on the leader did not end well.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No leader is known. Nothing was sent.
    #[error("no leader is known")]
    NoLeader,
    /// This node has stopped. Nothing was sent.
    #[error("this node has stopped")]
    Stopped,
    /// It did not reach the leader's handler: no effect.
    #[error("the leader was not reached: {0}")]
    NotSent(String),
    /// It may have reached the handler.
    #[error("the outcome of a call to the leader is unknown: {0}")]
    OutcomeUnknown(String),
    /// The handler's own error bytes.
    #[error("the handler refused ({} bytes)", .0.len())]
    Handler(bytes::Bytes),
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration contradicts itself or the data directory.
    #[error("{0}")]
    Configuration(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// An address could not be listened on.
    #[error("cannot listen on {address}: {source}; is another process using it?")]
    Listen {
        /// HOST:PORT.
        address: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The log's own error (damage is reported with file and offset).
    #[error(transparent)]
    Log(#[from] crate::log::LogError),
    /// A database file's own error.
    #[error(transparent)]
    Database(#[from] crate::database::DatabaseError),
    /// Its peers say that this node must not take part: its data were lost, it was removed, or it is of another cluster. Nothing was
    /// changed.
    #[error("{0}")]
    Refused(String),
    /// Raft did not start.
    #[error("raft did not start: {0}")]
    Raft(String),
}

/// Why a change of the membership was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// This node does not lead, or no leader is known.
    #[error("the leader was not reached: {0}")]
    NoLeader(String),
    /// The change makes no sense for the present members.
    #[error("{0}")]
    Rejected(String),
    /// It may have taken effect.
    #[error("the outcome of the membership change is unknown: {0}")]
    OutcomeUnknown(String),
}
