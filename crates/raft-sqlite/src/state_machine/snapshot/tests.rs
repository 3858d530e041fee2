//! Transfers between two machines in one process: random histories, writes in the middle, cut at any chunk, damaged files.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::receive::Incoming;
use super::send::{Entries, Link, Pace, SendError, Sent, Target, Transfer};
use super::*;
use crate::database::Writer;
use crate::database::pipeline::Origin;
use crate::database::reader_pool::ReaderPool;
use crate::database::replica::ReplicaOptions;
use crate::database::writer_thread::{Proposal, ProposalFailed, Proposer};
use crate::state_machine::MachineSetup;
use crate::state_machine::command::Command;

struct NoProposer;

impl Proposer for NoProposer {
    fn propose(&self, _proposal: Proposal, failed: ProposalFailed) {
        failed.report("nothing is proposed here".into());
    }
}

fn machine(folder: &Path, page_size: u32) -> Machine {
    Machine::open(MachineSetup {
        node: 1,
        directory: folder.join("db"),
        options: ReplicaOptions { page_size: PageSize::new(page_size).unwrap(), ..ReplicaOptions::default() },
        observers: Vec::new(),
        proposer: Arc::new(NoProposer),
        readers: Arc::new(ReaderPool::start(1).unwrap()),
    })
    .unwrap()
}

/// A machine that sends, the log that leads to its state, and the databases that the log's PageSets are captured on.
struct World {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    random: StdRng,
    page_size: u32,
    sender: Machine,
    captured_on: BTreeMap<String, (Replica, Writer)>,
    /// Commands; the first has the index 1.
    log: Vec<Bytes>,
    purged: u64,
    made: u32,
}

fn position(index: u64) -> LogPosition {
    LogPosition { term: 1, index }
}

impl World {
    fn new(seed: u64, page_size: u32) -> World {
        let folder = tempfile::tempdir().unwrap();
        let sender = machine(&folder.path().join("sender"), page_size);
        World {
            runtime: tokio::runtime::Runtime::new().unwrap(),
            random: StdRng::seed_from_u64(seed),
            page_size,
            sender,
            captured_on: BTreeMap::new(),
            log: Vec::new(),
            purged: 0,
            made: 0,
            folder,
        }
    }

    fn index(&self) -> u64 {
        self.log.len() as u64
    }

    fn receiver(&self, name: &str) -> Machine {
        machine(&self.folder.path().join(name), self.page_size)
    }

    /// The receiver catches up to `upto` from the log.
    fn replay(&self, machine: &Machine, upto: u64) {
        let from = machine.applied_state().0.map_or(0, |position| position.index);
        for index in from + 1..=upto {
            let command = self.log[index as usize - 1].clone();
            self.runtime.block_on(machine.apply_command(position(index), command)).unwrap();
        }
    }

    fn checkpoint(&self, machine: &Machine) {
        self.runtime.block_on(machine.checkpoint(machine.pin())).unwrap();
    }

    fn commit(&mut self, command: &Command) {
        let bytes = command.encode();
        self.log.push(bytes.clone());
        self.runtime.block_on(self.sender.apply_command(position(self.index()), bytes)).unwrap();
    }

    fn create(&mut self, name: &str) {
        self.commit(&Command::CreateDatabase { database: name.into() });
        self.made += 1;
        let folder = self.folder.path().join(format!("captured-{}", self.made));
        std::fs::create_dir_all(&folder).unwrap();
        let options = ReplicaOptions {
            page_size: PageSize::new(self.page_size).unwrap(),
            born: Version(self.index()),
            ..ReplicaOptions::default()
        };
        let replica = Replica::open(&folder, name, options).unwrap().0;
        let writer = replica.open_writer().unwrap();
        self.captured_on.insert(name.into(), (replica, writer));
        self.execute(name, "CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)");
    }

    fn drop_database(&mut self, name: &str) {
        self.captured_on.remove(name);
        self.commit(&Command::DropDatabase { database: name.into() });
    }

    fn execute(&mut self, name: &str, sql: &str) {
        let (replica, writer) = self.captured_on.get_mut(name).unwrap();
        writer.connection().execute_batch(sql).unwrap();
        let Some(group) = writer.seal().unwrap() else { return };
        replica.commit_captured(group.version).unwrap();
        let origin = Origin { node: 9, incarnation: 9, sequence: 9 };
        let sidecars = vec![Bytes::from_static(b"sidecar")];
        self.commit(&Command::Pages {
            database: name.into(),
            tables: None,
            origin,
            sidecars,
            page_set: group.page_set,
        });
    }

    /// Rows of `bytes` bytes, of random content.
    fn fill(&mut self, name: &str, rows: u32, bytes: u32) {
        self.execute(
            name,
            &format!(
                "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
                 INSERT INTO t(v) SELECT randomblob({bytes}) FROM n"
            ),
        );
    }

    fn step(&mut self) {
        let names: Vec<String> = self.captured_on.keys().cloned().collect();
        let name = names[self.random.random_range(0..names.len())].clone();
        let key = self.random.random_range(1..800);
        match self.random.random_range(0..40) {
            0 if names.len() < 4 => {
                let name = format!("db{}", self.random.random_range(0..6));
                if !self.captured_on.contains_key(&name) {
                    self.create(&name);
                }
            }
            1 if names.len() > 1 => self.drop_database(&name),
            2 => self.execute(&name, "VACUUM"),
            3 => self.execute(&name, &format!("DELETE FROM t WHERE k % 3 = {}", key % 3)),
            4 => self.checkpoint(&self.sender),
            5 => {
                // A PageSet of a version that did not happen is refused everywhere.
                let old = self.log[self.log.len() / 2].clone();
                if let Command::Pages { database, page_set, .. } = Command::decode(old.clone()).unwrap()
                    && let Some(state) = self.sender.database(&database)
                    && crate::page::page_set::versions(&page_set).unwrap().0 < state.replica.committed()
                {
                    self.commit(&Command::decode(old).unwrap());
                }
            }
            6..=12 => self.fill(&name, 60, 2000),
            13..=30 => self.execute(&name, &format!("UPDATE t SET v = randomblob(1500) WHERE k = {key}")),
            _ => self.execute(&name, &format!("INSERT OR REPLACE INTO t VALUES ({key}, zeroblob(3000))")),
        }
    }
}

/// The network: passes chunks on at once, and lets things happen in between.
struct Wire<'a> {
    world: &'a RefCell<World>,
    incoming: &'a mut Incoming,
    answers: VecDeque<Answer>,
    /// Chunks until it breaks.
    left: u64,
    /// Out of a hundred chunks so many come with a write before.
    writes: u32,
    /// Chunks of pages to be lost.
    lose: u32,
    actions: Vec<Action>,
}

impl Link for Wire<'_> {
    fn send(&mut self, chunk: Chunk) -> Result<(), SendError> {
        if self.left == 0 {
            return Err(SendError::Gone);
        }
        self.left -= 1;
        {
            let mut world = self.world.borrow_mut();
            while world.random.random_range(0..100) < self.writes {
                world.step();
            }
        }
        if self.lose > 0 && matches!(chunk, Chunk::Pages { .. }) {
            self.lose -= 1;
            return Ok(());
        }
        let answer = self.incoming.accept(chunk).unwrap();
        if let Some(Answer::Action(action)) = &answer {
            self.actions.push(*action);
        }
        self.answers.extend(answer);
        Ok(())
    }

    fn answer(&mut self) -> Result<Answer, SendError> {
        self.answers.pop_front().ok_or(SendError::Gone)
    }
}

struct WorldLog<'a>(&'a RefCell<World>);

impl Entries for WorldLog<'_> {
    fn read(&self, range: std::ops::Range<u64>, _max_bytes: usize) -> io::Result<Vec<(u64, Option<Bytes>)>> {
        let world = self.0.borrow();
        let index = range.start.max(world.purged + 1);
        Ok(world.log.get(index as usize - 1).map(|command| (index, Some(command.clone()))).into_iter().collect())
    }

    fn are_held(&self) -> bool {
        true
    }
}

/// One call, with the snapshot that is the newest when it begins; its position.
fn call(
    world: &RefCell<World>,
    transfer: &mut Transfer,
    incoming: &mut Incoming,
    (left, writes, lose): (u64, u32, u32),
) -> (u64, Result<Sent, SendError>, Vec<Action>) {
    let (target, mut pace) = {
        let world = world.borrow();
        (Target::new(&world.sender.pin()), Pace::new(&world.sender))
    };
    incoming.begin(transfer.id, target.index, target.databases()).unwrap();
    let mut wire = Wire { world, incoming, answers: VecDeque::new(), left, writes, lose, actions: Vec::new() };
    let sent = transfer.send(&target, &mut wire, &WorldLog(world), &mut pace);
    (target.index, sent, wire.actions)
}

fn install(world: &World, receiver: &Machine, incoming: &mut Incoming, index: u64) {
    let snapshot = incoming.complete().unwrap();
    let installed = receiver.install(position(index), MembershipRecord::default(), snapshot);
    world.runtime.block_on(installed).unwrap();
    assert!(!receiver.incoming_files().path("db0").parent().unwrap().exists(), "the files are gone");
}

/// Both have the same databases with the same pages, whose hash is the state hash.
fn assert_equal(sender: &Machine, receiver: &Machine, context: &str) {
    assert_eq!(sender.database_names(), receiver.database_names(), "{context}");
    for name in sender.database_names() {
        let (ours, theirs) = (sender.database(&name).unwrap(), receiver.database(&name).unwrap());
        let (ours, theirs) = (ours.replica.pin(), theirs.replica.pin());
        assert_eq!(ours.version(), theirs.version(), "{context}: {name}");
        assert_eq!(ours.page_count(), theirs.page_count(), "{context}: {name}");
        for number in (1..=ours.page_count()).map(PageNumber) {
            let same = ours.read_page(number).unwrap().bytes() == theirs.read_page(number).unwrap().bytes();
            assert!(same, "{context}: {name}, page {}", number.0);
        }
        assert!(receiver.database(&name).unwrap().replica.verify().unwrap(), "{context}: {name}");
    }
}

fn history(seed: u64, page_size: u32) {
    let context = format!("seed {seed}, pages of {page_size} bytes");
    let mut world = World::new(seed, page_size);
    world.create("db0");
    world.fill("db0", 900, 2000);
    for _ in 0..30 {
        world.step();
    }
    // The receiver is new, or has been away.
    let mut receiver = world.receiver("receiver");
    if !seed.is_multiple_of(4) {
        world.replay(&receiver, world.index());
        if seed.is_multiple_of(2) {
            world.checkpoint(&receiver);
        }
    }
    for _ in 0..30 {
        world.step();
    }
    let world = RefCell::new(world);
    let mut transfer = Transfer::new();
    let mut incoming = Incoming::new(&receiver);
    let mut calls = 0;
    let index = loop {
        calls += 1;
        let (left, writes) = {
            let mut world = world.borrow_mut();
            let cut = world.random.random_bool(0.5) && calls < 20;
            (if cut { world.random.random_range(0..60) } else { u64::MAX }, if calls < 30 { 20 } else { 0 })
        };
        let (index, sent, _) = call(&world, &mut transfer, &mut incoming, (left, writes, 0));
        match sent {
            Ok(Sent::Complete) => break index,
            Ok(Sent::Newer) | Err(SendError::Gone | SendError::LogPurged) => {}
            Err(error) => panic!("{context}: {error}"),
        }
        assert!(calls < 60, "{context}: no end");
        let mut world = world.borrow_mut();
        match world.random.random_range(0..6) {
            // Another leader, with another log.
            0 => transfer = Transfer::new(),
            // The receiver was killed.
            1 => {
                drop(incoming);
                drop(receiver);
                receiver = world.receiver("receiver");
                incoming = Incoming::new(&receiver);
            }
            2 => world.purged = world.index(),
            _ => {}
        }
    };
    let world = world.into_inner();
    install(&world, &receiver, &mut incoming, index);
    // From there it goes on with the log, also after a restart.
    drop(incoming);
    if world.index().is_multiple_of(2) {
        drop(receiver);
        receiver = world.receiver("receiver");
    }
    world.replay(&receiver, world.index());
    assert_equal(&world.sender, &receiver, &context);
}

#[test]
fn any_history_any_cuts_equal_pages() {
    for seed in 0..24 {
        history(seed, [4096, 512, 8192][seed as usize % 3]);
    }
}

#[test]
#[ignore = "takes minutes; run when the transfer changes"]
fn any_history_any_cuts_equal_pages_at_length() {
    let first = rand::random::<u32>().into();
    for seed in first..first + 600 {
        history(seed, [4096, 512, 65536][seed as usize % 3]);
    }
}

/// A sender with one database of about 4 MiB, and a receiver that has it as a file.
fn lagging(seed: u64) -> (World, Machine) {
    let mut world = World::new(seed, 4096);
    world.create("db0");
    world.fill("db0", 2000, 1900);
    let receiver = world.receiver("receiver");
    world.replay(&receiver, world.index());
    world.checkpoint(&receiver);
    (world, receiver)
}

const QUIET: (u64, u32, u32) = (u64::MAX, 0, 0);

#[test]
fn only_what_differs_is_sent_and_nothing_at_all_of_an_equal_database() {
    let (mut world, receiver) = lagging(1);
    world.create("equal");
    world.fill("equal", 100, 1000);
    world.replay(&receiver, world.index());
    for key in [5, 500, 1500] {
        world.execute("db0", &format!("UPDATE t SET v = randomblob(1900) WHERE k = {key}"));
    }
    let counters = world.sender.send_counters().clone();
    let world = RefCell::new(world);
    let mut incoming = Incoming::new(&receiver);
    let (index, sent, actions) = call(&world, &mut Transfer::new(), &mut incoming, QUIET);
    assert_eq!(sent.unwrap(), Sent::Complete);
    assert_eq!(actions, [Action::Compare, Action::Same]);
    assert_eq!(counters.sent_pages.load(Ordering::Relaxed), 3);
    assert!(counters.sent_bytes.load(Ordering::Relaxed) < 4 * 4096);
    let world = world.into_inner();
    install(&world, &receiver, &mut incoming, index);
    assert_equal(&world.sender, &receiver, "after the install");
    // Also that database's file has been brought up: the log before is gone.
    drop((incoming, receiver));
    assert_equal(&world.sender, &world.receiver("receiver"), "after a restart");
}

#[test]
fn what_has_arrived_is_not_sent_again() {
    let (world, _) = lagging(2);
    let receiver = world.receiver("new");
    let pages = u64::from(world.sender.database("db0").unwrap().replica.pin().page_count());
    let counters = world.sender.send_counters().clone();
    let world = RefCell::new(world);
    let mut sent_before = 0;
    for cut in [3, 6, u64::MAX] {
        // Killed each time, and found by another sender.
        let mut incoming = Incoming::new(&receiver);
        let (index, sent, _) = call(&world, &mut Transfer::new(), &mut incoming, (cut, 0, 0));
        let sent_pages = counters.sent_pages.load(Ordering::Relaxed);
        assert!(sent_pages > sent_before);
        sent_before = sent_pages;
        if let Ok(Sent::Complete) = sent {
            install(&world.borrow(), &receiver, &mut incoming, index);
        }
    }
    // The chunk that was cut off each time was counted as sent.
    assert!(sent_before < pages + 4 * 128, "{sent_before} pages were sent of {pages}");
    assert_equal(&world.borrow().sender, &receiver, "in three pieces");
}

#[test]
fn a_flipped_bit_in_the_receivers_own_file_does_not_survive() {
    for changed in [true, false] {
        let (mut world, receiver) = lagging(3);
        if changed {
            world.execute("db0", "UPDATE t SET v = randomblob(1900) WHERE k = 7");
        }
        let file = world.folder.path().join("receiver/db/db0.sqlite");
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.len() / 2 + 100;
        bytes[at] ^= 4;
        std::fs::write(&file, bytes).unwrap();
        let world = RefCell::new(world);
        let mut incoming = Incoming::new(&receiver);
        let (index, sent, actions) = call(&world, &mut Transfer::new(), &mut incoming, QUIET);
        assert_eq!((sent.unwrap(), actions), (Sent::Complete, vec![Action::Compare]));
        let world = world.into_inner();
        if changed {
            install(&world, &receiver, &mut incoming, index);
        } else {
            // Raft would not install what it has: the files alone.
            let snapshot = incoming.complete().unwrap();
            let replica = &receiver.database("db0").unwrap().replica;
            let pin = world.sender.database("db0").unwrap().replica.pin();
            let mark = AppliedMark { position: position(index), version: pin.version(), state_hash: pin.state_hash() };
            replica.install(&snapshot.files.path("db0"), mark).unwrap();
        }
        assert_equal(&world.sender, &receiver, "after a flipped bit");
    }
}

#[test]
fn pages_that_are_wrong_though_they_compared_equal_make_everything_be_sent() {
    let (mut world, receiver) = lagging(4);
    world.execute("db0", "UPDATE t SET v = randomblob(1900) WHERE k % 100 = 7");
    let world = RefCell::new(world);
    let mut transfer = Transfer::new();
    let mut incoming = Incoming::new(&receiver);
    let (_, sent, actions) = call(&world, &mut transfer, &mut incoming, (u64::MAX, 0, 1));
    assert!(matches!(&sent, Err(SendError::Mismatch(names)) if names == &["db0"]), "{sent:?}");
    assert_eq!(actions, [Action::Compare]);
    let (index, sent, actions) = call(&world, &mut transfer, &mut incoming, QUIET);
    assert_eq!((sent.unwrap(), actions), (Sent::Complete, vec![Action::Whole]));
    install(&world.borrow(), &receiver, &mut incoming, index);
    assert_equal(&world.borrow().sender, &receiver, "sent whole");
}

#[test]
fn writes_during_the_copy_come_by_the_log_and_nothing_is_pinned() {
    let (mut world, _) = lagging(5);
    // One database only: the steps would drop it.
    world.create("other");
    let receiver = world.receiver("new");
    let sender = world.sender.clone();
    let world = RefCell::new(world);
    let mut transfer = Transfer::new();
    let mut incoming = Incoming::new(&receiver);
    world.borrow_mut().execute("db0", "UPDATE t SET v = randomblob(1900)");
    let (_, sent, _) = call(&world, &mut transfer, &mut incoming, (u64::MAX, 60, 0));
    assert_eq!(sent.unwrap(), Sent::Newer);
    for name in sender.database_names() {
        assert_eq!(sender.database(&name).unwrap().replica.statistics().oldest_reader, None, "{name} is pinned");
    }
    let pages = sender.send_counters().sent_pages.load(Ordering::Relaxed);
    let index = loop {
        let (index, sent, actions) = call(&world, &mut transfer, &mut incoming, QUIET);
        if sent.unwrap() == Sent::Complete {
            assert!(actions.contains(&Action::Continue), "{actions:?}");
            break index;
        }
    };
    let again = sender.send_counters().sent_pages.load(Ordering::Relaxed) - pages;
    assert!(again < pages, "{again} pages after {pages}: databases made meanwhile alone");
    install(&world.borrow(), &receiver, &mut incoming, index);
    assert_equal(&sender, &receiver, "after the redo");
}

#[test]
fn a_snapshot_that_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let receiver = machine(folder.path(), 4096);
    let begin = |name: &str| {
        Chunk::Begin(Begin {
            name: name.into(),
            page_size: 4096,
            page_count: 2,
            version: 1,
            state_hash: 1,
            continues: 0,
        })
    };
    let pages = |numbers: &[u32], bytes: usize| {
        let images = Bytes::from(vec![1; bytes]);
        let crc32c = crc32c::crc32c(&images);
        Chunk::Pages { numbers: numbers.to_vec(), images, lz4: false, crc32c }
    };
    let bad_checksum = Chunk::Pages { numbers: vec![1], images: Bytes::from(vec![1; 4096]), lz4: false, crc32c: 1 };
    let huge = Chunk::Pages { numbers: vec![1], images: Bytes::from_static(&[255; 8]), lz4: true, crc32c: 0 };
    for chunks in [
        vec![Chunk::Copied],
        vec![Chunk::Ranges { first: 0, hashes: vec![1] }],
        vec![begin("../x")],
        vec![begin("a"), begin("a")],
        vec![begin("a"), Chunk::Copied, begin("a")],
        // It asked for everything.
        vec![begin("a"), Chunk::Ranges { first: 0, hashes: vec![1] }],
        vec![begin("a"), pages(&[0], 4096)],
        vec![begin("a"), pages(&[3], 4096)],
        vec![begin("a"), pages(&[2, 1], 8192)],
        vec![begin("a"), pages(&[1, 1], 8192)],
        vec![begin("a"), pages(&[1], 4095)],
        vec![begin("a"), pages(&[], 0)],
        vec![begin("a"), bad_checksum],
        vec![begin("a"), huge],
        vec![begin("a"), Chunk::Copied, Chunk::Redo { name: "a".into(), page_set: Bytes::from_static(b"x") }],
        vec![begin("a"), Chunk::Finish { exact: true }],
        vec![Chunk::Finish { exact: true }],
    ] {
        let mut incoming = Incoming::new(&receiver);
        incoming.begin(1, 1, 1).unwrap();
        let last = chunks.len() - 1;
        for (at, chunk) in chunks.into_iter().enumerate() {
            let text = format!("{chunk:?}");
            match incoming.accept(chunk) {
                Ok(_) => assert!(at < last, "{text}"),
                Err(error) => {
                    assert!(at == last && error.kind() == io::ErrorKind::InvalidData, "{text}: {error}");
                }
            }
        }
    }
    // Pages that never came: it does not have the hash, and says so.
    let mut incoming = Incoming::new(&receiver);
    incoming.begin(1, 1, 1).unwrap();
    for chunk in [begin("a"), pages(&[1], 4096), Chunk::Copied] {
        incoming.accept(chunk).unwrap();
    }
    let answer = incoming.accept(Chunk::Finish { exact: true }).unwrap();
    assert_eq!(answer, Some(Answer::Finished { mismatched: vec!["a".into()] }));
}

#[test]
fn what_lies_in_incoming_goes_once_the_node_has_come_past_it() {
    let folder = tempfile::tempdir().unwrap();
    let receiver = machine(folder.path(), 4096);
    let incoming = folder.path().join("incoming");
    assert!(is_obsolete(&incoming, 0), "nothing is there");
    receiver.incoming_files().begin(7).unwrap();
    assert!(!is_obsolete(&incoming, 6));
    assert!(is_obsolete(&incoming, 7));
    std::fs::write(incoming.join("target.json"), b"{").unwrap();
    assert!(is_obsolete(&incoming, 0));
    files::remove(&incoming);
    assert!(!incoming.exists());
}
