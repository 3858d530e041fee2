//! Tests of the log as a whole. Those that need faults run on [`sim_disk::SimDisk`].

mod basic;
mod crash;
mod damage;
mod faults;
mod format;
mod model;
mod readers;
mod sim_disk;
mod throughput;

use std::sync::Arc;

use bytes::Bytes;

use super::{Entry, EntryId, Log, LogError, LogOptions};
use sim_disk::SimDisk;

fn id(term: u64, index: u64) -> EntryId {
    EntryId { term, index }
}

/// An entry whose payload follows from its id.
fn entry(term: u64, index: u64, payload_bytes: usize) -> Entry {
    let payload: Vec<u8> = (0..payload_bytes).map(|i| (term * 31 + index * 7 + i as u64) as u8).collect();
    Entry { id: id(term, index), kind: (index % 3) as u8, payload: Bytes::from(payload) }
}

/// Small segments, so that few entries fill them, and no marks unless a test waits for one.
fn small() -> LogOptions {
    LogOptions {
        segment_bytes: 16 * 1024,
        cache_bytes: 4 * 1024,
        recycle: 2,
        mark_delay: std::time::Duration::from_secs(3600),
        ..LogOptions::default()
    }
}

fn open(disk: &SimDisk) -> Result<Log, LogError> {
    Log::open_on(Arc::new(disk.clone()), &small())
}

fn all(log: &Log) -> Vec<Entry> {
    log.read(0..u64::MAX, None).unwrap()
}
