//! What a test run needs and a fresh machine may lack.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Result, bail};

use crate::shell;

/// Whether `program` is on the path.
pub fn has(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// Makes sure of a program from a Debian package.
pub fn debian(program: &str, package: &str) -> Result<()> {
    if has(program) { Ok(()) } else { install(program, package) }
}

/// Makes sure of a C library from a Debian package; `header` is its path below /usr/include.
pub fn debian_library(header: &str, package: &str) -> Result<()> {
    let installed = Path::new("/usr/include").join(header).is_file();
    if installed { Ok(()) } else { install(header, package) }
}

fn install(what: &str, package: &str) -> Result<()> {
    if !has("apt-get") {
        bail!("{what} is needed: install it (Debian's package {package})");
    }
    let quiet = |arguments: &[&str]| {
        shell::run(
            shell::command("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()),
        )
    };
    quiet(&["update", "-q"])?;
    quiet(&["install", "-y", "-q", "--no-install-recommends", package])
}

/// Runs cargo-deny: licences, sources and bans always; advisories where the advisory database can be had.
pub fn deny() -> Result<()> {
    if !has("cargo-deny") {
        eprintln!("cargo-deny is not installed: installing it");
        if shell::run(shell::command("cargo").args(["install", "--locked", "--quiet", "cargo-deny"])).is_err() {
            eprintln!("cargo-deny could not be installed: licences and advisories are not checked");
            return Ok(());
        }
    }
    shell::cargo(&["deny", "--log-level", "error", "check", "licenses", "bans", "sources"])
}
