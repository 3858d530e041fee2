//! The tables of the etcd layer, and every SQL text that touches them, as named constants.
//!
//! ```text
//! rev(id, main, sub, key, create_rev, version, lease, value)   one row for each state of each key, appended only
//! lease(id, ttl)                                               leases that exist
//! meta(name, value)                                            compacted revisions
//! kv                                                           a view: the keys that exist now, for SQL users
//! ```
//!
//! `rev` is written by appending rows with ascending integer keys, so that many writes fill few pages: what a Raft entry
//! carries is proportional to the pages touched. It has no index; the key index is in memory (see [`crate::index`]).
//! `version` 0 is a tombstone. The value stands last in the row, so that a scan of the other columns leaves the overflow
//! pages of large values alone; it stands in the same row because a second table would double the pages of each write.
//!
//! Invariants: `id` ascends with (`main`, `sub`), without holes when written, and is never given to another state once
//! it is committed; `sub` counts from 0 in each revision; the newest row is never removed (compaction keeps it), so the
//! store's revision is the `main` of the last row.

use rusqlite::{Connection, OptionalExtension};

/// The layout this code writes, kept in SQLite's user_version. 0 is an empty database.
pub const LAYOUT: i64 = 1;

/// From layout 0 to 1.
pub const CREATE: &str = "
CREATE TABLE rev(
    id INTEGER PRIMARY KEY,
    main INTEGER NOT NULL,
    sub INTEGER NOT NULL,
    key BLOB NOT NULL,
    create_rev INTEGER NOT NULL,
    version INTEGER NOT NULL,
    lease INTEGER NOT NULL,
    value BLOB
);
CREATE TABLE lease(id INTEGER PRIMARY KEY, ttl INTEGER NOT NULL);
CREATE TABLE meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta(name, value) VALUES('compact_revision', -1), ('removed_revision', -1);
CREATE VIEW kv AS
    SELECT key, value, create_rev, main AS mod_rev, version, lease FROM rev
    WHERE version > 0 AND id IN (SELECT max(id) FROM rev GROUP BY key);
PRAGMA user_version = 1;
";

/// The layout found.
pub const LAYOUT_FOUND: &str = "PRAGMA user_version";

/// Appends a row; the id comes from SQLite, and must be the one expected.
pub const APPEND: &str =
    "INSERT INTO rev(main, sub, key, create_rev, version, lease, value) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7)";

/// The last row's id.
pub const LAST_ID: &str = "SELECT max(id) FROM rev";

/// A value by its row.
pub const VALUE: &str = "SELECT value FROM rev WHERE id = ?1";

/// Everything the key index is built from, in the order it was written.
pub const ALL_REVISIONS: &str = "SELECT id, main, key, create_rev, version, lease FROM rev ORDER BY id";

/// The first row at or after an id.
pub const MAIN_FROM: &str = "SELECT id, main FROM rev WHERE id >= ?1 ORDER BY id LIMIT 1";

/// The smallest and the greatest id.
pub const ID_BOUNDS: &str = "SELECT (SELECT min(id) FROM rev), (SELECT max(id) FROM rev)";

/// Rows from an id on, with their values.
pub const EVENTS_FROM: &str =
    "SELECT id, main, key, create_rev, version, lease, value FROM rev WHERE id >= ?1 ORDER BY id";

/// Rows with their values, newest first.
pub const EVENTS_BACK: &str = "SELECT id, main, key, create_rev, version, lease, value FROM rev ORDER BY id DESC";

/// Removes rows that compaction has made superfluous.
pub const REMOVE: &str = "DELETE FROM rev WHERE id BETWEEN ?1 AND ?2";

/// Adds a lease.
pub const GRANT: &str = "INSERT INTO lease(id, ttl) VALUES(?1, ?2)";

/// Removes a lease.
pub const END_LEASE: &str = "DELETE FROM lease WHERE id = ?1";

/// All leases.
pub const ALL_LEASES: &str = "SELECT id, ttl FROM lease ORDER BY id";

/// Whether a lease exists.
pub const LEASE_TTL: &str = "SELECT ttl FROM lease WHERE id = ?1";

/// History before this revision is gone.
pub const COMPACT_REVISION: &str = "SELECT value FROM meta WHERE name = 'compact_revision'";

/// Rows that nobody needs once history before this revision is gone have been removed.
pub const REMOVED_REVISION: &str = "SELECT value FROM meta WHERE name = 'removed_revision'";

/// Sets [`COMPACT_REVISION`].
pub const SET_COMPACT_REVISION: &str = "UPDATE meta SET value = ?1 WHERE name = 'compact_revision'";

/// Sets [`REMOVED_REVISION`].
pub const SET_REMOVED_REVISION: &str = "UPDATE meta SET value = ?1 WHERE name = 'removed_revision'";

/// What is wrong with the tables.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// SQLite refused.
    #[error("{0}")]
    Sql(#[from] rusqlite::Error),
    /// Written by a newer version of this program.
    #[error(
        "the tables have layout {0}, this program knows them up to {LAYOUT}: use the version that made them, or a newer one"
    )]
    Newer(i64),
    /// They contradict themselves.
    #[error("the tables are damaged: {0}")]
    Damaged(String),
}

/// The layout of the tables: 0 if there are none yet.
///
/// # Errors
/// [`SchemaError::Newer`] if this program cannot read them.
pub fn layout(connection: &Connection) -> Result<i64, SchemaError> {
    let found: i64 = connection.prepare_cached(LAYOUT_FOUND)?.query_row([], |row| row.get(0))?;
    if (0..=LAYOUT).contains(&found) { Ok(found) } else { Err(SchemaError::Newer(found)) }
}

/// Brings the tables to [`LAYOUT`], within the caller's SQLite transaction; whether anything was to do.
///
/// # Errors
/// [`SchemaError::Newer`] if this program cannot read them.
pub fn migrate(connection: &Connection) -> Result<bool, SchemaError> {
    let found = layout(connection)?;
    if found == 0 {
        connection.execute_batch(CREATE)?;
    }
    Ok(found != LAYOUT)
}

/// One number, or none if the query finds none.
///
/// # Errors
/// As SQLite has them.
pub fn number(connection: &Connection, sql: &str, parameters: impl rusqlite::Params) -> rusqlite::Result<Option<i64>> {
    let found = connection.prepare_cached(sql)?.query_row(parameters, |row| row.get::<_, Option<i64>>(0)).optional()?;
    Ok(found.flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        assert!(migrate(&connection).unwrap());
        connection
    }

    #[test]
    fn migration_happens_once_and_newer_tables_are_refused() {
        let connection = empty();
        assert!(!migrate(&connection).unwrap());
        assert_eq!(number(&connection, COMPACT_REVISION, []).unwrap(), Some(-1));
        connection.execute_batch("PRAGMA user_version = 2").unwrap();
        assert!(matches!(migrate(&connection), Err(SchemaError::Newer(2))));
    }

    #[test]
    fn every_statement_fits_the_tables() {
        let connection = empty();
        for sql in [
            APPEND,
            LAST_ID,
            VALUE,
            ALL_REVISIONS,
            MAIN_FROM,
            ID_BOUNDS,
            EVENTS_FROM,
            EVENTS_BACK,
            REMOVE,
            GRANT,
            END_LEASE,
            ALL_LEASES,
            LEASE_TTL,
            COMPACT_REVISION,
            REMOVED_REVISION,
            SET_COMPACT_REVISION,
            SET_REMOVED_REVISION,
        ] {
            connection.prepare(sql).unwrap();
        }
    }

    #[test]
    fn the_view_shows_the_keys_that_exist() {
        let connection = empty();
        for (main, key, create, version, value) in
            [(2, "a", 2, 1, Some("1")), (3, "b", 3, 1, Some("2")), (4, "a", 2, 2, Some("3")), (5, "b", 0, 0, None)]
        {
            connection
                .execute(APPEND, (main, 0, key.as_bytes(), create, version, 0, value.map(str::as_bytes)))
                .unwrap();
        }
        let mut statement = connection.prepare("SELECT key, value, mod_rev, version FROM kv").unwrap();
        let rows: Vec<(Vec<u8>, Vec<u8>, i64, i64)> = statement
            .query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?)))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(rows, [(b"a".to_vec(), b"3".to_vec(), 4, 2)]);
    }
}
