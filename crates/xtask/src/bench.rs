//! Builds what the benchmarks compare, and starts them: the program beside etcd, the library beside SQLite, hiqlite and dqlite.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use crate::{install, interop, shell};

/// The library's benchmark.
#[derive(Parser)]
#[command(name = "cargo xtask bench library", about = "The library beside SQLite, hiqlite and dqlite, in turns")]
struct Library {
    /// What is measured, separated by commas.
    #[arg(long, value_enum, default_value = "compare,apply,costs", value_delimiter = ',')]
    parts: Vec<Part>,
    /// Which systems ours is compared with, separated by commas.
    #[arg(long, value_enum, default_value = "sqlite-full,sqlite-off,hiqlite,dqlite", value_delimiter = ',')]
    against: Vec<System>,
    /// How often the systems take turns, and how often a cost is measured; medians count.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds a measurement of the comparison lasts.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Numbers of callers, separated by commas; workload rows has one caller always.
    #[arg(long, default_value = "1,16,64,256")]
    callers: String,
    /// Of insert, rows, select-local, select-linearizable, select-while-writing: separated by commas.
    #[arg(long, default_value = "insert,rows,select-local,select-linearizable,select-while-writing")]
    workloads: String,
    /// For the costs: further options of `library costs`.
    #[arg(last = true)]
    costs: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Operations a second, beside the others; bytes in the log for a row.
    Compare,
    /// What capturing and applying cost by themselves: no Raft, no disk.
    Apply,
    /// Memory with a large database, restart, catching up.
    Costs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum System {
    SqliteFull,
    SqliteOff,
    Hiqlite,
    Dqlite,
}

/// `arguments` are the load generator's, or `library` and the options of [`Library`].
pub fn run(arguments: &[String]) -> Result<()> {
    if arguments.first().is_some_and(|first| first == "library") {
        return Library::try_parse_from(arguments).unwrap_or_else(|error| error.exit()).run();
    }
    beside_etcd(arguments)
}

/// Runs the load generator on our release build and on a real etcd.
fn beside_etcd(arguments: &[String]) -> Result<()> {
    interop::need_go()?;
    shell::cargo(&["build", "--release", "--locked", "-p", "raft-sqlite-cli", "-p", "raft-sqlite-benches"])?;
    let release = shell::target_dir("release");
    let mut command = shell::command(&release.join("side-by-side").display().to_string());
    command.arg("--raft-sqlite").arg(release.join("raft-sqlite")).arg("--etcd").arg(interop::etcd()?);
    shell::run(command.args(arguments))
}

impl Library {
    fn run(&self) -> Result<()> {
        shell::cargo(&["build", "--release", "--locked", "-p", "raft-sqlite-benches", "--bin", "library"])?;
        if self.parts.contains(&Part::Compare) {
            self.compare()?;
        }
        if self.parts.contains(&Part::Apply) {
            let test = "database::tests::speed::speed_of_capture_and_apply";
            shell::cargo(&[
                "test",
                "--release",
                "--locked",
                "-p",
                "raft-sqlite",
                "--lib",
                "--",
                "--ignored",
                "--nocapture",
                "--exact",
                test,
            ])?;
        }
        if self.parts.contains(&Part::Costs) {
            let mut command = shell::command(&program().display().to_string());
            command.args(["costs", "--rounds", &self.rounds.to_string()]);
            shell::run(command.args(&self.costs))?;
        }
        Ok(())
    }

    fn compare(&self) -> Result<()> {
        let mut command = shell::command(&program().display().to_string());
        command.args(["compare", "--rounds", &self.rounds.to_string(), "--seconds", &self.seconds.to_string()]);
        command.args(["--callers", &self.callers, "--workloads", &self.workloads]);
        if !self.against.contains(&System::SqliteFull) {
            command.arg("--without-sqlite-full");
        }
        if !self.against.contains(&System::SqliteOff) {
            command.arg("--without-sqlite-off");
        }
        if self.against.contains(&System::Hiqlite) {
            command.arg("--hiqlite").arg(hiqlite()?);
        }
        if self.against.contains(&System::Dqlite) {
            command.arg("--dqlite").arg(dqlite()?);
        }
        shell::run(&mut command)
    }
}

fn program() -> PathBuf {
    shell::target_dir("release").join("library")
}

/// A workspace of its own, built in a folder of its own: two versions of SQLite do not link into one.
fn hiqlite() -> Result<PathBuf> {
    let target = shell::cache_dir()?.join("target-hiqlite");
    let mut command = shell::command("cargo");
    command.current_dir(shell::root().join("benches/hiqlite")).args(["build", "--release", "--locked", "--target-dir"]);
    shell::run(command.arg(&target))?;
    Ok(target.join("release/library-hiqlite"))
}

/// A Go module on Debian's libdqlite.
fn dqlite() -> Result<PathBuf> {
    interop::need_go()?;
    install::debian("gcc", "gcc")?;
    install::debian_library("dqlite.h", "libdqlite-dev")?;
    install::debian_library("raft.h", "libraft-dev")?;
    let program = shell::cache_dir()?.join("library-dqlite");
    let mut command = shell::command("go");
    // go-dqlite's own linker flag, which Go's list of harmless ones lacks.
    command.env("CGO_LDFLAGS_ALLOW", "-Wl,-z,now").env("CGO_ENABLED", "1");
    command.current_dir(shell::root().join("benches/dqlite")).args(["build", "-o"]).arg(&program).arg(".");
    shell::run(&mut command)?;
    Ok(program)
}
