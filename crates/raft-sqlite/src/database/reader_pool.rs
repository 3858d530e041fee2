//! Threads that run reads: SQLite never runs on an async worker.
//!
//! Each thread keeps one read-only connection per database it was asked for, and opens it anew when a snapshot replaced the
//! database. A read pins the committed version for as long as it runs.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, never, select_biased, unbounded};
use parking_lot::Mutex;

use super::replica::Replica;
use super::ticket::Ticket;
use super::{DatabaseError, Reader};
use crate::page::Version;

/// Most reads waiting for a thread.
const MAX_QUEUED_READS: usize = 16 * 1024;
/// Most connections a thread keeps.
const MAX_CONNECTIONS: usize = 64;

/// A read: given the connection with its transaction open, or the reason why there is none. What it gives back is called when the
/// transaction has ended, with how: only then is it known whether all that was read was there.
pub(crate) type Read = Box<dyn FnOnce(Result<(&rusqlite::Connection, Version), DatabaseError>) -> Answer + Send>;

/// Tells the caller.
pub(crate) type Answer = Box<dyn FnOnce(Result<(), DatabaseError>)>;

struct Request {
    replica: Replica,
    read: Read,
    ticket: Arc<Ticket>,
}

/// The pool; dropped, its threads end after the reads that are queued.
pub(crate) struct ReaderPool {
    requests: Mutex<Option<Sender<Request>>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    /// One a thread.
    forgets: Vec<Sender<()>>,
}

impl ReaderPool {
    /// Starts `threads` threads named `reader-N`.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let (sender, receiver) = bounded::<Request>(MAX_QUEUED_READS);
        let (mut handles, mut forgets) = (Vec::new(), Vec::new());
        for number in 0..threads.max(1) {
            let (receiver, (forget, forgotten)) = (receiver.clone(), unbounded());
            let thread = std::thread::Builder::new().name(format!("reader-{number}"));
            handles.push(thread.spawn(move || run(&receiver, forgotten))?);
            forgets.push(forget);
        }
        Ok(Self { requests: Mutex::new(Some(sender)), threads: Mutex::new(handles), forgets })
    }

    /// Closes connections to databases that were dropped: until then their files take room.
    pub fn forget_dropped(&self) {
        for thread in &self.forgets {
            let _ = thread.send(());
        }
    }

    /// Queues a read. False: too many wait; `read` was dropped uncalled.
    pub fn submit(&self, replica: Replica, read: Read, ticket: Arc<Ticket>) -> bool {
        let requests = self.requests.lock();
        let Some(requests) = &*requests else {
            return false;
        };
        !matches!(
            requests.try_send(Request { replica, read, ticket }),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_))
        )
    }

    /// No read is taken any more.
    pub fn is_stopped(&self) -> bool {
        self.requests.lock().is_none()
    }

    /// Reads that wait for a thread.
    pub fn queued(&self) -> usize {
        self.requests.lock().as_ref().map_or(0, Sender::len)
    }

    /// Ends the threads after the reads that are queued.
    pub fn stop(&self) {
        *self.requests.lock() = None;
        for thread in std::mem::take(&mut *self.threads.lock()) {
            let _ = thread.join();
        }
    }
}

fn run(requests: &Receiver<Request>, mut forget: Receiver<()>) {
    let mut connections: HashMap<usize, Reader> = HashMap::new();
    loop {
        let Request { replica, read, ticket } = select_biased! {
            recv(forget) -> told => {
                connections.retain(|_, reader| !reader.is_dropped());
                if told.is_err() {
                    forget = never();
                }
                continue;
            }
            recv(requests) -> request => match request {
                Ok(request) => request,
                Err(_) => return,
            },
        };
        // Dropped uncalled: its caller has gone, or knows by its own clock.
        if !ticket.begin() {
            continue;
        }
        let key = replica.identity();
        if connections.get(&key).is_some_and(|reader| !reader.is_current()) {
            connections.remove(&key);
        }
        if connections.len() > MAX_CONNECTIONS {
            connections.clear();
        }
        let reader = match connections.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => match replica.open_reader() {
                Ok(reader) => entry.insert(reader),
                Err(error) => {
                    read(Err(error))(Ok(()));
                    continue;
                }
            },
        };
        let healthy = match reader.begin() {
            Ok(version) => {
                reader.stop_check().set(move || ticket.must_stop());
                let ran = catch_unwind(AssertUnwindSafe(|| read(Ok((reader.connection(), version)))));
                reader.stop_check().clear();
                let ended = reader.end();
                let healthy = ended.is_ok();
                // A read that panicked has dropped what it would have answered with.
                ran.is_ok_and(|answer| {
                    answer(ended);
                    healthy
                })
            }
            Err(error) => {
                read(Err(error))(Ok(()));
                false
            }
        };
        if !healthy || replica.is_dropped() {
            connections.remove(&key);
        }
    }
}
