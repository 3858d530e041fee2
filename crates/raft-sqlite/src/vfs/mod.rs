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
mod refuse;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::{Connection, OpenFlags};

use crate::page::Version;
use crate::page::store::PageStore;
use capture::Capture;
use methods::View;

/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;
/// SQLite's page cache of the writer, in KiB. It only ever holds what is used.
const WRITER_CACHE_KIB: u32 = 8 * 1024;
/// SQLite's page cache of a reader, in KiB: small, since images in memory are used without copying.
const READER_CACHE_KIB: u32 = 4 * 1024;

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

/// Allows ATTACH of memory and temporary databases only; notes what a later caller must not inherit.
fn guard(connection: &mut Connection, touched: Option<Arc<AtomicBool>>) -> rusqlite::Result<()> {
    connection.authorizer(Some(move |context: AuthContext<'_>| {
        let touches = match context.action {
            AuthAction::Attach { filename } if !matches!(filename, "" | ":memory:") => {
                return Authorization::Deny;
            }
            AuthAction::Attach { .. } => true,
            AuthAction::Pragma { pragma_value, .. } => pragma_value.is_some(),
            AuthAction::CreateTempTable { .. }
            | AuthAction::CreateTempIndex { .. }
            | AuthAction::CreateTempTrigger { .. }
            | AuthAction::CreateTempView { .. } => true,
            _ => false,
        };
        if touches && let Some(touched) = &touched {
            touched.store(true, Ordering::Relaxed);
        }
        Authorization::Allow
    }))
}

/// The writer connection on a capture.
pub(crate) struct WriterConnection {
    view: ViewConnection,
    touched: Arc<AtomicBool>,
}

impl WriterConnection {
    pub fn open(capture: &Arc<Capture>) -> rusqlite::Result<Self> {
        let setup = format!(
            "PRAGMA synchronous=OFF; PRAGMA temp_store=MEMORY; PRAGMA wal_autocheckpoint=0;
             PRAGMA foreign_keys=ON; PRAGMA cache_size=-{WRITER_CACHE_KIB};"
        );
        let mut view = open(View::Writer(capture.clone()), OpenFlags::SQLITE_OPEN_READ_WRITE, &setup)?;
        view.connection.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        methods::seal(&view.connection)?;
        let touched = Arc::new(AtomicBool::new(false));
        guard(&mut view.connection, Some(touched.clone()))?;
        Ok(Self { view, touched })
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
    pinned: Arc<methods::PinnedVersionCell>,
}

impl ReaderConnection {
    pub fn open(store: &Arc<PageStore>) -> rusqlite::Result<Self> {
        let pinned = Arc::new(methods::PinnedVersionCell::default());
        let setup = format!(
            "PRAGMA temp_store=MEMORY; PRAGMA foreign_keys=ON; PRAGMA cache_size=-{READER_CACHE_KIB};
             PRAGMA mmap_size=1099511627776;"
        );
        let view = View::Reader { store: store.clone(), pinned: pinned.clone() };
        let mut view = open(view, OpenFlags::SQLITE_OPEN_READ_ONLY, &setup)?;
        methods::seal(&view.connection)?;
        guard(&mut view.connection, None)?;
        Ok(Self { view, pinned })
    }

    pub fn connection(&self) -> &Connection {
        &self.view.connection
    }

    /// Begins a read transaction: the version it sees.
    pub fn begin(&self) -> rusqlite::Result<Version> {
        let connection = &self.view.connection;
        connection.prepare_cached("BEGIN")?.raw_execute()?;
        // BEGIN alone takes no lock: the first read pins.
        let begun = connection.prepare_cached("PRAGMA data_version").and_then(|mut first| {
            let mut rows = first.raw_query();
            while rows.next()?.is_some() {}
            Ok(())
        });
        if let Err(error) = begun {
            let _ = self.end();
            return Err(error);
        }
        match self.pinned.get() {
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

    /// Ends it, whatever the caller left open.
    pub fn end(&self) -> rusqlite::Result<()> {
        let connection = &self.view.connection;
        if !connection.is_autocommit() {
            connection.prepare_cached("ROLLBACK")?.raw_execute()?;
        }
        Ok(())
    }
}
