//! The same handles for programs without tokio: each call blocks its thread until it is done.
//!
//! A [`Node`] or a [`Client`] brings a runtime with threads of its own, which ends with its last handle. Called from inside an async
//! runtime, these functions would stop one of its threads: they panic there, with tokio's words.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use raft_sqlite::{NodeConfig, ReadConsistency, blocking};
//!
//! let node = blocking::Node::start(NodeConfig::single("/var/lib/example"))?;
//! let db = node.database("app");
//! db.execute("CREATE TABLE IF NOT EXISTS word(id INTEGER PRIMARY KEY, text TEXT)")?;
//! db.execute(("INSERT INTO word(text) VALUES (?)", ["hello"]))?;
//! for row in db.query_rows("SELECT text FROM word", ReadConsistency::Linearizable)? {
//!     println!("{}", row?.get::<String>("text")?);
//! }
//! node.shutdown()?;
//! # Ok(())
//! # }
//! ```

use std::future::Future;
use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use crate::client::{
    Change, ClientBuilder, ConnectError, Executed, Migrated, Migration, MigrationError, ReadConsistency, Row,
    RowStream, Rows, SqlError, Statement, TransactionError, TransactionOptions,
};
use crate::config::NodeConfig;
use crate::database::DatabaseError;
use crate::database::job::WriteContext;
use crate::error::{ReadError, StartError, WriteError};
use crate::node::NodeBuilder;
use crate::page::Version;
use crate::{NodeId, rusqlite};

/// The runtime behind a node or a client.
#[derive(Clone, Debug)]
struct Threads(Arc<Runtime>);

impl Threads {
    fn start() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("raft-sqlite").enable_all().build()?;
        Ok(Self(Arc::new(runtime)))
    }

    fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.0.block_on(future)
    }
}

/// A running [`crate::Node`].
#[derive(Clone, Debug)]
pub struct Node {
    node: crate::Node,
    threads: Threads,
}

impl Node {
    /// Starts a node and waits until a leader is known, for as long as its members' start may take: several election time-outs.
    ///
    /// # Errors
    /// See [`StartError`]. That no leader is known yet is none: calls wait for one.
    pub fn start(config: NodeConfig) -> Result<Self, StartError> {
        Self::start_with(crate::Node::builder(config))
    }

    /// The same with what a builder has.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(builder: NodeBuilder) -> Result<Self, StartError> {
        let threads = Threads::start().map_err(|error| StartError::Raft(format!("no threads: {error}")))?;
        let node = threads.wait(async {
            let node = builder.start().await?;
            let patience = node.inner.patience();
            let _ = node.wait_for_leader(patience).await;
            Ok::<_, StartError>(node)
        })?;
        Ok(Self { node, threads })
    }

    /// The node itself: what does not wait is called on it.
    pub fn node(&self) -> &crate::Node {
        &self.node
    }

    /// See [`crate::Node::database`].
    pub fn database(&self, name: &str) -> LocalDatabase {
        let local = self.node.database(name);
        let database = Database { database: local.clone().into(), threads: self.threads.clone() };
        LocalDatabase { local, database }
    }

    /// See [`crate::Node::wait_for_leader`].
    ///
    /// # Errors
    /// As there.
    pub fn wait_for_leader(&self, patience: Duration) -> Result<NodeId, ReadError> {
        self.threads.wait(self.node.wait_for_leader(patience))
    }

    /// See [`crate::Node::create_database`].
    ///
    /// # Errors
    /// As there.
    pub fn create_database(&self, name: &str) -> Result<bool, WriteError> {
        self.threads.wait(self.node.create_database(name))
    }

    /// See [`crate::Node::drop_database`].
    ///
    /// # Errors
    /// As there.
    pub fn drop_database(&self, name: &str) -> Result<bool, WriteError> {
        self.threads.wait(self.node.drop_database(name))
    }

    /// See [`crate::Node::shutdown`].
    ///
    /// # Errors
    /// As there.
    pub fn shutdown(&self) -> Result<(), DatabaseError> {
        self.threads.wait(self.node.shutdown())
    }
}

/// A connected [`crate::Client`].
#[derive(Clone, Debug)]
pub struct Client {
    client: crate::Client,
    threads: Threads,
}

impl Client {
    /// See [`crate::Client::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(addresses: impl IntoIterator<Item = impl Into<String>>) -> Result<Self, ConnectError> {
        Self::connect_with(crate::Client::builder(addresses))
    }

    /// The same with settings.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_with(builder: ClientBuilder) -> Result<Self, ConnectError> {
        let threads = Threads::start().map_err(|error| ConnectError::Configuration(format!("no threads: {error}")))?;
        let client = threads.wait(builder.connect())?;
        Ok(Self { client, threads })
    }

    /// The client itself: what does not wait is called on it.
    pub fn client(&self) -> &crate::Client {
        &self.client
    }

    /// See [`crate::Client::database`].
    pub fn database(&self, name: &str) -> Database {
        Database { database: self.client.database(name), threads: self.threads.clone() }
    }

    /// See [`crate::Client::create_database`].
    ///
    /// # Errors
    /// As there.
    pub fn create_database(&self, name: &str) -> Result<bool, WriteError> {
        self.threads.wait(self.client.create_database(name))
    }

    /// See [`crate::Client::drop_database`].
    ///
    /// # Errors
    /// As there.
    pub fn drop_database(&self, name: &str) -> Result<bool, WriteError> {
        self.threads.wait(self.client.drop_database(name))
    }
}

/// A [`crate::Database`] whose calls block.
#[derive(Clone, Debug)]
pub struct Database {
    database: crate::Database,
    threads: Threads,
}

/// What every call of [`Database`] that writes ends with.
type Written<T> = Result<T, WriteError<SqlError>>;

impl Database {
    /// Its name.
    pub fn name(&self) -> &str {
        self.database.name()
    }

    /// See [`crate::Database::execute`].
    ///
    /// # Errors
    /// As there.
    pub fn execute(&self, statement: impl Into<Statement>) -> Written<Executed> {
        self.threads.wait(self.database.execute(statement))
    }

    /// See [`crate::Database::batch`].
    ///
    /// # Errors
    /// As there.
    pub fn batch(&self, statements: Vec<Statement>) -> Written<Vec<Executed>> {
        self.threads.wait(self.database.batch(statements))
    }

    /// See [`crate::Database::execute_batch`].
    ///
    /// # Errors
    /// As there.
    pub fn execute_batch(&self, sql: &str) -> Written<()> {
        self.threads.wait(self.database.execute_batch(sql))
    }

    /// See [`crate::Database::query`].
    ///
    /// # Errors
    /// As there.
    pub fn query(&self, statement: impl Into<Statement>, consistency: ReadConsistency) -> Result<Rows, ReadError> {
        self.threads.wait(self.database.query(statement, consistency))
    }

    /// See [`crate::Database::query_row`].
    ///
    /// # Errors
    /// As there.
    pub fn query_row(&self, statement: impl Into<Statement>, consistency: ReadConsistency) -> Result<Row, ReadError> {
        self.threads.wait(self.database.query_row(statement, consistency))
    }

    /// See [`crate::Database::query_optional`].
    ///
    /// # Errors
    /// As there.
    pub fn query_optional(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> Result<Option<Row>, ReadError> {
        self.threads.wait(self.database.query_optional(statement, consistency))
    }

    /// See [`crate::Database::query_as`].
    ///
    /// # Errors
    /// As there.
    pub fn query_as<T: DeserializeOwned>(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> Result<Vec<T>, ReadError> {
        self.threads.wait(self.database.query_as(statement, consistency))
    }

    /// Runs a query whose rows are made as the iterator asks for them; see [`crate::Database::query_stream`].
    ///
    /// # Errors
    /// As there.
    pub fn query_rows(
        &self,
        statement: impl Into<Statement>,
        consistency: ReadConsistency,
    ) -> Result<RowIterator, ReadError> {
        let rows = self.threads.wait(self.database.query_stream(statement, consistency))?;
        Ok(RowIterator { rows, threads: self.threads.clone() })
    }

    /// See [`crate::Database::with_timeout`].
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { database: self.database.with_timeout(timeout), threads: self.threads.clone() }
    }

    /// See [`crate::Database::changes`].
    ///
    /// # Errors
    /// As there.
    pub fn changes(&self, after: Option<Version>) -> Result<Changes, ReadError> {
        let changes = self.threads.wait(self.database.changes(after))?;
        Ok(Changes { changes, threads: self.threads.clone() })
    }

    /// See [`crate::Database::begin`].
    ///
    /// # Errors
    /// As there.
    pub fn begin(&self) -> Result<Transaction, TransactionError> {
        self.begin_with(TransactionOptions::default())
    }

    /// See [`crate::Database::begin_with`].
    ///
    /// # Errors
    /// As there.
    pub fn begin_with(&self, options: TransactionOptions) -> Result<Transaction, TransactionError> {
        let transaction = self.threads.wait(self.database.begin_with(options))?;
        Ok(Transaction { transaction, threads: self.threads.clone() })
    }

    /// See [`crate::Database::migrate`].
    ///
    /// # Errors
    /// As there.
    pub fn migrate(&self, migrations: &[Migration]) -> Result<Migrated, MigrationError> {
        self.threads.wait(self.database.migrate(migrations))
    }

    /// See [`crate::Database::wait_for_version`].
    ///
    /// # Errors
    /// As there.
    pub fn wait_for_version(&self, version: Version, patience: Duration) -> Result<(), ReadError> {
        self.threads.wait(self.database.wait_for_version(version, patience))
    }
}

/// A [`crate::Transaction`] whose calls block. Dropped, it is rolled back.
#[derive(Debug)]
pub struct Transaction {
    transaction: crate::Transaction,
    threads: Threads,
}

impl Transaction {
    /// See [`crate::Transaction::execute`].
    ///
    /// # Errors
    /// As there.
    pub fn execute(&mut self, statement: impl Into<Statement>) -> Result<Executed, TransactionError> {
        self.threads.wait(self.transaction.execute(statement))
    }

    /// See [`crate::Transaction::query`].
    ///
    /// # Errors
    /// As there.
    pub fn query(&mut self, statement: impl Into<Statement>) -> Result<Rows, TransactionError> {
        self.threads.wait(self.transaction.query(statement))
    }

    /// See [`crate::Transaction::query_row`].
    ///
    /// # Errors
    /// As there.
    pub fn query_row(&mut self, statement: impl Into<Statement>) -> Result<Row, TransactionError> {
        self.threads.wait(self.transaction.query_row(statement))
    }

    /// See [`crate::Transaction::savepoint`].
    ///
    /// # Errors
    /// As there.
    pub fn savepoint(&mut self, name: &str) -> Result<(), TransactionError> {
        self.threads.wait(self.transaction.savepoint(name))
    }

    /// See [`crate::Transaction::release`].
    ///
    /// # Errors
    /// As there.
    pub fn release(&mut self, name: &str) -> Result<(), TransactionError> {
        self.threads.wait(self.transaction.release(name))
    }

    /// See [`crate::Transaction::rollback_to`].
    ///
    /// # Errors
    /// As there.
    pub fn rollback_to(&mut self, name: &str) -> Result<(), TransactionError> {
        self.threads.wait(self.transaction.rollback_to(name))
    }

    /// See [`crate::Transaction::commit`].
    ///
    /// # Errors
    /// As there.
    pub fn commit(self) -> Result<Version, TransactionError> {
        self.threads.wait(self.transaction.commit())
    }

    /// See [`crate::Transaction::rollback`].
    ///
    /// # Errors
    /// As there.
    pub fn rollback(self) -> Result<(), TransactionError> {
        self.threads.wait(self.transaction.rollback())
    }
}

/// A [`crate::LocalDatabase`] whose calls block.
#[derive(Clone, Debug)]
pub struct LocalDatabase {
    local: crate::LocalDatabase,
    database: Database,
}

impl Deref for LocalDatabase {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.database
    }
}

impl LocalDatabase {
    /// See [`crate::LocalDatabase::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write<T, E, F>(&self, closure: F) -> Result<T, WriteError<E>>
    where
        F: FnOnce(&mut WriteContext<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        self.database.threads.wait(self.local.write(closure))
    }

    /// See [`crate::LocalDatabase::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read<T, F>(&self, closure: F) -> Result<T, ReadError>
    where
        F: FnOnce(&rusqlite::Connection, Version) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.database.threads.wait(self.local.read(closure))
    }
}

/// The rows of a query, one by one; see [`RowStream`].
#[derive(Debug)]
pub struct RowIterator {
    rows: RowStream,
    threads: Threads,
}

impl RowIterator {
    /// Column names.
    pub fn columns(&self) -> &[String] {
        self.rows.columns()
    }
}

impl Iterator for RowIterator {
    type Item = Result<Row, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.threads.wait(self.rows.next_row()).transpose()
    }
}

/// What is committed, one after the other; each call waits for the next. See [`crate::Changes`].
#[derive(Debug)]
pub struct Changes {
    changes: crate::Changes,
    threads: Threads,
}

impl Changes {
    /// The version after which it begins.
    pub fn start(&self) -> Version {
        self.changes.start()
    }
}

impl Iterator for Changes {
    type Item = Result<Change, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.threads.wait(futures_util::StreamExt::next(&mut self.changes))
    }
}
