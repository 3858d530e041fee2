//! Following what is committed: versions, and the tables they changed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::Stream;
use tokio::sync::mpsc;

use super::{Database, Way};
use crate::error::ReadError;
use crate::node::Node;
use crate::page::Version;

/// Something was committed and is visible to readers of the member that tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Read at [`ReadConsistency::AtLeast`](super::ReadConsistency::AtLeast) it to see it through any handle.
    pub version: Version,
    /// Tables that may have changed, sorted: those that the statements name, their triggers and foreign keys; `sqlite_schema` for the
    /// schema. None: any table may have changed since the change before. So it is where
    /// [`NodeConfig::track_tables`](crate::NodeConfig::track_tables) is off on the leader, after a snapshot, and for whoever is too far
    /// behind to be told each version.
    pub tables: Option<Arc<[String]>>,
}

/// Sent by a member, or by the task that speaks to members.
pub(crate) type Told = Result<Change, ReadError>;

/// The changes of a database, in order, none twice and none left out; see [`Database::changes`].
///
/// Take them with [`Self::next_change`], or as a [`Stream`].
#[derive(Debug)]
pub struct Changes {
    start: Version,
    told: mpsc::Receiver<Told>,
}

impl Changes {
    /// The version after which it begins.
    pub fn start(&self) -> Version {
        self.start
    }

    /// Waits for the next one.
    ///
    /// # Errors
    /// [`ReadError::NoSuchDatabase`]: it was dropped. [`ReadError::NoLeader`]: no member could be reached within the client's patience.
    /// [`ReadError::Fatal`]: the node was shut down. Nothing comes after an error.
    pub async fn next_change(&mut self) -> Result<Change, ReadError> {
        match std::future::poll_fn(|context| self.poll_change(context)).await {
            Some(told) => told,
            None => Err(ReadError::Fatal("the changes have ended".into())),
        }
    }

    fn poll_change(&mut self, context: &mut Context<'_>) -> Poll<Option<Told>> {
        let told = ready!(self.told.poll_recv(context));
        if let Some(Err(_)) = &told {
            self.told.close();
        }
        Poll::Ready(told)
    }
}

impl Stream for Changes {
    type Item = Result<Change, ReadError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_change(context)
    }
}

impl Database {
    /// Follows what is committed, as this node, or the member that the client is connected to, applies it. `after`: begins with the
    /// version behind this one, which a [`Change`] or a write has told; None: with the next one. A client goes on with another member
    /// when its own is gone.
    ///
    /// # Errors
    /// [`ReadError::NoSuchDatabase`]; else as [`Self::query`].
    pub async fn changes(&self, after: Option<Version>) -> Result<Changes, ReadError> {
        let (start, told) = match self.way() {
            Way::Node(node) => node.changes(self.name(), after)?,
            Way::Client(client) => client.changes(self.name(), after).await?,
        };
        Ok(Changes { start, told })
    }
}

impl Node {
    /// Where it begins, and what comes.
    pub(crate) fn changes(
        &self,
        name: &str,
        after: Option<Version>,
    ) -> Result<(Version, mpsc::Receiver<Told>), ReadError> {
        let inner = &self.inner;
        if let Some(why) = inner.machine.broken() {
            return Err(ReadError::Fatal(why));
        }
        let no_database = || ReadError::NoSuchDatabase(name.to_owned());
        let feed = inner.machine.database(name).ok_or_else(no_database)?.feed.clone();
        let mut state = feed.follow();
        let mut last = after.unwrap_or(state.borrow().newest);
        let start = last;
        let (sender, receiver) = mpsc::channel(16);
        let (machine, dropped) = (inner.machine.clone(), no_database());
        tokio::spawn(async move {
            loop {
                for (version, tables) in feed.after(last) {
                    last = version;
                    if sender.send(Ok(Change { version, tables })).await.is_err() {
                        return;
                    }
                }
                if state.borrow_and_update().ended {
                    break;
                }
                let seen = last;
                tokio::select! {
                    next = state.wait_for(|state| state.ended || state.newest > seen) => if next.is_err() { break },
                    () = sender.closed() => return,
                }
            }
            let stops = machine.is_stopping();
            let why = if stops { ReadError::Fatal("it was shut down".into()) } else { dropped };
            let _ = sender.send(Err(why)).await;
        });
        Ok((start, receiver))
    }
}
