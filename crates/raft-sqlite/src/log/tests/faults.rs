//! Full disks, failed writes and failed syncs.

use std::sync::mpsc;

use bytes::Bytes;

use super::sim_disk::{Faults, SimDisk};
use super::{all, entry, id, open};
use crate::error::ErrorClass;
use crate::log::vote::MAX_VOTE_BYTES;
use crate::log::{Entry, LogError};
use rand::SeedableRng;

#[test]
fn a_full_disk_is_told_at_once_and_the_log_goes_on_when_there_is_room() {
    let disk = SimDisk::new();
    let log = open(&disk).unwrap();
    log.flush().unwrap();
    disk.set_faults(Faults { capacity: Some(100 * 1024), ..Faults::default() });
    let mut next = 0;
    let refused = loop {
        let entries = vec![entry(1, next, 900), entry(1, next + 1, 900)];
        match log.append(entries, |result| result.unwrap()) {
            Ok(()) => next += 2,
            Err(error) => break error,
        }
        log.flush().unwrap();
    };
    assert!(matches!(refused, LogError::DiskFull { .. }), "{refused}");
    assert_eq!(refused.class(), ErrorClass::Retryable);
    let before = log.statistics();
    assert!(before.segments >= 3);
    assert_eq!(log.state().last, Some(id(1, next - 1)));
    assert_eq!(all(&log).len() as u64, next);

    // Also for what is too large, with nothing half made.
    let huge = vec![entry(1, next, 10), entry(1, next + 1, 30_000)];
    assert!(matches!(log.append(huge, |_| {}), Err(LogError::DiskFull { .. })));
    assert_eq!(log.state().last, Some(id(1, next - 1)));
    assert_eq!(disk.contents().keys().filter(|name| name.starts_with("spare-")).count(), 0);

    // Votes, truncation and purging go on.
    log.save_vote(b"vote on a full disk", |result| result.unwrap()).unwrap();
    log.truncate_after(Some(next - 2), |result| result.unwrap()).unwrap();
    log.purge(id(1, next / 2), |result| result.unwrap()).unwrap();
    log.flush().unwrap();
    log.append(vec![entry(2, next - 1, 900)], |result| result.unwrap()).unwrap();
    let expected = all(&log);
    log.shutdown();
    let log = open(&disk).unwrap();
    assert_eq!(all(&log), expected);
    assert_eq!(log.vote().unwrap(), &b"vote on a full disk"[..]);
}

#[test]
fn purges_fit_into_a_full_segment() {
    let disk = SimDisk::new();
    let log = open(&disk).unwrap();
    // Two segments; a third may be ready.
    log.append((0..16).map(|index| entry(1, index, 900)).collect(), |_| {}).unwrap();
    log.flush().unwrap();
    disk.set_faults(Faults { capacity: Some(1), ..Faults::default() });
    let mut next = 16;
    while log.append(vec![entry(1, next, 900)], |_| {}).is_ok() {
        next += 1;
        log.flush().unwrap();
    }
    for index in 0..next {
        log.purge(id(1, index), |result| result.unwrap()).unwrap();
    }
    log.flush().unwrap();
    log.append(vec![entry(1, next, 900)], |result| result.unwrap()).unwrap();
    log.flush().unwrap();
}

#[test]
fn after_a_failed_write_or_sync_nothing_is_acknowledged() {
    for (write, sync) in [(Some(0), None), (Some(1), None), (None, Some(0)), (None, Some(1)), (None, Some(2))] {
        let disk = SimDisk::new();
        let log = open(&disk).unwrap();
        log.append(vec![entry(1, 0, 300)], |result| result.unwrap()).unwrap();
        log.flush().unwrap();
        disk.set_faults(Faults { write, sync, capacity: None });
        let (sender, receiver) = mpsc::channel();
        let mut acknowledged = 1;
        for index in 1..60 {
            let sender = sender.clone();
            match log.append(vec![entry(1, index, 700)], move |result| sender.send(result).unwrap()) {
                Ok(()) => {}
                Err(LogError::Failed { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        drop(sender);
        let results: Vec<_> = receiver.iter().collect();
        let first_failure = results.iter().position(|result| result.is_err()).expect("the fault strikes");
        assert!(results[first_failure..].iter().all(|result| result.is_err()));
        acknowledged += first_failure;
        for result in [
            log.append(vec![], |_| {}),
            log.save_vote(b"", |_| {}),
            log.purge(id(1, 0), |_| {}),
            log.truncate_after(None, |_| {}),
            log.flush(),
        ] {
            let error = result.unwrap_err();
            assert!(matches!(error, LogError::Failed { .. }), "{error}");
            assert_eq!(error.class(), ErrorClass::Fatal);
        }
        // What was accepted can still be read by this process.
        assert!(all(&log).len() >= acknowledged);
        log.shutdown();

        // The next process finds what the kernel shows, and what it reports is on disk whatever the
        // kernel forgot.
        disk.set_faults(Faults::default());
        let log = open(&disk).unwrap();
        let found = all(&log);
        assert!(found.len() >= acknowledged);
        for seed in 0..10 {
            let torn = disk.state().after_power_loss(&mut rand::rngs::StdRng::seed_from_u64(seed));
            assert_eq!(all(&open(&torn).unwrap()), found);
        }
    }
}

#[test]
fn a_vote_whose_sync_failed_is_not_acknowledged_and_comes_back_whole() {
    for sync in 0..2 {
        let disk = SimDisk::new();
        let log = open(&disk).unwrap();
        log.save_vote(b"one", |result| result.unwrap()).unwrap();
        log.flush().unwrap();
        disk.set_faults(Faults { sync: Some(sync), ..Faults::default() });
        let (sender, receiver) = mpsc::channel();
        log.save_vote(b"two", move |result| sender.send(result).unwrap()).unwrap();
        assert!(receiver.recv().unwrap().is_err());
        log.shutdown();
        let log = open(&disk).unwrap();
        let found = log.vote();
        for seed in 0..10 {
            let torn = disk.state().after_power_loss(&mut rand::rngs::StdRng::seed_from_u64(seed));
            assert_eq!(open(&torn).unwrap().vote(), found);
        }
    }
}

#[test]
fn a_panic_in_a_callback_stops_the_log_and_tells_those_who_wait() {
    let log = open(&SimDisk::new()).unwrap();
    log.append(vec![entry(1, 0, 10)], |_| panic!("a callback's own mistake")).unwrap();
    let mut index = 1;
    let error = loop {
        match log.append(vec![entry(1, index, 10)], |_| {}).and_then(|()| log.flush()) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, LogError::Failed { .. }), "{error}");
}

#[test]
fn an_entry_larger_than_a_segment_gets_one_of_its_own() {
    let disk = SimDisk::new();
    let log = open(&disk).unwrap();
    let huge = |index| Entry { id: id(1, index), kind: 7, payload: Bytes::from(vec![index as u8; 200_000]) };
    let entries = vec![entry(1, 0, 10), huge(1), huge(2), entry(1, 3, 10), entry(1, 4, 7_000)];
    log.append(entries.clone(), |result| result.unwrap()).unwrap();
    log.flush().unwrap();
    assert_eq!(all(&log), entries);
    log.shutdown();
    let log = open(&disk).unwrap();
    assert_eq!(all(&log), entries);
    assert_eq!(log.read(1..9, Some(100)).unwrap(), entries[1..2]);
    log.purge(id(1, 3), |_| {}).unwrap();
    log.flush().unwrap();
    log.shutdown();
    assert!(disk.contents().values().all(|bytes| bytes.len() <= 16 * 1024), "large files are not kept");
    assert_eq!(all(&open(&disk).unwrap()), entries[4..]);
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let log = open(&SimDisk::new()).unwrap();
    let error = log.save_vote(&[0; MAX_VOTE_BYTES + 1], |_| {}).unwrap_err();
    assert!(matches!(error, LogError::TooLarge { .. }));
    log.save_vote(&[1; MAX_VOTE_BYTES], |result| result.unwrap()).unwrap();
    log.flush().unwrap();
    let last = Entry { id: id(1, u64::MAX), kind: 0, payload: Bytes::new() };
    assert!(matches!(log.append(vec![last], |_| {}), Err(LogError::NotNext { .. })));
}
