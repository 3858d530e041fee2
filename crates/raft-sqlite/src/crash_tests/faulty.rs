//! Each operation of the scripted workload fails once, and the power goes after it.

use std::sync::atomic::Ordering;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::disk::SimulatedDisk;
use super::node::{Progress, StorageNode, run};
use super::script::script;

#[test]
fn a_failing_operation_loses_nothing_acknowledged() {
    let script = script(9);
    let disk = SimulatedDisk::default();
    drop(run(&disk, &script, &Progress::default()).unwrap());
    let operations = disk.operations();
    let step = if super::is_exhaustive() { 1 } else { 7 };
    let (mut told, mut borne) = (0, 0);
    for number in (0..operations).step_by(step) {
        let disk = SimulatedDisk::default();
        disk.set_faulty(number);
        let progress = Progress::default();
        match run(&disk, &script, &progress) {
            Err(error) => {
                told += 1;
                assert!(!error.is_full() && error.to_string().contains("/data/"), "operation {number}: {error}");
            }
            // What is only tidying may be left for later.
            Ok(node) => {
                borne += 1;
                node.check_state(&script).unwrap();
            }
        }
        assert_eq!(disk.faults(), 1, "operation {number}");
        // What a failed sync left in memory only is gone now.
        let disk = disk.state().after_power_loss(&mut StdRng::seed_from_u64(number));
        let node = StorageNode::start(&disk).unwrap_or_else(|error| panic!("operation {number}: {error}"));
        let last = node.last().max(node.applied());
        let acknowledged = progress.acknowledged.load(Ordering::SeqCst);
        assert!(last >= acknowledged, "operation {number}: entry {acknowledged} was acknowledged, {last} is the last");
        assert!(node.found_vote() >= progress.vote_acknowledged.load(Ordering::SeqCst), "operation {number}");
        node.check_state(&script).unwrap();
        drop(node);
        let node = run(&disk, &script, &Progress::default()).unwrap();
        assert_eq!(node.applied(), script.entries.len() as u64);
        node.check_state(&script).unwrap();
    }
    println!("{told} failures told, {borne} borne");
    assert!(told > 50, "only {told} failures were told");
}
