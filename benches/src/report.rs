//! Medians and ratios as a Markdown table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::System;
use crate::load::Workload;

/// One system under one load for a few seconds.
#[derive(Clone, Copy, Debug)]
pub struct Measurement {
    pub operations_per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub cpu_seconds_per_1000: f64,
    pub disk_bytes_per_operation: f64,
    pub rss_mib: f64,
    pub failures: u64,
}

impl std::fmt::Display for Measurement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:>8.0} ops/s  p50 {:>7.2} ms  p99 {:>7.2} ms  {:.3} CPU s/1000  {:>6.0} disk B/op  {:>4.0} MiB a node",
            self.operations_per_second,
            self.p50_ms,
            self.p99_ms,
            self.cpu_seconds_per_1000,
            self.disk_bytes_per_operation,
            self.rss_mib
        )?;
        if self.failures > 0 { write!(f, "  {} FAILED", self.failures) } else { Ok(()) }
    }
}

/// All measurements of a run.
#[derive(Default)]
pub struct Report {
    rows: BTreeMap<(Workload, usize), [Vec<Measurement>; 2]>,
    idle: [Vec<f64>; 2],
}

fn slot(system: System) -> usize {
    match system {
        System::RaftSqlite => 0,
        System::Etcd => 1,
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    if values.is_empty() {
        return None;
    }
    let middle = values.len() / 2;
    Some(if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) })
}

impl Report {
    pub fn add(&mut self, workload: Workload, clients: usize, system: System, measurement: Measurement) {
        self.rows.entry((workload, clients)).or_default()[slot(system)].push(measurement);
    }

    /// Memory of one node right after the start.
    pub fn idle(&mut self, system: System, rss_bytes: u64) {
        self.idle[slot(system)].push(rss_bytes as f64 / 1024.0 / 1024.0);
    }

    pub fn markdown(&self, description: &str) -> String {
        let mut text = format!("{description}. Ours / etcd's (ratio).\n\n");
        text.push_str(
            "| workload | clients | ops/s | p50 ms | p99 ms | CPU s per 1000 | disk bytes/op | MiB a node |\n",
        );
        text.push_str("|---|---|---|---|---|---|---|---|\n");
        for ((workload, clients), systems) in &self.rows {
            let cell = |pick: fn(&Measurement) -> f64, digits: usize| {
                let of = |slot: usize| median(systems[slot].iter().map(pick));
                match (of(0), of(1)) {
                    (Some(ours), Some(etcds)) => match ours / etcds {
                        ratio if ratio.is_finite() => format!("{ours:.digits$} / {etcds:.digits$} ({ratio:.2})"),
                        _ => format!("{ours:.digits$} / {etcds:.digits$}"),
                    },
                    (Some(ours), None) => format!("{ours:.digits$}"),
                    _ => String::new(),
                }
            };
            let _ = writeln!(
                text,
                "| {workload} | {clients} | {} | {} | {} | {} | {} | {} |",
                cell(|m| m.operations_per_second, 0),
                cell(|m| m.p50_ms, 2),
                cell(|m| m.p99_ms, 2),
                cell(|m| m.cpu_seconds_per_1000, 3),
                cell(|m| m.disk_bytes_per_operation, 0),
                cell(|m| m.rss_mib, 0),
            );
        }
        let idle = |slot: usize| median(self.idle[slot].iter().copied());
        if let (Some(ours), Some(etcds)) = (idle(0), idle(1)) {
            let _ = writeln!(text, "\nIdle, right after the start: {ours:.0} / {etcds:.0} MiB a node.");
        }
        let failures: u64 = self.rows.values().flatten().flatten().map(|m| m.failures).sum();
        let _ = writeln!(text, "Failed requests: {failures}.");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median([].into_iter()), None);
    }
}
