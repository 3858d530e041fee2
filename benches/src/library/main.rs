//! The library beside its peers, in one run: plain SQLite, hiqlite, dqlite. The systems take turns, each measurement in a process and a
//! folder of its own; medians as Markdown for docs/benchmarks.md.

mod costs;
mod load;
mod member;
mod ours;
mod sqlite;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};

use load::{Measure, Outcome, Workload};

#[derive(Parser)]
#[command(about = "Measures the library beside SQLite, hiqlite and dqlite", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// One measurement of a system that is built in.
    Measure {
        #[arg(long)]
        system: BuiltIn,
        #[command(flatten)]
        measure: Measure,
    },
    /// All systems, in turns.
    Compare(Compare),
    /// Memory, restart and catching up of a node of ours.
    Costs(costs::Costs),
    /// A member that the measurements of costs start.
    #[command(hide = true)]
    Member(member::Member),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BuiltIn {
    RaftSqlite,
    SqliteFull,
    SqliteOff,
}

#[derive(Parser)]
struct Compare {
    /// The program of benches/hiqlite.
    #[arg(long)]
    hiqlite: Option<PathBuf>,
    /// The program of benches/dqlite.
    #[arg(long)]
    dqlite: Option<PathBuf>,
    /// Leaves out SQLite with synchronous=FULL.
    #[arg(long)]
    without_sqlite_full: bool,
    /// Leaves out SQLite with synchronous=OFF.
    #[arg(long)]
    without_sqlite_off: bool,
    /// How often the systems take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds a measurement lasts.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Numbers of callers, separated by commas; rows has one caller always.
    #[arg(long, default_value = "1,16,64,256", value_delimiter = ',')]
    callers: Vec<usize>,
    /// Workloads, separated by commas.
    #[arg(
        long,
        default_value = "insert,rows,select-local,select-linearizable,select-while-writing",
        value_delimiter = ','
    )]
    workloads: Vec<Workload>,
}

/// A system under measurement: its name and the command that measures it.
struct System {
    name: &'static str,
    command: Vec<String>,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Task::Measure { system, measure } => {
            let outcome = match system {
                BuiltIn::SqliteFull => sqlite::measure(&measure, "FULL")?,
                BuiltIn::SqliteOff => sqlite::measure(&measure, "OFF")?,
                BuiltIn::RaftSqlite => {
                    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
                    runtime.block_on(ours::measure(&measure))?
                }
            };
            outcome.print();
            Ok(())
        }
        Task::Compare(compare) => compare.run(),
        Task::Costs(costs) => costs.run(),
        Task::Member(member) => {
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(member.run())
        }
    }
}

impl Compare {
    fn run(&self) -> Result<()> {
        let systems = self.systems()?;
        let mut outcomes: BTreeMap<(Workload, usize), Vec<Vec<Outcome>>> = BTreeMap::new();
        for round in 0..self.rounds {
            for workload in &self.workloads {
                let callers: &[usize] = if *workload == Workload::Rows { &[1] } else { &self.callers };
                for callers in callers {
                    for turn in 0..systems.len() {
                        // The order changes from round to round, so that none always runs on the warmer machine.
                        let system = (turn + round) % systems.len();
                        let outcome = self.measure(&systems[system], *workload, *callers);
                        let outcome = match outcome {
                            Ok(outcome) => outcome,
                            Err(error) => {
                                eprintln!("  {}: {error:#}", systems[system].name);
                                Outcome { failure: Some(format!("{error:#}")), ..Outcome::default() }
                            }
                        };
                        eprintln!(
                            "round {} {workload:>20} {callers:>4} callers {:>12}: {:>9.0}/s  p99 {:>8.2} ms  {} failures {}",
                            round + 1,
                            systems[system].name,
                            outcome.operations_per_second,
                            outcome.p99_ms,
                            outcome.failures,
                            outcome.failure.as_deref().unwrap_or("")
                        );
                        let row =
                            outcomes.entry((*workload, *callers)).or_insert_with(|| vec![Vec::new(); systems.len()]);
                        row[system].push(outcome);
                    }
                }
            }
        }
        self.print(&systems, &outcomes);
        Ok(())
    }

    fn systems(&self) -> Result<Vec<System>> {
        let this = std::env::current_exe()?.display().to_string();
        let built_in = |name, argument: &str| System {
            name,
            command: vec![this.clone(), "measure".into(), "--system".into(), argument.into()],
        };
        let mut systems = vec![built_in("raft-sqlite", "raft-sqlite")];
        if !self.without_sqlite_full {
            systems.push(built_in("SQLite FULL", "sqlite-full"));
        }
        if !self.without_sqlite_off {
            systems.push(built_in("SQLite OFF", "sqlite-off"));
        }
        for (name, program) in [("hiqlite", &self.hiqlite), ("dqlite", &self.dqlite)] {
            if let Some(program) = program {
                systems.push(System { name, command: vec![program.display().to_string()] });
            }
        }
        Ok(systems)
    }

    fn measure(&self, system: &System, workload: Workload, callers: usize) -> Result<Outcome> {
        let folder = tempfile::Builder::new().prefix("library-bench-").tempdir()?;
        let output = Command::new("timeout")
            .args(["--signal=KILL", "120"])
            .args(&system.command)
            .args(["--workload", &workload.to_string(), "--callers", &callers.to_string()])
            .args(["--seconds", &self.seconds.to_string(), "--data"])
            .arg(folder.path().join("data"))
            .stdin(Stdio::null())
            .output()
            .with_context(|| system.command[0].clone())?;
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().rev().find(|line| line.starts_with('{'));
        match last {
            Some(line) => Ok(serde_json::from_str(line)?),
            None => {
                let errors = String::from_utf8_lossy(&output.stderr);
                bail!("{}: {}", output.status, errors.lines().last().unwrap_or(""))
            }
        }
    }

    fn print(&self, systems: &[System], outcomes: &BTreeMap<(Workload, usize), Vec<Vec<Outcome>>>) {
        println!(
            "Three nodes in one process on loopback (SQLite: alone), values of {} bytes, {} s a measurement, median of {} alternating rounds.\n",
            load::VALUE_BYTES,
            self.seconds,
            self.rounds
        );
        let names: Vec<&str> = systems.iter().map(|system| system.name).collect();
        println!("| workload | callers | {} | log bytes/row |", names.join(" | "));
        println!("|---|---|{}---|", "---|".repeat(systems.len()));
        for ((workload, callers), row) in outcomes {
            let cells: Vec<String> = row.iter().map(|outcomes| cell(outcomes, &row[0])).collect();
            let logged = median(row[0].iter().filter_map(|outcome| outcome.replicated_bytes_per_operation));
            let logged = logged.map_or(String::new(), |bytes| format!("{bytes:.0}"));
            println!("| {workload} | {callers} | {} | {logged} |", cells.join(" | "));
        }
        println!("\nOperations (rows) a second; in brackets p99 in ms, and how many times as many ours does.");
    }
}

fn cell(outcomes: &[Outcome], ours: &[Outcome]) -> String {
    let rate =
        |outcomes: &[Outcome]| median(outcomes.iter().map(|outcome| outcome.operations_per_second)).unwrap_or(0.0);
    let p99 = median(outcomes.iter().map(|outcome| outcome.p99_ms)).unwrap_or(0.0);
    let failures: u64 = outcomes.iter().map(|outcome| outcome.failures).sum();
    let mut text = format!("{:.0} ({p99:.1}", rate(outcomes));
    if !std::ptr::eq(outcomes, ours) && rate(outcomes) > 0.0 {
        text.push_str(&format!("; {:.2}", rate(ours) / rate(outcomes)));
    }
    text.push(')');
    if failures > 0 {
        text.push_str(&format!(" {failures} failed"));
    }
    text
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
