//! The program `raft-sqlite`: runs a node, and asks running nodes.
//!
//! Exit codes: 0 done, 1 failed, 2 usage, 3 no leader or not reachable.

mod endpoint;
mod member;
mod output;
mod serve;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Gives memory back that glibc's keeps; docs/adr/0007-allocator.md.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Something went wrong; the exit code says of which kind.
#[derive(Debug)]
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn failed(message: impl std::fmt::Display) -> Self {
        Self { code: 1, message: message.to_string() }
    }

    fn usage(message: impl std::fmt::Display) -> Self {
        Self { code: 2, message: message.to_string() }
    }

    fn unreachable(message: impl std::fmt::Display) -> Self {
        Self { code: 3, message: message.to_string() }
    }
}

#[derive(Parser)]
#[command(
    name = "raft-sqlite",
    version,
    about = "SQLite replicated through Raft, speaking the etcd v3 API",
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a node: by default one on 127.0.0.1:2379 with its files in ./raft-sqlite.data
    Serve(Box<serve::ServeArguments>),
    /// Members of the cluster
    #[command(subcommand)]
    Member(member::MemberCommand),
    /// How each member is: role, term, indexes, sizes
    Status(status::StatusArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return report(Failure::failed(format!("the async runtime did not start: {error}")));
        }
    };
    let outcome = runtime.block_on(async {
        match arguments.command {
            Command::Serve(arguments) => serve::run(*arguments).await,
            Command::Member(command) => member::run(command).await,
            Command::Status(arguments) => status::run(arguments).await,
        }
    });
    // Reads and checkpoints that are still running on blocking threads are not worth waiting for: all that counts is on disk.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(failure),
    }
}

fn report(failure: Failure) -> ExitCode {
    eprintln!("raft-sqlite: {}", failure.message);
    ExitCode::from(failure.code)
}
