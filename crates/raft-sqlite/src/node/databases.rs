//! Making and dropping databases, from any node.

use std::sync::Weak;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use openraft::errors::{ClientWriteError, RaftError};
use prost::Message as _;

use super::calls::CallHandler;
use super::{Node, NodeInner};
use crate::client::remote_sql;
use crate::consensus::types::CommandBytes;
use crate::error::WriteError;
use crate::network::proto;
use crate::network::proto::database_change::Kind;
use crate::state_machine::CommandOutcome;
use crate::state_machine::command::{Command, check_database_name};

/// Name of the built-in handler.
pub(super) const HANDLER: &str = remote_sql::DATABASES_HANDLER;

impl Node {
    /// Makes an empty database, through any node. True: it was made; false: it is there already. It is there on this node when this
    /// returns, on the others as soon as they have applied it.
    ///
    /// Writing to a database makes it, too. Any number of them live in one cluster; each has a writer of its own, so a transaction in
    /// one never waits for a transaction in another.
    ///
    /// # Errors
    /// [`WriteError::Rejected`] for a name that is none; else see [`WriteError::class`].
    pub async fn create_database(&self, name: &str) -> Result<bool, WriteError> {
        self.change_database(name, Kind::Create).await
    }

    /// Drops a database with all its content, through any node. True: it was dropped; false: there was none. Reads that have begun end
    /// well; writes that wait are refused. Its files go with the next checkpoint of each node, soon.
    ///
    /// # Errors
    /// As [`Self::create_database`].
    pub async fn drop_database(&self, name: &str) -> Result<bool, WriteError> {
        self.change_database(name, Kind::Drop).await
    }

    async fn change_database(&self, name: &str, kind: Kind) -> Result<bool, WriteError> {
        check_database_name(name).map_err(WriteError::Rejected)?;
        let reply = self.call_leader(HANDLER, remote_sql::encode_database_change(name, kind)).await;
        let reply = remote_sql::decode_database_change(reply)?;
        let mut applied = self.inner.machine.applied_index();
        super::read_index::wait_applied(&mut applied, reply.index, self.inner.patience())
            .await
            .map_err(|why| WriteError::OutcomeUnknown(format!("done, but not applied on this node yet: {why}")))?;
        Ok(reply.changed)
    }
}

impl NodeInner {
    /// On the leader: through Raft, and the new database's writer opened.
    pub(crate) async fn apply_database_change(
        &self,
        name: &str,
        kind: Kind,
    ) -> Result<proto::DatabaseChangeReply, WriteError> {
        check_database_name(name).map_err(WriteError::Rejected)?;
        let now = self.leadership.borrow().clone();
        if !now.writable_here {
            return Err(WriteError::NotLeader { leader: now.leader });
        }
        if self.storage.is_full() {
            return Err(WriteError::DiskFull);
        }
        let database = name.to_owned();
        let command = match kind {
            Kind::Create => Command::CreateDatabase { database },
            Kind::Drop => Command::DropDatabase { database },
        };
        let written = match self.raft.client_write(CommandBytes(command.encode())).await {
            Ok(written) => written,
            Err(RaftError::Fatal(fatal)) => return Err(WriteError::Fatal(fatal.to_string())),
            // No proof that it had no effect.
            Err(RaftError::APIError(error @ ClientWriteError::ForwardToLeader(_))) => {
                return Err(WriteError::OutcomeUnknown(error.to_string()));
            }
            Err(RaftError::APIError(error)) => return Err(WriteError::Rejected(error.to_string())),
        };
        if kind == Kind::Create {
            // One that cannot be opened now is tried again as long as this node leads.
            let _ = self.machine.open_writer(name, now.term).await;
        }
        let changed = *written.response() == CommandOutcome::Done;
        Ok(proto::DatabaseChangeReply { changed, index: written.log_id().index })
    }
}

/// The leader's end.
pub(super) struct DatabasesHandler {
    pub node: Weak<NodeInner>,
}

impl CallHandler for DatabasesHandler {
    fn call(&self, payload: Bytes) -> BoxFuture<'static, Result<Bytes, Bytes>> {
        let node = self.node.clone();
        Box::pin(async move {
            let fail = remote_sql::encode_plain_failure;
            let rejected = |text: String| fail(WriteError::Rejected(text));
            let node = node.upgrade().ok_or_else(|| rejected("the node stops".into()))?;
            let change = proto::DatabaseChange::decode(payload).map_err(|error| rejected(error.to_string()))?;
            let kind = Kind::try_from(change.kind).map_err(|error| rejected(error.to_string()))?;
            let reply = node.apply_database_change(&change.name, kind).await.map_err(fail)?;
            Ok(Bytes::from(reply.encode_to_vec()))
        })
    }
}
