//! What a node costs beside its speed: memory with a large database, time to start again, time to catch up. Three members, a process each.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};

use crate::{load, median};

const MEMBERS: usize = 3;
/// The members settle: the last checkpoint is written, buffers are given back.
const REST: Duration = Duration::from_secs(10);
/// Rows that the catch-up is measured with.
const MISSED_ROWS: u64 = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Resident memory, at rest and under load.
    Memory,
    /// From exec to a linearizable read.
    Restart,
    /// A member that was away, against the rate at which the others wrote.
    CatchUp,
}

#[derive(Parser)]
pub struct Costs {
    /// What is measured, separated by commas.
    #[arg(long, default_value = "memory,restart,catch-up", value_delimiter = ',')]
    parts: Vec<Part>,
    /// The database whose memory is measured, in MiB.
    #[arg(long, default_value_t = 2048)]
    memory_mib: u64,
    /// The database of a node that starts again, in MiB.
    #[arg(long, default_value_t = 1024)]
    restart_mib: u64,
    /// Log entries of a node that starts again.
    #[arg(long, default_value_t = 100_000)]
    log_entries: u64,
    /// Seconds of load while memory is measured.
    #[arg(long, default_value_t = 20)]
    load_seconds: u64,
    /// How often a node starts again; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where the members keep their files: a folder with room for three databases. A temporary one is made in it.
    #[arg(long)]
    folder: Option<PathBuf>,
}

impl Costs {
    pub fn run(&self) -> Result<()> {
        println!("Three members, a process each, on loopback; values of {} bytes.\n", load::VALUE_BYTES);
        println!("| what | figure |\n|---|---|");
        if self.parts.contains(&Part::Memory) {
            self.memory()?;
        }
        if self.parts.contains(&Part::Restart) {
            self.restart()?;
            self.restart_without_checkpoint()?;
        }
        if self.parts.contains(&Part::CatchUp) {
            self.catch_up()?;
        }
        Ok(())
    }

    fn place(&self) -> Result<tempfile::TempDir> {
        let folder = self.folder.clone().unwrap_or_else(std::env::temp_dir);
        tempfile::Builder::new()
            .prefix("library-costs-")
            .tempdir_in(&folder)
            .with_context(|| folder.display().to_string())
    }

    fn memory(&self) -> Result<()> {
        let folder = self.place()?;
        let mut cluster = Cluster::start(folder.path(), &["--no-sync", "--keep", "5000"])?;
        cluster.order(cluster.leader, &format!("fill {}", self.memory_mib))?;
        // As a user runs it, synced, and without what filling left in the allocator.
        for member in 0..MEMBERS {
            cluster.stop(member)?;
        }
        cluster.options = vec!["--keep".into(), "5000".into()];
        cluster.start_all()?;
        let (leader, follower) = (cluster.leader, cluster.follower());
        let size = self.memory_mib;
        cluster.settle()?;
        for (name, member) in [("leader", leader), ("follower", follower)] {
            row(&format!("memory, {size} MiB database, {name}, at rest"), &cluster.memory(member)?.to_string());
        }
        writeln!(cluster.input(leader)?, "load {} 64", self.load_seconds)?;
        let (mut most, end) = ([Memory::default(); 2], Instant::now() + Duration::from_secs(self.load_seconds));
        while Instant::now() < end {
            for (most, member) in most.iter_mut().zip([leader, follower]) {
                *most = most.max(cluster.memory(member)?);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let done = cluster.answer(leader)?;
        for (name, most) in ["leader", "follower"].into_iter().zip(most) {
            let what = format!(
                "memory, {size} MiB database, {name}, most under load (64 callers, updates and selects: {done})"
            );
            row(&what, &most.to_string());
        }
        cluster.settle()?;
        for (name, member) in [("leader", leader), ("follower", follower)] {
            row(&format!("memory, {size} MiB database, {name}, at rest again"), &cluster.memory(member)?.to_string());
        }
        Ok(())
    }

    fn restart(&self) -> Result<()> {
        let folder = self.place()?;
        // What fills the database leaves the log again: else it is the log that is large.
        let mut cluster = Cluster::start(folder.path(), &["--no-sync", "--keep", "0"])?;
        cluster.order(cluster.leader, &format!("fill {}", self.restart_mib))?;
        // Small ones, enough that all of the large ones are purged: the log drops them in batches.
        cluster.order(cluster.leader, "grow-log 1000 4")?;
        cluster.settle()?;
        for member in 0..MEMBERS {
            cluster.kill(member)?;
        }
        cluster.options[2] = (2 * self.log_entries).to_string();
        cluster.start_all()?;
        cluster.order(cluster.leader, &format!("grow-log {} 4", self.log_entries))?;
        let what = self.subject(&mut cluster, self.restart_mib)?;
        let follower = cluster.follower();
        let mut starts = Vec::new();
        for _ in 0..self.rounds {
            cluster.kill(follower)?;
            starts.push(cluster.begin(follower)?);
        }
        row(&format!("start after kill -9, a follower, {what}"), &Start::text(&starts));
        let mut starts = Vec::new();
        for _ in 0..self.rounds {
            cluster.stop(follower)?;
            starts.push(cluster.begin(follower)?);
        }
        row(&format!("start after a clean stop, a follower, {what}"), &Start::text(&starts));
        let mut starts = Vec::new();
        for _ in 0..self.rounds {
            for member in 0..MEMBERS {
                cluster.kill(member)?;
            }
            let all = cluster.start_all()?;
            starts
                .push(all.into_iter().max_by(|one, other| one.seconds.total_cmp(&other.seconds)).context("no member")?);
        }
        row(&format!("start of all three after kill -9, until the last serves, {what}"), &Start::text(&starts));
        Ok(())
    }

    /// The worst case: nothing in the database's file, all in the log.
    fn restart_without_checkpoint(&self) -> Result<()> {
        let folder = self.place()?;
        let keep = (2 * self.log_entries).to_string();
        let mut cluster = Cluster::start(folder.path(), &["--no-sync", "--no-checkpoints", "--keep", &keep])?;
        cluster.order(cluster.leader, "fill 1")?;
        cluster.order(cluster.leader, &format!("grow-log {} 4", self.log_entries))?;
        let what = self.subject(&mut cluster, 1)?;
        let follower = cluster.follower();
        let mut starts = Vec::new();
        for _ in 0..self.rounds {
            cluster.kill(follower)?;
            starts.push(cluster.begin(follower)?);
        }
        row(&format!("start after kill -9, a follower without any checkpoint, {what}"), &Start::text(&starts));
        Ok(())
    }

    fn subject(&self, cluster: &mut Cluster, filled_mib: u64) -> Result<String> {
        cluster.settle()?;
        let follower = cluster.follower();
        let entries: u64 = cluster.order(follower, "entries")?.parse()?;
        let bytes: u64 = cluster.order(follower, "bytes")?.parse()?;
        if entries < self.log_entries || bytes < filled_mib << 20 {
            bail!("the log has {entries} entries and the database {bytes} bytes: less than was to be measured");
        }
        Ok(format!("{} MiB, {entries} log entries", bytes >> 20))
    }

    fn catch_up(&self) -> Result<()> {
        let folder = self.place()?;
        let mut cluster = Cluster::start(folder.path(), &["--no-sync", "--keep", "1000000"])?;
        cluster.order(cluster.leader, "fill 32")?;
        let (mut wrote, mut caught_up, mut applied_ratio) = (Vec::new(), Vec::new(), Vec::new());
        let mut entries = 0;
        for _ in 0..self.rounds {
            cluster.settle()?;
            let follower = cluster.follower();
            cluster.kill(follower)?;
            let plain = cluster.begin(follower)?.seconds;
            cluster.kill(follower)?;
            let before: u64 = cluster.order(cluster.leader, "entries")?.parse()?;
            let answer = cluster.order(cluster.leader, &format!("insert {MISSED_ROWS} 64"))?;
            let (rows, milliseconds) = answer.split_once(' ').context("an answer of two numbers")?;
            let (rows, seconds) = (rows.parse::<f64>()?, milliseconds.parse::<f64>()? / 1000.0);
            entries = cluster.order(cluster.leader, "entries")?.parse::<u64>()? - before;
            let away = (cluster.begin(follower)?.seconds - plain).max(0.001);
            wrote.push(rows / seconds);
            caught_up.push(rows / away);
            applied_ratio.push(seconds / away);
        }
        let middle = |values: Vec<f64>| median(values.into_iter()).unwrap_or(0.0);
        let what = format!("{MISSED_ROWS} single-row transactions in {entries} entries, no member syncs");
        row(&format!("written by 64 callers, {what}"), &format!("{:.0} rows/s", middle(wrote)));
        let times = middle(applied_ratio);
        row(
            &format!("a follower that was away catches up, {what}"),
            &format!("{:.0} rows/s, {times:.1} times as fast as they were written", middle(caught_up)),
        );
        Ok(())
    }
}

fn row(what: &str, figure: &str) {
    println!("| {what} | {figure} |");
}

/// How a start went.
struct Start {
    /// From exec until a linearizable read was answered.
    seconds: f64,
    /// Read by system calls until then.
    read_mib: f64,
}

impl Start {
    fn text(starts: &[Start]) -> String {
        let seconds = median(starts.iter().map(|start| start.seconds)).unwrap_or(0.0);
        let read_mib = median(starts.iter().map(|start| start.read_mib)).unwrap_or(0.0);
        format!("{seconds:.2} s, {read_mib:.0} MiB read")
    }
}

/// Resident memory of a process, in MiB.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    all: f64,
    anonymous: f64,
}

impl Memory {
    fn max(self, other: Self) -> Self {
        Self { all: self.all.max(other.all), anonymous: self.anonymous.max(other.anonymous) }
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} MiB resident, {:.0} MiB of it anonymous", self.all, self.anonymous)
    }
}

struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Members as processes.
struct Cluster {
    folder: PathBuf,
    peers: String,
    options: Vec<String>,
    members: Vec<Option<Process>>,
    leader: usize,
}

impl Cluster {
    fn start(folder: &Path, options: &[&str]) -> Result<Self> {
        let listeners = (0..MEMBERS).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
        let urls = listeners
            .iter()
            .map(|listener| Ok(format!("http://{}", listener.local_addr()?)))
            .collect::<Result<Vec<_>>>()?;
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let members = (0..MEMBERS).map(|_| None).collect();
        let mut cluster = Self { folder: folder.to_owned(), peers: urls.join(","), options, members, leader: 0 };
        drop(listeners);
        cluster.start_all()?;
        Ok(cluster)
    }

    fn start_all(&mut self) -> Result<Vec<Start>> {
        let began = Instant::now();
        for member in 0..MEMBERS {
            self.spawn(member)?;
        }
        let starts = (0..MEMBERS).map(|member| self.ready(member, began)).collect::<Result<Vec<_>>>()?;
        self.find_leader()?;
        Ok(starts)
    }

    fn find_leader(&mut self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < REST {
            for member in 0..MEMBERS {
                if self.order(member, "leads")? == "true" {
                    self.leader = member;
                    return Ok(());
                }
            }
        }
        bail!("no member leads")
    }

    fn follower(&self) -> usize {
        (self.leader + 1) % MEMBERS
    }

    fn begin(&mut self, member: usize) -> Result<Start> {
        let began = Instant::now();
        self.spawn(member)?;
        self.ready(member, began)
    }

    fn spawn(&mut self, member: usize) -> Result<()> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["member", "--number", &member.to_string(), "--peers", &self.peers, "--data"])
            .arg(self.folder.join(member.to_string()))
            .args(&self.options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no output")?);
        self.members[member] = Some(Process { child, input, output });
        Ok(())
    }

    fn ready(&mut self, member: usize, began: Instant) -> Result<Start> {
        let answer = self.answer(member)?;
        let seconds = began.elapsed().as_secs_f64();
        if answer != "ready" {
            bail!("member {member} answered {answer:?}");
        }
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.process(member)?.child.id()))?;
        Ok(Start { seconds, read_mib: labelled(&io, "rchar:") as f64 / 1048576.0 })
    }

    fn process(&mut self, member: usize) -> Result<&mut Process> {
        self.members[member].as_mut().with_context(|| format!("member {member} does not run"))
    }

    fn input(&mut self, member: usize) -> Result<&mut ChildStdin> {
        self.process(member)?.input.as_mut().context("its input is closed")
    }

    fn answer(&mut self, member: usize) -> Result<String> {
        let mut line = String::new();
        self.process(member)?.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("member {member} has ended");
        }
        Ok(line.trim_end().to_owned())
    }

    fn order(&mut self, member: usize, order: &str) -> Result<String> {
        writeln!(self.input(member)?, "{order}")?;
        self.answer(member)
    }

    /// Everything is applied everywhere, and then nothing happens for a while.
    fn settle(&mut self) -> Result<()> {
        for member in 0..MEMBERS {
            self.order(member, "linearize")?;
        }
        std::thread::sleep(REST);
        self.find_leader()
    }

    fn memory(&mut self, member: usize) -> Result<Memory> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process(member)?.child.id()))?;
        let mib = |label| labelled(&status, label) as f64 / 1024.0;
        Ok(Memory { all: mib("VmRSS:"), anonymous: mib("RssAnon:") })
    }

    fn kill(&mut self, member: usize) -> Result<()> {
        // Killed and waited for when it is dropped.
        self.members[member].take().with_context(|| format!("member {member} does not run")).map(drop)
    }

    /// As an operator stops it.
    fn stop(&mut self, member: usize) -> Result<()> {
        let process = self.process(member)?;
        drop(process.input.take());
        let status = process.child.wait()?;
        if !status.success() {
            bail!("member {member} did not stop cleanly: {status}");
        }
        self.members[member] = None;
        Ok(())
    }
}

fn labelled(text: &str, label: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}
