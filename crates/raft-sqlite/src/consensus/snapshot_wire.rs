//! The pieces of a snapshot, and what is answered to them, as peer-protocol messages and back.

use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::network::proto;
use crate::state_machine::invalid;
use crate::state_machine::snapshot::{Action, Answer, Begin, Chunk};

/// Numbers of `N` bytes one behind the other.
fn numbers<const N: usize>(bytes: &[u8]) -> io::Result<impl Iterator<Item = [u8; N]>> {
    let (numbers, rest) = bytes.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(invalid(format!("{} bytes of hashes, not a multiple of {N}", bytes.len())));
    }
    Ok(numbers.iter().copied())
}

pub fn to_chunk(chunk: Chunk) -> proto::SnapshotChunk {
    use proto::snapshot_chunk::Chunk as Wire;
    let chunk = match chunk {
        Chunk::Begin(Begin { name, page_size, page_count, version, state_hash, continues }) => {
            let state_hash = Bytes::copy_from_slice(&state_hash.to_le_bytes());
            Wire::Begin(proto::SnapshotDatabaseBegin { name, page_size, page_count, version, state_hash, continues })
        }
        Chunk::Ranges { first, hashes } => {
            let mut bytes = BytesMut::with_capacity(hashes.len() * 16);
            hashes.into_iter().for_each(|hash| bytes.put_u128_le(hash));
            Wire::Ranges(proto::SnapshotRanges { first_range: first, hashes: bytes.freeze() })
        }
        Chunk::Pages { numbers, images, lz4, crc32c } => {
            Wire::Pages(proto::SnapshotPages { numbers, images, lz4, crc32c })
        }
        Chunk::Copied => Wire::Copied(proto::SnapshotCopied {}),
        Chunk::Redo { name, page_set } => Wire::Redo(proto::SnapshotRedo { name, page_set }),
        Chunk::Finish { exact } => Wire::Finish(proto::SnapshotFinish { exact }),
    };
    proto::SnapshotChunk { chunk: Some(chunk) }
}

pub fn from_chunk(chunk: proto::SnapshotChunk) -> io::Result<Chunk> {
    use proto::snapshot_chunk::Chunk as Wire;
    Ok(match chunk.chunk {
        Some(Wire::Begin(begin)) => {
            let state_hash: [u8; 16] = begin
                .state_hash
                .as_ref()
                .try_into()
                .map_err(|_| invalid(format!("a state hash of {} bytes", begin.state_hash.len())))?;
            Chunk::Begin(Begin {
                name: begin.name,
                page_size: begin.page_size,
                page_count: begin.page_count,
                version: begin.version,
                state_hash: u128::from_le_bytes(state_hash),
                continues: begin.continues,
            })
        }
        Some(Wire::Ranges(ranges)) => Chunk::Ranges {
            first: ranges.first_range,
            hashes: numbers(&ranges.hashes)?.map(u128::from_le_bytes).collect(),
        },
        Some(Wire::Pages(proto::SnapshotPages { numbers, images, lz4, crc32c })) => {
            Chunk::Pages { numbers, images, lz4, crc32c }
        }
        Some(Wire::Copied(_)) => Chunk::Copied,
        Some(Wire::Redo(proto::SnapshotRedo { name, page_set })) => Chunk::Redo { name, page_set },
        Some(Wire::Finish(proto::SnapshotFinish { exact })) => Chunk::Finish { exact },
        Some(Wire::Header(_)) => return Err(invalid("a second snapshot header".into())),
        None => return Err(invalid("an empty snapshot chunk".into())),
    })
}

pub fn to_answer(answer: Answer) -> proto::SnapshotAnswer {
    use proto::snapshot_answer::Answer as Wire;
    let answer = match answer {
        Answer::Action(action) => Wire::Action(
            match action {
                Action::Whole => proto::SnapshotAction::Whole,
                Action::Compare => proto::SnapshotAction::Compare,
                Action::Continue => proto::SnapshotAction::Continue,
                Action::Same => proto::SnapshotAction::Same,
            }
            .into(),
        ),
        Answer::Differs(ranges) => {
            let range = |(range, hashes): (u32, Vec<u64>)| {
                let mut bytes = BytesMut::with_capacity(hashes.len() * 8);
                hashes.into_iter().for_each(|hash| bytes.put_u64_le(hash));
                proto::SnapshotRangeHashes { range, hashes: bytes.freeze() }
            };
            Wire::Differs(proto::SnapshotDiffers { ranges: ranges.into_iter().map(range).collect() })
        }
        Answer::Finished { mismatched } => Wire::Finished(proto::SnapshotFinished { mismatched }),
    };
    proto::SnapshotAnswer { answer: Some(answer) }
}

/// Everything but the response, which is Raft's.
pub fn from_answer(answer: proto::snapshot_answer::Answer) -> io::Result<Answer> {
    use proto::snapshot_answer::Answer as Wire;
    Ok(match answer {
        Wire::Action(action) => Answer::Action(match proto::SnapshotAction::try_from(action) {
            Ok(proto::SnapshotAction::Whole) => Action::Whole,
            Ok(proto::SnapshotAction::Compare) => Action::Compare,
            Ok(proto::SnapshotAction::Continue) => Action::Continue,
            Ok(proto::SnapshotAction::Same) => Action::Same,
            Err(_) => return Err(invalid(format!("the receiver of a snapshot asks for the unknown action {action}"))),
        }),
        Wire::Differs(differs) => {
            let range = |range: proto::SnapshotRangeHashes| {
                Ok((range.range, numbers(&range.hashes)?.map(u64::from_le_bytes).collect()))
            };
            Answer::Differs(differs.ranges.into_iter().map(range).collect::<io::Result<_>>()?)
        }
        Wire::Finished(proto::SnapshotFinished { mismatched }) => Answer::Finished { mismatched },
        Wire::Response(_) => return Err(invalid("a snapshot was answered for before it was finished".into())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_comes_back() {
        let begin =
            Begin { name: "a".into(), page_size: 512, page_count: 9, version: 7, state_hash: 1 << 100, continues: 3 };
        for chunk in [
            Chunk::Begin(begin),
            Chunk::Ranges { first: 3, hashes: vec![1, u128::MAX] },
            Chunk::Pages { numbers: vec![1, 9], images: Bytes::from_static(b"xy"), lz4: true, crc32c: 5 },
            Chunk::Copied,
            Chunk::Redo { name: "a".into(), page_set: Bytes::from_static(b"z") },
            Chunk::Finish { exact: true },
        ] {
            assert_eq!(from_chunk(to_chunk(chunk.clone())).unwrap(), chunk);
        }
        for answer in [
            Answer::Action(Action::Whole),
            Answer::Action(Action::Compare),
            Answer::Action(Action::Continue),
            Answer::Action(Action::Same),
            Answer::Differs(vec![(0, vec![1, u64::MAX]), (7, vec![])]),
            Answer::Finished { mismatched: vec!["a".into()] },
        ] {
            assert_eq!(from_answer(to_answer(answer.clone()).answer.unwrap()).unwrap(), answer);
        }
        let odd = proto::SnapshotRanges { first_range: 0, hashes: Bytes::from_static(&[0; 17]) };
        let odd = proto::SnapshotChunk { chunk: Some(proto::snapshot_chunk::Chunk::Ranges(odd)) };
        assert!(from_chunk(odd).unwrap_err().to_string().contains("17 bytes"));
    }
}
