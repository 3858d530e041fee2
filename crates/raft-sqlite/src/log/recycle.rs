//! Files that begin, end, and begin again as segments.

use std::sync::Arc;

use super::LogError;
use super::disk::Disk;
use super::placement::{Segment, Spare, create_spare, segment_name};
use super::record::{RECORDS_START, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::writer::Shared;

/// Turns a spare file into a segment. It gets its name only with its header on disk, so a segment
/// whose header cannot be read is always damage.
pub(super) fn begin_segment(
    disk: &dyn Disk,
    segment: &Segment,
    spare_name: &str,
    header: &SegmentHeader,
) -> Result<(), LogError> {
    let name = segment_name(segment.number);
    let failed = |source| LogError::Io { action: "beginning", path: disk.path(&name), source };
    let mut block = vec![0; RECORDS_START as usize];
    block[..SEGMENT_HEADER_BYTES].copy_from_slice(&header.encode());
    segment.file.write_at(&block, 0).map_err(failed)?;
    segment.file.sync().map_err(failed)?;
    disk.rename(spare_name, &name).map_err(failed)?;
    disk.sync_directory().map_err(failed)
}

/// Sets the segments below `below` free, once the purge that allows it is on disk. Of ordinary
/// length, and up to `recycle` of them, they are kept for use again.
pub(super) fn release(shared: &Shared, below: u32, recycle: usize) -> Result<(), LogError> {
    let mut kept = Vec::new();
    let mut removed = Vec::new();
    {
        let mut state = shared.state.lock();
        let placement = &mut state.placement;
        while placement.segments.front().is_some_and(|segment| segment.number < below) {
            let Some(segment) = placement.segments.pop_front() else {
                break;
            };
            if segment.length == placement.segment_length && placement.spares.len() + kept.len() < recycle {
                kept.push((segment, placement.new_spare_name()));
            } else {
                removed.push(segment);
            }
        }
    }
    if kept.is_empty() && removed.is_empty() {
        return Ok(());
    }
    let disk = &*shared.disk;
    let failed = |number, source| LogError::Io { action: "recycling", path: disk.path(&segment_name(number)), source };
    for segment in &removed {
        let number = segment.number;
        disk.remove(&segment_name(number)).map_err(|source| failed(number, source))?;
    }
    for (segment, spare_name) in &kept {
        let number = segment.number;
        disk.rename(&segment_name(number), spare_name).map_err(|source| failed(number, source))?;
    }
    // Before the files are written to under their new purpose.
    disk.sync_directory().map_err(|source| failed(below, source))?;
    let mut state = shared.state.lock();
    for (segment, name) in kept {
        let file = Arc::clone(&segment.file);
        state.placement.spares.push(Spare { name, length: segment.length, file });
    }
    Ok(())
}

/// Has a file ready for the next segment, so that no caller has to make one. A failure here harms
/// nobody: who needs the room will ask again and be told.
pub(super) fn keep_spare(shared: &Shared) {
    let (name, length) = {
        let mut state = shared.state.lock();
        if !state.placement.spares.is_empty() || state.closing {
            return;
        }
        (state.placement.new_spare_name(), state.placement.segment_length)
    };
    match create_spare(&*shared.disk, name, length) {
        Ok(spare) => shared.state.lock().placement.spares.push(spare),
        Err(error) => tracing::debug!(%error, "no spare segment for the Raft log"),
    }
}
