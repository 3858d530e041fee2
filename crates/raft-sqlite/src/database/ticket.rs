//! A caller's place in the queue of a writer or reader thread, and its deadline.
//!
//! ```text
//! Queued ──begin──► Running        whoever moves it first decides: a caller that gave up provably had no effect,
//!    └────cancel──► Cancelled      or the thread has begun and its outcome counts
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

const QUEUED: u8 = 0;
const RUNNING: u8 = 1;
const CANCELLED: u8 = 2;

/// Shared by the caller and the thread.
#[derive(Debug)]
pub(crate) struct Ticket {
    state: AtomicU8,
    deadline: Option<Instant>,
    interrupted: AtomicBool,
    abandoned: AtomicBool,
}

impl Ticket {
    /// `deadline`: from then on it is not begun any more, and interrupted if it runs.
    pub fn new(deadline: Option<Instant>) -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU8::new(QUEUED),
            deadline,
            interrupted: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        })
    }

    /// The thread takes it. False: the caller has gone or its deadline has passed.
    pub fn begin(&self) -> bool {
        if self.is_late() {
            self.cancel();
        }
        self.state.compare_exchange(QUEUED, RUNNING, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// The caller gives up. True: it has not begun and never will.
    pub fn cancel(&self) -> bool {
        match self.state.compare_exchange(QUEUED, CANCELLED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(state) => state == CANCELLED,
        }
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Asked by SQLite as it works: whether to stop.
    pub fn must_stop(&self) -> bool {
        let late = self.is_late() || self.abandoned.load(Ordering::SeqCst);
        if late {
            self.interrupted.store(true, Ordering::SeqCst);
        }
        late
    }

    /// Nobody waits for it any more: it is not begun, and interrupted if it runs. For what has no effect.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.cancel();
    }

    /// Whether [`Self::must_stop`] has said so.
    pub fn was_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}

/// Cancels what has not begun when the caller's future is dropped.
#[derive(Debug)]
pub(crate) struct CancelOnDrop(pub Arc<Ticket>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Abandons a read when the caller's future is dropped.
#[derive(Debug)]
pub(crate) struct AbandonOnDrop(pub Arc<Ticket>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_begins_or_is_cancelled_never_both() {
        let ticket = Ticket::new(None);
        assert!(ticket.begin() && !ticket.cancel() && !ticket.begin());
        let ticket = Ticket::new(None);
        assert!(ticket.cancel() && ticket.cancel() && !ticket.begin());
    }

    #[test]
    fn after_the_deadline_it_does_not_begin() {
        let ticket = Ticket::new(Some(Instant::now()));
        assert!(!ticket.begin() && ticket.cancel());
        let ticket = Ticket::new(Some(Instant::now() + Duration::from_secs(3600)));
        assert!(ticket.begin() && !ticket.must_stop() && !ticket.was_interrupted());
    }
}
