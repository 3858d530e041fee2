//! Bits that the disk has changed, in each file of a database: found and named, or without effect; never a byte deleted.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rusqlite::Connection;

use super::crash::{SimulatedDisk, history, on, replay};
use super::*;
use crate::database::DatabaseError;
use crate::database::replica::ApplyError;
use crate::page::source::{Disk as _, SystemDisk};

type Files = BTreeMap<PathBuf, Vec<u8>>;

fn files(folder: &Path) -> Files {
    let list = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    list.map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect()
}

fn flip(path: &Path, at: usize, bits: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= bits;
    std::fs::write(path, bytes).unwrap();
}

/// A database of some pages with two checkpoints, closed. The entries that it holds, and the next one.
fn closed(folder: &Path, page_size: u32) -> Vec<bytes::Bytes> {
    let leader = open(folder, "leader", &options(page_size));
    let mut writer = leader.open_writer().unwrap();
    let mut log = Vec::new();
    writer.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").unwrap();
    for round in 0..3 {
        for row in 0..60 {
            let value = vec![row as u8 + round; 200];
            writer.connection().execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (row, value)).unwrap();
        }
        log.push(seal_and_commit(&mut writer, &leader).unwrap());
    }
    drop(writer);
    drop(leader);
    Replica::remove_files(&crate::page::source::SystemDisk, folder, "leader").unwrap();
    let replica = open(folder, "x", &options(page_size));
    for (index, page_set) in log[..2].iter().enumerate() {
        replica.apply(page_set).unwrap();
        replica.checkpoint(replica.pin(), position(index as u64 + 1)).unwrap();
    }
    log
}

fn read_all(replica: &Replica) -> Result<String, DatabaseError> {
    let reader = replica.open_reader()?;
    reader.begin()?;
    let read: rusqlite::Result<String> =
        reader.connection().query_row("SELECT group_concat(k || hex(v)) FROM t", [], |row| row.get(0));
    reader.end()?;
    Ok(read?)
}

#[test]
fn a_flipped_bit_in_any_file_of_a_database_is_found_or_without_effect() {
    for page_size in [512, 4096] {
        let folder = tempfile::tempdir().unwrap();
        closed(folder.path(), page_size);
        let image = files(folder.path());
        let names: Vec<String> =
            image.keys().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        assert_eq!(names, ["x.applied", "x.sqlite", "x.sums"]);
        let whole = open(folder.path(), "x", &options(page_size));
        let (hash, rows) = (whole.pin().state_hash(), read_all(&whole).unwrap());
        drop(whole);
        let (mut found, mut harmless) = (0, 0);
        for (path, bytes) in &image {
            let step = if path.ends_with("x.sqlite") { 61 } else { 1 };
            for at in (0..bytes.len()).filter(|at| at % step == 0 || *at < 110) {
                flip(path, at, 1 << (at % 8));
                let before = files(folder.path());
                let opened = Replica::open(folder.path(), "x", options(page_size));
                // A damaged page that is not the first is found when it is read.
                let outcome = match opened {
                    Err(error) => Err(error),
                    Ok((replica, _)) => {
                        assert_eq!(replica.pin().state_hash(), hash, "{}, byte {at}", path.display());
                        let damage_in_page = path.ends_with("x.sqlite");
                        let checked = replica.verify().map(|whole| assert!(whole));
                        let scrubbed = replica.scrub(1, u32::MAX).and_then(|next| {
                            assert_eq!(next, None);
                            replica.damage().map_or(Ok(()), |damage| Err(damage.into()))
                        });
                        assert_eq!(checked.is_err(), damage_in_page, "{}, byte {at}", path.display());
                        assert_eq!(scrubbed.is_err(), damage_in_page);
                        // What is not damaged is read as it was.
                        match read_all(&replica) {
                            Ok(read) => assert_eq!(read, rows),
                            Err(error) => assert!(matches!(error, DatabaseError::DamagedPage(_)), "{error}"),
                        }
                        checked
                    }
                };
                match outcome {
                    Err(DatabaseError::Damaged { path: named, offset, .. }) => {
                        assert_eq!(&named, path);
                        assert!(offset <= at as u64, "{}, byte {at}: told {offset}", path.display());
                        found += 1;
                    }
                    Err(DatabaseError::DamagedPage(damage)) => {
                        assert_eq!(&damage.path, path);
                        assert_eq!(damage.page, (at as u32 / page_size) + 1);
                        assert_eq!(damage.offset, u64::from(damage.page - 1) * u64::from(page_size));
                        found += 1;
                    }
                    Err(error) => panic!("{}, byte {at}: {error}", path.display()),
                    Ok(()) => harmless += 1,
                }
                assert!(files(folder.path()) == before, "{}, byte {at}: something was changed", path.display());
                flip(path, at, 1 << (at % 8));
            }
        }
        // Without effect: what lies between the slots of the mark, and the older slot.
        assert!(found > 700 && (68..=1024).contains(&harmless), "{found} found, {harmless} without effect");
    }
}

#[test]
fn a_file_that_was_cut_short_is_reported_and_not_cut_further() {
    let folder = tempfile::tempdir().unwrap();
    closed(folder.path(), 512);
    for (path, bytes) in files(folder.path()) {
        for length in [1, 60, 511, bytes.len() / 2, bytes.len() - 1] {
            // The older slot is at the end.
            if path.ends_with("x.applied") && length > 60 {
                continue;
            }
            std::fs::write(&path, &bytes[..length]).unwrap();
            let before = files(folder.path());
            let error = Replica::open(folder.path(), "x", options(512)).err();
            let error = error.unwrap_or_else(|| panic!("{} cut to {length}", path.display()));
            assert_eq!(error.class(), crate::error::ErrorClass::Fatal, "{error}");
            assert!(files(folder.path()) == before, "{} cut to {length}", path.display());
        }
        std::fs::write(&path, &bytes).unwrap();
    }
}

/// What the text of the report says.
#[test]
fn checksums_that_were_moved_away_are_made_anew_if_the_database_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    closed(folder.path(), 512);
    let image = files(folder.path());
    let sums = folder.path().join("x.sums");
    flip(&sums, 600, 4);
    let error = Replica::open(folder.path(), "x", options(512)).err().unwrap();
    assert!(error.to_string().contains("x.sums is damaged at byte 512"), "{error}");
    assert!(error.to_string().contains("moved away while the node is stopped"), "{error}");
    std::fs::rename(&sums, folder.path().join("aside")).unwrap();
    drop(open(folder.path(), "x", &options(512)));
    std::fs::remove_file(folder.path().join("aside")).unwrap();
    assert!(files(folder.path()) == image);
    // With a damaged database nothing vouches for any page.
    std::fs::remove_file(&sums).unwrap();
    flip(&folder.path().join("x.sqlite"), 1500, 4);
    let error = Replica::open(folder.path(), "x", options(512)).err().unwrap();
    assert!(error.to_string().contains("x.sqlite is damaged"), "{error}");
}

/// The page that row 30 is in, which is neither the first nor the table's root.
fn page_of_a_row(folder: &Path) -> u32 {
    let bytes = std::fs::read(folder.join("x.sqlite")).unwrap();
    let at = bytes.windows(200).position(|window| window == [31; 200]).unwrap();
    at as u32 / 512 + 1
}

#[test]
fn nothing_that_was_made_from_a_damaged_page_is_proposed_or_applied() {
    let folder = tempfile::tempdir().unwrap();
    let log = closed(folder.path(), 512);
    let page = page_of_a_row(folder.path());
    assert!(page > 2);
    let path = folder.path().join("x.sqlite");
    flip(&path, (page as usize - 1) * 512 + 300, 1);
    let image = files(folder.path());
    let replica = open(folder.path(), "x", &options(512));
    let before = replica.committed();

    // SQLite gets no damaged page to work on.
    let mut writer = replica.open_writer().unwrap();
    let error = writer.connection().execute("UPDATE t SET v = zeroblob(200) WHERE k = 30", []).unwrap_err();
    assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::SystemIoFailure), "{error}");
    assert_eq!(writer.take_damage().map(|damage| damage.page), Some(page));
    assert!(writer.seal().unwrap().is_none());
    // What does not need it goes through.
    writer.connection().execute("UPDATE t SET v = zeroblob(200) WHERE k = 1", []).unwrap();
    assert!(writer.seal().unwrap().is_some());
    drop(writer);

    // A page that was captured without having been read: its old image is needed for the state hash.
    let capture = crate::vfs::capture::Capture::new(replica.store_for_tests(), 1 << 20);
    capture.put_for_tests(PageNumber(page), vec![7; 512]);
    let error = DatabaseError::io(&path, capture.seal().unwrap_err());
    assert!(matches!(&error, DatabaseError::DamagedPage(damage) if damage.page == page), "{error}");
    replica.store_for_tests().discard();

    // Nor is anything laid over it.
    let error = replica.apply(&log[2]).unwrap_err();
    assert!(matches!(&error, ApplyError::Damaged(damage) if damage.page == page), "{error}");
    assert_eq!(replica.committed(), before);
    for text in
        ["x.sqlite is damaged", &format!("page {page}, from byte {}", (page - 1) * 512), "empty its data directory"]
    {
        assert!(error.to_string().contains(text), "{error}");
    }
    drop(replica);
    assert!(files(folder.path()) == image);
}

/// The one thing that repairs a page: one that is written anew as a whole.
#[test]
fn a_damaged_page_that_a_checkpoint_overwrites_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let log = closed(folder.path(), 512);
    let page = page_of_a_row(folder.path());
    let replica = open(folder.path(), "x", &options(512));
    replica.apply(&log[2]).unwrap();
    flip(&folder.path().join("x.sqlite"), (page as usize - 1) * 512 + 300, 1);
    // The image in memory is what readers see.
    assert!(replica.scrub(1, u32::MAX).is_ok() && replica.damage().is_none());
    replica.checkpoint(replica.pin(), position(3)).unwrap();
    assert!(replica.verify().unwrap());
    replica.check_sums().unwrap();
}

#[test]
fn a_reader_of_an_older_version_gets_an_error_and_not_another_page() {
    let folder = tempfile::tempdir().unwrap();
    let log = closed(folder.path(), 512);
    let page = page_of_a_row(folder.path());
    let replica = open(folder.path(), "x", &options(512));
    let old = replica.pin();
    replica.apply(&log[2]).unwrap();
    flip(&folder.path().join("x.sqlite"), (page as usize - 1) * 512 + 300, 1);
    // The old image cannot be kept for the pin: the checkpoint waits.
    let error = replica.checkpoint(replica.pin(), position(3)).unwrap_err();
    assert!(matches!(&error, DatabaseError::DamagedPage(damage) if damage.page == page), "{error}");
    let error = old.read_page(PageNumber(page)).unwrap_err();
    assert!(matches!(&error, DatabaseError::DamagedPage(damage) if damage.page == page), "{error}");
    drop(old);
    replica.checkpoint(replica.pin(), position(3)).unwrap();
    assert!(replica.verify().unwrap() && replica.damage().is_none());
}

/// A crash in the midst of a checkpoint's second step; then a bit of its WAL flips.
#[test]
fn a_damaged_wal_of_a_checkpoint_is_not_dropped_while_the_database_needs_it() {
    let mut random = Random::new(21);
    let (log, hashes) = history(&mut random);
    let (mut needed, mut dropped) = (0, 0);
    for budget in 0.. {
        let disk = SimulatedDisk::default();
        let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
        replay(&replica, &log, 18);
        replica.checkpoint(replica.pin(), position(18)).unwrap();
        replay(&replica, &log, 26);
        disk.set_budget(Some(budget));
        let survived = replica.checkpoint(replica.pin(), position(26)).is_ok();
        drop(replica);
        disk.crash(&mut random);
        if survived {
            break;
        }
        let wal = Path::new("/d/x.sqlite-wal");
        let Some(file) = disk.open(wal, false).unwrap().filter(|file| file.length().unwrap() > 0) else { continue };
        let at = random.below(file.length().unwrap());
        let mut byte = [0];
        file.read_at(&mut byte, at).unwrap();
        file.write_at(&[byte[0] ^ 8], at).unwrap();
        file.sync().unwrap();
        match Replica::open(Path::new("/d"), "x", on(&disk)) {
            Ok((replica, _)) => {
                // It was dropped, and rightly: nothing of it is in the database; or it was cut short after the flipped bit.
                assert!(replica.verify().unwrap());
                replica.check_sums().unwrap();
                assert_eq!(replica.pin().state_hash().0, hashes[replica.committed().0 as usize - 1]);
                dropped += 1;
            }
            Err(DatabaseError::Damaged { path, offset, .. }) => {
                assert_eq!(path, wal);
                assert!(offset <= at, "told {offset}, flipped {at}");
                assert!(disk.open(wal, false).unwrap().is_some(), "the WAL was removed");
                needed += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(needed > 5 && dropped > 0, "{needed} needed, {dropped} dropped");
}

/// Plain SQLite finds nothing in the way.
#[test]
fn plain_sqlite_opens_a_database_beside_its_checksums() {
    let folder = tempfile::tempdir().unwrap();
    closed(folder.path(), 4096);
    assert!(SystemDisk.open(&folder.path().join("x.sums"), false).unwrap().is_some());
    let copy = folder.path().join("copy.sqlite");
    std::fs::copy(folder.path().join("x.sqlite"), &copy).unwrap();
    assert_integrity(&Connection::open(&copy).unwrap());
}
