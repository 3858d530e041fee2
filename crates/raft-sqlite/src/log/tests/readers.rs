//! Readers while entries are appended, truncated and purged, and segments are used again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::sim_disk::SimDisk;
use super::{all, entry, id, open, small};
use crate::log::Log;

#[test]
fn readers_see_whole_entries_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(directory.path(), &small()).unwrap();
    let stop = AtomicBool::new(false);
    let term = AtomicU64::new(1);
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let (log, stop, term) = (log.clone(), &stop, &term);
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(seed);
                let mut seen = 0;
                while !stop.load(Ordering::Relaxed) || seen == 0 {
                    let last = log.state().last.map_or(0, |last| last.index);
                    let from = random.random_range(last.saturating_sub(150)..=last + 1);
                    let max_bytes = random.random::<bool>().then_some(5_000);
                    let entries = log.read(from..from + 80, max_bytes).unwrap();
                    for pair in entries.windows(2) {
                        assert_eq!(pair[1].id.index, pair[0].id.index + 1);
                        assert!(pair[1].id.term >= pair[0].id.term);
                    }
                    for found in &entries {
                        assert!(found.id.term <= term.load(Ordering::SeqCst));
                        assert_eq!(*found, entry(found.id.term, found.id.index, found.payload.len()));
                    }
                    seen += entries.len();
                }
            });
        }
        let mut random = StdRng::seed_from_u64(99);
        let mut next = 0;
        for round in 0..600u64 {
            let now = term.load(Ordering::SeqCst);
            let count = random.random_range(1..8);
            let entries = (next..next + count).map(|index| entry(now, index, random.random_range(0..800))).collect();
            log.append(entries, |result| result.unwrap()).unwrap();
            next += count;
            if round % 20 == 7 {
                term.fetch_add(1, Ordering::SeqCst);
                log.truncate_after(Some(next - 3), |result| result.unwrap()).unwrap();
                next -= 2;
            }
            if round % 25 == 9 && next > 60 {
                let upto = log.read(next - 60..next - 59, None).unwrap()[0].id;
                log.purge(upto, |result| result.unwrap()).unwrap();
            }
        }
        log.flush().unwrap();
        stop.store(true, Ordering::Relaxed);
    });
    let statistics = log.statistics();
    assert!(statistics.spare_segments > 0 && statistics.segments < 12, "segments were used again: {statistics:?}");
    log.shutdown();
}

#[test]
fn a_segment_is_not_used_again_while_it_is_read() {
    let disk = SimDisk::new();
    let log = open(&disk).unwrap();
    let fill = |log: &Log, term: u64| {
        let next = log.state().last.map_or(0, |last| last.index + 1);
        log.append((next..next + 40).map(|index| entry(term, index, 800)).collect(), |_| {}).unwrap();
        log.flush().unwrap();
    };
    fill(&log, 1);
    let expected: Vec<_> = (0..8).map(|index| entry(1, index, 800)).collect();
    let busy = AtomicBool::new(false);
    let (writer, purges) = (log.clone(), std::sync::Arc::new(AtomicU64::new(0)));
    let counter = std::sync::Arc::clone(&purges);
    disk.set_before_read(move || {
        // Once: while the reader has found its entries but not read them yet, purge them and go on
        // until every free file is in use.
        if !busy.swap(true, Ordering::SeqCst) {
            for term in 2..6 {
                writer.purge(writer.state().last.unwrap(), |result| result.unwrap()).unwrap();
                fill(&writer, term);
            }
            counter.store(4, Ordering::SeqCst);
        }
    });
    assert_eq!(log.read(0..8, None).unwrap(), expected);
    assert_eq!(purges.load(Ordering::SeqCst), 4);
    assert_eq!(log.state().purged, Some(id(4, 159)));
    assert_eq!(all(&log).len(), 40);
}
