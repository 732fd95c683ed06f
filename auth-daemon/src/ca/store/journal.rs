//! The bytes of the journal of what was issued. Pure.
//!
//! A header, then one frame for each write: magic, length of the payload (32 bits, little-endian), the first eight bytes
//! of its SHA-256, payload. A frame is written only when those before it are safe, so after a crash only the last one
//! can be damaged.

use super::record;
use crate::ca::authority::IssuedRecord;

/// Names the file and its format.
pub(super) const HEADER: &[u8; 8] = b"adcaj\0\0\x01";
/// No text in UTF-8 has its first byte.
const MAGIC: [u8; 4] = [0xf5, b'c', b'a', b'j'];
const FRAME_HEADER: usize = 16;
/// Longest payload of a frame, in bytes.
pub(super) const MAX_PAYLOAD: usize = 1 << 20;

/// What a journal holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) records: Vec<IssuedRecord>,
    /// How much of the file is good. What follows is the rest of a write that a crash ended.
    pub(super) length: usize,
}

/// The frame around a payload.
pub(super) fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_HEADER + payload.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&checksum(payload));
    frame.extend_from_slice(payload);
    frame
}

/// A whole journal with `records`.
pub(super) fn whole<'a>(records: impl Iterator<Item = &'a IssuedRecord>) -> Vec<u8> {
    let mut journal = HEADER.to_vec();
    let mut payload = Vec::new();
    for issued in records {
        // They come from a journal: what was encoded once can be again.
        let _ = record::encode(issued, &mut payload);
        if payload.len() > MAX_PAYLOAD / 2 {
            journal.extend_from_slice(&frame(&payload));
            payload.clear();
        }
    }
    if !payload.is_empty() {
        journal.extend_from_slice(&frame(&payload));
    }
    journal
}

/// Reads a journal. Fails if anything but its end is damaged, with the place.
pub(super) fn read(journal: &[u8]) -> Result<Contents, String> {
    if !journal.starts_with(HEADER) {
        return Err("is no journal of this version".into());
    }
    let mut contents = Contents {
        records: Vec::new(),
        length: HEADER.len(),
    };
    while contents.length < journal.len() {
        let at = contents.length;
        let Some(payload) = payload(&journal[at..]) else {
            let later = (at + 1..journal.len()).find(|&later| payload(&journal[later..]).is_some());
            return match later {
                Some(later) => Err(format!("is damaged between byte {at} and byte {later}")),
                None => Ok(contents),
            };
        };
        let records = record::read(payload)
            .map_err(|_| format!("has a record that cannot be read behind byte {at}"))?;
        contents.records.extend(records);
        contents.length = at + FRAME_HEADER + payload.len();
    }
    Ok(contents)
}

/// The payload of the frame that `bytes` begins with, if it is whole.
fn payload(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (length, rest) = rest.split_first_chunk()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let payload = rest.get(..length).filter(|_| length <= MAX_PAYLOAD)?;
    (checksum(payload) == *sum).then_some(payload)
}

fn checksum(payload: &[u8]) -> [u8; 8] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, payload);
    let mut sum = [0; 8];
    sum.copy_from_slice(&digest.as_ref()[..8]);
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn records() -> impl Strategy<Value = Vec<Vec<IssuedRecord>>> {
        let record = (
            any::<[u8; 16]>(),
            any::<u64>(),
            any::<u32>(),
            "[a-z]{1,30}",
            prop::option::of("\\PC{0,40}"),
        );
        let record = record.prop_map(|(serial, not_after, signer, name, node)| IssuedRecord {
            serial,
            not_after,
            signer,
            identity: format!("spiffe://a/ns/b/sa/{name}").parse().unwrap(),
            node,
        });
        prop::collection::vec(prop::collection::vec(record, 1..5), 1..6)
    }

    fn written(frames: &[Vec<IssuedRecord>]) -> (Vec<u8>, Vec<usize>) {
        let mut journal = HEADER.to_vec();
        let mut ends = vec![journal.len()];
        for records in frames {
            let mut payload = Vec::new();
            for record in records {
                record::encode(record, &mut payload).unwrap();
            }
            journal.extend(frame(&payload));
            ends.push(journal.len());
        }
        (journal, ends)
    }

    proptest! {
        #[test]
        fn cuts_a_torn_end_and_nothing_else(frames in records(), cut in any::<prop::sample::Index>(), garbage in 0..3u8) {
            let (journal, ends) = written(&frames);
            let cut = HEADER.len() + cut.index(journal.len() + 1 - HEADER.len());
            let mut torn = journal[..cut].to_vec();
            if garbage == 1 {
                torn.resize(journal.len(), 0);
            }
            // Zeros may be what was cut.
            let same = torn.iter().zip(&journal).take_while(|(torn, whole)| torn == whole).count();
            let whole = ends.iter().rposition(|&end| end <= same).unwrap();
            let contents = read(&torn).unwrap();
            prop_assert_eq!(contents.length, ends[whole]);
            prop_assert_eq!(contents.records, frames[..whole].concat());
        }

        #[test]
        fn refuses_damage_before_the_end(frames in records(), at in any::<prop::sample::Index>(), bit in 0..8) {
            let (journal, ends) = written(&frames);
            let at = at.index(journal.len());
            let mut damaged = journal.clone();
            damaged[at] ^= 1_u8 << bit;
            let last = ends[ends.len() - 2];
            if at < last {
                read(&damaged).unwrap_err();
            } else {
                prop_assert_eq!(read(&damaged).unwrap().length, last);
            }
        }

        #[test]
        fn a_rewritten_one_holds_the_same(frames in records()) {
            let all = frames.concat();
            let journal = whole(all.iter());
            prop_assert_eq!(read(&journal).unwrap(), Contents { records: all, length: journal.len() });
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
            let _ = read(&[HEADER, &frame(&bytes)[..]].concat());
        }
    }
}
