//! Groups of transactions between the writer thread and the apply of their entry.
//!
//! ```text
//! callers ──► writer thread ──seal──► in flight (proposed) ──apply──► committed, callers answered
//!                  │                       │
//!                  └── open group          └── leadership lost: discarded, callers told
//! ```
//! The lock on the groups in flight decides every race between the two ends: whoever holds it either commits the first group or
//! discards all of them (INV-COMMIT-OR-DISCARD).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::job::{Effect, Job, Refusal};
use super::replica::Replica;
use super::{DatabaseError, Writer};
use crate::page::Version;

/// Which writer captured a group: lets the leader recognise its own entry when it comes back committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The member that captured it.
    pub node: u64,
    /// Drawn at random each time a writer is opened.
    pub incarnation: u64,
    /// Counts the groups of that writer from 1.
    pub sequence: u64,
}

/// A caller in a group, and what to tell it when the group is committed.
pub(super) struct Waiter {
    pub job: Box<dyn Job>,
    /// Whether the caller's own transaction captured something.
    pub wrote: bool,
    /// The leadership it ran in.
    pub term: u64,
    /// The transaction was rolled back for this reason. Withheld like any result: it may tell of captured state.
    pub refusal: Option<Refusal>,
}

impl Waiter {
    /// Everything the caller may have seen is committed, by `version` at the latest.
    pub fn answer(self, version: Option<Version>) {
        let outcome = match (self.refusal, version) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(version)) if self.wrote => Ok(Effect::Committed(version)),
            (None, _) => Ok(Effect::None { term: self.term }),
        };
        self.job.finish(outcome);
    }
}

/// Tells each caller that its group is committed.
pub(crate) struct Answers {
    waiters: Vec<Waiter>,
    version: Version,
    proposed: Instant,
    span: tracing::Span,
}

impl Answers {
    /// When the group was handed to Raft.
    pub fn proposed(&self) -> Instant {
        self.proposed
    }

    /// To be called when the version is visible to readers and observers know of it.
    pub fn send(self) {
        tracing::debug!(parent: &self.span, "applied");
        for waiter in self.waiters {
            waiter.answer(Some(self.version));
        }
    }
}

struct Group {
    sequence: u64,
    version: Version,
    proposed: Instant,
    /// From the proposal to the answers.
    span: tracing::Span,
    waiters: Vec<Waiter>,
}

#[derive(Default)]
struct InFlight {
    /// The writer's incarnation that these groups belong to.
    incarnation: u64,
    groups: VecDeque<Group>,
}

/// What one database's writer has captured and Raft has not yet committed.
#[derive(Default)]
pub(crate) struct Pipeline {
    in_flight: Mutex<InFlight>,
    /// Signalled when a group leaves.
    room: Condvar,
}

impl Pipeline {
    /// A writer was opened: its groups will carry this incarnation.
    pub(super) fn begin(&self, incarnation: u64) {
        let mut in_flight = self.in_flight.lock();
        assert!(in_flight.groups.is_empty(), "invariant: a writer is opened on an empty pipeline");
        in_flight.incarnation = incarnation;
    }

    pub fn len(&self) -> usize {
        self.in_flight.lock().groups.len()
    }

    pub(super) fn push(&self, sequence: u64, version: Version, waiters: Vec<Waiter>, span: tracing::Span) {
        self.in_flight.lock().groups.push_back(Group { sequence, version, proposed: Instant::now(), span, waiters });
    }

    /// Adds a caller that has seen the newest group in flight but changed nothing. Gives it back when nothing is in flight.
    pub(super) fn attach(&self, waiter: Waiter) -> Option<Waiter> {
        match self.in_flight.lock().groups.back_mut() {
            Some(group) => {
                group.waiters.push(waiter);
                None
            }
            None => Some(waiter),
        }
    }

    /// Waits until fewer than `limit` groups are in flight, or for `patience`. True: there is room.
    pub(super) fn wait_for_room(&self, limit: usize, patience: std::time::Duration) -> bool {
        let mut in_flight = self.in_flight.lock();
        if in_flight.groups.len() >= limit {
            self.room.wait_for(&mut in_flight, patience);
        }
        in_flight.groups.len() < limit
    }

    /// The entry of `origin` is committed. If it is the first group in flight here, makes its version visible.
    ///
    /// None: not ours, or discarded meanwhile; the PageSet has to be applied from its bytes.
    pub(crate) fn commit_own(&self, origin: Origin, replica: &Replica) -> Option<Result<Answers, DatabaseError>> {
        let mut in_flight = self.in_flight.lock();
        if in_flight.incarnation != origin.incarnation {
            return None;
        }
        if in_flight.groups.front()?.sequence != origin.sequence {
            return None;
        }
        let group = in_flight.groups.pop_front()?;
        let committed = replica.commit_captured(group.version);
        self.room.notify_all();
        drop(in_flight);
        Some(match committed {
            Ok(()) => {
                let Group { version, proposed, span, waiters, .. } = group;
                Ok(Answers { waiters, version, proposed, span })
            }
            Err(error) => Err(DatabaseError::from(error)),
        })
    }

    /// Leadership is lost: drops everything captured, closes the writer and tells the callers in flight that their outcome is unknown.
    pub(super) fn discard(&self, writer: Writer, why: &str) {
        let mut in_flight = self.in_flight.lock();
        writer.discard();
        in_flight.incarnation = 0;
        let groups = std::mem::take(&mut in_flight.groups);
        self.room.notify_all();
        drop(in_flight);
        for waiter in groups.into_iter().flat_map(|group| group.waiters) {
            waiter.job.finish(Err(Refusal::OutcomeUnknown(why.to_owned())));
        }
    }
}

/// Shared between a database's writer thread and the state machine.
pub(crate) type SharedPipeline = Arc<Pipeline>;
