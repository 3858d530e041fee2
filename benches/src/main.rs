//! Load on three nodes of raft-sqlite and of etcd, alternating, in one run: medians and ratios.
//!
//! Both run on loopback with their default durability (an acknowledged write is synced on a majority), take the same flags and get
//! the same load from the same generator. For each workload and number of clients the systems take turns `--rounds` times; what is
//! printed is the median of the rounds, and the ratio of ours to etcd's. Written as Markdown for docs/benchmarks.md.

mod load;
mod report;
mod servers;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;

use load::Workload;
use report::{Measurement, Report};
use servers::Servers;

#[derive(Parser)]
#[command(about = "Measures raft-sqlite beside etcd", disable_help_subcommand = true)]
struct Arguments {
    /// The program raft-sqlite.
    #[arg(long)]
    raft_sqlite: PathBuf,
    /// The program etcd; without it only raft-sqlite is measured.
    #[arg(long)]
    etcd: Option<PathBuf>,
    /// Nodes in each cluster.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// How often the systems take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds a measurement lasts.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Numbers of clients, separated by commas.
    #[arg(long, default_value = "1,16,100,1000", value_delimiter = ',')]
    clients: Vec<usize>,
    /// Workloads, separated by commas: put, range, serializable-range, txn.
    #[arg(long, default_value = "put,range,txn", value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// Bytes in a value.
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// Different keys.
    #[arg(long, default_value_t = 10_000)]
    keys: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    RaftSqlite,
    Etcd,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(arguments))
}

async fn run(arguments: Arguments) -> Result<()> {
    let mut systems = vec![(System::RaftSqlite, vec![arguments.raft_sqlite.display().to_string(), "serve".into()])];
    if let Some(etcd) = &arguments.etcd {
        systems.push((System::Etcd, vec![etcd.display().to_string()]));
    }
    let mut report = Report::default();
    for round in 0..arguments.rounds {
        for turn in 0..systems.len() {
            // The order changes from round to round, so that neither always runs on the warmer machine.
            let (system, command) = &systems[(turn + round) % systems.len()];
            eprintln!("round {} of {}: {system:?}", round + 1, arguments.rounds);
            let servers = Servers::start(command, arguments.nodes).await.with_context(|| format!("{system:?}"))?;
            report.idle(*system, servers.rss_bytes()? / arguments.nodes as u64);
            load::fill(&servers.urls, arguments.keys, arguments.value_bytes).await?;
            for workload in &arguments.workloads {
                for clients in &arguments.clients {
                    let cpu_before = servers.cpu_seconds()?;
                    let disk_before = servers.disk_bytes()?;
                    let settings = load::Settings {
                        workload: *workload,
                        clients: *clients,
                        duration: Duration::from_secs(arguments.seconds),
                        value_bytes: arguments.value_bytes,
                        keys: arguments.keys,
                    };
                    let result = load::run(&servers.urls, settings).await?;
                    let operations = result.operations.max(1) as f64;
                    let measurement = Measurement {
                        operations_per_second: result.operations as f64 / result.seconds,
                        p50_ms: result.latency.value_at_quantile(0.50) as f64 / 1000.0,
                        p99_ms: result.latency.value_at_quantile(0.99) as f64 / 1000.0,
                        cpu_seconds_per_1000: (servers.cpu_seconds()? - cpu_before) / operations * 1000.0,
                        disk_bytes_per_operation: (servers.disk_bytes()? - disk_before) as f64 / operations,
                        rss_mib: servers.rss_bytes()? as f64 / 1024.0 / 1024.0 / arguments.nodes as f64,
                        failures: result.failures,
                    };
                    eprintln!("  {workload} {clients:>5} clients: {measurement}");
                    report.add(*workload, *clients, *system, measurement);
                }
            }
        }
    }
    println!("{}", report.markdown(&arguments.describe()));
    Ok(())
}

impl Arguments {
    fn describe(&self) -> String {
        format!(
            "{} nodes on loopback, {} keys, values of {} bytes, {} s a measurement, median of {} alternating rounds",
            self.nodes, self.keys, self.value_bytes, self.seconds, self.rounds
        )
    }
}
