//! Running programs.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// The workspace's folder.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").components().collect()
}

/// A command in the workspace's folder.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// Runs it to its end; a failure is an error that names it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?} could not be started"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Runs cargo.
pub fn cargo(arguments: &[&str]) -> Result<()> {
    run(command("cargo").args(arguments))
}

/// Runs one part of a test run and says how long it took.
pub fn step(name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("=== {name}");
    let start = Instant::now();
    let result = body();
    let word = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("=== {name}: {word} in {:.0} s", start.elapsed().as_secs_f64());
    result.with_context(|| name.to_owned())
}

/// Where cargo puts programs built with `profile` ("debug" or "release").
pub fn target_dir(profile: &str) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => root().join(target).join(profile),
        None => root().join("target").join(profile),
    }
}

/// Where built helpers outlive a checkout: other programs' binaries, such as kube-apiserver.
pub fn cache_dir() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => PathBuf::from(home).join(".cache"),
        (None, None) => {
            bail!("neither XDG_CACHE_HOME nor HOME is set: no place to keep built programs")
        }
    };
    let dir = base.join("raft-sqlite");
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}
