//! Power failures at every write, sync and rename, with torn sectors, and again while the log
//! recovers and goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::sim_disk::{SimDisk, State};
use super::{all, entry, id, open, small};
use crate::log::{Entry, EntryId, Log, LogOptions};

/// What a log holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Content {
    purged: Option<EntryId>,
    entries: Vec<Entry>,
}

impl Content {
    fn of(log: &Log) -> Self {
        Self { purged: log.state().purged, entries: all(log) }
    }

    fn last(&self) -> Option<EntryId> {
        self.entries.last().map(|entry| entry.id).or(self.purged)
    }

    fn next(&self) -> u64 {
        self.last().map_or(0, |last| last.index + 1)
    }

    fn truncate_after(&mut self, last: Option<u64>) {
        self.entries.retain(|entry| last.is_some_and(|last| entry.id.index <= last));
    }

    fn purge(&mut self, upto: EntryId) {
        if self.purged.is_none_or(|purged| purged.index < upto.index) {
            self.purged = Some(upto);
            self.entries.retain(|entry| entry.id.index > upto.index);
        }
    }
}

/// Everything that was asked of a log, and what it must have afterwards.
#[derive(Default)]
struct History {
    /// Contents after each step; an append of several entries is as many steps, as a crash may fall
    /// between them.
    contents: Vec<Content>,
    /// How many `contents` there were after each call.
    after_call: Vec<usize>,
    votes: Vec<Option<Bytes>>,
    committed: Vec<Option<EntryId>>,
}

/// A disk in the middle of a run, with what had been acknowledged by then.
struct Moment {
    disk: State,
    what: &'static str,
    calls_acknowledged: usize,
    votes_acknowledged: usize,
}

/// Runs random calls on the log in `disk` and returns the disk before every change to it.
fn run(disk: &SimDisk, random: &mut StdRng, calls: usize) -> (History, Vec<Moment>) {
    let moments = Arc::new(Mutex::new(Vec::new()));
    let calls_acknowledged = Arc::new(AtomicUsize::new(0));
    let votes_acknowledged = Arc::new(AtomicUsize::new(0));
    {
        let (moments, calls, votes) =
            (Arc::clone(&moments), Arc::clone(&calls_acknowledged), Arc::clone(&votes_acknowledged));
        disk.set_hook(move |state, what| {
            moments.lock().push(Moment {
                disk: state.clone(),
                what,
                calls_acknowledged: calls.load(Ordering::SeqCst),
                votes_acknowledged: votes.load(Ordering::SeqCst),
            });
        });
    }
    // With marks at every idle moment, or with none.
    let mark_delay = Duration::from_secs(if random.random() { 0 } else { 3600 });
    let options = LogOptions { mark_delay, ..small() };
    let log = Log::open_on(Arc::new(disk.clone()), &options).unwrap();
    let mut content = Content::of(&log);
    let mut history = History {
        contents: vec![content.clone()],
        after_call: vec![1],
        votes: vec![log.vote()],
        committed: vec![None, log.committed()],
    };
    let mut term = content.last().map_or(1, |last| last.term);
    for _ in 0..calls {
        let acknowledged = Arc::clone(&calls_acknowledged);
        let done = move |result: std::io::Result<()>| {
            result.unwrap();
            acknowledged.fetch_add(1, Ordering::SeqCst);
        };
        match random.random_range(0..100) {
            0..60 => {
                let next = content.next();
                // Often the same size, so that remains of torn writes stand where new records
                // could.
                let entries: Vec<_> = (next..next + random.random_range(1..4))
                    .map(|index| {
                        let bytes = match random.random_range(0..20) {
                            0 => random.random_range(3_000..30_000),
                            1..8 => random.random_range(0..1_500),
                            _ => 200,
                        };
                        entry(term, index, bytes)
                    })
                    .collect();
                for entry in &entries {
                    content.entries.push(entry.clone());
                    history.contents.push(content.clone());
                }
                log.append(entries, done).unwrap();
            }
            60..70 => {
                let first = content.purged.map_or(0, |purged| purged.index);
                let last = match random.random_range(0..6) {
                    0 => None,
                    _ => Some(random.random_range(first..=content.next())),
                };
                if last == Some(0) && content.purged.is_none() && content.entries.is_empty() {
                    continue;
                }
                content.truncate_after(last);
                history.contents.push(content.clone());
                term += 1;
                log.truncate_after(last, done).unwrap();
            }
            70..80 => {
                let upto = match random.random_range(0..8) {
                    0 => id(term, content.next() + 3),
                    _ if content.entries.is_empty() => continue,
                    _ => content.entries[random.random_range(0..content.entries.len())].id,
                };
                content.purge(upto);
                history.contents.push(content.clone());
                log.purge(upto, done).unwrap();
            }
            80..88 => {
                let vote = Bytes::from(vec![random.random(); random.random_range(0..40)]);
                history.votes.push(Some(vote.clone()));
                let votes = Arc::clone(&votes_acknowledged);
                log.save_vote(&vote, move |result| {
                    votes.fetch_add(1, Ordering::SeqCst);
                    done(result);
                })
                .unwrap();
            }
            88..95 => {
                let committed = content.last();
                history.committed.push(committed);
                log.save_committed(committed);
                continue;
            }
            _ => {
                log.flush().unwrap();
                // A chance to be idle.
                std::thread::yield_now();
                continue;
            }
        }
        history.after_call.push(history.contents.len());
    }
    if random.random() {
        log.flush().unwrap();
    }
    log.shutdown();
    disk.clear_hook();
    let moments = std::mem::take(&mut *moments.lock());
    (history, moments)
}

impl History {
    /// Opens `disk` and checks that it holds what it must, and nothing that was never asked for.
    fn check(&self, disk: &SimDisk, moment: &Moment) {
        let log = match open(disk) {
            Ok(log) => log,
            Err(error) => panic!("crash before {}: {error}", moment.what),
        };
        let found = Content::of(&log);
        let least = self.after_call[moment.calls_acknowledged] - 1;
        assert!(
            self.contents[least..].contains(&found),
            "crash before {}: purged {:?}, last {:?}; acknowledged were purged {:?}, last {:?}",
            moment.what,
            found.purged,
            found.last(),
            self.contents[least].purged,
            self.contents[least].last(),
        );
        assert_eq!(log.state().last, found.last());
        assert!(self.votes[moment.votes_acknowledged..].contains(&log.vote()), "crash before {}", moment.what);
        assert!(self.committed.contains(&log.committed()), "crash before {}", moment.what);
        assert!(log.committed().map(|id| id.index) <= found.last().map(|id| id.index));
    }
}

/// A crash in each moment of a run; then, for some of them, a run on what was left, and a crash in
/// that.
fn explore(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let disk = SimDisk::new();
    let (history, moments) = run(&disk, &mut random, 40);
    for moment in &moments {
        let torn = moment.disk.after_power_loss(&mut random);
        if !random.random_ratio(1, 8) {
            history.check(&torn, moment);
            continue;
        }
        let (history, moments) = run(&torn, &mut random, 8);
        for moment in moments {
            history.check(&moment.disk.after_power_loss(&mut random), &moment);
        }
    }
}

#[test]
fn a_crash_at_any_moment_loses_nothing_acknowledged() {
    // RAFT_LOG_CRASH_SEEDS=FROM..TO explores others.
    let seeds = std::env::var("RAFT_LOG_CRASH_SEEDS").ok().and_then(|range| {
        let (from, to) = range.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    for seed in seeds.unwrap_or(0..12) {
        if let Err(panic) = std::panic::catch_unwind(|| explore(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn after_a_kill_nothing_written_is_lost_and_what_is_found_survives_a_power_failure() {
    for seed in 0..4 {
        let mut random = StdRng::seed_from_u64(seed);
        let disk = SimDisk::new();
        let (history, moments) = run(&disk, &mut random, 40);
        for moment in &moments {
            let killed = moment.disk.after_kill();
            history.check(&killed, moment);
            let found = Content::of(&open(&killed).unwrap());
            let torn = killed.state().after_power_loss(&mut random);
            assert_eq!(Content::of(&open(&torn).unwrap()), found, "seed {seed}");
        }
    }
}

#[test]
fn the_remains_of_a_torn_write_are_never_taken_for_records() {
    let disk = SimDisk::new();
    let log = open(&disk).unwrap();
    log.append(vec![entry(1, 0, 200)], |_| {}).unwrap();
    log.flush().unwrap();
    let first_end = 4096 + 48 + 248;
    log.append(vec![entry(1, 1, 200), entry(1, 2, 200)], |_| {}).unwrap();
    log.flush().unwrap();
    let torn = disk.state().after_kill();
    torn.tamper("segment-0000000001", |bytes| bytes[first_end..first_end + 248].fill(0));

    // What is written now ends where the remains of entry 2 begin, and they would be next.
    let log = open(&torn).unwrap();
    assert_eq!(log.state().last, Some(id(1, 0)));
    log.append(vec![entry(2, 1, 200 - 48)], |_| {}).unwrap();
    log.flush().unwrap();
    let remains = &torn.contents()["segment-0000000001"][first_end + 248..first_end + 2 * 248];
    assert_eq!(remains, &disk.contents()["segment-0000000001"][first_end + 248..first_end + 2 * 248]);
    let killed = torn.state().after_kill();
    assert_eq!(all(&open(&killed).unwrap()), vec![entry(1, 0, 200), entry(2, 1, 200 - 48)]);
}
