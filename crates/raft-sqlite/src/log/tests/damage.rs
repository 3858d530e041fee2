//! Damaged files are reported and left alone; nothing that was synced is lost in silence.

use super::sim_disk::SimDisk;
use super::{all, entry, id, open};
use crate::log::{Entry, EntryId, Log, LogError};

/// What a log holds that a test compares.
fn content(log: &Log) -> (Vec<Entry>, Option<EntryId>, Option<bytes::Bytes>) {
    (all(log), log.state().purged, log.vote())
}

/// A log of two segments, stopped in order.
fn stopped_log() -> SimDisk {
    let disk = SimDisk::new();
    let log = open(&disk).unwrap();
    log.save_vote(b"first vote", |_| {}).unwrap();
    for index in 0..14 {
        log.append(vec![entry(1, index, 700 + index as usize)], |_| {}).unwrap();
        log.flush().unwrap();
    }
    log.truncate_after(Some(11), |_| {}).unwrap();
    log.append(vec![entry(2, 12, 100), entry(2, 13, 3)], |_| {}).unwrap();
    log.purge(id(1, 2), |_| {}).unwrap();
    log.save_vote(b"second vote", |_| {}).unwrap();
    log.shutdown();
    disk
}

#[test]
fn a_flipped_bit_anywhere_is_detected_or_harmless() {
    let disk = stopped_log();
    let expected = content(&open(&disk).unwrap());
    let image = stopped_log().contents();
    assert_eq!(image.keys().filter(|name| name.starts_with("segment-")).count(), 2);
    let (mut detected, mut harmless) = (0, 0);
    for (name, bytes) in image.iter().filter(|(name, _)| !name.starts_with("spare-")) {
        // Every byte that carries something; of the zeros a sample.
        let places: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] != 0 || at % 61 == 0).collect();
        for at in places {
            for bits in [1 << (at % 8), 0xff] {
                let disk = stopped_log_from(&image);
                disk.tamper(name, |bytes| bytes[at] ^= bits);
                let before = disk.contents();
                match open(&disk) {
                    Ok(log) => {
                        assert!(content(&log) == expected, "{name}, byte {at}, bits {bits:#x}");
                        harmless += 1;
                    }
                    Err(LogError::Damaged { path, .. }) => {
                        assert!(path.ends_with(name), "{name}, byte {at}: {}", path.display());
                        assert!(disk.contents() == before, "{name}, byte {at}: files were changed");
                        detected += 1;
                    }
                    Err(error) => panic!("{name}, byte {at}, bits {bits:#x}: {error}"),
                }
            }
        }
    }
    assert!(detected > 10_000 && harmless > 100, "{detected} detected, {harmless} harmless");
}

/// The same files on a disk of their own.
fn stopped_log_from(image: &std::collections::BTreeMap<String, Vec<u8>>) -> SimDisk {
    use crate::log::disk::Disk;
    let disk = SimDisk::new();
    for (name, bytes) in image {
        let file = disk.create(name, bytes.len() as u64).unwrap();
        file.write_at(bytes, 0).unwrap();
        file.sync().unwrap();
    }
    disk.sync_directory().unwrap();
    disk
}

#[test]
fn zeroed_sectors_are_detected_or_harmless() {
    let disk = stopped_log();
    let expected = content(&open(&disk).unwrap());
    let image = stopped_log().contents();
    let end = image["segment-0000000002"].iter().rposition(|byte| *byte != 0).unwrap();
    for (name, bytes) in image.iter().filter(|(name, _)| !name.starts_with("spare-")) {
        for start in (0..bytes.len()).step_by(512) {
            // The sector with the last mark is the one that nothing vouches for.
            if name == "segment-0000000002" && start == end / 512 * 512 {
                continue;
            }
            let disk = stopped_log_from(&image);
            disk.tamper(name, |bytes| bytes[start..start + 512].fill(0));
            match open(&disk) {
                Ok(log) => assert!(content(&log) == expected, "{name}, sector at {start}"),
                Err(LogError::Damaged { .. }) => {}
                Err(error) => panic!("{name}, sector at {start}: {error}"),
            }
        }
    }
}

#[test]
fn a_cut_file_is_reported() {
    for (name, length) in [("segment-0000000001", 3_000), ("segment-0000000002", 10_000), ("vote", 4_096)] {
        let disk = stopped_log();
        disk.tamper(name, |bytes| bytes.truncate(length));
        assert!(matches!(open(&disk), Err(LogError::Damaged { .. })), "{name}");
    }
}

#[test]
fn a_missing_file_is_reported() {
    for names in [
        &["segment-0000000001"][..],
        &["vote"],
        &["segment-0000000001", "segment-0000000002"],
        &["vote", "segment-0000000001"],
    ] {
        let disk = stopped_log();
        for name in names {
            disk.remove_behind(name);
        }
        let before = disk.contents();
        assert!(matches!(open(&disk), Err(LogError::Missing { .. })), "{names:?}");
        assert!(disk.contents() == before);
    }
}

#[test]
fn a_missing_newest_segment_is_reported_when_the_one_before_goes_on_without_it() {
    // Without the newest segment the one before it ends in bytes that no later record vouches for:
    // as after a crash. What tells is the vote or a peer; this test states the limit.
    let disk = stopped_log();
    disk.remove_behind("segment-0000000002");
    let log = open(&disk).unwrap();
    assert!(log.state().last < Some(id(2, 13)));
}

#[test]
fn the_last_batch_is_vouched_for_by_the_mark_of_an_idle_log() {
    let disk = SimDisk::new();
    let options = crate::log::LogOptions { mark_delay: std::time::Duration::from_millis(1), ..super::small() };
    let log = Log::open_on(std::sync::Arc::new(disk.clone()), &options).unwrap();
    log.append(vec![entry(1, 0, 500)], |_| {}).unwrap();
    log.flush().unwrap();
    let without_mark = disk.state().after_kill();
    // The mark is written when the log is idle: wait for the file to change.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let written = |disk: &SimDisk| disk.contents()["segment-0000000001"].iter().filter(|byte| **byte != 0).count();
    while written(&disk) == written(&without_mark) && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    let with_mark = disk.state().after_kill();
    let place = 4096 + 48 + 100;
    with_mark.tamper("segment-0000000001", |bytes| bytes[place] ^= 1);
    assert!(matches!(open(&with_mark), Err(LogError::Damaged { offset: 4144, .. })));
    drop(log);
}

#[test]
fn damage_that_appears_while_the_log_is_open_is_reported_by_read() {
    let disk = stopped_log();
    let log = open(&disk).unwrap();
    disk.tamper("segment-0000000001", |bytes| bytes[4096 + 48 + 3 * 800] ^= 1);
    let error = log.read(0..u64::MAX, None).unwrap_err();
    assert!(matches!(error, LogError::Damaged { .. }), "{error}");
}

#[test]
fn a_newer_format_is_refused() {
    for (name, crc_from, crc_at) in [("segment-0000000001", 0..124, 124), ("vote", 0..28, 28)] {
        let disk = stopped_log();
        disk.tamper(name, |bytes| {
            bytes[8] = 9;
            let mut crc = crc32c::crc32c(&bytes[crc_from]);
            if name == "vote" {
                let length = bytes[12] as usize;
                crc = crc32c::crc32c_append(crc, &bytes[32..32 + length]);
            }
            bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        });
        let error = open(&disk).unwrap_err();
        assert!(matches!(error, LogError::NewerFormat { found: 9, supported: 1, .. }), "{name}: {error}");
        assert!(error.to_string().contains("use the newer program"), "{name}: {error}");
    }
}

#[test]
fn one_damaged_copy_of_the_vote_is_put_right() {
    for slot in [0, 4096] {
        let disk = stopped_log();
        disk.tamper("vote", |bytes| bytes[slot + 40] ^= 1);
        let log = open(&disk).unwrap();
        assert_eq!(log.vote().unwrap(), &b"second vote"[..]);
        let vote = &disk.contents()["vote"];
        assert_eq!(vote[..100], vote[4096..4196]);
    }
}
