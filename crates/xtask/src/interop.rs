//! Real clients and faults against the real program: starts the tests of `tests/` and of its Go modules.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{install, shell};

/// Which client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Client {
    /// Debian's etcd-client.
    Etcdctl,
    /// The official Go client, tests/clientv3.
    Clientv3,
    /// A stock kube-apiserver, tests/kubernetes.
    Kubernetes,
    /// All of them.
    All,
}

/// The variable that tests/src/cluster.rs reads.
const SERVER_VARIABLE: &str = "RAFT_SQLITE_TESTS_SERVER";

/// Runs the tests of one client, or of all.
pub fn run(client: Client, oracle: bool) -> Result<()> {
    let server = if oracle { Some(etcd()?) } else { None };
    if matches!(client, Client::Etcdctl | Client::All) {
        install::debian("etcdctl", "etcd-client")?;
        integration_test("etcdctl", server.as_deref(), &[])?;
    }
    if matches!(client, Client::Clientv3 | Client::All) {
        need_go()?;
        integration_test("clientv3", server.as_deref(), &[])?;
    }
    if matches!(client, Client::Kubernetes | Client::All) {
        need_go()?;
        kubernetes(server.as_deref())?;
    }
    Ok(())
}

/// What `cargo test --workspace` needs beside cargo.
pub fn install() -> Result<()> {
    install::debian("etcdctl", "etcd-client")?;
    need_go()
}

/// Kills nodes under writes.
pub fn fault(seconds: u64, seed: Option<u64>) -> Result<()> {
    let seconds = seconds.to_string();
    let seed = seed.map(|seed| seed.to_string());
    let mut variables = vec![("CRASH_SECONDS", seconds.as_str()), ("BANK_SECONDS", seconds.as_str())];
    if let Some(seed) = &seed {
        variables.push(("CRASH_SEED", seed));
    }
    integration_test("crash", None, &variables)?;
    integration_test("bank", None, &variables)
}

fn integration_test(name: &str, server: Option<&Path>, variables: &[(&str, &str)]) -> Result<()> {
    shell::cargo(&["build", "--locked", "-p", "raft-sqlite-cli"])?;
    let mut command = shell::command("cargo");
    command.args([
        "test",
        "--locked",
        "-p",
        "raft-sqlite-tests",
        "--test",
        name,
        "--",
        "--nocapture",
        "--test-threads=1",
    ]);
    command.envs(variables.iter().copied());
    if let Some(server) = server {
        command.env(SERVER_VARIABLE, server);
    }
    shell::run(&mut command)
}

/// Makes sure of Go.
pub fn need_go() -> Result<()> {
    if install::has("go") {
        return Ok(());
    }
    install::debian("go", "golang-go").context("the Go modules under tests/ and benches/ need Go 1.26 or newer")
}

/// A stock etcd, built once from its Go module.
pub fn etcd() -> Result<PathBuf> {
    let folder = shell::root().join("tests/etcd-oracle");
    let version = required_version(&folder, "go.etcd.io/etcd/server/v3")?;
    let program = shell::cache_dir()?.join(format!("etcd-{version}"));
    if !program.is_file() {
        eprintln!("building etcd {version} from its Go module");
        let mut command = shell::command("go");
        shell::run(command.current_dir(&folder).args(["build", "-o"]).arg(&program).arg("."))?;
    }
    Ok(program)
}

fn kubernetes(server: Option<&Path>) -> Result<()> {
    let server = match server {
        Some(server) => server.display().to_string(),
        None => {
            shell::cargo(&["build", "--release", "--locked", "-p", "raft-sqlite-cli"])?;
            format!("{} serve", shell::target_dir("release").join("raft-sqlite").display())
        }
    };
    let folder = shell::root().join("tests/kubernetes");
    shell::run(shell::command("go").current_dir(folder).args(["run", "./cmd/e2e", "--server", &server]))
}

/// The version of a module in a folder's go.mod.
fn required_version(folder: &Path, module: &str) -> Result<String> {
    let file = folder.join("go.mod");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let line = text
        .lines()
        .map(str::trim)
        .map(|line| line.trim_start_matches("require "))
        .find(|line| line.starts_with(module));
    match line.and_then(|line| line.split_whitespace().nth(1)) {
        Some(version) => Ok(version.to_owned()),
        None => bail!("{} does not require {module}", file.display()),
    }
}
