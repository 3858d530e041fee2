//! openraft's own test suite for storage, on ours.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::machine::StateMachine;
use super::storage::LogStorage;
use super::types::TypeConfig;
use crate::database::reader_pool::ReaderPool;
use crate::database::replica::ReplicaOptions;
use crate::database::writer_thread::{Proposal, ProposalFailed, Proposer};
use crate::log::{Log, LogOptions};
use crate::state_machine::{Machine, MachineSetup};

struct NoProposer;

impl Proposer for NoProposer {
    fn propose(&self, _proposal: Proposal, failed: ProposalFailed) {
        failed.report("nothing is proposed here".into());
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStorage, StateMachine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStorage, StateMachine), StorageError<TypeConfig>> {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(&folder.path().join("log"), &LogOptions::default()).unwrap();
        let machine = Machine::open(MachineSetup {
            node: 1,
            directory: folder.path().join("db"),
            options: ReplicaOptions::default(),
            observers: Vec::new(),
            proposer: Arc::new(NoProposer),
            readers: Arc::new(ReaderPool::start(1).unwrap()),
        })
        .unwrap();
        // The suite purges without checkpoints: INV-PURGE-AFTER-CHECKPOINT is not its subject.
        let storage = LogStorage::new(log, Arc::new(AtomicU64::new(u64::MAX)));
        Ok((folder, storage, StateMachine::new(machine)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openraft_storage_suite() {
    Suite::test_all(Builder).await.unwrap();
}
