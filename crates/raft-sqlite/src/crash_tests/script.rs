//! A scripted workload: the log entries of a leader with several databases, and what they make of a node.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::disk::SimulatedDisk;
use crate::database::Writer;
use crate::database::pipeline::Origin;
use crate::database::replica::{Replica, ReplicaOptions};
use crate::page::{PageSize, Version};
use crate::state_machine::command::Command;

pub(super) const BLANK: u8 = 0;
pub(super) const COMMAND: u8 = 1;
pub(super) const MEMBERSHIP: u8 = 2;

/// Name, version and state hash of each database.
pub(super) type Databases = BTreeMap<String, (u64, u128)>;

#[derive(Clone)]
pub(super) struct ScriptEntry {
    pub kind: u8,
    pub payload: Bytes,
}

/// What the node does besides, right after an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Chore {
    Vote,
    Checkpoint,
    Purge,
    CleanRestart,
}

pub(super) struct Script {
    /// Entry i has index i + 1.
    pub entries: Vec<ScriptEntry>,
    /// After so many entries.
    pub states: Vec<Databases>,
    pub chores: BTreeMap<u64, Vec<Chore>>,
}

pub(super) fn options(disk: &SimulatedDisk) -> ReplicaOptions {
    ReplicaOptions { page_size: PageSize::new(512).unwrap(), disk: Arc::new(disk.clone()), ..ReplicaOptions::default() }
}

struct Leader {
    databases: BTreeMap<String, (Replica, Writer)>,
    script: Script,
    random: StdRng,
}

impl Leader {
    fn push(&mut self, kind: u8, payload: Bytes) {
        self.script.entries.push(ScriptEntry { kind, payload });
        let states = self.databases.iter().map(|(name, (replica, _))| {
            let pin = replica.pin();
            (name.clone(), (pin.version().0, pin.state_hash().0))
        });
        self.script.states.push(states.collect());
    }

    fn create(&mut self, name: &str) {
        let born = Version(self.script.entries.len() as u64 + 1);
        let options = ReplicaOptions { born, ..options(&SimulatedDisk::default()) };
        let (replica, _) = Replica::open(Path::new("/leader"), name, options).unwrap();
        let writer = replica.open_writer().unwrap();
        self.databases.insert(name.to_owned(), (replica, writer));
        self.push(COMMAND, Command::CreateDatabase { database: name.to_owned() }.encode());
    }

    fn drop_database(&mut self, name: &str) {
        self.databases.remove(name);
        self.push(COMMAND, Command::DropDatabase { database: name.to_owned() }.encode());
    }

    fn write(&mut self, name: &str, sql: &str) {
        let sequence = self.script.entries.len() as u64;
        let (replica, writer) = self.databases.get_mut(name).unwrap();
        writer.connection().execute_batch(sql).unwrap();
        let Some(group) = writer.seal().unwrap() else { return };
        replica.commit_captured(group.version).unwrap();
        let command = Command::Pages {
            database: name.to_owned(),
            tables: None,
            origin: Origin { node: 9, incarnation: 1, sequence },
            sidecars: Vec::new(),
            page_set: group.page_set,
        };
        self.push(COMMAND, command.encode());
    }

    fn random_write(&mut self, name: &str) {
        let key = self.random.random_range(0..40);
        let length = self.random.random_range(0..1200);
        let sql = match self.random.random_range(0..12) {
            0 => format!("DELETE FROM t WHERE k % 3 = {}", key % 3),
            1 => "VACUUM".to_owned(),
            2 => format!("CREATE TABLE IF NOT EXISTS u{}(a, b UNIQUE)", key % 4),
            3 => format!("BEGIN; UPDATE t SET v = randomblob({length}); INSERT INTO t(v) VALUES (1); COMMIT"),
            4 => "CREATE INDEX IF NOT EXISTS i ON t(v)".to_owned(),
            5 => "DROP INDEX IF EXISTS i".to_owned(),
            _ => format!("INSERT OR REPLACE INTO t VALUES ({key}, randomblob({length}))"),
        };
        self.write(name, &sql);
    }
}

const TABLE: &str = "CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)";

/// The same kinds of things happen for each seed, at the same places; the writes between them differ.
pub(super) fn script(seed: u64) -> Script {
    let script = Script { entries: Vec::new(), states: vec![Databases::new()], chores: BTreeMap::new() };
    let mut leader = Leader { databases: BTreeMap::new(), script, random: StdRng::seed_from_u64(seed) };
    let membership = Bytes::from_static(br#"{"voters":[[1]],"nodes":{}}"#);
    leader.push(MEMBERSHIP, membership);
    leader.push(BLANK, Bytes::new());
    leader.create("a");
    leader.write("a", TABLE);
    leader.create("b");
    leader.write("b", TABLE);
    for round in 0..9 {
        for _ in 0..3 {
            leader.random_write("a");
            leader.random_write("b");
        }
        match round {
            1 => {
                leader.drop_database("b");
                leader.random_write("a");
                leader.create("b");
                leader.write("b", TABLE);
            }
            3 => {
                leader.create("c");
                leader.write("c", TABLE);
                leader.random_write("c");
            }
            // Dropped before a checkpoint has seen it, and made again.
            4 => {
                leader.create("d");
                leader.write("d", TABLE);
                leader.drop_database("d");
                leader.create("d");
                leader.write("d", TABLE);
            }
            6 => leader.drop_database("c"),
            7 => leader.drop_database("b"),
            8 => leader.push(BLANK, Bytes::new()),
            _ => {}
        }
        if round == 7 {
            leader.create("b");
            leader.write("b", TABLE);
        }
        let after = leader.script.entries.len() as u64;
        let chores = match round {
            0 => vec![Chore::Vote, Chore::Checkpoint],
            2 => vec![Chore::Checkpoint, Chore::Purge],
            4 => vec![Chore::Checkpoint, Chore::Purge, Chore::Vote],
            5 => vec![Chore::CleanRestart],
            6 => vec![Chore::Checkpoint, Chore::Purge],
            8 => vec![Chore::Vote, Chore::Checkpoint, Chore::Purge],
            _ => vec![],
        };
        leader.script.chores.insert(after, chores);
    }
    leader.script
}
