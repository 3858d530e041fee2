//! Serves the watchers that are behind from history: from the ring of recent events, and where that does not reach back
//! far enough from the tables.
//!
//! One pass takes the events from some watcher's next revision on, gives them to every watcher whose next revision lies
//! among them, and moves these on. So watchers that stand near each other share the reading, and since each pass starts
//! from the watcher that waited longest, one far behind cannot starve the others. Passes from the ring run under the
//! hub's lock and end in the watcher being synced; passes from the tables read without it.
//!
//! A watcher whose next revision is compacted is canceled with the compacted revision.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::dispatch::{Audience, Run, Window, dispatch};
use super::hub::{Hub, MAX_RUN_BATCHES, MAX_RUN_BYTES};
use super::outbox::{Content, Frame};
use super::watchers::{Place, Watcher, WatcherKey, Watchers};
use crate::error::KvError;
use crate::index::KeyRange;
use crate::kv::{EventBatch, RecentEvents};

/// Events read from the tables in one pass.
const MAX_STORED_EVENTS: usize = 1000;
/// Pause after a failure to read.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What one look under the lock found to do.
enum Pass {
    /// Nobody is ready.
    Idle,
    /// Some were served or moved: look again.
    Done,
    /// Previous values are missing for this run.
    Previous { run: Run, missing: HashSet<(u32, u32)>, window: Window },
    /// The ring does not reach back to the window's start.
    Tables(Window),
}

/// Runs until dropped.
pub(super) async fn run(hub: &Hub) {
    let mut number = 0;
    loop {
        number += 1;
        match from_ring(hub, number) {
            Pass::Idle => hub.behind.notified().await,
            Pass::Done => tokio::task::yield_now().await,
            Pass::Previous { mut run, missing, window } => {
                hub.read_previous(&mut run, missing).await;
                give(hub, run, &window, number).await;
            }
            Pass::Tables(mut window) => {
                let range = window.only.clone().unwrap_or_else(KeyRange::all);
                match hub.history.stored(range, window.low, window.to, MAX_STORED_EVENTS).await {
                    Ok(past) => {
                        window.to = past.complete_to.min(window.to);
                        give(hub, Run::new(past.batches), &window, number).await;
                    }
                    // The watcher is canceled by the next pass.
                    Err(KvError::Compacted) if hub.history.compact_revision() > window.low => {}
                    Err(error) => {
                        tracing::warn!(%error, low = window.low, to = window.to, "watchers cannot catch up");
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                }
            }
        }
    }
}

/// Gives a run to the watchers whose next revision lies in it; the lock was not held since it was read.
async fn give(hub: &Hub, mut run: Run, window: &Window, number: u64) {
    loop {
        let missing = match serve(hub, &mut hub.lock(), &mut run, window, number) {
            Ok(()) => return,
            Err(missing) => missing,
        };
        hub.read_previous(&mut run, missing).await;
    }
}

fn from_ring(hub: &Hub, number: u64) -> Pass {
    let mut watchers = hub.lock();
    cancel_compacted(hub, &mut watchers);
    let Some((chosen, low)) = choose(&watchers) else {
        return Pass::Idle;
    };
    if low > watchers.revision {
        // Not behind any more, or never was (a restored state that is older than what it waits for).
        watchers.promote(chosen);
        watchers.answer_progress();
        return Pass::Done;
    }
    let to = watchers.revision;
    match hub.history.recent(low - 1, MAX_RUN_BATCHES) {
        RecentEvents::Batches(batches) => {
            let whole = batches.len() < MAX_RUN_BATCHES;
            let (batches, cut) = limit(batches, to);
            let to = match batches.last() {
                Some(last) if cut || !whole => last.revision,
                _ => to,
            };
            let mut run = Run::new(batches);
            let window = Window { low, to, only: None };
            match serve(hub, &mut watchers, &mut run, &window, number) {
                Ok(()) => Pass::Done,
                Err(missing) => Pass::Previous { run, missing, window },
            }
        }
        RecentEvents::Gone { after } => {
            let ready: Vec<WatcherKey> =
                watchers.behind_set.iter().copied().filter(|key| is_ready(&watchers, *key)).collect();
            let only = match ready.as_slice() {
                [only] => Some(watchers.get(*only).range.clone()),
                _ => None,
            };
            // The ring has what comes after `after`.
            Pass::Tables(Window { low, to: if after >= low { to.min(after) } else { to }, only })
        }
    }
}

/// At most the bytes of one run (but one revision at least), and nothing after `to`. True if something within `to`
/// was left out.
fn limit(mut batches: Vec<Arc<EventBatch>>, to: i64) -> (Vec<Arc<EventBatch>>, bool) {
    batches.truncate(batches.partition_point(|batch| batch.revision <= to));
    let mut bytes = 0;
    let fit = batches
        .iter()
        .take_while(|batch| {
            let fits = bytes < MAX_RUN_BYTES;
            bytes += batch.weight_bytes();
            fits
        })
        .count();
    let cut = fit < batches.len();
    batches.truncate(fit);
    (batches, cut)
}

fn is_ready(watchers: &Watchers, key: WatcherKey) -> bool {
    matches!(watchers.get(key).place, Place::Behind { waits_for_room: false, .. })
}

/// The watcher that waited longest, and of those the furthest behind.
fn choose(watchers: &Watchers) -> Option<(WatcherKey, i64)> {
    watchers
        .behind_set
        .iter()
        .filter_map(|key| match watchers.get(*key) {
            Watcher { place: Place::Behind { waits_for_room: false, served }, next_revision, .. } => {
                Some((*served, *next_revision, *key))
            }
            _ => None,
        })
        .min()
        .map(|(_, next, key)| (key, next))
}

/// Gives the run to whom the window is for and moves these on, unless their queue is full.
fn serve(
    hub: &Hub,
    watchers: &mut Watchers,
    run: &mut Run,
    window: &Window,
    number: u64,
) -> Result<(), HashSet<(u32, u32)>> {
    let audience = Audience::Behind(window);
    dispatch(watchers, run, audience, window.to, &*hub.history, &hub.header, hub.max_fragment_bytes)?;
    let keys: Vec<WatcherKey> = watchers.behind_set.iter().copied().collect();
    let reached = watchers.revision;
    for key in keys {
        let watcher = watchers.get_mut(key);
        if !window.is_for(watcher) {
            continue;
        }
        let Place::Behind { waits_for_room, served } = &mut watcher.place else {
            continue;
        };
        *served = number;
        if !*waits_for_room {
            watcher.next_revision = watcher.next_revision.max(window.to + 1);
            if watcher.next_revision > reached {
                watchers.promote(key);
            }
        }
    }
    watchers.answer_progress();
    Ok(())
}

fn cancel_compacted(hub: &Hub, watchers: &mut Watchers) {
    let compacted = hub.history.compact_revision();
    let gone: Vec<WatcherKey> =
        watchers.behind_set.iter().copied().filter(|key| watchers.get(*key).next_revision < compacted).collect();
    for key in gone {
        let watcher = watchers.remove(key);
        let content = Content::Canceled { compact_revision: compacted };
        // As etcd: no revision in this header.
        watcher.outbox.push_control(Frame { watch_id: watcher.watch_id, revision: 0, content });
    }
}
