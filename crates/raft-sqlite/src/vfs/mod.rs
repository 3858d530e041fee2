//! The VFS between SQLite and the page store. The only unsafe code of the crate.
//!
//! One VFS is registered for the process. It opens two kinds of names, each registered for as long as its view lives:
//! - a writer view ([`capture::Capture`]): the newest images, captured ones included, with a private WAL;
//! - a reader view: each read transaction pins the committed version and sees exactly it.
//!
//! Everything else (temporary files, sorters) goes to SQLite's own VFS. `methods` has the C functions.

#![allow(unsafe_code)]

pub(crate) mod capture;
mod methods;
pub(crate) mod refuse;
pub(crate) mod stop;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::{Connection, OpenFlags, ffi};

use crate::page::store::{PageStore, PinBound};
use crate::page::{PageDamage, Version};
use capture::Capture;
use methods::View;
use stop::StopCheck;

/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;
/// SQLite's page cache of the writer, in KiB. It only ever holds what is used.
const WRITER_CACHE_KIB: u32 = 4 * 1024;
/// SQLite's page cache of a reader, in KiB: small, since images in memory are used without copying.
const READER_CACHE_KIB: u32 = 2 * 1024;

/// A connection on one of our views; its name is taken back when this is dropped.
struct ViewConnection {
    // Dropped first: SQLite closes its files while the name still stands.
    connection: Connection,
    _name: methods::RegisteredName,
}

fn open(view: View, flags: OpenFlags, setup: &str) -> rusqlite::Result<ViewConnection> {
    let name = methods::register(view)?;
    let connection =
        Connection::open_with_flags_and_vfs(name.as_str(), flags | OpenFlags::SQLITE_OPEN_NO_MUTEX, methods::VFS_NAME)?;
    connection.execute_batch(setup)?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    Ok(ViewConnection { connection, _name: name })
}

/// Names of tables that the statements prepared on a connection would change.
#[derive(Clone, Debug, Default)]
struct ChangedTables(Arc<Mutex<BTreeSet<String>>>);

impl ChangedTables {
    /// Told by the authorizer, for triggers' and foreign keys' statements, too.
    fn note(&self, context: &AuthContext<'_>) {
        let (AuthAction::Insert { table_name }
        | AuthAction::Update { table_name, .. }
        | AuthAction::Delete { table_name }) = context.action
        else {
            return;
        };
        if context.database_name != Some("main") {
            return;
        }
        let name = match table_name {
            "sqlite_master" | "sqlite_schema" => "sqlite_schema",
            // SQLite's own notes: sequences, statistics.
            internal if internal.starts_with("sqlite_") => return,
            name => name,
        };
        let mut names = self.0.lock();
        if !names.contains(name) {
            names.insert(name.to_owned());
        }
    }
}

/// Allows ATTACH of memory and temporary databases only, and no PRAGMA by way of another database's name that is refused by that of the
/// main one. Notes what a later caller must not inherit.
fn guard(
    connection: &mut Connection,
    touched: Arc<AtomicBool>,
    changed: Option<ChangedTables>,
) -> rusqlite::Result<()> {
    connection.authorizer(Some(move |context: AuthContext<'_>| {
        if let Some(changed) = &changed {
            changed.note(&context);
        }
        let touches = match context.action {
            AuthAction::Attach { filename: "" | ":memory:" } => true,
            // Without a file name: an expression, whatever its value will be.
            AuthAction::Attach { .. } | AuthAction::Unknown { code: ffi::SQLITE_ATTACH, .. } => {
                refuse::note(refuse::FILES);
                return Authorization::Deny;
            }
            AuthAction::Function { function_name } if function_name.eq_ignore_ascii_case("load_extension") => {
                refuse::note(refuse::LOAD_EXTENSION);
                return Authorization::Deny;
            }
            AuthAction::Pragma { pragma_name, pragma_value } => {
                let elsewhere = context.database_name.is_some_and(|name| name != "main");
                if elsewhere && let Some(why) = refuse::pragma(pragma_name, pragma_value.is_some()) {
                    refuse::note(&why);
                    return Authorization::Deny;
                }
                pragma_value.is_some()
            }
            AuthAction::CreateTempTable { .. }
            | AuthAction::CreateTempIndex { .. }
            | AuthAction::CreateTempTrigger { .. }
            | AuthAction::CreateTempView { .. } => true,
            _ => false,
        };
        if touches {
            touched.store(true, Ordering::Relaxed);
        }
        Authorization::Allow
    }))
}

/// What the library rests on, and a program could have changed through the connection's own methods.
fn keep_settings(connection: &Connection) -> rusqlite::Result<()> {
    use rusqlite::config::DbConfig;
    for (setting, value) in [
        // Its WAL is ours: there is nothing to bring into a file.
        (DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true),
        (DbConfig::SQLITE_DBCONFIG_RESET_DATABASE, false),
        (DbConfig::SQLITE_DBCONFIG_WRITABLE_SCHEMA, false),
    ] {
        connection.set_db_config(setting, value)?;
    }
    Ok(())
}

/// A read that compares the schema and changes nothing.
fn first_read(connection: &Connection) -> rusqlite::Result<()> {
    let mut first = connection.prepare_cached("SELECT 0 FROM sqlite_schema WHERE 0")?;
    let mut rows = first.raw_query();
    while rows.next()?.is_some() {}
    Ok(())
}

/// After a program's preparation: it counts as nobody's leftovers. None: it left a transaction open.
fn prepared<R>(connection: &Connection, touched: &AtomicBool, ran: R) -> rusqlite::Result<Option<R>> {
    let settled = connection.is_autocommit();
    if !settled {
        connection.execute_batch("ROLLBACK")?;
    }
    keep_settings(connection)?;
    touched.store(false, Ordering::Relaxed);
    Ok(settled.then_some(ran))
}

/// INV-WRITER-COMMITS: a caller's closure runs inside a transaction that the writer thread begins and ends. A COMMIT of its own rolls back:
/// otherwise it would be captured whatever the caller is told.
#[derive(Debug, Default)]
struct HeldTransaction {
    held: AtomicBool,
    ended: AtomicBool,
}

/// The writer connection on a capture.
pub(crate) struct WriterConnection {
    view: ViewConnection,
    capture: Arc<Capture>,
    touched: Arc<AtomicBool>,
    transaction: Arc<HeldTransaction>,
    stop: StopCheck,
    changed: Option<ChangedTables>,
}

impl WriterConnection {
    /// `track_tables`: see [`Self::take_changed_tables`].
    pub fn open(capture: &Arc<Capture>, track_tables: bool) -> rusqlite::Result<Self> {
        let setup = format!(
            "PRAGMA synchronous=OFF; PRAGMA temp_store=MEMORY; PRAGMA wal_autocheckpoint=0;
             PRAGMA foreign_keys=ON; PRAGMA cache_size=-{WRITER_CACHE_KIB};"
        );
        let mut view = open(View::Writer(capture.clone()), OpenFlags::SQLITE_OPEN_READ_WRITE, &setup)?;
        keep_settings(&view.connection)?;
        methods::seal(&view.connection)?;
        let touched = Arc::new(AtomicBool::new(false));
        let changed = track_tables.then(ChangedTables::default);
        if track_tables {
            // A kept statement would run without being prepared, and its tables not be named.
            view.connection.set_prepared_statement_cache_capacity(0);
        }
        guard(&mut view.connection, touched.clone(), changed.clone())?;
        let transaction = Arc::new(HeldTransaction::default());
        // A commit that is refused becomes a rollback.
        let commits = transaction.clone();
        view.connection.commit_hook(Some(move || commits.held.load(Ordering::Relaxed)))?;
        let rollbacks = transaction.clone();
        view.connection.rollback_hook(Some(move || rollbacks.ended.store(true, Ordering::Relaxed)))?;
        let stop = StopCheck::default();
        stop.install(&mut view.connection)?;
        Ok(Self { view, capture: capture.clone(), touched, transaction, stop, changed })
    }

    /// The tables that statements prepared since the last call would change; none if they are not tracked.
    pub fn take_changed_tables(&self) -> BTreeSet<String> {
        self.changed.as_ref().map(|changed| std::mem::take(&mut *changed.0.lock())).unwrap_or_default()
    }

    pub fn stop_check(&self) -> &StopCheck {
        &self.stop
    }

    /// Runs what the program prepares its connections with. It cannot write into the database, and what it sets, attaches or creates on
    /// the connection is every later caller's. None: it left a transaction open. `run` must not panic.
    pub fn prepare<R>(&self, run: impl FnOnce(&Connection) -> R) -> rusqlite::Result<Option<R>> {
        let connection = &self.view.connection;
        // Takes the write lock the first time, to make the wal-index.
        first_read(connection)?;
        self.capture.set_read_only(true);
        let ran = run(connection);
        self.capture.set_read_only(false);
        prepared(connection, &self.touched, ran)
    }

    /// Before each caller.
    pub fn forget_last_insert_rowid(&self) {
        methods::forget_last_insert_rowid(&self.view.connection);
    }

    /// From now on COMMIT is refused, and rolls back.
    pub fn hold_transaction(&self) {
        self.transaction.ended.store(false, Ordering::Relaxed);
        self.transaction.held.store(true, Ordering::Relaxed);
    }

    /// COMMIT is allowed again. False: the transaction that was held has been rolled back, by whatever.
    pub fn release_transaction(&self) -> bool {
        self.transaction.held.store(false, Ordering::Relaxed);
        !self.transaction.ended.load(Ordering::Relaxed)
    }

    pub fn connection(&self) -> &Connection {
        &self.view.connection
    }

    /// Whether a caller prepared something that outlives its transaction: a PRAGMA that sets, a temporary object, ATTACH.
    pub fn is_touched(&self) -> bool {
        self.touched.load(Ordering::Relaxed)
    }
}

/// A read-only connection on the committed state.
pub(crate) struct ReaderConnection {
    view: ViewConnection,
    progress: Arc<Mutex<methods::ReadProgress>>,
    touched: Arc<AtomicBool>,
    stop: StopCheck,
}

impl ReaderConnection {
    pub fn open(store: &Arc<PageStore>) -> rusqlite::Result<Self> {
        let progress = Arc::new(Mutex::new(methods::ReadProgress::default()));
        let setup = format!(
            "PRAGMA temp_store=MEMORY; PRAGMA foreign_keys=ON; PRAGMA cache_size=-{READER_CACHE_KIB};
             PRAGMA mmap_size=1099511627776;"
        );
        let view = View::Reader { store: store.clone(), progress: progress.clone() };
        let mut view = open(view, OpenFlags::SQLITE_OPEN_READ_ONLY, &setup)?;
        methods::seal(&view.connection)?;
        let touched = Arc::new(AtomicBool::new(false));
        guard(&mut view.connection, touched.clone(), None)?;
        let stop = StopCheck::default();
        stop.install(&mut view.connection)?;
        Ok(Self { view, progress, touched, stop })
    }

    pub fn stop_check(&self) -> &StopCheck {
        &self.stop
    }

    /// As [`WriterConnection::prepare`].
    pub fn prepare<R>(&self, run: impl FnOnce(&Connection) -> R) -> rusqlite::Result<Option<R>> {
        prepared(&self.view.connection, &self.touched, run(&self.view.connection))
    }

    pub fn connection(&self) -> &Connection {
        &self.view.connection
    }

    /// Begins a read transaction: the version it sees.
    pub fn begin(&self) -> rusqlite::Result<Version> {
        let connection = &self.view.connection;
        connection.prepare_cached("BEGIN")?.raw_execute()?;
        // BEGIN alone takes no lock: the first read pins. It is one that compares the schema, too: SQLite prepares on the schema that it
        // knows, and a PRAGMA that finds nothing in an old one never looks whether there is a newer one.
        if let Err(error) = first_read(connection) {
            let _ = self.end();
            return Err(error);
        }
        match self.progress.lock().pinned {
            Some(version) => Ok(version),
            None => {
                let _ = self.end();
                Err(rusqlite::Error::SqliteFailure(
                    rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR),
                    Some("the read transaction pinned no version".into()),
                ))
            }
        }
    }

    /// The bound that the last read transaction ran into, if it did.
    pub fn too_old(&self) -> Option<PinBound> {
        self.progress.lock().too_old
    }

    /// A damaged page that the last read transaction came upon.
    pub fn damage(&self) -> Option<PageDamage> {
        self.progress.lock().damaged.clone()
    }

    /// As [`WriterConnection::is_touched`].
    pub fn is_touched(&self) -> bool {
        self.touched.load(Ordering::Relaxed)
    }

    /// Ends it, whatever the caller left open.
    pub fn end(&self) -> rusqlite::Result<()> {
        let connection = &self.view.connection;
        if !connection.is_autocommit() {
            connection.prepare_cached("ROLLBACK")?.raw_execute()?;
        }
        Ok(())
    }
}
