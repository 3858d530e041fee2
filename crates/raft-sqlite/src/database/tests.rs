//! The storage engine as a whole: leader, follower and plain SQLite side by side, and every crash a checkpoint can suffer.

mod crash;
mod damage;
mod equality;
mod limits;
mod random_sql;
mod speed;

use std::path::Path;

pub(super) use random_sql::Random;
use rusqlite::Connection;

use super::Writer;
use super::replica::LogPosition;
use super::replica::{PinnedVersion, Replica, ReplicaOptions};
use crate::page::{PageNumber, PageSize, StateHash, page_hash};

pub(super) fn options(page_size: u32) -> ReplicaOptions {
    ReplicaOptions { page_size: PageSize::new(page_size).unwrap(), ..ReplicaOptions::default() }
}

pub(super) fn open(folder: &Path, name: &str, options: &ReplicaOptions) -> Replica {
    Replica::open(folder, name, options.clone()).unwrap().0
}

pub(super) fn position(index: u64) -> LogPosition {
    LogPosition { term: 1, index }
}

/// Seals what is captured and commits it at once; the PageSet.
pub(super) fn seal_and_commit(writer: &mut Writer, replica: &Replica) -> Option<bytes::Bytes> {
    let group = writer.seal().unwrap()?;
    replica.commit_captured(group.version).unwrap();
    Some(group.page_set)
}

/// A text of everything in the database, schema included.
pub(super) fn dump(connection: &Connection) -> String {
    let user_version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    let mut text = format!("user_version {user_version}\n");
    let mut tables = connection
        .prepare("SELECT name, coalesce(sql, '') FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name")
        .unwrap();
    let names: Vec<(String, String)> =
        tables.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect();
    for (name, sql) in names {
        text.push_str(&sql);
        let mut rows = connection.prepare(&format!("SELECT * FROM \"{name}\" ORDER BY 1")).unwrap();
        let width = rows.column_count();
        let mut lines = Vec::new();
        let mut cursor = rows.query([]).unwrap();
        while let Some(row) = cursor.next().unwrap() {
            let values = (0..width).map(|column| format!("|{:?}", row.get_ref(column).unwrap()));
            lines.push(values.collect::<String>());
        }
        lines.sort();
        text.push_str(&lines.join("\n"));
    }
    text
}

pub(super) fn assert_integrity(connection: &Connection) {
    let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

/// The pages of a pinned version have the state hash that was kept for it.
pub(super) fn assert_whole(pin: &PinnedVersion) {
    let mut hash = StateHash::default();
    for number in (1..=pin.page_count()).map(PageNumber) {
        hash.add(page_hash(number, pin.read_page(number).unwrap().bytes()));
    }
    assert_eq!(hash, pin.state_hash(), "version {} is not what it was", pin.version());
}

/// Every page equal, and the state hash true on both.
pub(super) fn assert_same_pages(a: &Replica, b: &Replica) {
    let (pin_a, pin_b) = (a.pin(), b.pin());
    assert_eq!(pin_a.version(), pin_b.version());
    assert_eq!(pin_a.state_hash(), pin_b.state_hash());
    assert_eq!(pin_a.page_count(), pin_b.page_count());
    for number in (1..=pin_a.page_count()).map(PageNumber) {
        let (page_a, page_b) = (pin_a.read_page(number).unwrap(), pin_b.read_page(number).unwrap());
        assert!(page_a.bytes() == page_b.bytes(), "page {} differs at version {}", number.0, pin_a.version());
    }
    assert!(a.verify().unwrap() && b.verify().unwrap(), "the state hash is not the pages' own");
}
