//! What is counted on the way, in atomics: the places that count know nothing of names and text.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::family::HistogramValue;
use crate::error::ErrorClass;

/// Upper bounds of durations, in microseconds.
const MICROSECONDS: &[u64] = &[
    50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400, 204_800, 409_600, 819_200, 1_638_400,
    6_553_600, 26_214_400,
];
/// Upper bounds of sizes, in bytes.
const BYTES: &[u64] = &[256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];
/// Upper bounds of numbers of transactions.
const NUMBERS: &[u64] = &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// Only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Observations counted by size. The parts are added one by one: a reader may see an observation half.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [u64],
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
    /// Of the unit shown in the unit observed.
    scale: f64,
}

impl Histogram {
    fn new(bounds: &'static [u64], scale: f64) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0), scale }
    }

    /// Observed in microseconds, shown in seconds.
    fn of_times() -> Self {
        Self::new(MICROSECONDS, 1e6)
    }

    pub fn observe(&self, value: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    pub fn time(&self, time: Duration) {
        self.observe(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    pub fn value(&self) -> HistogramValue {
        HistogramValue {
            bounds: self.bounds.iter().map(|bound| *bound as f64 / self.scale).collect(),
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: self.sum.load(Ordering::Relaxed) as f64 / self.scale,
        }
    }
}

/// Names of the classes, in the order of [`ByClass`].
pub(crate) const CLASSES: [&str; 4] = ["rejected", "retryable", "outcome_unknown", "fatal"];

/// A counter for each class of errors.
#[derive(Debug, Default)]
pub(crate) struct ByClass([Counter; 4]);

impl ByClass {
    pub fn count(&self, class: ErrorClass) {
        let at = match class {
            ErrorClass::Rejected => 0,
            ErrorClass::Retryable => 1,
            ErrorClass::OutcomeUnknown => 2,
            ErrorClass::Fatal => 3,
        };
        self.0[at].add(1);
    }

    pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> {
        CLASSES.into_iter().zip(self.0.iter().map(Counter::get))
    }
}

/// One node's counters.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Another leader than before is known.
    pub leader_changes: Counter,
    /// This node stood for election.
    pub elections: Counter,
    /// Entries handed to Raft; those that failed.
    pub proposals: Counter,
    pub proposals_failed: Counter,
    /// From handing an entry to Raft to its being applied here.
    pub proposal_time: Histogram,
    /// Transactions that share an entry, and its bytes.
    pub entry_transactions: Histogram,
    pub entry_bytes: Histogram,
    /// Calls of `Database::write` that ended well; others.
    pub writes: Counter,
    pub write_errors: ByClass,
    /// From the call to the answer.
    pub write_time: Histogram,
    /// From the call to the writer's turn; the transaction itself.
    pub queue_time: Histogram,
    pub transaction_time: Histogram,
    pub reads: Counter,
    pub read_errors: Counter,
    /// Waiting for a thread included.
    pub read_time: Histogram,
    /// One entry.
    pub apply_time: Histogram,
    /// From giving entries to the log to their being on the disk.
    pub append_time: Histogram,
    pub hash_mismatches: Counter,
    pub base_mismatches: Counter,
    pub scrubs: Counter,
    pub scrubs_failed: Counter,
    pub scrubbed_pages: Counter,
    pub checkpoints_failed: Counter,
    pub checkpoint_time: Histogram,
    pub checkpoint_pages: Counter,
    pub checkpoint_bytes: Counter,
    pub snapshots_sent: Counter,
    pub snapshots_send_failed: Counter,
    pub snapshots_received: Counter,
    pub snapshots_receive_failed: Counter,
    pub snapshot_received_bytes: Counter,
    /// Calls sent to the leader; those that were not answered.
    pub calls: Counter,
    pub call_errors: ByClass,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            leader_changes: Counter::default(),
            elections: Counter::default(),
            proposals: Counter::default(),
            proposals_failed: Counter::default(),
            proposal_time: Histogram::of_times(),
            entry_transactions: Histogram::new(NUMBERS, 1.0),
            entry_bytes: Histogram::new(BYTES, 1.0),
            writes: Counter::default(),
            write_errors: ByClass::default(),
            write_time: Histogram::of_times(),
            queue_time: Histogram::of_times(),
            transaction_time: Histogram::of_times(),
            reads: Counter::default(),
            read_errors: Counter::default(),
            read_time: Histogram::of_times(),
            apply_time: Histogram::of_times(),
            append_time: Histogram::of_times(),
            hash_mismatches: Counter::default(),
            base_mismatches: Counter::default(),
            scrubs: Counter::default(),
            scrubs_failed: Counter::default(),
            scrubbed_pages: Counter::default(),
            checkpoints_failed: Counter::default(),
            checkpoint_time: Histogram::of_times(),
            checkpoint_pages: Counter::default(),
            checkpoint_bytes: Counter::default(),
            snapshots_sent: Counter::default(),
            snapshots_send_failed: Counter::default(),
            snapshots_received: Counter::default(),
            snapshots_receive_failed: Counter::default(),
            snapshot_received_bytes: Counter::default(),
            calls: Counter::default(),
            call_errors: ByClass::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn observations_fall_into_their_buckets() {
        let histogram = Histogram::new(&[10, 100], 10.0);
        for value in [0, 10, 11, 100, 101, u64::MAX >> 1] {
            histogram.observe(value);
        }
        let value = histogram.value();
        assert_eq!((value.bounds, value.counts.clone()), (vec![1.0, 10.0], vec![2, 2, 2]));
        assert_eq!(value.counts.iter().sum::<u64>(), 6);
    }

    /// What one write costs, in nanoseconds: run with `--release -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn cost_of_a_write() {
        let recorder = Recorder::default();
        let rounds = 1_000_000;
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            let called = std::time::Instant::now();
            let began = std::time::Instant::now();
            recorder.queue_time.time(began - called);
            recorder.transaction_time.time(began.elapsed());
            recorder.write_time.time(called.elapsed());
            recorder.writes.add(1);
        }
        println!("{} ns a write", start.elapsed().as_nanos() / rounds);
    }
}
