//! The histograms that openraft keeps of its batch sizes, in 2 KiB each and nothing besides.
//!
//! The crate of this name builds lookup tables for sixteen bucket widths when the first histogram is made: 27 MB, of which openraft
//! uses 2 KB. A whole node of ours takes less. `[patch.crates-io]` in the workspace's manifest puts this one in its place; it has what
//! openraft calls. docs/adr/0008-openraft-statistics.md.

use std::fmt;
use std::marker::PhantomData;

/// Buckets that share their highest set bit are told apart by the two bits after it: a value is known to a quarter of itself.
const DETAIL_BITS: u32 = 2;
/// Values 0 to 3 one each, then four for each highest bit from 2 to 63.
const BUCKETS: usize = 252;

/// Counts of values in buckets whose width grows with the value; a percentile is right to within a quarter of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    _period: PhantomData<T>,
}

impl<T> Histogram<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: Box::new([0; BUCKETS]), total: 0, _period: PhantomData }
    }

    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts one value `count` times.
    pub fn record_n(&mut self, value: u64, count: u64) {
        self.counts[bucket(value)] += count;
        self.total += count;
    }

    /// How many values were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The smallest value of the bucket that the given share of values (0.0 to 1.0) does not exceed; 0 when empty.
    #[must_use]
    pub fn percentile(&self, share: f64) -> u64 {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return smallest(bucket);
            }
        }
        0
    }

    /// The percentiles that openraft shows.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total,
            p0_1: self.percentile(0.001),
            p1: self.percentile(0.01),
            p5: self.percentile(0.05),
            p10: self.percentile(0.1),
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            p99_9: self.percentile(0.999),
        }
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

fn bucket(value: u64) -> usize {
    let Some(highest) = value.checked_ilog2().filter(|highest| *highest >= DETAIL_BITS) else {
        return value as usize;
    };
    let detail = (value >> (highest - DETAIL_BITS)) & ((1 << DETAIL_BITS) - 1);
    (((highest - DETAIL_BITS + 1) as usize) << DETAIL_BITS) + detail as usize
}

fn smallest(bucket: usize) -> u64 {
    let (group, detail) = (bucket >> DETAIL_BITS, (bucket & ((1 << DETAIL_BITS) - 1)) as u64);
    match group {
        0 => detail,
        group => ((1 << DETAIL_BITS) | detail) << (group - 1),
    }
}

/// Percentiles of a [`Histogram`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PercentileStats {
    /// How many values were counted.
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, p0_1, p1, p5, p10, p50, p90, p99, p99_9 } = self;
        write!(
            f,
            "samples {samples}, p0.1 {p0_1}, p1 {p1}, p5 {p5}, p10 {p10}, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}"
        )
    }
}

/// Several histograms under their names, to be printed: a line of percentiles each.
#[derive(Clone, Debug, Default)]
pub struct AsciiChart {
    lines: Vec<(String, PercentileStats)>,
}

impl AsciiChart {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a histogram.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub fn add<T>(mut self, name: impl Into<String>, histogram: Histogram<T>) -> Self {
        self.lines.push((name.into(), histogram.percentile_stats()));
        self
    }

    /// As it is: there is one form.
    #[must_use]
    pub fn detailed(self) -> Self {
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|(name, stats)| writeln!(f, "{name}: {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_a_bucket_whose_smallest_is_within_a_quarter() {
        assert_eq!((bucket(u64::MAX), smallest(BUCKETS - 1)), (BUCKETS - 1, 0b111 << 61));
        let values = (0..5000).chain((0..64).flat_map(|bit| [1u64 << bit, (1u64 << bit) | 1, u64::MAX >> bit]));
        for value in values {
            let low = smallest(bucket(value));
            assert!(low <= value && value - low <= value / 5 + 1, "{value}: {low}");
            assert_eq!(bucket(low), bucket(value));
        }
    }

    #[test]
    fn percentiles() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats().p50, 0);
        (0..90).for_each(|_| histogram.record(1));
        histogram.record_n(1000, 10);
        let stats = histogram.percentile_stats();
        assert_eq!((stats.samples, stats.p50, stats.p90, stats.p99), (100, 1, 1, smallest(bucket(1000))));
    }
}
