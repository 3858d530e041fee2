//! The writer of a database: one named thread on the leader that runs callers' transactions one after another.
//!
//! Each caller gets an SQLite transaction of its own. What has been captured while earlier groups are on their way goes into the next
//! Raft entry together. The thread never waits for Raft, except when the bounds below are reached (back-pressure).
//!
//! ```text
//!            open(term)                       job: BEGIN IMMEDIATE, closure, COMMIT
//!  Closed ───────────────► Open ◄──────────────────────────────────────┐
//!    ▲                      │ ├─ queue empty and room in flight ──► seal and propose
//!    └──────────────────────┘ └─ bounds reached ───────────────► wait for room, seal and propose
//!      close / proposal failed: discard what is captured, tell the callers
//! ```
//! INV-NOTHING-LEAKS: a caller is answered only when every captured version it may have read is committed.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded, select_biased, unbounded};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::job::{Job, Refusal, WriteContext};
use super::pipeline::{Origin, SharedPipeline, Waiter};
use super::replica::Replica;
use super::{DatabaseError, Writer};
use crate::metrics::recorder::Recorder;

/// Most transactions in one Raft entry: bounds how long the first one waits for the last one's SQL.
const MAX_GROUP_TRANSACTIONS: usize = 512;
/// Most captured bytes of page images in one Raft entry, unless a single transaction is larger.
const MAX_GROUP_BYTES: usize = 4 * 1024 * 1024;
/// Most groups proposed and not yet applied while more callers wait: what comes meanwhile shares the next entry and its sync.
const GROUPS_IN_FLIGHT: usize = 4;
/// Most callers waiting for the writer.
const MAX_QUEUED_JOBS: usize = 16 * 1024;
/// How often a writer that waits for room looks whether it is to close.
const CLOSE_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// A sealed group, ready to be proposed.
pub(crate) struct Proposal {
    /// Only this leadership may propose it.
    pub term: u64,
    pub database: String,
    /// Those that its transactions may have changed; None: not known.
    pub tables: Option<Vec<String>>,
    pub origin: Origin,
    pub sidecars: Vec<Bytes>,
    pub page_set: Bytes,
}

/// Hands sealed groups to Raft. Called on the writer thread; must not block.
pub(crate) trait Proposer: Send + Sync {
    /// `failed` is told when the entry could not be proposed or its commit not be awaited.
    fn propose(&self, proposal: Proposal, failed: ProposalFailed);
}

/// Told once if a proposal fails: closes the writer that made it.
pub(crate) struct ProposalFailed {
    control: Sender<Control>,
    incarnation: u64,
}

impl ProposalFailed {
    pub fn report(self, why: String) {
        let _ = self.control.send(Control::Close { incarnation: Some(self.incarnation), why, done: None });
    }
}

enum Control {
    Open {
        term: u64,
        done: oneshot::Sender<Result<(), DatabaseError>>,
    },
    Close {
        incarnation: Option<u64>,
        why: String,
        done: Option<oneshot::Sender<()>>,
    },
    /// A group was applied: what was held back may be sealed.
    Applied,
    Stop,
}

/// What one database's writer thread works with.
pub(crate) struct WriterSetup {
    pub node: u64,
    pub database: String,
    pub replica: Replica,
    pub pipeline: SharedPipeline,
    pub proposer: Arc<dyn Proposer>,
    pub recorder: Arc<Recorder>,
    /// Called on the writer thread whenever the captured state starts anew from the committed one.
    pub on_reset: Box<dyn Fn() + Send>,
}

/// A job and when it came.
type Queued = (Instant, Box<dyn Job>);

/// The handle to a writer thread.
pub(crate) struct WriterThread {
    jobs: Sender<Queued>,
    control: Sender<Control>,
    interrupt: Arc<Mutex<Option<rusqlite::InterruptHandle>>>,
    closing: Arc<AtomicBool>,
    is_open: Arc<AtomicBool>,
    /// The leadership that it was last opened for.
    opened_term: AtomicU64,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl WriterThread {
    /// Starts the thread; the writer is closed until [`Self::open`].
    pub fn start(setup: WriterSetup) -> std::io::Result<WriterThread> {
        let (jobs, job_receiver) = bounded(MAX_QUEUED_JOBS);
        let (control, control_receiver) = unbounded();
        let interrupt = Arc::new(Mutex::new(None));
        let closing = Arc::new(AtomicBool::new(false));
        let is_open = Arc::new(AtomicBool::new(false));
        let name = format!("writer-{}", setup.database);
        let mut state = Thread {
            setup,
            jobs: job_receiver,
            control: control_receiver,
            control_sender: control.clone(),
            interrupt: interrupt.clone(),
            closing: closing.clone(),
            is_open: is_open.clone(),
            open: None,
            held_back: None,
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || state.run())?;
        Ok(WriterThread {
            jobs,
            control,
            interrupt,
            closing,
            is_open,
            opened_term: AtomicU64::new(0),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Queues a job; it is always answered through its `finish`.
    pub fn submit(&self, job: Box<dyn Job>) {
        match self.jobs.try_send((Instant::now(), job)) {
            Ok(()) => {}
            Err(TrySendError::Full((_, job))) => job.finish(Err(Refusal::Overloaded)),
            Err(TrySendError::Disconnected((_, job))) => job.finish(Err(Refusal::Fatal("the writer has ended".into()))),
        }
    }

    /// Opens the writer on the committed state for the leadership of `term`.
    pub async fn open(&self, term: u64) -> Result<(), DatabaseError> {
        // Its thread may be busy with a transaction for long: whoever opens another database's writer must not wait for it.
        if self.is_open() && self.opened_term.load(Ordering::SeqCst) == term {
            return Ok(());
        }
        let (done, receiver) = oneshot::channel();
        let _ = self.control.send(Control::Open { term, done });
        receiver.await.unwrap_or_else(|_| Err(DatabaseError::Closed))?;
        self.opened_term.store(term, Ordering::SeqCst);
        Ok(())
    }

    /// Discards what is captured and closes the writer. When it returns, no captured version is left.
    pub async fn close(&self, why: &str) {
        let (done, receiver) = oneshot::channel();
        self.closing.store(true, Ordering::SeqCst);
        if let Some(interrupt) = &*self.interrupt.lock() {
            interrupt.interrupt();
        }
        let _ = self.control.send(Control::Close { incarnation: None, why: why.to_owned(), done: Some(done) });
        let _ = receiver.await;
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        self.jobs.len()
    }

    /// Whether jobs are taken.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::SeqCst)
    }

    /// A group of this writer was applied.
    pub fn applied(&self) {
        let _ = self.control.send(Control::Applied);
    }

    /// Ends the thread, discarding what is captured.
    pub fn stop(&self) {
        self.closing.store(true, Ordering::SeqCst);
        if let Some(interrupt) = &*self.interrupt.lock() {
            interrupt.interrupt();
        }
        let _ = self.control.send(Control::Stop);
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

struct Open {
    writer: Writer,
    term: u64,
    incarnation: u64,
    sequence: u64,
    waiters: Vec<Waiter>,
    sidecars: Vec<Bytes>,
    /// Of the open group.
    tables: BTreeSet<String>,
}

struct Thread {
    setup: WriterSetup,
    jobs: Receiver<Queued>,
    control: Receiver<Control>,
    control_sender: Sender<Control>,
    interrupt: Arc<Mutex<Option<rusqlite::InterruptHandle>>>,
    closing: Arc<AtomicBool>,
    is_open: Arc<AtomicBool>,
    open: Option<Open>,
    /// A job that waits until everything captured is committed; all others wait behind it.
    held_back: Option<Queued>,
}

enum Next {
    Job(Queued),
    Control(Control),
    Idle,
    Stop,
}

impl Thread {
    fn run(&mut self) {
        loop {
            match self.next() {
                Next::Job(job) => self.take_job(job),
                Next::Control(Control::Open { term, done }) => {
                    let _ = done.send(self.open_writer(term));
                }
                Next::Control(Control::Close { incarnation, why, done }) => {
                    let current = self.open.as_ref().map(|open| open.incarnation);
                    if incarnation.is_none() || incarnation == current {
                        self.close_writer(&why);
                    }
                    if let Some(done) = done {
                        let _ = done.send(());
                    }
                }
                Next::Control(Control::Applied) => {}
                Next::Control(Control::Stop) | Next::Stop => break,
                Next::Idle => self.seal(),
            }
        }
        self.close_writer("the node stops");
        if let Some((_, job)) = self.held_back.take() {
            job.finish(Err(Refusal::NotLeader));
        }
        while let Ok((_, job)) = self.jobs.try_recv() {
            job.finish(Err(Refusal::NotLeader));
        }
    }

    /// What to do next: control first, then callers, then handing over what has been captured.
    fn next(&mut self) -> Next {
        match self.control.try_recv() {
            Ok(control) => return Next::Control(control),
            Err(TryRecvError::Disconnected) => return Next::Stop,
            Err(TryRecvError::Empty) => {}
        }
        if self.held_back.is_some() {
            return self.next_for_held_back();
        }
        if let Ok(job) = self.jobs.try_recv() {
            return Next::Job(job);
        }
        if self.has_open_group() && self.setup.pipeline.len() < GROUPS_IN_FLIGHT {
            return Next::Idle;
        }
        select_biased! {
            recv(self.control) -> control => control.map_or(Next::Stop, Next::Control),
            recv(self.jobs) -> job => job.map_or(Next::Stop, Next::Job),
        }
    }

    /// Seals what is open and waits until it is applied (INV-NOTHING-LEAKS).
    fn next_for_held_back(&mut self) -> Next {
        if self.has_open_group() {
            return Next::Idle;
        }
        if self.open.is_some() && self.setup.pipeline.len() > 0 {
            return self.control.recv().map_or(Next::Stop, Next::Control);
        }
        self.held_back.take().map_or(Next::Idle, Next::Job)
    }

    fn take_job(&mut self, job: Queued) {
        let committed = !self.has_open_group() && self.setup.pipeline.len() == 0;
        if job.1.needs_committed_state() && self.open.is_some() && !committed {
            self.held_back = Some(job);
        } else {
            self.run_job(job);
        }
    }

    fn has_open_group(&self) -> bool {
        self.open.as_ref().is_some_and(|open| !open.waiters.is_empty())
    }

    fn open_writer(&mut self, term: u64) -> Result<(), DatabaseError> {
        if self.open.as_ref().is_some_and(|open| open.term == term) {
            return Ok(());
        }
        self.close_writer("a new leadership begins");
        let writer = self.setup.replica.open_writer()?;
        let incarnation = rand::random::<u64>().max(1);
        *self.interrupt.lock() = writer.interrupt_handle();
        self.closing.store(false, Ordering::SeqCst);
        self.setup.pipeline.begin(incarnation);
        (self.setup.on_reset)();
        self.is_open.store(true, Ordering::SeqCst);
        self.open = Some(Open {
            writer,
            term,
            incarnation,
            sequence: 0,
            waiters: Vec::new(),
            sidecars: Vec::new(),
            tables: BTreeSet::new(),
        });
        Ok(())
    }

    fn close_writer(&mut self, why: &str) {
        *self.interrupt.lock() = None;
        self.is_open.store(false, Ordering::SeqCst);
        let Some(open) = self.open.take() else { return };
        self.setup.pipeline.discard(open.writer, why);
        // Captured but never proposed: provably without effect.
        for waiter in open.waiters {
            waiter.job.finish(Err(Refusal::NotLeader));
        }
        (self.setup.on_reset)();
    }

    fn run_job(&mut self, (queued, mut job): Queued) {
        if self.closing.load(Ordering::SeqCst) {
            return job.finish(Err(Refusal::NotLeader));
        }
        let Some(open) = &mut self.open else {
            return job.finish(Err(Refusal::NotLeader));
        };
        if !job.ticket().begin() {
            return job.finish(Err(Refusal::Timeout("it waited for its turn to write".into())));
        }
        match open.writer.connect() {
            Ok(false) => {}
            Ok(true) => *self.interrupt.lock() = open.writer.interrupt_handle(),
            // It has seen nothing and done nothing.
            Err(error) => return job.finish(Err(Refusal::Rejected(error.to_string()))),
        }
        let term = open.term;
        let before = open.writer.captured();
        open.writer.take_changed_tables();
        let began = Instant::now();
        self.setup.recorder.queue_time.time(began - queued);
        let ran = run_transaction(&open.writer, job.as_mut(), term, &self.closing);
        self.setup.recorder.transaction_time.time(began.elapsed());
        let tables = open.writer.take_changed_tables();
        let reset = open.writer.reset_connection();
        if let Ok(true) = reset {
            *self.interrupt.lock() = open.writer.interrupt_handle();
        }
        let after = open.writer.captured();
        let wrote = after.transactions != before.transactions;
        let refusal = match ran {
            Ok(sidecars) => {
                if wrote {
                    open.sidecars.extend(sidecars);
                    open.tables.extend(tables);
                }
                None
            }
            Err(refusal) => Some(refusal),
        };
        if let Err(error) = &reset {
            tracing::error!(database = self.setup.database, %error, "the writer connection could not be reset: closing it");
            let _ = self.control_sender.send(Control::Close {
                incarnation: Some(open.incarnation),
                why: "the writer connection failed".into(),
                done: None,
            });
        }
        self.await_commit(Waiter { job, wrote, refusal, term });
        if self.open.as_ref().is_some_and(|open| {
            let group = open.writer.captured();
            open.waiters.len() >= MAX_GROUP_TRANSACTIONS || group.bytes >= MAX_GROUP_BYTES
        }) {
            self.wait_for_room();
            self.seal();
        }
    }

    /// INV-NOTHING-LEAKS: puts the caller behind the newest version that it may have seen.
    fn await_commit(&mut self, waiter: Waiter) {
        let open = self.open.as_mut().expect("invariant: a job has just run");
        if waiter.wrote || !open.waiters.is_empty() {
            open.waiters.push(waiter);
        } else if let Some(waiter) = self.setup.pipeline.attach(waiter) {
            waiter.answer(None);
        }
    }

    /// Back-pressure: too much is on its way.
    fn wait_for_room(&mut self) {
        while !self.setup.pipeline.wait_for_room(GROUPS_IN_FLIGHT, CLOSE_CHECK_INTERVAL) {
            if self.closing.load(Ordering::SeqCst) || !self.control.is_empty() {
                return;
            }
        }
    }

    /// Ends the open group and hands it to Raft.
    fn seal(&mut self) {
        if self.closing.load(Ordering::SeqCst) {
            return;
        }
        let Some(open) = &mut self.open else { return };
        let waiters = std::mem::take(&mut open.waiters);
        let sidecars = std::mem::take(&mut open.sidecars);
        let tables = std::mem::take(&mut open.tables);
        let tables = open.writer.tracks_tables().then(|| tables.into_iter().collect());
        match open.writer.seal() {
            Ok(Some(group)) => {
                open.sequence += 1;
                let origin = Origin { node: self.setup.node, incarnation: open.incarnation, sequence: open.sequence };
                let writers = waiters.iter().filter(|waiter| waiter.wrote).count();
                let bytes = group.page_set.len() + sidecars.iter().map(Bytes::len).sum::<usize>();
                self.setup.recorder.entry_transactions.observe(writers as u64);
                self.setup.recorder.entry_bytes.observe(bytes as u64);
                let span = tracing::debug_span!(
                    parent: None,
                    "entry",
                    database = self.setup.database,
                    term = open.term,
                    version = group.version.0,
                    transactions = writers,
                    bytes
                );
                self.setup.pipeline.push(open.sequence, group.version, waiters, span);
                let proposal = Proposal {
                    term: open.term,
                    database: self.setup.database.clone(),
                    tables,
                    origin,
                    sidecars,
                    page_set: group.page_set,
                };
                let failed = ProposalFailed { control: self.control_sender.clone(), incarnation: open.incarnation };
                self.setup.proposer.propose(proposal, failed);
            }
            Ok(None) => {
                // Only callers without effect: they wait for what they saw.
                for waiter in waiters {
                    if let Some(waiter) = self.setup.pipeline.attach(waiter) {
                        waiter.answer(None);
                    }
                }
            }
            Err(error) => {
                tracing::error!(database = self.setup.database, %error, "a group could not be sealed: it is dropped");
                for waiter in waiters {
                    waiter.job.finish(Err(match &error {
                        DatabaseError::DamagedPage(damage) => Refusal::Damaged(damage.clone()),
                        error => Refusal::Rejected(format!("the group could not be sealed: {error}")),
                    }));
                }
                self.close_writer("a group could not be sealed");
            }
        }
    }
}

/// BEGIN IMMEDIATE, the caller's work, COMMIT or ROLLBACK. Gives the sidecars of a committed transaction.
fn run_transaction(writer: &Writer, job: &mut dyn Job, term: u64, closing: &AtomicBool) -> Result<Vec<Bytes>, Refusal> {
    // Of an earlier caller that went on after it.
    let _ = writer.take_too_large();
    let _ = writer.take_damage();
    match run_undamaged(writer, job, term, closing) {
        // Whatever SQLite made of a page that could not be read.
        Err(refusal) => Err(writer.take_damage().map_or(refusal, Refusal::Damaged)),
        ran => ran,
    }
}

fn run_undamaged(writer: &Writer, job: &mut dyn Job, term: u64, closing: &AtomicBool) -> Result<Vec<Bytes>, Refusal> {
    let connection = writer.connection();
    let needs_transaction = job.needs_transaction();
    if needs_transaction {
        execute(connection, "BEGIN IMMEDIATE").map_err(Refusal::Sql)?;
        writer.hold_transaction();
    }
    let ticket = job.ticket().clone();
    if ticket.deadline().is_some() {
        let ticket = ticket.clone();
        writer.stop_check().set(move || ticket.must_stop());
    }
    let mut context = WriteContext { connection, sidecars: Vec::new(), term, closing, stop: writer.stop_check() };
    let ran = catch_unwind(AssertUnwindSafe(|| job.run(&mut context)));
    // Not for the COMMIT, nor for the next caller.
    writer.stop_check().clear();
    let late = || ticket.was_interrupted().then(|| Refusal::Timeout("the statement was interrupted".into()));
    let sidecars = context.sidecars;
    let held = !needs_transaction || writer.release_transaction();
    let damage = writer.take_damage();
    let refusal = match ran {
        Ok(true) if !needs_transaction => return Ok(sidecars),
        _ if damage.is_some() => damage.map(Refusal::Damaged),
        Ok(true) if !held => Some(late().unwrap_or_else(|| match writer.take_too_large() {
            Some(limit_bytes) => Refusal::TooLarge { limit_bytes },
            None => Refusal::Rejected("the closure ended the transaction itself: use savepoints instead".into()),
        })),
        Ok(true) => match execute(connection, "COMMIT") {
            Ok(()) => return Ok(sidecars),
            Err(error) => Some(writer.refusal(error)),
        },
        Ok(false) => late().or_else(|| writer.take_too_large().map(|limit_bytes| Refusal::TooLarge { limit_bytes })),
        Err(_) => Some(Refusal::Rejected("the closure panicked; its transaction was rolled back".into())),
    };
    if !connection.is_autocommit() {
        execute(connection, "ROLLBACK").map_err(Refusal::Sql)?;
    }
    match refusal {
        Some(refusal) => Err(refusal),
        None => Ok(Vec::new()),
    }
}

fn execute(connection: &rusqlite::Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.raw_execute().map(|_| ())
}
