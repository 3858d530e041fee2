//! A crash at every write, truncation, rename and sync of a checkpoint and of an install: whatever of the unsynced writes is on the disk
//! (each 512-byte sector for itself), the next start finds a whole version, at least the last one whose checkpoint returned, and the log
//! brings it up to date.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::mark::AppliedMark;
use super::*;
use crate::page::source::{Disk, DiskFile};

#[derive(Clone)]
enum Operation {
    Write(u64, Vec<u8>),
    SetLength(u64),
}

/// A file's content on the platters, and what is on its way there.
#[derive(Clone, Default)]
struct Content {
    durable: Vec<u8>,
    pending: Vec<Operation>,
}

impl Content {
    fn apply(bytes: &mut Vec<u8>, operation: &Operation) {
        match operation {
            Operation::Write(offset, data) => {
                let (from, to) = (*offset as usize, *offset as usize + data.len());
                if bytes.len() < to {
                    bytes.resize(to, 0);
                }
                bytes[from..to].copy_from_slice(data);
            }
            Operation::SetLength(length) => bytes.resize(*length as usize, 0),
        }
    }

    fn visible(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        self.pending.iter().for_each(|operation| Self::apply(&mut bytes, operation));
        bytes
    }
}

#[derive(Clone, Default)]
struct State {
    files: Vec<Content>,
    /// Names as programs see them, and as a crash leaves them.
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Operations left until the crash; None: no crash.
    budget: Option<u64>,
    operations: u64,
}

/// A disk in memory that loses power after a number of operations.
#[derive(Clone, Default)]
pub(super) struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

struct SimulatedFile {
    disk: SimulatedDisk,
    file: usize,
}

fn power_is_out() -> io::Error {
    io::Error::other("the power is out")
}

impl SimulatedDisk {
    /// Operations left until the power goes.
    pub(super) fn set_budget(&self, budget: Option<u64>) {
        self.state.lock().budget = budget;
    }

    fn step(state: &mut State) -> io::Result<()> {
        state.operations += 1;
        match &mut state.budget {
            Some(0) => Err(power_is_out()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Of what was not synced, each sector and each truncation and each name is on the disk or not, at random.
    pub(super) fn crash(&self, random: &mut Random) {
        let mut state = self.state.lock();
        for content in &mut state.files {
            for operation in std::mem::take(&mut content.pending) {
                match operation {
                    Operation::Write(offset, data) => {
                        for (sector, part) in data.chunks(512).enumerate() {
                            if random.below(2) == 0 {
                                let part = Operation::Write(offset + 512 * sector as u64, part.to_vec());
                                Content::apply(&mut content.durable, &part);
                            }
                        }
                    }
                    cut => {
                        if random.below(2) == 0 {
                            Content::apply(&mut content.durable, &cut);
                        }
                    }
                }
            }
        }
        // Renames are atomic, and on the disk after the folder's sync at the latest.
        if random.below(2) == 0 {
            state.durable_names = state.names.clone();
        } else {
            state.names = state.durable_names.clone();
        }
        state.budget = None;
    }
}

impl DiskFile for SimulatedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.disk.state.lock().files[self.file].visible();
        let from = (offset as usize).min(bytes.len());
        let count = buffer.len().min(bytes.len() - from);
        buffer[..count].copy_from_slice(&bytes[from..from + count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        // The write that the power fails in may still be there in part.
        state.files[self.file].pending.push(Operation::Write(offset, bytes.to_vec()));
        SimulatedDisk::step(&mut state)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.files[self.file].pending.push(Operation::SetLength(length));
        SimulatedDisk::step(&mut state)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.state.lock().files[self.file].visible().len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        SimulatedDisk::step(&mut state)?;
        let content = &mut state.files[self.file];
        content.durable = content.visible();
        content.pending.clear();
        Ok(())
    }
}

impl Disk for SimulatedDisk {
    fn make_folder(&self, _folder: &Path) -> io::Result<()> {
        Ok(())
    }

    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Arc<dyn DiskFile>>> {
        let mut state = self.state.lock();
        let file = match state.names.get(path) {
            Some(file) => *file,
            None if !create => return Ok(None),
            None => {
                state.files.push(Content::default());
                let file = state.files.len() - 1;
                state.names.insert(path.to_owned(), file);
                file
            }
        };
        Ok(Some(Arc::new(SimulatedFile { disk: self.clone(), file })))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        SimulatedDisk::step(&mut state)?;
        let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        SimulatedDisk::step(&mut state)?;
        state.names.remove(path);
        Ok(())
    }

    fn sync_folder(&self, _folder: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        SimulatedDisk::step(&mut state)?;
        state.durable_names = state.names.clone();
        Ok(())
    }
}

/// A log of PageSets, and the state hash after each.
pub(super) fn history(random: &mut Random) -> (Vec<bytes::Bytes>, Vec<u128>) {
    let folder = tempfile::tempdir().unwrap();
    let leader = open(folder.path(), "leader", &options(512));
    let mut writer = leader.open_writer().unwrap();
    let (mut log, mut hashes) = (Vec::new(), Vec::new());
    writer.connection().execute_batch("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)").unwrap();
    for round in 0..60 {
        if round % 20 == 19 {
            writer.connection().execute_batch("DELETE FROM t WHERE k % 3 = 0; VACUUM").unwrap();
        } else {
            let length = random.below(900);
            let row = (random.below(60) as i64, random.blob(length));
            writer.connection().execute("INSERT OR REPLACE INTO t VALUES (?, ?)", row).unwrap();
        }
        log.push(seal_and_commit(&mut writer, &leader).unwrap());
        hashes.push(leader.pin().state_hash().0);
    }
    (log, hashes)
}

pub(super) fn on(disk: &SimulatedDisk) -> ReplicaOptions {
    ReplicaOptions { disk: Arc::new(disk.clone()), ..options(512) }
}

/// Applies `upto` entries of the log, skipping what the replica has.
pub(super) fn replay(replica: &Replica, log: &[bytes::Bytes], upto: usize) {
    for page_set in &log[replica.committed().0 as usize..upto] {
        replica.apply(page_set).unwrap();
    }
}

/// Recovers, perhaps through more crashes, and checks.
fn recover_and_check(
    disk: &SimulatedDisk,
    log: &[bytes::Bytes],
    hashes: &[u128],
    at_least: u64,
    random: &mut Random,
) -> u64 {
    for _ in 0..random.below(3) {
        // Crashes during recovery, too.
        disk.state.lock().budget = Some(random.below(12));
        let _ = Replica::open(Path::new("/d"), "x", on(disk));
        disk.crash(random);
    }
    let (replica, mark) = Replica::open(Path::new("/d"), "x", on(disk)).unwrap();
    let version = replica.committed().0;
    assert!(version >= at_least, "version {version} is there, {at_least} was checkpointed");
    assert_eq!(mark.map_or(0, |mark| mark.version.0), version);
    // Each page that is read is compared with its checksum; these with the mark.
    assert!(replica.verify().unwrap(), "version {version} does not have its own hash");
    replica.check_sums().unwrap();
    if version > 0 {
        assert_eq!(replica.pin().state_hash().0, hashes[version as usize - 1]);
    }
    replay(&replica, log, log.len());
    assert_eq!(replica.pin().state_hash().0, hashes[log.len() - 1]);
    assert_integrity(replica.open_reader().unwrap().connection());
    version
}

#[test]
fn a_checkpoint_survives_a_crash_at_every_operation() {
    let mut random = Random::new(11);
    let (log, hashes) = history(&mut random);
    let mut crashes = 0;
    for (first, second) in [(10, 20), (25, 60), (0, 5)] {
        for budget in 0.. {
            let disk = SimulatedDisk::default();
            let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
            let mut at_least = 0;
            if first > 0 {
                replay(&replica, &log, first);
                replica.checkpoint(replica.pin(), position(first as u64)).unwrap();
                at_least = first as u64;
            }
            replay(&replica, &log, second);
            disk.state.lock().budget = Some(budget);
            let result = replica.checkpoint(replica.pin(), position(second as u64));
            let survived = result.is_ok();
            drop(replica);
            disk.crash(&mut random);
            if survived {
                at_least = second as u64;
            }
            recover_and_check(&disk, &log, &hashes, at_least, &mut random);
            if survived {
                break;
            }
            crashes += 1;
        }
    }
    assert!(crashes > 30, "only {crashes} crashes: the seam counts too few operations");
}

#[test]
fn a_failed_checkpoint_can_be_tried_again() {
    let mut random = Random::new(12);
    let (log, hashes) = history(&mut random);
    for budget in 0..25 {
        let disk = SimulatedDisk::default();
        let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
        replay(&replica, &log, 30);
        replica.checkpoint(replica.pin(), position(30)).unwrap();
        replay(&replica, &log, 45);
        disk.state.lock().budget = Some(budget);
        let _ = replica.checkpoint(replica.pin(), position(45));
        // As when a full disk has room again.
        disk.state.lock().budget = None;
        replay(&replica, &log, 50);
        replica.checkpoint(replica.pin(), position(50)).unwrap();
        assert!(replica.verify().unwrap());
        drop(replica);
        disk.crash(&mut random);
        recover_and_check(&disk, &log, &hashes, 50, &mut random);
    }
}

/// Wherever a checkpoint stops, plain SQLite opens what lies there, and finds the old version or the new one.
#[test]
fn plain_sqlite_opens_what_a_checkpoint_leaves_at_every_operation() {
    let mut random = Random::new(17);
    let (log, _) = history(&mut random);
    // The file grows; over a VACUUM, it shrinks.
    for (first, second) in [(6, 16), (17, 20)] {
        let mut seen = [0, 0];
        let mut wal_was_written = false;
        for budget in 0.. {
            let disk = SimulatedDisk::default();
            let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
            replay(&replica, &log, first);
            replica.checkpoint(replica.pin(), position(first as u64)).unwrap();
            let old = dump(replica.open_reader().unwrap().connection());
            replay(&replica, &log, second);
            let new = dump(replica.open_reader().unwrap().connection());
            disk.state.lock().budget = Some(budget);
            let survived = replica.checkpoint(replica.pin(), position(second as u64)).is_ok();
            let files: Vec<(PathBuf, Vec<u8>)> = {
                let state = disk.state.lock();
                state.names.iter().map(|(path, file)| (path.clone(), state.files[*file].visible())).collect()
            };
            let wal_bytes =
                files.iter().find(|(path, _)| path.ends_with("x.sqlite-wal")).map_or(0, |(_, bytes)| bytes.len());
            assert!(wal_bytes == 0 || !survived);
            // The WAL goes out in one write: of that, any part may be there.
            let parts = if wal_bytes > 0 && !wal_was_written {
                wal_was_written = true;
                (0..wal_bytes).step_by(499).collect()
            } else {
                vec![usize::MAX]
            };
            for part in parts {
                let folder = tempfile::tempdir().unwrap();
                for (path, bytes) in &files {
                    let count = if path.ends_with("x.sqlite-wal") { part.min(bytes.len()) } else { bytes.len() };
                    std::fs::write(folder.path().join(path.file_name().unwrap()), &bytes[..count]).unwrap();
                }
                let plain = Connection::open(folder.path().join("x.sqlite")).unwrap();
                assert_integrity(&plain);
                let found = dump(&plain);
                assert!(found == old || found == new, "operation {budget}");
                seen[usize::from(found == new)] += 1;
            }
            if survived {
                break;
            }
        }
        assert!(seen[0] > 10 && seen[1] > 5, "{seen:?}");
    }
}

/// A checkpoint that fails, and a later one in which the power goes: the first one's WAL must not be lost while the file is half way.
#[test]
fn a_crash_in_the_checkpoint_after_a_failed_one_loses_nothing() {
    let mut random = Random::new(14);
    let (log, hashes) = history(&mut random);
    let mut crashes = 0;
    for failed_at in 0.. {
        let mut failed = false;
        for budget in 0.. {
            let disk = SimulatedDisk::default();
            let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
            replay(&replica, &log, 18);
            replica.checkpoint(replica.pin(), position(18)).unwrap();
            // Over a VACUUM: the first one shrinks the file.
            replay(&replica, &log, 20);
            disk.state.lock().budget = Some(failed_at);
            failed = replica.checkpoint(replica.pin(), position(20)).is_err();
            disk.state.lock().budget = None;
            replay(&replica, &log, 26);
            disk.state.lock().budget = Some(budget);
            let survived = replica.checkpoint(replica.pin(), position(26)).is_ok();
            drop(replica);
            disk.crash(&mut random);
            let at_least = if survived {
                26
            } else if failed {
                18
            } else {
                20
            };
            recover_and_check(&disk, &log, &hashes, at_least, &mut random);
            if survived {
                break;
            }
            crashes += 1;
        }
        if !failed {
            break;
        }
    }
    assert!(crashes > 300, "only {crashes} crashes");
}

#[test]
fn a_checkpoint_of_an_older_version_does_not_take_the_file_back() {
    let mut random = Random::new(15);
    let (log, hashes) = history(&mut random);
    let disk = SimulatedDisk::default();
    let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
    replay(&replica, &log, 10);
    let old = replica.pin();
    replay(&replica, &log, 30);
    replica.checkpoint(replica.pin(), position(30)).unwrap();
    replica.checkpoint(old, position(10)).unwrap();
    drop(replica);
    disk.crash(&mut random);
    recover_and_check(&disk, &log, &hashes, 30, &mut random);
}

/// The file of a checkpoint at `version`, and its mark.
fn snapshot(log: &[bytes::Bytes], version: u64) -> (Vec<u8>, AppliedMark) {
    let source = SimulatedDisk::default();
    let (sender, _) = Replica::open(Path::new("/s"), "s", on(&source)).unwrap();
    replay(&sender, log, version as usize);
    sender.checkpoint(sender.pin(), position(version)).unwrap();
    let pin = sender.pin();
    let state = source.state.lock();
    let file = state.files[state.names[Path::new("/s/s.sqlite")]].visible();
    (file, AppliedMark { position: position(version), version: pin.version(), state_hash: pin.state_hash() })
}

fn receive(disk: &SimulatedDisk, file: &[u8]) -> PathBuf {
    let path = PathBuf::from("/d/received");
    let received = disk.open(&path, true).unwrap().unwrap();
    received.write_at(file, 0).unwrap();
    received.sync().unwrap();
    disk.sync_folder(Path::new("/d")).unwrap();
    path
}

/// An install fails; the replica goes on without it, or tries it once more, and then the power goes.
#[test]
fn a_failed_install_leaves_a_replica_that_goes_on() {
    let mut random = Random::new(16);
    let (log, hashes) = history(&mut random);
    let (file, mark) = snapshot(&log, 40);
    for failed_at in 0.. {
        let mut failed = false;
        for again in [false, true] {
            let disk = SimulatedDisk::default();
            let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
            replay(&replica, &log, 7);
            replica.checkpoint(replica.pin(), position(7)).unwrap();
            let received = receive(&disk, &file);
            disk.state.lock().budget = Some(failed_at);
            failed = replica.install(&received, mark).is_err();
            disk.state.lock().budget = None;
            if again {
                replica.install(&receive(&disk, &file), mark).unwrap();
            }
            if replica.committed().0 < 50 {
                replay(&replica, &log, 50);
            }
            let pin = replica.pin();
            replica.checkpoint(pin, position(50)).unwrap();
            // When the first install stood on the disk already, the checkpoint has taken it over instead.
            let at_least = replica.committed().0.min(50);
            assert!(at_least == 50 || (at_least == 40 && failed));
            replay(&replica, &log, 55);
            replica.checkpoint(replica.pin(), position(55)).unwrap();
            drop(replica);
            disk.crash(&mut random);
            recover_and_check(&disk, &log, &hashes, 55, &mut random);
        }
        if !failed {
            assert!(failed_at > 8);
            break;
        }
    }
}

#[test]
fn an_install_survives_a_crash_at_every_operation() {
    let mut random = Random::new(13);
    let (log, hashes) = history(&mut random);
    let (file, mark) = snapshot(&log, 40);
    for budget in 0.. {
        let disk = SimulatedDisk::default();
        let (replica, _) = Replica::open(Path::new("/d"), "x", on(&disk)).unwrap();
        replay(&replica, &log, 7);
        replica.checkpoint(replica.pin(), position(7)).unwrap();
        let received = receive(&disk, &file);
        disk.state.lock().budget = Some(budget);
        let survived = replica.install(&received, mark).is_ok();
        drop(replica);
        disk.crash(&mut random);
        let version = recover_and_check(&disk, &log, &hashes, if survived { 40 } else { 7 }, &mut random);
        assert!(version == 7 || version == 40);
        if survived {
            assert!(budget > 5);
            break;
        }
    }
}
