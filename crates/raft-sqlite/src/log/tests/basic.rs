//! What each call does, on a real directory.

use std::sync::mpsc;

use bytes::Bytes;

use crate::log::{Entry, EntryId, Log, LogError, LogOptions, LogState};

fn entry(term: u64, index: u64, payload: &[u8]) -> Entry {
    Entry { id: EntryId { term, index }, kind: 1, payload: Bytes::copy_from_slice(payload) }
}

#[test]
fn append_read_truncate_purge_vote_reopen() {
    let directory = tempfile::tempdir().unwrap();
    let options = LogOptions { segment_bytes: 16 * 1024, ..LogOptions::default() };
    let log = Log::open(directory.path(), &options).unwrap();
    assert_eq!(log.state(), LogState::default());
    let entries: Vec<_> = (0..100).map(|i| entry(1, i, &[i as u8; 300])).collect();
    let (sender, receiver) = mpsc::channel();
    log.append(entries.clone(), move |result| sender.send(result).unwrap()).unwrap();
    assert_eq!(log.read(0..1000, None).unwrap(), entries);
    receiver.recv().unwrap().unwrap();
    log.truncate_after(Some(89), |_| {}).unwrap();
    log.append(vec![entry(2, 90, b"new")], |_| {}).unwrap();
    log.purge(EntryId { term: 1, index: 69 }, |_| {}).unwrap();
    log.save_vote(b"vote 2", |_| {}).unwrap();
    log.save_committed(Some(EntryId { term: 1, index: 80 }));
    log.flush().unwrap();
    let mut expected = entries[70..90].to_vec();
    expected.push(entry(2, 90, b"new"));
    assert_eq!(log.read(0..1000, None).unwrap(), expected);
    log.shutdown();
    for _ in 0..3 {
        let log = Log::open(directory.path(), &options).unwrap();
        assert_eq!(
            log.state(),
            LogState { purged: Some(EntryId { term: 1, index: 69 }), last: Some(EntryId { term: 2, index: 90 }) }
        );
        assert_eq!(log.read(0..1000, None).unwrap(), expected);
        assert_eq!(log.read(75..1000, Some(650)).unwrap(), expected[5..7]);
        assert_eq!(log.vote().unwrap(), &b"vote 2"[..]);
        assert_eq!(log.committed(), Some(EntryId { term: 1, index: 80 }));
    }
}

#[test]
fn callbacks_come_in_order_after_the_entries_can_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(directory.path(), &LogOptions::default()).unwrap();
    let (sender, receiver) = mpsc::channel();
    for index in 0..500 {
        let sender = sender.clone();
        let reader = log.clone();
        log.append(vec![entry(1, index, b"x")], move |result| {
            result.unwrap();
            assert_eq!(reader.read(index..index + 1, None).unwrap().len(), 1);
            sender.send(index).unwrap();
        })
        .unwrap();
    }
    drop(sender);
    assert!(receiver.iter().eq(0..500));
    let statistics = log.statistics();
    assert!(statistics.syncs >= 1 && statistics.written_entries == 500, "{statistics:?}");
    assert_eq!(statistics.sync_latency.iter().sum::<u64>(), statistics.syncs);
}

#[test]
fn a_second_opener_is_told_who_holds_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(directory.path(), &LogOptions::default()).unwrap();
    let error = Log::open(directory.path(), &LogOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
    assert!(text.contains(&directory.path().display().to_string()), "{text}");
    log.shutdown();
    Log::open(directory.path(), &LogOptions::default()).unwrap();
}

#[test]
fn the_last_handle_closes_the_log_even_from_a_callback() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(directory.path(), &LogOptions::default()).unwrap();
    let handle = log.clone();
    let (sender, receiver) = mpsc::channel();
    log.append(vec![entry(1, 0, b"x")], move |result| {
        result.unwrap();
        drop(handle);
        sender.send(()).unwrap();
    })
    .unwrap();
    drop(log);
    receiver.recv().unwrap();
    // The thread gives the lock back when it ends.
    let log = loop {
        match Log::open(directory.path(), &LogOptions::default()) {
            Ok(log) => break log,
            Err(LogError::Locked { .. }) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(log.state().last, Some(EntryId { term: 1, index: 0 }));
}

#[test]
fn a_closed_log_refuses_writes_and_still_reads() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(directory.path(), &LogOptions::default()).unwrap();
    log.append(vec![entry(1, 0, b"x")], |_| {}).unwrap();
    log.shutdown();
    log.shutdown();
    assert!(matches!(log.append(vec![entry(1, 1, b"x")], |_| {}), Err(LogError::Closed)));
    assert!(matches!(log.flush(), Err(LogError::Closed)));
    assert_eq!(log.read(0..9, None).unwrap().len(), 1);
}

#[test]
fn what_makes_no_sense_is_refused_without_effect() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(directory.path(), &LogOptions::default()).unwrap();
    log.append(vec![entry(1, 5, b"five"), entry(1, 6, b"six")], |_| {}).unwrap();
    let state = log.state();
    for entries in [vec![entry(1, 8, b"")], vec![entry(1, 6, b"")], vec![entry(1, 7, b""), entry(1, 9, b"")]] {
        assert!(matches!(log.append(entries, |_| {}), Err(LogError::NotNext { .. })));
    }
    assert_eq!(log.state(), state);
    log.purge(EntryId { term: 1, index: 5 }, |_| {}).unwrap();
    assert!(matches!(log.truncate_after(Some(4), |_| {}), Err(LogError::Purged { index: 4, purged: 5 })));
    assert_eq!(log.state().last, state.last);
    // A purge of what is gone does nothing.
    log.purge(EntryId { term: 1, index: 3 }, |_| {}).unwrap();
    assert_eq!(log.state().purged, Some(EntryId { term: 1, index: 5 }));
    // A snapshot from the leader: the log goes on behind it.
    log.purge(EntryId { term: 4, index: 100 }, |_| {}).unwrap();
    assert!(matches!(log.append(vec![entry(4, 7, b"")], |_| {}), Err(LogError::NotNext { expected: 101, found: 7 })));
    log.append(vec![entry(4, 101, b"")], |_| {}).unwrap();
    assert_eq!(log.read(0..u64::MAX, None).unwrap(), vec![entry(4, 101, b"")]);
}
