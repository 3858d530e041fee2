//! Physical compaction: the leader removes the rows that nobody needs any more, in small transactions in the background.
//!
//! Which rows those are, the key index knows: no scan. They are removed in the order they were written in, so that one
//! step touches few pages. When all are gone, REMOVED tells every node that its index may forget them too; until then
//! any new leader finds the same rows again, so a step that is lost costs nothing.
//!
//! One step at a time, each a transaction among those of the clients: a write waits at most for one step.

use super::ValueId;
use super::route::Inner;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Rows a step removes: about half a millisecond of the writer.
const ROWS_PER_STEP: usize = 512;
/// How long to wait after a step failed.
const PAUSE: Duration = Duration::from_millis(500);

/// Runs for as long as the store lives.
pub(super) async fn run(store: Weak<Inner>) {
    let watched = store.upgrade().map(|store| (store.replica.versions(), store.node().leadership()));
    let Some((mut versions, mut leadership)) = watched else { return };
    loop {
        {
            let Some(store) = store.upgrade() else { return };
            let due = due(&store);
            if let Some(revision) = due.filter(|_| leadership.borrow_and_update().writable_here) {
                if !remove(&store, revision).await {
                    drop(store);
                    tokio::time::sleep(PAUSE).await;
                }
                continue;
            }
        }
        let changed = tokio::select! {
            changed = versions.changed() => changed,
            changed = leadership.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// The revision whose garbage is still in the tables.
fn due(store: &Inner) -> Option<i64> {
    let state = store.replica.state();
    let compacted = state.contents.compact_revision;
    (compacted > state.contents.removed_revision).then_some(compacted)
}

/// Whether all went well.
async fn remove(store: &Arc<Inner>, revision: i64) -> bool {
    let state = store.replica.state();
    let Ok(garbage) = tokio::task::spawn_blocking(move || state.contents.keys.garbage(revision)).await else {
        return false;
    };
    for step in garbage.chunks(ROWS_PER_STEP) {
        let runs = runs(step);
        if store.write_here(move |transaction| transaction.remove_rows(&runs)).await.is_err() {
            return false;
        }
    }
    store.write_here(move |transaction| transaction.rows_removed(revision)).await.is_ok()
}

/// Ascending numbers as (first, last) of each run without a hole.
fn runs(ids: &[ValueId]) -> Vec<(ValueId, ValueId)> {
    ids.chunk_by(|a, b| a.0 + 1 == b.0).filter_map(|run| Some((*run.first()?, *run.last()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_no_holes() {
        let ids = [1, 2, 3, 5, 8, 9].map(ValueId);
        let want = [(1, 3), (5, 5), (8, 9)].map(|(a, b)| (ValueId(a), ValueId(b)));
        assert_eq!(runs(&ids), want);
        assert!(runs(&[]).is_empty());
    }
}
