//! Whether SQLite is to stop what it is doing: asked by its progress handler.

use std::sync::Arc;

use parking_lot::Mutex;

/// SQLite asks every so many steps of its virtual machine: some tens of microseconds apart.
pub(crate) const PROGRESS_STEPS: std::ffi::c_int = 2_000;

type Check = Box<dyn Fn() -> bool + Send>;

/// One connection's check; clones share it. None set: SQLite goes on.
#[derive(Clone, Default)]
pub(crate) struct StopCheck(Arc<Mutex<Option<Check>>>);

impl StopCheck {
    /// Puts the check of this connection in force until [`Self::clear`].
    pub fn set(&self, check: impl Fn() -> bool + Send + 'static) {
        *self.0.lock() = Some(Box::new(check));
    }

    pub fn clear(&self) {
        *self.0.lock() = None;
    }

    /// Installs it, once for the connection's life.
    pub(super) fn install(&self, connection: &mut rusqlite::Connection) -> rusqlite::Result<()> {
        let check = self.0.clone();
        connection.progress_handler(PROGRESS_STEPS, Some(move || check.lock().as_ref().is_some_and(|check| check())))
    }
}
