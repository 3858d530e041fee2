//! Reads what lies on the disk before anybody needs it: damage at rest is found while the other members are still whole.
//!
//! Every `scrub_interval`, each database's file, page by page against its checksums, at `scrub_bytes_per_second` at most; then the
//! checksums themselves and the applied mark. What is found is told (log, metrics, [`super::NodeStatus::damaged`]) and changes nothing: this
//! node goes on with what is whole, and leads no more if another member can.

use std::sync::Weak;
use std::time::{Duration, Instant};

use super::{Node, NodeInner};
use crate::database::DatabaseError;
use crate::database::replica::Replica;
use crate::error::ReadError;

/// Bytes read in one go.
const BATCH_BYTES: usize = 1 << 20;

/// What one reading of a database has found.
#[derive(Debug, Default)]
struct Progress {
    next: u32,
    failed: Option<DatabaseError>,
}

/// Reads the next part of a file. False: it was the last one. Blocking I/O.
fn read_part(replica: &Replica, progress: &mut Progress) -> bool {
    let pages = (BATCH_BYTES / replica.page_size().bytes()).max(1) as u32;
    match replica.scrub(progress.next, pages) {
        Ok(Some(next)) => {
            progress.next = next;
            true
        }
        Ok(None) => {
            progress.failed = replica.check_sums().err().or_else(|| replica.damage().map(DatabaseError::from));
            false
        }
        Err(error) => {
            progress.failed = Some(error);
            false
        }
    }
}

/// Runs until the node stops.
pub(super) async fn run(node: Weak<NodeInner>, interval: Duration, bytes_per_second: u64) {
    // So that the members of a cluster do not read at the same time.
    let mut pause = interval.mul_f64(rand::random::<f64>());
    loop {
        tokio::time::sleep(pause).await;
        pause = interval;
        let Some(names) = node.upgrade().map(|node| node.machine.database_names()) else { return };
        for name in names {
            scrub(&node, &name, bytes_per_second).await;
        }
        let Some(node) = node.upgrade() else { return };
        node.machine.recorder().scrubs.add(1);
    }
}

async fn scrub(node: &Weak<NodeInner>, name: &str, bytes_per_second: u64) {
    let mut progress = Progress { next: 1, failed: None };
    let part_takes = Duration::from_secs_f64(BATCH_BYTES as f64 / bytes_per_second.max(1) as f64);
    loop {
        // The node must be able to stop meanwhile, and the database to go.
        let Some(state) = node.upgrade().and_then(|node| node.machine.database(name)) else { return };
        let began = Instant::now();
        let read = tokio::task::spawn_blocking(move || {
            let more = read_part(&state.replica, &mut progress);
            (more, progress)
        });
        let Ok((more, now)) = read.await else { return };
        progress = now;
        if !more {
            break;
        }
        tokio::time::sleep(part_takes.saturating_sub(began.elapsed())).await;
    }
    if let Some(error) = progress.failed
        && let Some(node) = node.upgrade()
    {
        node.machine.recorder().scrubs_failed.add(1);
        tracing::error!(database = name, %error, "the database's files are not as they were written");
    }
}

impl Node {
    /// Reads a database's file on this node whole, as fast as the disk gives it, and compares each page with its checksum, all checksums
    /// together with the state hash, and the applied mark. Changes nothing.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] names the first page that is not as it was written; [`ReadError::Fatal`] another file;
    /// [`ReadError::NoSuchDatabase`].
    pub async fn verify_database(&self, name: &str) -> Result<(), ReadError> {
        let state = self.inner.machine.database(name).ok_or_else(|| ReadError::NoSuchDatabase(name.to_owned()))?;
        let read = tokio::task::spawn_blocking(move || {
            let mut progress = Progress { next: 1, failed: None };
            while read_part(&state.replica, &mut progress) {}
            progress.failed
        });
        match read.await {
            Ok(None) => Ok(()),
            Ok(Some(DatabaseError::DamagedPage(damage))) => Err(ReadError::Damaged(damage)),
            Ok(Some(error)) => Err(ReadError::Fatal(error.to_string())),
            Err(error) => Err(ReadError::Fatal(error.to_string())),
        }
    }
}
