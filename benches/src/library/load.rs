//! What every system under measurement shares: its arguments, callers that run one operation after another, and the outcome as a line
//! of JSON. Also compiled into the programs of the peers, so it knows none of them.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Rows there are before reads are measured.
pub const PRELOADED: u64 = 100_000;
/// Rows in a transaction of [`Workload::Rows`].
pub const ROWS: u64 = 1000;
/// Bytes in a value.
pub const VALUE_BYTES: usize = 256;
/// Callers that write beside [`Workload::SelectWhileWriting`].
pub const WRITERS: usize = 16;

/// What callers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// One row, in a transaction of its own.
    Insert,
    /// 1000 rows in a transaction; counted in rows.
    Rows,
    /// A row by its key, as the node has it.
    SelectLocal,
    /// A row by its key, linearizable.
    SelectLinearizable,
    /// As select-local, while 16 other callers insert.
    SelectWhileWriting,
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self {
            Workload::Insert => "insert",
            Workload::Rows => "rows",
            Workload::SelectLocal => "select-local",
            Workload::SelectLinearizable => "select-linearizable",
            Workload::SelectWhileWriting => "select-while-writing",
        };
        f.pad(name)
    }
}

impl Workload {
    /// Whether it needs rows to be there.
    pub fn reads(self) -> bool {
        !matches!(self, Workload::Insert | Workload::Rows)
    }
}

/// One measurement.
#[derive(Clone, Debug, Parser)]
pub struct Measure {
    /// What callers do.
    #[arg(long)]
    pub workload: Workload,
    /// How many at once.
    #[arg(long)]
    pub callers: usize,
    /// For how long.
    #[arg(long, default_value_t = 3)]
    pub seconds: u64,
    /// Where the system keeps its files.
    #[arg(long)]
    pub data: std::path::PathBuf,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub operations_per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// Of the process, callers included.
    pub cpu_seconds_per_1000: f64,
    /// Written to disks, all nodes together.
    pub disk_bytes_per_operation: f64,
    /// Of the process: all nodes and the callers.
    pub rss_mib: f64,
    pub failures: u64,
    /// Operations that succeeded.
    #[serde(default)]
    pub operations: u64,
    /// Appended to the leader's log for an operation; only where it can be told.
    pub replicated_bytes_per_operation: Option<f64>,
    /// The first failure.
    pub failure: Option<String>,
}

impl Outcome {
    /// Prints it as the last line of a measuring program.
    pub fn print(&self) {
        println!("{}", serde_json::to_string(self).expect("plain JSON"));
    }
}

/// A value that does not compress to nothing: half of it random, half text.
pub fn value(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut value: Vec<u8> = (0..VALUE_BYTES / 16).flat_map(|_| next().to_le_bytes()).collect();
    while value.len() < VALUE_BYTES {
        value.extend_from_slice(format!("\"name\":\"pod-{:x}\",", next() >> 40).as_bytes());
    }
    value.truncate(VALUE_BYTES);
    value
}

/// A key between 1 and [`PRELOADED`], a different one each time.
pub fn some_key(number: u64) -> i64 {
    (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as i64 % PRELOADED as i64 + 1
}

/// Counts what the callers do.
pub struct Meter {
    start: Instant,
    cpu: f64,
    disk: u64,
}

/// What one caller did.
pub struct Tally {
    pub operations: u64,
    pub failures: u64,
    pub failure: Option<String>,
    pub latency: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        let latency = Histogram::new_with_bounds(1, 600_000_000, 3).expect("constant bounds");
        Self { operations: 0, failures: 0, failure: None, latency }
    }
}

impl Tally {
    /// Counts an operation that did `count` and began at `began`.
    pub fn count<T, E: std::fmt::Display>(&mut self, began: Instant, count: u64, result: Result<T, E>) {
        match result {
            Ok(_) => {
                self.operations += count;
                self.latency.saturating_record(began.elapsed().as_micros() as u64);
            }
            Err(error) => {
                self.failures += 1;
                self.failure.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

impl Meter {
    pub fn start() -> Self {
        Self { start: Instant::now(), cpu: cpu_seconds(), disk: disk_bytes() }
    }

    pub fn finish(self, tallies: impl IntoIterator<Item = Tally>) -> Outcome {
        let seconds = self.start.elapsed().as_secs_f64();
        let (cpu, disk) = (cpu_seconds() - self.cpu, disk_bytes() - self.disk);
        let mut all = Tally::default();
        for tally in tallies {
            all.operations += tally.operations;
            all.failures += tally.failures;
            all.failure = all.failure.or(tally.failure);
            all.latency.add(&tally.latency).expect("equal bounds");
        }
        let operations = all.operations.max(1) as f64;
        Outcome {
            operations_per_second: all.operations as f64 / seconds,
            p50_ms: all.latency.value_at_quantile(0.50) as f64 / 1000.0,
            p99_ms: all.latency.value_at_quantile(0.99) as f64 / 1000.0,
            cpu_seconds_per_1000: cpu / operations * 1000.0,
            disk_bytes_per_operation: disk as f64 / operations,
            rss_mib: rss_mib(),
            failures: all.failures,
            operations: all.operations,
            replicated_bytes_per_operation: None,
            failure: all.failure,
        }
    }
}

/// Runs `callers` tasks that call `operation` with a number of their own each time, one after the other, until the time is over. Each
/// call counts as `count`.
pub async fn drive<F, T, E>(
    callers: usize,
    duration: Duration,
    count: u64,
    operation: impl Fn(u64) -> F + Clone + Send + 'static,
) -> Outcome
where
    F: Future<Output = Result<T, E>> + Send,
    T: Send,
    E: std::fmt::Display + Send,
{
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let meter = Meter::start();
    let end = Instant::now() + duration;
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let operation = operation.clone();
            tokio::spawn(async move {
                let mut tally = Tally::default();
                while Instant::now() < end {
                    let began = Instant::now();
                    let result = operation(NUMBER.fetch_add(1, Ordering::Relaxed)).await;
                    tally.count(began, count, result);
                }
                tally
            })
        })
        .collect();
    let mut tallies = Vec::new();
    for task in tasks {
        tallies.push(task.await.expect("a caller panicked"));
    }
    meter.finish(tallies)
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |parts| parts.1).split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / rustix::param::clock_ticks_per_second() as f64
}

fn disk_bytes() -> u64 {
    number_after("/proc/self/io", "write_bytes:")
}

fn rss_mib() -> f64 {
    number_after("/proc/self/status", "VmRSS:") as f64 / 1024.0
}

fn number_after(file: &str, label: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}
