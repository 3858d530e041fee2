//! A power failure before every write, sync and change of names of the scripted workload.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::disk::{SimulatedDisk, State};
use super::node::{Progress, StorageNode, run};
use super::script::{Script, script};

/// The disk before an operation, and what had been promised by then.
struct Moment {
    disk: State,
    acknowledged: u64,
    submitted: u64,
    vote_acknowledged: u64,
    vote_submitted: u64,
}

fn moments(script: &Script) -> Vec<Moment> {
    let disk = SimulatedDisk::default();
    let moments = Arc::new(Mutex::new(Vec::new()));
    let progress = Arc::new(Progress::default());
    disk.set_hook({
        let (moments, progress) = (moments.clone(), progress.clone());
        move |state| {
            moments.lock().push(Moment {
                disk: state.clone(),
                acknowledged: progress.acknowledged.load(Ordering::SeqCst),
                submitted: progress.submitted.load(Ordering::SeqCst),
                vote_acknowledged: progress.vote_acknowledged.load(Ordering::SeqCst),
                vote_submitted: progress.vote_submitted.load(Ordering::SeqCst),
            });
        }
    });
    let node = run(&disk, script, &progress).unwrap();
    node.check_state(script).unwrap();
    drop(node);
    disk.clear_hook();
    std::mem::take(&mut *moments.lock())
}

fn restart_and_check(moment: &Moment, script: &Script, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut disk = moment.disk.after_power_loss(&mut random);
    // The power goes again while it recovers.
    for _ in 0..random.random_range(0..3) {
        disk.set_power(Some(random.random_range(0..40)));
        let _ = StorageNode::start(&disk);
        disk = disk.state().after_power_loss(&mut random);
    }
    let node = StorageNode::start(&disk).unwrap();
    let last = node.last().max(node.applied());
    assert!(last >= moment.acknowledged, "entry {} was acknowledged, {last} is the last", moment.acknowledged);
    assert!(last <= moment.submitted.max(moment.acknowledged), "{last} entries of {} submitted", moment.submitted);
    assert_eq!(node.applied(), last);
    let vote = node.found_vote();
    assert!(vote >= moment.vote_acknowledged && vote <= moment.vote_submitted, "vote {vote}");
    node.check_state(script).unwrap();
    drop(node);
    // It goes on.
    let progress = Progress::default();
    let node = run(&disk, script, &progress).unwrap();
    assert_eq!(node.applied(), script.entries.len() as u64);
    node.check_state(script).unwrap();
}

#[test]
fn a_node_survives_a_power_failure_before_every_operation() {
    let (scripts, images, step) = if super::is_exhaustive() { (4, 4, 1) } else { (1, 1, 5) };
    let mut restarts = 0;
    for seed in 0..scripts {
        let script = script(seed);
        let moments = moments(&script);
        assert!(moments.len() > 300, "only {} operations", moments.len());
        for (number, moment) in moments.iter().enumerate().skip(seed as usize % step).step_by(step) {
            for image in 0..images {
                let seed = seed << 32 | (number as u64) << 8 | image;
                let checked = std::panic::catch_unwind(|| restart_and_check(moment, &script, seed));
                assert!(checked.is_ok(), "script and image of seed {seed:#x}, before operation {number}");
                restarts += 1;
            }
        }
    }
    println!("{restarts} crash images");
}
