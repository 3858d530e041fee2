//! What a replicated database refuses, and what it says then.

use std::cell::RefCell;

use rusqlite::ffi;

/// Why an ATTACH is refused, or the VACUUM INTO that makes one.
pub(super) const FILES: &str = "a file cannot be attached to a replicated database (ATTACH, VACUUM INTO): what is written there would be on \
     this node only, and not be replicated. Attach ':memory:' for scratch tables; for a copy, open the database file of a stopped node, or \
     back up through a read";
/// Why SQL cannot load extensions.
pub(super) const LOAD_EXTENSION: &str = "load_extension is refused from SQL on a replicated database: it would run foreign code in the node. \
     Link the extension into the program and register it with sqlite3_auto_extension";

thread_local! {
    /// Why the authorizer last refused something on this thread: SQLite itself only says "not authorized".
    static REFUSED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Notes why something is refused.
pub(super) fn note(why: &str) {
    REFUSED.with(|refused| *refused.borrow_mut() = Some(why.to_owned()));
}

/// Forgets what was refused before.
pub(crate) fn forget() {
    REFUSED.with(|refused| *refused.borrow_mut() = None);
}

/// The error of a statement that ran on this thread since [`forget`], saying why it was refused, if that was the reason.
pub(crate) fn explain(error: rusqlite::Error) -> rusqlite::Error {
    // SQLite's words for a refusal by the authorizer, under several codes.
    let words = error.to_string();
    let denied = words.contains("not authorized") || words.contains("authorization denied");
    match REFUSED.with(|refused| refused.borrow_mut().take()) {
        Some(why) if denied => rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_AUTH), Some(why)),
        _ => error,
    }
}

/// PRAGMAs that would break replication: name, whether only the setter is refused, and why.
const PRAGMAS: &[(&str, bool, &str)] = &[
    ("journal_mode", true, "the journal is the replicated log; there is nothing to choose"),
    ("locking_mode", true, "locks are the library's; readers never block and never see a lock"),
    ("page_size", true, "it is fixed when the database is made: set NodeConfig::page_size for new ones"),
    ("synchronous", true, "a commit is on the disks of a majority when it returns, whatever it says"),
    ("wal_autocheckpoint", true, "checkpoints are made by the library: see NodeConfig::checkpoint_entries"),
    ("wal_checkpoint", false, "checkpoints are made by the library: see NodeConfig::checkpoint_entries"),
    ("journal_size_limit", true, "the journal is the replicated log"),
    ("mmap_size", true, "pages are shared without copying already"),
    ("read_uncommitted", true, "nothing uncommitted is ever shown"),
    ("schema_version", true, "SQLite keeps it; a wrong one corrupts the database on every node"),
    ("writable_schema", true, "a wrong schema corrupts the database on every node"),
    ("encoding", true, "databases are UTF-8"),
    ("cache_spill", true, "the library depends on it"),
    ("fullfsync", true, "the log decides how it is synced"),
    ("checkpoint_fullfsync", true, "the library decides how files are synced"),
    ("soft_heap_limit", true, "it would hold for every database of this process"),
    ("hard_heap_limit", true, "it would hold for every database of this process"),
    ("temp_store_directory", true, "it would hold for every database of this process; set SQLITE_TMPDIR instead"),
    ("data_store_directory", true, "it would hold for every database of this process"),
];

/// Why a PRAGMA is refused; None: it is not.
pub(super) fn pragma(name: &str, sets: bool) -> Option<String> {
    let name = name.to_ascii_lowercase();
    let (_, _, why) = PRAGMAS.iter().find(|(refused, only_setter, _)| *refused == name && (sets || !only_setter))?;
    Some(format!("PRAGMA {name} is refused on a replicated database: {why}"))
}
