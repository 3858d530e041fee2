//! What the etcd layer holds, without the values: the key index, the leases and the revisions; and the changes that can
//! be made to it.
//!
//! There are two of them on a node: the committed one, which the observer brings forward from the sidecars, and on the
//! leader the writer's, which is ahead. Both change through the functions here and nowhere else, so they cannot differ
//! in what a change means.
//!
//! INV-KV-REBUILD: `Contents` built from the tables equals the one that made them.

use super::{LeaseInfo, ValueId};
use crate::index::tree::{Item, Tree};
use crate::index::{KeyEntry, KeyIndex, Record};
use crate::schema::{self, SchemaError};
use rusqlite::Connection;
use std::sync::Arc;

/// See the module. A clone is O(1) and never changes.
#[derive(Debug, Clone)]
pub(crate) struct Contents {
    /// Of the newest event; 1 in an empty store.
    pub(crate) revision: i64,
    /// History before this one is gone; -1 at first.
    pub(crate) compact_revision: i64,
    /// The rows that nobody needs once the history before this one is gone have been removed.
    pub(crate) removed_revision: i64,
    /// The next event's row.
    pub(crate) next_id: ValueId,
    pub(crate) keys: KeyIndex,
    pub(crate) leases: Tree<Lease>,
    /// Where the key index has yet to forget garbage of `removed_revision`.
    forgetting: Option<Forgetting>,
}

/// In keys after this one; None: in all.
type Forgetting = Option<Arc<[u8]>>;

/// A lease and what hangs on it.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    pub(crate) info: LeaseInfo,
    pub(crate) keys: Tree<Attached>,
}

/// A key that hangs on a lease.
#[derive(Debug, Clone)]
pub(crate) struct Attached(pub(crate) Arc<[u8]>);

impl Item for Lease {
    type Key = i64;
    type Owned = i64;
    type Summary = ();
    fn key(&self) -> &i64 {
        &self.info.id
    }
    fn owned_key(&self) -> i64 {
        self.info.id
    }
    fn summary(&self) {}
}

impl Item for Attached {
    type Key = [u8];
    type Owned = Arc<[u8]>;
    type Summary = ();
    fn key(&self) -> &[u8] {
        &self.0
    }
    fn owned_key(&self) -> Arc<[u8]> {
        Arc::clone(&self.0)
    }
    fn summary(&self) {}
}

/// What differs between two contents, of which one was made from the other.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    keys: Vec<Arc<[u8]>>,
    leases: Vec<i64>,
}

impl Touched {
    pub(crate) fn note(&mut self, changed: &Changed) {
        self.keys.push(Arc::clone(&changed.key));
        self.leases.extend([changed.old_lease(), changed.record.lease].into_iter().filter(|id| *id != 0));
    }

    pub(crate) fn note_lease(&mut self, id: i64) {
        self.leases.push(id);
    }

    pub(crate) fn note_keys(&mut self, keys: Vec<Arc<[u8]>>) {
        self.keys.extend(keys);
    }
}

/// What a put or a delete did to a key.
#[derive(Debug)]
pub(crate) struct Changed {
    pub(crate) key: Arc<[u8]>,
    /// The state it has now.
    pub(crate) record: Record,
    /// What was known of it before.
    pub(crate) before: Option<KeyEntry>,
}

impl Changed {
    /// The lease that the key hung on before, 0 for none.
    pub(crate) fn old_lease(&self) -> i64 {
        self.before.as_ref().and_then(KeyEntry::live).map_or(0, |record| record.lease)
    }
}

/// How to undo a change. The store's revision is for the caller to restore.
#[derive(Debug)]
pub(crate) enum Undo {
    Key(Changed),
    Granted(i64),
    Ended(Lease),
    /// With the compacted revision of before.
    Compacted(i64),
    /// With the removed revision of before, and what was to be forgotten.
    Removed(i64, Option<Forgetting>),
}

impl Default for Contents {
    fn default() -> Self {
        Contents {
            revision: 1,
            compact_revision: -1,
            removed_revision: -1,
            next_id: ValueId(1),
            keys: KeyIndex::default(),
            leases: Tree::default(),
            forgetting: None,
        }
    }
}

impl Contents {
    /// Puts a key at `revision`, which becomes the store's. The lease exists, or is 0.
    pub(crate) fn put(&mut self, key: &[u8], lease: i64, revision: i64) -> Changed {
        let value_id = self.next_id;
        self.change(key, |live| Record {
            create_revision: live.map_or(revision, |r| r.create_revision),
            mod_revision: revision,
            version: live.map_or(1, |r| r.version + 1),
            lease,
            value_id,
        })
    }

    /// Deletes a key that exists, at `revision`, which becomes the store's.
    pub(crate) fn delete(&mut self, key: &[u8], revision: i64) -> Option<Changed> {
        self.keys.get(key).and_then(KeyEntry::live)?;
        let value_id = self.next_id;
        let tombstone = Record { create_revision: 0, mod_revision: revision, version: 0, lease: 0, value_id };
        Some(self.change(key, |_| tombstone))
    }

    fn change(&mut self, key: &[u8], make: impl FnOnce(Option<&Record>) -> Record) -> Changed {
        let (key, record, before) = self.keys.push(key, make);
        let changed = Changed { key, record, before };
        self.next_id.0 += 1;
        self.revision = record.mod_revision;
        self.reattach(&changed.key, changed.old_lease(), record.lease);
        changed
    }

    fn reattach(&mut self, key: &Arc<[u8]>, from: i64, to: i64) {
        if from == to {
            return;
        }
        // Out and in again, so that the keys of a lease that nobody shares are changed in place.
        if let Some(mut lease) = self.leases.remove(&from) {
            lease.keys.remove(key);
            self.leases.insert(lease);
        }
        if let Some(mut lease) = self.leases.remove(&to) {
            lease.keys.insert(Attached(Arc::clone(key)));
            self.leases.insert(lease);
        }
    }

    /// Undoes a change, which must be the last one not undone yet.
    pub(crate) fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Key(changed) => {
                self.reattach(&changed.key, changed.record.lease, changed.old_lease());
                self.keys.restore(&changed.key, changed.before);
                self.next_id = changed.record.value_id;
            }
            Undo::Granted(id) => drop(self.leases.remove(&id)),
            Undo::Ended(lease) => drop(self.leases.insert(lease)),
            Undo::Compacted(revision) => self.compact_revision = revision,
            Undo::Removed(revision, forgetting) => {
                self.removed_revision = revision;
                self.forgetting = forgetting;
            }
        }
    }

    /// Makes these contents equal to others, given what differs.
    pub(crate) fn follow(&mut self, other: &Contents, touched: &mut Touched) {
        for key in touched.keys.drain(..) {
            self.keys.follow(&other.keys, &key);
        }
        for id in touched.leases.drain(..) {
            match other.leases.get(&id) {
                Some(lease) => drop(self.leases.insert(lease.clone())),
                None => drop(self.leases.remove(&id)),
            }
        }
        self.revision = other.revision;
        self.compact_revision = other.compact_revision;
        self.removed_revision = other.removed_revision;
        self.next_id = other.next_id;
        self.forgetting = other.forgetting.clone();
    }

    /// Adds a lease without keys.
    pub(crate) fn grant(&mut self, info: LeaseInfo) {
        self.leases.insert(Lease { info, keys: Tree::default() });
    }

    /// Removes a lease; its keys have been deleted before.
    pub(crate) fn end_lease(&mut self, id: i64) -> Option<Lease> {
        self.leases.remove(&id)
    }

    /// Forgets history before `revision`, logically.
    pub(crate) fn compact(&mut self, revision: i64) {
        self.compact_revision = revision;
    }

    /// The garbage of `revision` is no longer in the tables: the key index may forget it too, in small steps.
    pub(crate) fn removed(&mut self, revision: i64) -> Undo {
        let undo = Undo::Removed(self.removed_revision, self.forgetting.take());
        self.removed_revision = revision;
        self.forgetting = Some(None);
        undo
    }

    /// Goes on forgetting, in at most `limit` keys; which those were.
    pub(crate) fn forget_some(&mut self, limit: usize) -> Vec<Arc<[u8]>> {
        let Some(from) = self.forgetting.take() else { return Vec::new() };
        let forgotten = self.keys.forget_garbage(self.removed_revision, from.as_deref(), limit);
        self.forgetting = forgotten.next.map(Some);
        forgotten.keys
    }

    /// From the tables as the connection sees them.
    ///
    /// # Errors
    /// If SQLite fails, or the tables make no sense.
    pub(crate) fn load(connection: &Connection) -> Result<Contents, SchemaError> {
        let mut contents = Contents::default();
        if schema::layout(connection)? == 0 {
            return Ok(contents);
        }
        let number = |sql| schema::number(connection, sql, []);
        contents.compact_revision = number(schema::COMPACT_REVISION)?.unwrap_or(-1);
        contents.removed_revision = number(schema::REMOVED_REVISION)?.unwrap_or(-1);
        contents.load_leases(connection)?;
        contents.load_keys(connection)?;
        if contents.compact_revision > contents.revision {
            return Err(SchemaError::Damaged("compacted beyond the newest revision".into()));
        }
        Ok(contents)
    }

    fn load_leases(&mut self, connection: &Connection) -> Result<(), SchemaError> {
        let mut statement = connection.prepare(schema::ALL_LEASES)?;
        let rows = statement.query_map([], |row| Ok(LeaseInfo { id: row.get(0)?, ttl_seconds: row.get(1)? }))?;
        for info in rows {
            self.grant(info?);
        }
        Ok(())
    }

    fn load_keys(&mut self, connection: &Connection) -> Result<(), SchemaError> {
        let mut statement = connection.prepare(schema::ALL_REVISIONS)?;
        let mut rows = statement.query([])?;
        let mut states: Vec<(Arc<[u8]>, Record)> = Vec::new();
        while let Some(row) = rows.next()? {
            let record = Record {
                value_id: ValueId(row.get(0)?),
                mod_revision: row.get(1)?,
                create_revision: row.get(3)?,
                version: row.get(4)?,
                lease: row.get(5)?,
            };
            if record.mod_revision < self.revision {
                return Err(SchemaError::Damaged(format!("revisions go back at row {}", record.value_id.0)));
            }
            self.revision = record.mod_revision;
            self.next_id = ValueId(record.value_id.0 + 1);
            states.push((row.get_ref(2)?.as_blob().map_err(rusqlite::Error::from)?.into(), record));
        }
        // Stable: the states of one key stay in the order they were written in.
        states.sort_by(|a, b| a.0.cmp(&b.0));
        let mut attached: Vec<(i64, Arc<[u8]>)> = Vec::new();
        for (at, (key, record)) in states.iter().enumerate() {
            let current = states.get(at + 1).is_none_or(|(next, _)| next != key);
            if current && record.lease != 0 && record.is_live() {
                attached.push((record.lease, Arc::clone(key)));
            }
        }
        let mut states = states.into_iter().peekable();
        self.keys = KeyIndex::from_ascending(std::iter::from_fn(|| {
            let (key, record) = states.next()?;
            let mut records = vec![record];
            while let Some((_, record)) = states.next_if(|(next, _)| *next == key) {
                records.push(record);
            }
            Some((key, records))
        }));
        attached.sort_by_key(|(id, _)| *id); // stable, so keys ascend within a lease
        for keys in attached.chunk_by(|a, b| a.0 == b.0) {
            let Some(lease) = self.leases.get(&keys[0].0) else {
                return Err(SchemaError::Damaged(format!("keys hang on lease {:x}, which does not exist", keys[0].0)));
            };
            let keys = Tree::from_ascending(keys.iter().map(|(_, key)| Attached(Arc::clone(key))));
            self.leases.insert(Lease { info: lease.info, keys });
        }
        Ok(())
    }
}

#[cfg(test)]
impl Contents {
    /// Everything that counts, for comparisons: what the key index has yet to forget does not.
    pub(crate) fn portrait(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let mut contents = self.clone();
        contents.forgetting = Some(None);
        contents.forget_some(usize::MAX);
        let keys: Vec<_> =
            contents.keys.iter().map(|(key, e)| (key.to_vec(), e.records().copied().collect::<Vec<_>>())).collect();
        let leases: Vec<_> =
            contents.leases.iter().map(|l| (l.info, l.keys.iter().map(|k| k.0.to_vec()).collect::<Vec<_>>())).collect();
        (self.revision, self.compact_revision, self.removed_revision, self.next_id, keys, leases)
    }
}
