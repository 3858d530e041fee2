//! The project's own build commands: `cargo xtask test | fmt | tidy | interop | fault | bench`.
//!
//! `cargo xtask test` is the one test command: it installs what it needs, checks format, lints and documentation, and runs every
//! test. What takes longer stands behind a command of its own.

mod bench;
mod install;
mod interop;
mod shell;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};

use shell::{cargo, step};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, checks and tests raft-sqlite", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything that must be green before a change lands: format, lints, documentation, licences, all tests.
    Test,
    /// Formats the source.
    Fmt,
    /// Checks what no compiler does: import arrows, file sizes, where unsafe may stand.
    Tidy,
    /// Real clients against the real program.
    Interop {
        /// Which: etcdctl, clientv3, kubernetes, or all of them.
        #[arg(value_enum, default_value_t = interop::Client::All)]
        client: interop::Client,
        /// Run the same tests against a real etcd (the oracle) instead of our program.
        #[arg(long)]
        oracle: bool,
    },
    /// Kills nodes under writes and under transactions; see tests/tests/crash.rs and bank.rs.
    Fault {
        /// How long to go on killing, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The seed of every choice; printed, so that a run can be repeated.
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Load on three nodes of ours and of etcd, alternating; prints medians and ratios. `bench library`: the library beside SQLite,
    /// hiqlite and dqlite; `bench library --help` lists its options.
    Bench {
        /// Passed on to the load generator; or `library` and its options.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> Result<()> {
    std::env::set_current_dir(shell::root())?;
    match Arguments::parse().command {
        Command::Test => test(),
        Command::Fmt => cargo(&["fmt", "--all"]),
        Command::Tidy => tidy::check(&shell::root()),
        Command::Interop { client, oracle } => interop::run(client, oracle),
        Command::Fault { seconds, seed } => interop::fault(seconds, seed),
        Command::Bench { arguments } => bench::run(&arguments),
    }
}

fn test() -> Result<()> {
    step("format", || cargo(&["fmt", "--all", "--check"]))?;
    step("tidy", || tidy::check(&shell::root()))?;
    step("clippy", || cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    step("rustdoc", || {
        shell::run(
            shell::command("cargo")
                .args(["doc", "--workspace", "--no-deps", "--locked", "--document-private-items"])
                .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"),
        )
    })?;
    step("licences and advisories", install::deny)?;
    step("build", || cargo(&["build", "--workspace", "--all-targets", "--locked"]))?;
    step("what the tests need", interop::install)?;
    // etcdctl, the official Go client and kill -9 under writes are among them (tests/tests).
    step("tests", || cargo(&["test", "--workspace", "--locked"]))
}
