//! Figures, not assertions: appends a second beside plain write + fdatasync on the same disk, in
//! the same run.
//!
//! `cargo test --release -p raft-sqlite log::tests::throughput -- --ignored --nocapture`;
//! RAFT_LOG_BENCH_DIR names a directory on the disk to measure.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::log::{Entry, EntryId, Log, LogOptions};

const PAYLOAD_BYTES: usize = 300;
const RUN: Duration = Duration::from_secs(3);

fn report(name: &str, mut latencies: Vec<Duration>, elapsed: Duration) {
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{name:48} {:9.0}/s  p50 {:.3} ms  p99 {:.3} ms  max {:.1} ms",
        latencies.len() as f64 / elapsed.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

fn plain(name: &str, file: &File, length: u64) {
    let record = vec![7u8; PAYLOAD_BYTES + 52];
    let start = Instant::now();
    let mut latencies = Vec::new();
    let mut offset = 0;
    while start.elapsed() < RUN {
        let begin = Instant::now();
        file.write_all_at(&record, offset).unwrap();
        file.sync_data().unwrap();
        latencies.push(begin.elapsed());
        offset += record.len() as u64;
        if offset + record.len() as u64 > length {
            offset = 0;
        }
    }
    report(name, latencies, start.elapsed());
}

fn appenders(name: &str, log: &Log, count: usize) {
    let next = Arc::new(Mutex::new(log.state().last.map_or(0, |last| last.index + 1)));
    let stop = Arc::new(AtomicBool::new(false));
    let before = log.statistics();
    let start = Instant::now();
    let threads: Vec<_> = (0..count)
        .map(|_| {
            let (log, next, stop) = (log.clone(), Arc::clone(&next), Arc::clone(&stop));
            std::thread::spawn(move || {
                let payload = Bytes::from(vec![7u8; PAYLOAD_BYTES]);
                let mut latencies = Vec::new();
                let (sender, receiver) = mpsc::channel();
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    {
                        let mut next = next.lock().unwrap();
                        let id = EntryId { term: 1, index: *next };
                        let sender = sender.clone();
                        let entry = Entry { id, kind: 1, payload: payload.clone() };
                        log.append(vec![entry], move |result| sender.send(result).unwrap()).unwrap();
                        *next += 1;
                    }
                    receiver.recv().unwrap().unwrap();
                    latencies.push(begin.elapsed());
                }
                latencies
            })
        })
        .collect();
    std::thread::sleep(RUN);
    stop.store(true, Ordering::Relaxed);
    let latencies: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    let elapsed = start.elapsed();
    report(name, latencies, elapsed);
    let after = log.statistics();
    println!(
        "{:48} {:9.0} syncs/s, {:.1} entries a sync, {:.0} bytes an entry, mean sync {:.3} ms",
        "",
        (after.syncs - before.syncs) as f64 / elapsed.as_secs_f64(),
        (after.written_entries - before.written_entries) as f64 / (after.syncs - before.syncs) as f64,
        (after.written_bytes - before.written_bytes) as f64 / (after.written_entries - before.written_entries) as f64,
        (after.sync_time - before.sync_time).as_secs_f64() * 1e3 / (after.syncs - before.syncs) as f64,
    );
}

#[test]
#[ignore = "prints figures; run it in release on the disk to be measured"]
fn appends_beside_plain_syncs() {
    let base = std::env::var_os("RAFT_LOG_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let directory = tempfile::tempdir_in(base).unwrap();
    let length = 16 * 1024 * 1024;

    let file = File::create(directory.path().join("growing")).unwrap();
    plain("plain write + fdatasync, growing file", &file, u64::MAX);
    let file = File::create(directory.path().join("written")).unwrap();
    file.write_all_at(&vec![1; length], 0).unwrap();
    file.sync_all().unwrap();
    plain("plain write + fdatasync, file already written", &file, length as u64);

    let log = Log::open(&directory.path().join("log"), &LogOptions::default()).unwrap();
    appenders("log, 1 appender, new segments", &log, 1);
    appenders("log, 64 appenders, new segments", &log, 64);
    log.purge(log.state().last.unwrap(), |_| {}).unwrap();
    log.flush().unwrap();
    // What is appended now goes into recycled files once the open segment is full.
    let filler = Bytes::from(vec![1; 1024 * 1024]);
    for _ in 0..20 {
        let index = log.state().last.unwrap().index + 1;
        log.append(vec![Entry { id: EntryId { term: 1, index }, kind: 1, payload: filler.clone() }], |_| {}).unwrap();
    }
    log.flush().unwrap();
    appenders("log, 1 appender, recycled segments", &log, 1);
    appenders("log, 64 appenders, recycled segments", &log, 64);
    plain("plain write + fdatasync, file already written", &file, length as u64);
    log.shutdown();
}
