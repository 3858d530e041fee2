//! What the log has done since it was opened, for metrics.

use std::time::Duration;

/// Upper bounds, in microseconds, of the buckets of [`LogStatistics::sync_latency`]; one more
/// bucket holds what is slower.
pub const SYNC_LATENCY_BUCKETS: [u64; 14] =
    [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400, 409_600, 1_638_400];

/// Counters since [`super::Log::open`], and sizes now.
#[derive(Clone, Debug, Default)]
pub struct LogStatistics {
    /// Entries that can be read.
    pub entries: u64,
    /// Segment files in use.
    pub segments: u64,
    /// Their length together, in bytes.
    pub segment_bytes: u64,
    /// Segment files that wait for use.
    pub spare_segments: u64,
    /// Bytes that can be appended without asking the file system for room.
    pub ready_bytes: u64,
    /// Bytes of entries in memory, as [`super::LogOptions::cache_bytes`] counts them.
    pub cached_bytes: u64,
    /// Bytes of records that wait to be written, or are being written.
    pub queued_bytes: u64,
    /// Batches written.
    pub batches: u64,
    /// Entries written.
    pub written_entries: u64,
    /// Bytes written, headers and padding included.
    pub written_bytes: u64,
    /// fdatasync calls on segments; saving a vote counts as one.
    pub syncs: u64,
    /// Time in them.
    pub sync_time: Duration,
    /// The longest.
    pub sync_time_max: Duration,
    /// How many syncs took up to each of [`SYNC_LATENCY_BUCKETS`] (and above the one before); the
    /// last element counts slower ones.
    pub sync_latency: [u64; SYNC_LATENCY_BUCKETS.len() + 1],
}

impl LogStatistics {
    /// Counts one sync.
    pub(super) fn count_sync(&mut self, time: Duration) {
        self.syncs += 1;
        self.sync_time += time;
        self.sync_time_max = self.sync_time_max.max(time);
        let microseconds = time.as_micros();
        let bucket = SYNC_LATENCY_BUCKETS.partition_point(|bound| u128::from(*bound) < microseconds);
        self.sync_latency[bucket] += 1;
    }
}
