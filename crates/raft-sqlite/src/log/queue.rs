//! What has been accepted and waits for the writer thread.

use std::collections::VecDeque;
use std::fmt;
use std::io;

use bytes::Bytes;

use super::EntryId;
use super::placement::Rotation;
use super::record::{Position, RecordType, record_bytes};

/// Called once an operation is on disk, or has failed.
pub(super) type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// A record that has its place and is to be written.
#[derive(Debug)]
pub(super) struct PlacedRecord {
    pub(super) record_type: RecordType,
    pub(super) position: Position,
    pub(super) id: EntryId,
    pub(super) kind: u8,
    pub(super) payload: Bytes,
}

impl PlacedRecord {
    /// A record without payload.
    pub(super) fn control(record_type: RecordType, position: Position, id: EntryId) -> Self {
        Self { record_type, position, id, kind: 0, payload: Bytes::new() }
    }
}

/// One step of the writer thread.
pub(super) enum Step {
    Write(PlacedRecord),
    /// Sync the segment, and go on in this one.
    Rotate(Box<Rotation>),
    SaveVote(Bytes),
    /// Once synced, the segments below this number are free.
    Release(u32),
    /// Once synced, call this.
    Call(Done),
}

impl Step {
    /// Bytes it adds to the log.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Step::Write(record) => u64::from(record_bytes(record.payload.len())),
            Step::Rotate(_) | Step::SaveVote(_) | Step::Release(_) | Step::Call(_) => 0,
        }
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Write(record) => write!(f, "write {:?} {:?}", record.record_type, record.id),
            Step::Rotate(rotation) => write!(f, "begin segment {}", rotation.segment.number),
            Step::SaveVote(_) => f.write_str("save vote"),
            Step::Release(below) => write!(f, "release segments below {below}"),
            Step::Call(_) => f.write_str("call back"),
        }
    }
}

/// Steps in order. Its bound is in [`super::Log::append`], which waits while it is too long.
#[derive(Debug, Default)]
pub(super) struct Queue {
    steps: VecDeque<Step>,
    /// Of steps queued, or taken and not finished.
    bytes: u64,
}

impl Queue {
    pub(super) fn push(&mut self, step: Step) {
        self.bytes += step.bytes();
        self.steps.push_back(step);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes steps until they add `limit_bytes` or more; with how many bytes they add.
    pub(super) fn take(&mut self, limit_bytes: u64) -> (Vec<Step>, u64) {
        let mut bytes = 0;
        let mut steps = Vec::with_capacity(self.steps.len());
        while bytes < limit_bytes
            && let Some(step) = self.steps.pop_front()
        {
            bytes += step.bytes();
            steps.push(step);
        }
        (steps, bytes)
    }

    /// Notes that taken steps are finished.
    pub(super) fn finish(&mut self, bytes: u64) {
        self.bytes -= bytes;
    }

    /// Gives up all that is queued or taken.
    pub(super) fn abandon(&mut self) -> VecDeque<Step> {
        self.bytes = 0;
        std::mem::take(&mut self.steps)
    }
}
