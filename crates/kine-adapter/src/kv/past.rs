//! Events from the tables: for watchers that are behind the ring, and to fill the ring when a node starts.

use super::ValueId;
use super::contents::Contents;
use super::event::{Event, EventBatch, EventKind, PastEvents};
use super::replica::{event, previous};
use super::view::Fault;
use crate::error::KvError;
use crate::index::{KeyEntry, KeyRange, Record};
use crate::schema::{self, SchemaError};
use bytes::Bytes;
use rusqlite::{Connection, Row};
use std::collections::VecDeque;
use std::sync::Arc;

/// At most this many bytes of events are read at once, whatever the caller's limit.
const MAX_BYTES: usize = 16 << 20;
/// At most this many rows are passed over at once without finding an event of the range.
const MAX_ROWS: usize = 100_000;
/// At most this many rows are read into the ring at the start.
const MAX_RING_ROWS: usize = 200_000;

/// A row as the statements `EVENTS_*` select it.
struct Found<'a> {
    record: Record,
    key: &'a [u8],
    value: Option<&'a [u8]>,
}

fn found<'a>(row: &'a Row<'_>) -> rusqlite::Result<Found<'a>> {
    Ok(Found {
        record: Record {
            value_id: ValueId(row.get(0)?),
            mod_revision: row.get(1)?,
            create_revision: row.get(3)?,
            version: row.get(4)?,
            lease: row.get(5)?,
        },
        key: row.get_ref(2)?.as_blob()?,
        value: row.get_ref(6)?.as_blob_or_null()?,
    })
}

fn to_event(found: &Found<'_>, contents: &Contents) -> Event {
    let revision = found.record.mod_revision;
    let kind = if found.record.is_live() { EventKind::Put } else { EventKind::Delete };
    let entry: Option<&KeyEntry> = contents.keys.get(found.key);
    let before = entry.and_then(|entry| entry.live_at(revision - 1));
    let before = before.map(|before| Box::new(previous(before, None)));
    let value = found.value.map(Bytes::copy_from_slice).unwrap_or_default();
    event(kind, Bytes::copy_from_slice(found.key), value, &found.record, before)
}

/// The newest events that fit, as (every event after this revision is there, batches).
///
/// # Errors
/// If SQLite fails.
#[allow(clippy::type_complexity)]
pub(super) fn newest(
    connection: &Connection,
    contents: &Contents,
    max_bytes: usize,
) -> Result<(i64, VecDeque<Arc<EventBatch>>), SchemaError> {
    let oldest = contents.compact_revision.max(0);
    let mut batches = VecDeque::new();
    if schema::layout(connection)? == 0 {
        return Ok((oldest, batches));
    }
    let (mut bytes, mut count) = (0, 0);
    let mut events: Vec<Event> = Vec::new(); // of one revision, newest first
    let mut flush = |events: &mut Vec<Event>| {
        if let Some(revision) = events.first().map(|event| event.mod_revision) {
            events.reverse();
            batches.push_front(Arc::new(EventBatch { revision, events: std::mem::take(events).into_boxed_slice() }));
        }
    };
    let mut statement = connection.prepare_cached(schema::EVENTS_BACK)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let found = found(row)?;
        let revision = found.record.mod_revision;
        if events.first().is_some_and(|event| event.mod_revision != revision) {
            flush(&mut events);
        }
        if revision <= oldest {
            return Ok((oldest, batches));
        }
        let event = to_event(&found, contents);
        bytes += event.weight_bytes();
        count += 1;
        if bytes > max_bytes || count > MAX_RING_ROWS {
            return Ok((revision, batches)); // what is in `events` is only part of that revision
        }
        events.push(event);
    }
    flush(&mut events);
    Ok((oldest, batches))
}

/// Events of a range; see [`super::Store::events_from_tables`]. `contents` is a committed state that is not newer than
/// what the connection sees. Without a connection, because nothing has ever been written, there are none.
///
/// # Errors
/// `Compacted`, as the connection sees it.
pub(super) fn between(
    connection: Option<&Connection>,
    contents: &Contents,
    range: &KeyRange,
    revisions: (i64, i64),
    limit: usize,
) -> Result<PastEvents, Fault> {
    let (start, end) = (revisions.0, revisions.1.min(contents.revision));
    let mut past = PastEvents { batches: Vec::new(), complete_to: end };
    let Some(connection) = connection.filter(|_| start <= end) else { return Ok(past) };
    if schema::layout(connection).map_err(damaged)? == 0 {
        return Ok(past);
    }
    let compacted = schema::number(connection, schema::COMPACT_REVISION, [])?.unwrap_or(-1);
    if start < compacted {
        return Err(KvError::Compacted.into());
    }
    let Some(first) = first_row_from(connection, start)? else {
        return Ok(past);
    };
    let mut events: Vec<Event> = Vec::new(); // of one revision
    let (mut revision, mut rows_seen, mut events_seen, mut bytes) = (start, 0, 0, 0);
    let mut statement = connection.prepare_cached(schema::EVENTS_FROM)?;
    let mut rows = statement.query([first.0])?;
    while let Some(row) = rows.next()? {
        let main: i64 = row.get(1)?;
        if main != revision {
            flush(&mut past.batches, &mut events, revision);
            if main > end {
                return Ok(past);
            }
            if events_seen >= limit || bytes >= MAX_BYTES || rows_seen >= MAX_ROWS {
                past.complete_to = main - 1;
                return Ok(past);
            }
            revision = main;
        }
        rows_seen += 1;
        let key = row.get_ref(2)?.as_blob().map_err(rusqlite::Error::from)?;
        if range.contains(key) {
            let event = to_event(&found(row)?, contents);
            events_seen += 1;
            bytes += event.weight_bytes();
            events.push(event);
        }
    }
    flush(&mut past.batches, &mut events, revision);
    Ok(past)
}

fn flush(batches: &mut Vec<Arc<EventBatch>>, events: &mut Vec<Event>, revision: i64) {
    if !events.is_empty() {
        batches.push(Arc::new(EventBatch { revision, events: std::mem::take(events).into_boxed_slice() }));
    }
}

fn damaged(error: SchemaError) -> Fault {
    match error {
        SchemaError::Sql(error) => Fault::Sql(error),
        error => Fault::Refused(KvError::Internal(error.to_string())),
    }
}

/// The first row of a revision or a later one. Rows are not indexed by revision, but ascend with it: a binary search.
fn first_row_from(connection: &Connection, revision: i64) -> Result<Option<ValueId>, Fault> {
    let bounds: (Option<i64>, Option<i64>) =
        connection.prepare_cached(schema::ID_BOUNDS)?.query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let (Some(mut low), Some(last)) = bounds else {
        return Ok(None);
    };
    let mut statement = connection.prepare_cached(schema::MAIN_FROM)?;
    // Invariant: the row sought is at `low` or later, and before `high`; there are holes in between.
    let mut high = last + 1;
    while low < high {
        let middle = low + (high - low) / 2;
        let (id, main): (i64, i64) = statement.query_row([middle], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if main >= revision {
            high = middle;
        } else {
            low = id + 1;
        }
    }
    Ok(Some(ValueId(low)).filter(|id| id.0 <= last))
}
