//! One member in a process of its own, so that its memory, its reads and its start can be measured. It takes orders on its standard
//! input, a line each, answers each with a line, and stops cleanly at the end of input.

use std::io::{BufRead as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use raft_sqlite::{InitialMember, LocalDatabase, Node, NodeConfig, ReadConsistency, SyncMode, WriteError, rusqlite};

use crate::load;

const PATIENCE: Duration = Duration::from_secs(60);
/// Rows in a transaction that fills.
const FILL_ROWS: u64 = 4096;
const INSERT: &str = "INSERT INTO item(value) VALUES (?)";

#[derive(Parser)]
pub struct Member {
    /// Its files.
    #[arg(long)]
    data: PathBuf,
    /// Which of the URLs is its own.
    #[arg(long)]
    number: usize,
    /// Peer URLs of all members.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// For preparations: does not sync its log.
    #[arg(long)]
    no_sync: bool,
    /// Makes no checkpoints.
    #[arg(long)]
    no_checkpoints: bool,
    /// Log entries it keeps.
    #[arg(long)]
    keep: u64,
}

impl Member {
    pub async fn run(&self) -> Result<()> {
        let members: Vec<InitialMember> = self
            .peers
            .iter()
            .enumerate()
            .map(|(number, url)| InitialMember { name: format!("n{number}"), peer_urls: vec![url.clone()] })
            .collect();
        let mut config =
            NodeConfig::member(&self.data, &format!("n{}", self.number), members).map_err(anyhow::Error::msg)?;
        config.log_entries_to_keep = self.keep;
        if self.no_sync {
            config.log_sync = SyncMode::LosesAcknowledgedOnPowerFailure;
        }
        if self.no_checkpoints {
            (config.checkpoint_entries, config.checkpoint_bytes) = (u64::MAX, u64::MAX);
        }
        let node = Node::start(config).await?;
        let began = Instant::now();
        while let Err(error) = node.linearize().await {
            if began.elapsed() > PATIENCE {
                return Err(error).context("no linearizable read");
            }
        }
        answer("ready");
        let (orders, mut received) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            std::io::stdin().lock().lines().map_while(Result::ok).try_for_each(|line| orders.send(line))
        });
        while let Some(line) = received.recv().await {
            answer(&obey(&node, &line).await.with_context(|| line.clone())?);
        }
        node.shutdown().await?;
        Ok(())
    }
}

fn answer(line: &str) {
    let mut output = std::io::stdout().lock();
    // Nobody listens: the measurement is over.
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}

async fn obey(node: &Node, order: &str) -> Result<String> {
    let words: Vec<&str> = order.split_whitespace().collect();
    let number = |at: usize| -> Result<u64> { Ok(words.get(at).context("a number is missing")?.parse()?) };
    let db = node.database("bench");
    Ok(match words.first().copied() {
        Some("leads") => node.leadership().borrow().writable_here.to_string(),
        Some("linearize") => {
            node.linearize().await?;
            "done".into()
        }
        Some("entries") => node.log_statistics().entries.to_string(),
        Some("bytes") => node.database_statistics("bench").context("no database")?.size_bytes.to_string(),
        // fill MIB
        Some("fill") => fill(node, &db, number(1)? << 20).await?,
        // grow-log ENTRIES CALLERS
        Some("grow-log") => {
            let goal = node.status().last_log_index + number(1)?;
            let node = node.clone();
            insert_until(&db, number(2)?, move |_| node.status().last_log_index >= goal).await?
        }
        // insert ROWS CALLERS
        Some("insert") => {
            let rows = number(1)?;
            insert_until(&db, number(2)?, move |done| done >= rows).await?
        }
        // load SECONDS CALLERS
        Some("load") => {
            let outcome = update_and_select(&db, Duration::from_secs(number(1)?), number(2)? as usize).await?;
            format!("{:.0} operations/s, {} failed", outcome.operations_per_second, outcome.failures)
        }
        _ => bail!("unknown order"),
    })
}

async fn fill(node: &Node, db: &LocalDatabase, bytes: u64) -> Result<String> {
    db.execute("CREATE TABLE IF NOT EXISTS item(id INTEGER PRIMARY KEY, value BLOB NOT NULL)").await?;
    let mut first = 0;
    while node.database_statistics("bench").context("no database")?.size_bytes < bytes {
        let values: Vec<Vec<u8>> = (first..first + FILL_ROWS).map(load::value).collect();
        first += FILL_ROWS;
        let done: Result<(), WriteError<rusqlite::Error>> = db
            .write(move |context| {
                let mut insert = context.connection().prepare_cached(INSERT)?;
                values.iter().try_for_each(|value| insert.execute([value]).map(drop))
            })
            .await;
        done?;
    }
    Ok(first.to_string())
}

/// Single-row transactions until `enough` says so of the rows inserted; answers rows and milliseconds.
async fn insert_until(
    db: &LocalDatabase,
    callers: u64,
    enough: impl Fn(u64) -> bool + Clone + Send + Sync + 'static,
) -> Result<String> {
    let rows = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let tasks: Vec<_> = (0..callers)
        .map(|caller| {
            let (db, rows, enough) = (db.clone(), Arc::clone(&rows), enough.clone());
            tokio::spawn(async move {
                while !enough(rows.load(Ordering::Relaxed)) {
                    db.execute((INSERT, [load::value(caller)])).await?;
                    rows.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    Ok(format!("{} {}", rows.load(Ordering::Relaxed), began.elapsed().as_millis()))
}

/// Half of the callers update a random row each time, half read one, all over the database.
async fn update_and_select(db: &LocalDatabase, duration: Duration, callers: usize) -> Result<load::Outcome> {
    let rows = db.query("SELECT max(id) FROM item", ReadConsistency::Local).await?;
    let rows: i64 = rows.first().context("no rows")?.get(0)?;
    let write = Arc::new(AtomicBool::new(false));
    let db = db.clone();
    Ok(load::drive(callers, duration, 1, move |number| {
        let (db, write) = (db.clone(), write.fetch_xor(true, Ordering::Relaxed));
        let key = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16) as i64 % rows + 1;
        async move {
            if write {
                let update = ("UPDATE item SET value = ? WHERE id = ?", (load::value(number), key));
                db.execute(update).await.map(drop).map_err(|error| error.to_string())
            } else {
                let select = ("SELECT value FROM item WHERE id = ?", [key]);
                db.query(select, ReadConsistency::Local).await.map(drop).map_err(|error| error.to_string())
            }
        }
    })
    .await)
}
