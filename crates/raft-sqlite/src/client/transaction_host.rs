//! Interactive transactions: the leader's end.
//!
//! ```text
//! caller ──requests──► host (task) ──commands──► writer thread: BEGIN IMMEDIATE, statements, COMMIT or ROLLBACK
//!        ◄──replies───                ◄─results──
//! ```
//! The writer thread begins it only when everything captured is committed and applied, and its first statement runs only after a round
//! of ReadIndex in the same leadership (INV-NOTHING-LEAKS). The task that goes away, for whatever reason, takes the commands' channel
//! with it, which ends the transaction at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use futures_util::{Stream, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::remote::describe;
use super::remote_sql::{run_statement, sql_error, to_failure, to_result};
use super::transaction::{NotBegun, Wire, begin_on};
use super::{LocalDatabase, SqlError};
use crate::NodeId;
use crate::database::job::{Effect, Job, Refusal, WriteContext};
use crate::database::ticket::{CancelOnDrop, Ticket};
use crate::error::WriteError;
use crate::network::client_proto::client_client::ClientClient;
use crate::network::client_proto::transaction_ended::Reason;
use crate::network::client_proto::transaction_reply::Reply;
use crate::network::client_proto::transaction_request::Request;
use crate::network::client_proto::{
    TransactionBegin, TransactionBegun, TransactionCommitted, TransactionEnded, TransactionReply, TransactionRequest,
};
use crate::network::proto;
use crate::node::Node;

/// How often the writer thread looks whether it is to close while a transaction is idle.
const CLOSE_CHECK_INTERVAL: Duration = Duration::from_millis(10);
/// How often a node looks for a leader to begin on.
const LEADER_RETRY_INTERVAL: Duration = Duration::from_millis(20);

enum Command {
    Statement(proto::SqlStatement, oneshot::Sender<Reply>),
    Commit,
    Rollback,
}

/// What both ends know of a transaction.
struct Shared {
    /// The caller has gone: a running statement is to be interrupted.
    gone: AtomicBool,
    /// From then on a running statement is interrupted, once it has begun.
    end: Mutex<Option<Instant>>,
    /// Why it was rolled back.
    ended: Mutex<Option<TransactionEnded>>,
}

impl Shared {
    fn must_stop(&self) -> bool {
        self.gone.load(Ordering::SeqCst) || self.end.lock().is_some_and(|end| Instant::now() >= end)
    }
}

/// On the writer thread.
struct Interactive {
    ticket: Arc<Ticket>,
    commands: crossbeam_channel::Receiver<Command>,
    /// Told the leadership's term once the transaction is open.
    open: Option<oneshot::Sender<u64>>,
    done: oneshot::Sender<Result<Effect, Refusal>>,
    shared: Arc<Shared>,
    idle: Duration,
    total: Duration,
}

impl Interactive {
    fn ended(&self, reason: Reason, message: String) -> bool {
        self.shared.ended.lock().get_or_insert(TransactionEnded { reason: reason.into(), message });
        false
    }
}

impl Job for Interactive {
    fn needs_transaction(&self) -> bool {
        true
    }

    fn needs_committed_state(&self) -> bool {
        true
    }

    fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket
    }

    fn run(&mut self, context: &mut WriteContext<'_>) -> bool {
        let end = Instant::now() + self.total;
        *self.shared.end.lock() = Some(end);
        let shared = self.shared.clone();
        context.stop_when(move || shared.must_stop());
        if self.open.take().is_none_or(|open| open.send(context.term()).is_err()) {
            return self.ended(Reason::RolledBack, String::new());
        }
        let mut idle_since = Instant::now();
        loop {
            if context.is_closing() {
                return self.ended(Reason::LeadershipLost, String::new());
            }
            match self.commands.recv_timeout(CLOSE_CHECK_INTERVAL) {
                Ok(Command::Statement(statement, reply)) => {
                    let ran = run_statement(context.connection(), &statement);
                    if context.is_closing() {
                        return self.ended(Reason::LeadershipLost, String::new());
                    }
                    if ran.is_err() && Instant::now() >= end {
                        return self.ended(Reason::TotalTimeout, String::new());
                    }
                    if context.connection().is_autocommit() {
                        let why = ran.err().map_or(statement.sql, |error| sql_error(&error, 0).message);
                        return self.ended(Reason::ByStatement, why);
                    }
                    let _ = reply.send(match ran {
                        Ok(result) => Reply::Result(to_result(&result)),
                        Err(error) => Reply::Refused(to_failure(&WriteError::Closure(sql_error(&error, 0)))),
                    });
                    idle_since = Instant::now();
                }
                Ok(Command::Commit) => return true,
                Ok(Command::Rollback) | Err(RecvTimeoutError::Disconnected) => {
                    return self.ended(Reason::RolledBack, String::new());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if Instant::now() >= end {
                return self.ended(Reason::TotalTimeout, String::new());
            }
            if idle_since.elapsed() >= self.idle {
                return self.ended(Reason::IdleTimeout, String::new());
            }
        }
    }

    fn finish(self: Box<Self>, outcome: Result<Effect, Refusal>) {
        let _ = self.done.send(outcome);
    }
}

/// Ends the transaction when the task that serves it ends.
struct GoneOnDrop(Arc<Shared>);

impl Drop for GoneOnDrop {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::SeqCst);
    }
}

/// What goes back to the caller: replies, then perhaps that the connection to the leader broke.
pub(crate) type Replies = mpsc::Sender<Result<TransactionReply, Status>>;

async fn reply_with(replies: &Replies, reply: Reply) -> Result<(), Gone> {
    replies.send(Ok(TransactionReply { reply: Some(reply) })).await.map_err(|_| Gone)
}

/// The caller has gone.
struct Gone;

/// Serves one transaction until it ends or `requests` does: here if this node leads, else by passing it on to the leader.
pub(crate) async fn serve(
    node: Node,
    mut requests: impl Stream<Item = TransactionRequest> + Send + Unpin,
    replies: Replies,
) {
    let begin = match requests.next().await {
        Some(TransactionRequest { request: Some(Request::Begin(begin)) }) => begin,
        Some(_) => {
            let error = WriteError::Rejected("a transaction begins with its bounds".into());
            let _ = reply_with(&replies, Reply::Failed(to_failure(&error))).await;
            return;
        }
        None => return,
    };
    if begin.cluster_id != node.cluster_id() {
        let why = format!(
            "wrong cluster: the transaction is for {:016x}, this member belongs to {:016x}",
            begin.cluster_id,
            node.cluster_id()
        );
        let _ = replies.send(Err(Status::failed_precondition(why))).await;
        return;
    }
    let leads = node.inner.leadership.borrow().leader == Some(node.id());
    if begin.passed_on || leads {
        if let Ok(last) = host(&node, begin, &mut requests, &replies).await {
            let _ = reply_with(&replies, last).await;
        }
    } else {
        let _ = relay(&node, begin, requests, &replies).await;
    }
}

/// Passes requests on to the leader, and its replies back.
async fn relay(
    node: &Node,
    begin: TransactionBegin,
    mut requests: impl Stream<Item = TransactionRequest> + Send + Unpin,
    replies: &Replies,
) -> Result<(), Gone> {
    let mut wire = tokio::select! {
        begun = begin_from(node, begin) => match begun {
            Ok(wire) => wire,
            Err(error) => return reply_with(replies, Reply::Failed(to_failure(&error))).await,
        },
        // Nothing may come before it has begun: this is the caller's end.
        _ = requests.next() => return Err(Gone),
    };
    reply_with(replies, Reply::Begun(TransactionBegun {})).await?;
    loop {
        tokio::select! {
            request = requests.next() => {
                // Dropped, the wire ends, and with it the transaction. What cannot be sent is told by the replies.
                let _ = wire.requests.send(request.ok_or(Gone)?).await;
            }
            reply = wire.replies.next() => match reply {
                Some(Ok(reply)) => replies.send(Ok(reply)).await.map_err(|_| Gone)?,
                Some(Err(why)) => return replies.send(Err(Status::unavailable(why))).await.map_err(|_| Gone),
                None => return Ok(()),
            },
        }
    }
}

/// Runs it on this node's writer thread; the last reply.
async fn host(
    node: &Node,
    begin: TransactionBegin,
    requests: &mut (impl Stream<Item = TransactionRequest> + Send + Unpin),
    replies: &Replies,
) -> Result<Reply, Gone> {
    let failed = |error: WriteError<SqlError>| Ok(Reply::Failed(to_failure(&error)));
    let not_leading = || failed(WriteError::NotLeader { leader: None });
    if !node.inner.leadership.borrow().writable_here {
        return not_leading();
    }
    let bound = node.inner.config.max_transaction_duration;
    let (idle, total) = (Duration::from_millis(begin.idle_timeout_ms), Duration::from_millis(begin.total_timeout_ms));
    if idle > bound || total > bound {
        return failed(WriteError::Rejected(format!(
            "the transaction asks for {} ms idle and {} ms in all, the leader allows {} ms: ask for less, or raise max_transaction_duration",
            idle.as_millis(),
            total.as_millis(),
            bound.as_millis()
        )));
    }
    let database = node.database(&begin.database);
    let ticket = Ticket::new(None);
    let _cancel = CancelOnDrop(ticket.clone());
    let shared = Arc::new(Shared { gone: AtomicBool::new(false), end: Mutex::new(None), ended: Mutex::new(None) });
    let _gone = GoneOnDrop(shared.clone());
    let (commands, receiver) = crossbeam_channel::bounded(1);
    let (open, opened) = oneshot::channel();
    let (done, mut finished) = oneshot::channel();
    let job = Interactive {
        ticket: ticket.clone(),
        commands: receiver,
        open: Some(open),
        done,
        shared: shared.clone(),
        idle,
        total,
    };
    let queue_time = Duration::from_millis(begin.queue_timeout_ms).min(bound);
    let turn = async {
        database.submit_job(Box::new(job)).await?;
        Ok::<_, WriteError<SqlError>>(opened.await.ok())
    };
    let term = tokio::select! {
        term = turn => match term {
            Ok(term) => term,
            Err(error) => return failed(error),
        },
        // Nothing may come before it has begun: this is the caller's end.
        _ = requests.next() => return Err(Gone),
        () = tokio::time::sleep(queue_time) => {
            return failed(WriteError::Timeout("the transaction waited for its turn: others held the writer".into()));
        }
    };
    let Some(term) = term else {
        return Ok(outcome(node, &database, finished.await, &shared).await);
    };
    let confirmed = node.inner.confirm().await.ok();
    if confirmed.and_then(|confirmed| confirmed.own_term) != Some(term) {
        return not_leading();
    }
    reply_with(replies, Reply::Begun(TransactionBegun {})).await?;
    loop {
        let request = tokio::select! {
            request = requests.next() => request.ok_or(Gone)?,
            finished = &mut finished => return Ok(outcome(node, &database, finished, &shared).await),
        };
        let (answer, mut answered) = oneshot::channel();
        let command = match request.request {
            Some(Request::Statement(statement)) => Command::Statement(statement, answer),
            Some(Request::Commit(_)) => Command::Commit,
            Some(Request::Rollback(_)) => Command::Rollback,
            Some(Request::Begin(_)) | None => {
                let why = "a transaction begins once, and each request asks for something";
                return failed(WriteError::Rejected(why.into()));
            }
        };
        let is_statement = matches!(command, Command::Statement(..));
        // The thread takes one at a time. It takes no more when the transaction is over.
        if commands.try_send(command).is_err() || !is_statement {
            return Ok(outcome(node, &database, finished.await, &shared).await);
        }
        let reply = tokio::select! {
            biased;
            reply = &mut answered => match reply {
                Ok(reply) => reply,
                Err(_) => return Ok(outcome(node, &database, finished.await, &shared).await),
            },
            // A caller waits for its answer before it asks again: it has gone.
            _ = requests.next() => return Err(Gone),
        };
        reply_with(replies, reply).await?;
    }
}

/// What became of it, once the writer thread is done with it.
async fn outcome(
    node: &Node,
    database: &LocalDatabase,
    finished: Result<Result<Effect, Refusal>, oneshot::error::RecvError>,
    shared: &Shared,
) -> Reply {
    let failed = |error: WriteError<SqlError>| Reply::Failed(to_failure(&error));
    let finished = match finished {
        // Better words than the statement's own, which are about a full disk or a failed read.
        Ok(Err(refusal @ (Refusal::TooLarge { .. } | Refusal::Damaged(_)))) => return failed(refusal.into_error(None)),
        finished => finished,
    };
    if let Some(ended) = shared.ended.lock().take() {
        return Reply::Ended(ended);
    }
    let recorder = node.inner.machine.recorder();
    let leader: Option<NodeId> = node.inner.leadership.borrow().leader;
    match finished {
        Ok(Ok(Effect::Committed(version))) => {
            recorder.writes.add(1);
            Reply::Committed(TransactionCommitted { version: version.0 })
        }
        Ok(Ok(Effect::None { term })) => {
            let confirmed = node.inner.confirm().await.ok();
            if confirmed.and_then(|confirmed| confirmed.own_term) != Some(term) {
                return failed(WriteError::NotLeader { leader });
            }
            let version = node.database_statistics(database.name()).map_or(0, |now| now.version);
            Reply::Committed(TransactionCommitted { version })
        }
        Ok(Err(refusal)) => {
            let error = match refusal.into_error::<SqlError>(leader) {
                WriteError::Sql(error) => WriteError::Closure(sql_error(&error, 0)),
                other => other,
            };
            recorder.write_errors.count(error.class());
            failed(error)
        }
        Err(_) => failed(WriteError::Fatal("the writer has ended".into())),
    }
}

/// Begins a transaction from a node: here if it leads, else on the leader.
pub(super) async fn begin_from(node: &Node, begin: TransactionBegin) -> Result<Wire, WriteError<SqlError>> {
    let deadline = Instant::now() + Duration::from_millis(begin.queue_timeout_ms);
    let mut begin = TransactionBegin { cluster_id: node.cluster_id(), passed_on: true, ..begin };
    let mut leadership = node.leadership();
    loop {
        let leader = leadership.borrow_and_update().leader;
        let begun = match leader {
            Some(leader) if leader == node.id() => begin_on(serve_here(node), begin.clone()).await,
            Some(leader) => begin_on_member(node, leader, begin.clone()).await,
            None => Err(NotBegun::TryOn("no leader is known".into())),
        };
        let why = match begun {
            Ok(wire) => return Ok(wire),
            Err(NotBegun::Failed(error)) => return Err(error),
            Err(NotBegun::TryOn(why)) => why,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(WriteError::Timeout(format!("no leader let the transaction begin: {why}")));
        }
        begin.queue_timeout_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1);
        if let Ok(Err(_)) = tokio::time::timeout(left.min(LEADER_RETRY_INTERVAL), leadership.changed()).await {
            return Err(WriteError::Fatal("it was shut down".into()));
        }
    }
}

/// A transaction on this node.
fn serve_here(node: &Node) -> Wire {
    let (requests, received) = mpsc::channel(1);
    let (sender, replies) = mpsc::channel(2);
    tokio::spawn(serve(node.clone(), ReceiverStream::new(received), sender));
    let replies = ReceiverStream::new(replies).map(|reply| reply.map_err(|status| status.message().to_owned()));
    Wire { requests, replies: replies.boxed() }
}

async fn begin_on_member(node: &Node, leader: NodeId, begin: TransactionBegin) -> Result<Wire, NotBegun> {
    let urls = node.inner.peer_urls(leader);
    let url = urls.first().ok_or_else(|| NotBegun::TryOn(format!("member {leader} has no peer address")))?;
    let client = node.inner.channels.client_service(leader.0, url).map_err(NotBegun::TryOn)?;
    begin_remotely(client, begin).await
}

/// Begins on the member that `client` is connected to.
pub(super) async fn begin_remotely(
    mut client: ClientClient<Channel>,
    begin: TransactionBegin,
) -> Result<Wire, NotBegun> {
    let (requests, received) = mpsc::channel(1);
    let replies = client
        .transaction(ReceiverStream::new(received))
        .await
        .map_err(|status| NotBegun::TryOn(describe(&status)))?
        .into_inner();
    let replies = replies.map(|reply| reply.map_err(|status| describe(&status)));
    begin_on(Wire { requests, replies: replies.boxed() }, begin).await
}
