//! The writer's and the readers' connections to a replica.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::DatabaseError;
use super::job::Refusal;
use super::prepare::ConnectionRole;
use super::replica::Replica;
use crate::page::store::PageStore;
use crate::page::{PageDamage, Version};
use crate::vfs::capture::{Capture, OpenGroup, SealedGroup};
use crate::vfs::stop::StopCheck;
use crate::vfs::{ReaderConnection, WriterConnection};

/// The single writer of a replica. Owned by one thread.
pub(crate) struct Writer {
    pub(super) replica: Replica,
    pub(super) capture: Arc<Capture>,
    /// None: to be opened by [`Self::connect`], since the program's preparation failed.
    connection: Option<WriterConnection>,
    open: Arc<AtomicBool>,
}

impl Writer {
    /// `open`: the replica's mark that a writer is there; taken back when this is dropped.
    pub(super) fn new(replica: Replica, capture: Arc<Capture>, open: Arc<AtomicBool>) -> Result<Self, DatabaseError> {
        let mut writer = Self { replica, capture, connection: None, open };
        match writer.connect() {
            // The leader leads without it; callers are told.
            Ok(_) | Err(DatabaseError::Prepare(_)) => Ok(writer),
            Err(error) => Err(error),
        }
    }

    /// Opens and prepares the connection if it is not there; true: it was not.
    ///
    /// # Errors
    /// [`DatabaseError::Prepare`]: what was captured stays, and the next call tries again.
    pub fn connect(&mut self) -> Result<bool, DatabaseError> {
        let missing = self.connection.is_none();
        if missing {
            let connection = WriterConnection::open(&self.capture, self.replica.tracks_tables())?;
            self.replica.prepare(ConnectionRole::Writer, |steps| connection.prepare(steps))?;
            self.connection = Some(connection);
        }
        Ok(missing)
    }

    /// Interrupts what runs on the connection; None: there is none now.
    pub fn interrupt_handle(&self) -> Option<rusqlite::InterruptHandle> {
        self.connection.as_ref().map(|connection| connection.connection().get_interrupt_handle())
    }

    /// Only after [`Self::connect`].
    pub fn connection(&self) -> &rusqlite::Connection {
        self.connection.as_ref().expect("invariant: connected before it is used").connection()
    }

    /// Whether SQLite is to stop what it does on this connection.
    pub fn stop_check(&self) -> &StopCheck {
        self.connection.as_ref().expect("invariant: open until dropped").stop_check()
    }

    /// Whether the tables are known that transactions change.
    pub fn tracks_tables(&self) -> bool {
        self.replica.tracks_tables()
    }

    /// The tables that statements prepared since the last call would change.
    pub fn take_changed_tables(&self) -> BTreeSet<String> {
        self.connection.as_ref().map(WriterConnection::take_changed_tables).unwrap_or_default()
    }

    /// A caller's closure begins: until [`Self::release_transaction`] nobody commits.
    pub(super) fn hold_transaction(&self) {
        self.connection.as_ref().expect("invariant: connected before it is used").hold_transaction();
    }

    /// It has ended. False: it ended the transaction itself, and none of it has taken effect.
    pub(super) fn release_transaction(&self) -> bool {
        self.connection.as_ref().expect("invariant: connected before it is used").release_transaction()
    }

    /// The group that is not sealed yet.
    pub fn captured(&self) -> OpenGroup {
        self.capture.open_group()
    }

    /// The bound that the last transaction hit, if it did.
    pub fn take_too_large(&self) -> Option<u64> {
        self.capture.take_too_large()
    }

    /// A damaged page, if SQLite has asked for one since the last call.
    pub fn take_damage(&self) -> Option<PageDamage> {
        self.capture.take_damage()
    }

    /// Why a COMMIT failed.
    pub fn refusal(&self, error: rusqlite::Error) -> Refusal {
        match self.take_too_large() {
            Some(limit_bytes) => Refusal::TooLarge { limit_bytes },
            None => Refusal::Sql(error),
        }
    }

    /// Between two callers: what belongs to a connection (temporary objects, attached databases, PRAGMAs) does not outlive its caller.
    /// Costs nothing unless a caller made such a thing; then the connection is opened anew: true.
    pub fn reset_connection(&mut self) -> Result<bool, DatabaseError> {
        if let Some(connection) = self.connection.as_ref().filter(|connection| !connection.is_touched()) {
            connection.forget_last_insert_rowid();
            return Ok(false);
        }
        self.connection = None;
        match self.connect() {
            // The next caller is told, unless it goes well by then.
            Ok(_) | Err(DatabaseError::Prepare(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Ends the open group; None: nothing was captured in it.
    pub fn seal(&mut self) -> Result<Option<SealedGroup>, DatabaseError> {
        let sealed = self.capture.seal().map_err(|error| DatabaseError::io(self.replica.path(), error))?;
        if let Some(group) = &sealed {
            self.replica.note_captured(group.version, group.state_hash);
        }
        Ok(sealed)
    }

    /// Drops every captured version above the committed one, and closes.
    pub fn discard(self) {
        drop(self);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.connection = None;
        self.replica.discard_captured(self.capture.store());
        self.open.store(false, Ordering::SeqCst);
    }
}

/// A read-only connection to a replica.
pub(crate) struct Reader {
    replica: Replica,
    store: Arc<PageStore>,
    connection: ReaderConnection,
}

impl Reader {
    pub(super) fn new(replica: Replica, store: Arc<PageStore>) -> Result<Self, DatabaseError> {
        let connection = ReaderConnection::open(&store)?;
        replica.prepare(ConnectionRole::Reader, |steps| connection.prepare(steps))?;
        Ok(Self { replica, store, connection })
    }

    pub fn connection(&self) -> &rusqlite::Connection {
        self.connection.connection()
    }

    /// As [`Writer::stop_check`].
    pub fn stop_check(&self) -> &StopCheck {
        self.connection.stop_check()
    }

    /// Begins a read transaction; the version it sees.
    pub fn begin(&self) -> Result<Version, DatabaseError> {
        Ok(self.connection.begin()?)
    }

    /// Ends it.
    ///
    /// # Errors
    /// [`DatabaseError::ReaderTooOld`], [`DatabaseError::ReaderHoldsTooMuch`]: something that was read in it failed because it had lasted
    /// too long. [`DatabaseError::DamagedPage`]: because a page is damaged.
    pub fn end(&self) -> Result<(), DatabaseError> {
        self.connection.end()?;
        match (self.connection.too_old(), self.connection.damage()) {
            (Some(bound), _) => Err(bound.into()),
            (None, Some(damage)) => Err(damage.into()),
            (None, None) => Ok(()),
        }
    }

    /// Whether its database is gone.
    pub fn is_dropped(&self) -> bool {
        self.replica.is_dropped()
    }

    /// False: not for another caller. Either a snapshot has replaced the database, and this connection goes on seeing the old one, or
    /// a caller has left something on it (a temporary object, an attached database, a PRAGMA).
    pub fn is_current(&self) -> bool {
        self.replica.is_current(&self.store) && !self.connection.is_touched()
    }
}
