//! No room at each operation of the scripted workload.

use std::sync::atomic::Ordering;

use super::disk::SimulatedDisk;
use super::node::{Progress, StorageNode, run};
use super::script::script;

/// Attempts that fail before there is room again: more than one call makes, and than a retry.
const ATTEMPTS: u64 = 3;

#[test]
fn a_full_disk_at_every_operation_loses_nothing() {
    let script = script(5);
    let disk = SimulatedDisk::default();
    drop(run(&disk, &script, &Progress::default()).unwrap());
    let operations = disk.operations();
    let step = if super::is_exhaustive() { 1 } else { 9 };
    let (mut refused, mut restarts) = (0, 0);
    for from in (0..operations).step_by(step) {
        let disk = SimulatedDisk::default();
        disk.set_full(from, ATTEMPTS);
        let progress = Progress::default();
        // Each refusal is a typed error; the node is started again in that state until it goes on.
        let mut tries = 0;
        let node = loop {
            match run(&disk, &script, &progress) {
                Ok(node) => break node,
                Err(error) => assert!(error.is_full(), "operation {from}: {error}"),
            }
            if let Ok(node) = StorageNode::start(&disk) {
                assert!(node.last().max(node.applied()) >= progress.acknowledged.load(Ordering::SeqCst));
                node.check_state(&script).unwrap();
            }
            restarts += 1;
            tries += 1;
            assert!(tries <= ATTEMPTS, "operation {from}");
        };
        refused += disk.refused();
        assert_eq!(node.applied(), script.entries.len() as u64);
        node.check_state(&script).unwrap();
    }
    println!("{refused} refusals, {restarts} restarts");
    assert!(refused > 20 && restarts > 5, "{refused} refusals, {restarts} restarts");
}
