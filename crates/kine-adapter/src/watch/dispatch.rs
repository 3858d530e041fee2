//! A run of events to the watchers of an index.
//!
//! A run is several whole revisions. First each event is matched to the ranges that hold its key, then each range's
//! events are encoded, at most once for each combination of filter and `prev_kv`, and the bytes shared by its watchers:
//! 11 apiservers with one watch each on `/registry/leases/` cost one encoding and 11 queue entries a run.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use prost::Message;
use prost::encoding::encoded_len_varint;

use super::history::History;
use super::outbox::{Content, Frame, HeaderSource};
use super::range_index::{RangeIndex, SlotId};
use super::watchers::{Filter, Place, Watcher, WatcherKey, Watchers};
use crate::index::KeyRange;
use crate::kv::{Event, EventBatch, EventKind};
use crate::proto::mvccpb;

/// `WatchResponse.events`.
const EVENTS_FIELD: u32 = 11;

/// Which index a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience<'a> {
    /// The synced watchers; the run starts right after the hub's revision.
    Synced,
    /// Those behind that the window is for.
    Behind(&'a Window),
}

/// What a run from history covers: every event from `low` to `to`, both inclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Window {
    pub low: i64,
    pub to: i64,
    /// Only the events of this range were read.
    pub only: Option<KeyRange>,
}

impl Window {
    /// Whether the watcher may be served from it and moved on past it: nothing between what it has had and the window
    /// is left out.
    pub fn is_for(&self, watcher: &Watcher) -> bool {
        (self.low..=self.to + 1).contains(&watcher.next_revision)
            && self.only.as_ref().is_none_or(|range| *range == watcher.range)
    }
}

/// Some whole revisions, with the previous values read so far.
#[derive(Debug, Default)]
pub(super) struct Run {
    batches: Vec<Arc<EventBatch>>,
    previous: HashMap<(u32, u32), Option<mvccpb::KeyValue>>,
}

/// The events of one range, encoded for one kind of watcher.
#[derive(Debug, Clone)]
struct Encoded {
    bytes: Bytes,
    /// Where each event ends in `bytes`.
    ends: Vec<usize>,
}

impl Run {
    pub fn new(batches: Vec<Arc<EventBatch>>) -> Run {
        Run { batches, previous: HashMap::new() }
    }

    pub fn batches(&self) -> &[Arc<EventBatch>] {
        &self.batches
    }

    pub fn event(&self, (batch, event): (u32, u32)) -> &Event {
        &self.batches[batch as usize].events[event as usize]
    }

    /// Leaves out what happened up to and including `revision`.
    pub fn skip_to(&mut self, revision: i64) {
        let known = self.batches.partition_point(|batch| batch.revision <= revision);
        if known > 0 {
            self.batches.drain(..known);
            // Positions have changed; what is left out is read again.
            self.previous.clear();
        }
    }

    /// What was the key before the event: read by the caller of [`dispatch`], which had asked for it.
    pub fn set_previous(&mut self, at: (u32, u32), previous: Option<mvccpb::KeyValue>) {
        self.previous.insert(at, previous);
    }
}

/// Gives the run to every watcher of the audience that it is for; those whose queue is full fall back, or wait for
/// room. `to` is the revision up to which the run is complete: headers carry it.
///
/// # Errors
/// Events whose previous value has to be read first; nobody was given anything.
pub(super) fn dispatch(
    watchers: &mut Watchers,
    run: &mut Run,
    audience: Audience<'_>,
    to: i64,
    history: &dyn History,
    header: &HeaderSource,
    max_fragment_bytes: usize,
) -> Result<(), HashSet<(u32, u32)>> {
    let slots = matching(watchers, run, audience);
    let missing = missing_previous(watchers, run, audience, &slots, history);
    if !missing.is_empty() {
        for slot in slots {
            index(watchers, audience).slot_mut(slot).matched.clear();
        }
        return Err(missing);
    }
    for id in slots {
        let slot = index(watchers, audience).slot_mut(id);
        let mut matched = std::mem::take(&mut slot.matched);
        let members = std::mem::take(&mut slot.members);
        let first = run.event(matched[0]).mod_revision;
        let mut encodings: Vec<((bool, Filter), Encoded)> = Vec::new();
        let mut refused = Vec::new();
        for key in &members {
            let watcher = watchers.get_mut(*key);
            if !audience.includes(watcher) {
                continue;
            }
            let own;
            let kind = (watcher.previous, watcher.filter);
            let encoded = if watcher.next_revision > first {
                // Has had, or did not ask for, the first of them.
                let from = matched.partition_point(|at| run.event(*at).mod_revision < watcher.next_revision);
                own = encode(run, &matched[from..], kind);
                &own
            } else {
                let known = encodings.iter().position(|(other, _)| *other == kind);
                let at = known.unwrap_or_else(|| {
                    encodings.push((kind, encode(run, &matched, kind)));
                    encodings.len() - 1
                });
                &encodings[at].1
            };
            if encoded.ends.is_empty() {
                continue;
            }
            if push(watcher, encoded, to, header, max_fragment_bytes) {
                watcher.told = true;
            } else {
                refused.push(*key);
            }
        }
        matched.clear();
        let slot = index(watchers, audience).slot_mut(id);
        slot.members = members;
        slot.matched = matched;
        for key in refused {
            match &mut watchers.get_mut(key).place {
                Place::Behind { waits_for_room, .. } => *waits_for_room = true,
                Place::Synced => watchers.fall_back(key, first, true),
            }
        }
    }
    Ok(())
}

impl Audience<'_> {
    fn includes(self, watcher: &Watcher) -> bool {
        match self {
            Audience::Synced => true,
            Audience::Behind(window) => {
                window.is_for(watcher) && !matches!(watcher.place, Place::Behind { waits_for_room: true, .. })
            }
        }
    }
}

fn index<'w>(watchers: &'w mut Watchers, audience: Audience<'_>) -> &'w mut RangeIndex<WatcherKey> {
    match audience {
        Audience::Synced => &mut watchers.synced,
        Audience::Behind(_) => &mut watchers.behind,
    }
}

/// Notes in each slot which events are in its range; the slots that have any.
fn matching(watchers: &mut Watchers, run: &Run, audience: Audience<'_>) -> Vec<SlotId> {
    let mut slots = Vec::new();
    let index = index(watchers, audience);
    for (b, batch) in (0u32..).zip(&run.batches) {
        for (e, event) in (0u32..).zip(&batch.events) {
            index.stab(&event.key, |id, slot| {
                if slot.matched.is_empty() {
                    slots.push(id);
                }
                slot.matched.push((b, e));
            });
        }
    }
    slots
}

fn missing_previous(
    watchers: &mut Watchers,
    run: &mut Run,
    audience: Audience<'_>,
    slots: &[SlotId],
    history: &dyn History,
) -> HashSet<(u32, u32)> {
    let mut missing = HashSet::new();
    for slot in slots {
        let slot = index(watchers, audience).slot_mut(*slot);
        if slot.wanting_previous == 0 {
            continue;
        }
        for at in &slot.matched {
            let event = run.event(*at);
            if is_create(event) || run.previous.contains_key(at) {
                continue;
            }
            match history.previous_at_hand(event) {
                Some(previous) => {
                    run.previous.insert(*at, previous);
                }
                None => {
                    missing.insert(*at);
                }
            }
        }
    }
    missing
}

fn is_create(event: &Event) -> bool {
    event.kind == EventKind::Put && event.create_revision == event.mod_revision
}

fn encode(run: &Run, matched: &[(u32, u32)], (previous, filter): (bool, Filter)) -> Encoded {
    let mut bytes = BytesMut::new();
    let mut ends = Vec::new();
    for at in matched {
        let event = run.event(*at);
        let unwanted = match event.kind {
            EventKind::Put => filter.no_put,
            EventKind::Delete => filter.no_delete,
        };
        if unwanted {
            continue;
        }
        let message = mvccpb::Event {
            r#type: match event.kind {
                EventKind::Put => mvccpb::event::EventType::Put,
                EventKind::Delete => mvccpb::event::EventType::Delete,
            }
            .into(),
            kv: Some(event.key_value()),
            prev_kv: if previous { run.previous.get(at).cloned().flatten() } else { None },
        };
        let size = message.encoded_len();
        bytes.reserve(1 + encoded_len_varint(size as u64) + size);
        prost::encoding::message::encode(EVENTS_FIELD, &message, &mut bytes);
        ends.push(bytes.len());
    }
    Encoded { bytes: bytes.freeze(), ends }
}

/// Queues one answer, or several if the watcher takes fragments and one would be too large. False if the queue is full.
fn push(watcher: &Watcher, encoded: &Encoded, revision: i64, header: &HeaderSource, max_fragment_bytes: usize) -> bool {
    let frame = |encoded: Bytes, more: bool| Frame {
        watch_id: watcher.watch_id,
        revision,
        content: Content::Events { encoded, more },
    };
    if !watcher.fragment || encoded.ends.len() < 2 {
        return watcher.outbox.push_events([frame(encoded.bytes.clone(), false)]);
    }
    let head = frame(Bytes::new(), true).head(header).encoded_len();
    let mut frames = Vec::new();
    let (mut start, mut next) = (0, 0);
    while next < encoded.ends.len() {
        next += 1;
        while next < encoded.ends.len() && head + encoded.ends[next] - start < max_fragment_bytes {
            next += 1;
        }
        let end = encoded.ends[next - 1];
        frames.push(frame(encoded.bytes.slice(start..end), next < encoded.ends.len()));
        start = end;
    }
    watcher.outbox.push_events(frames)
}
