//! Certificates that were issued and have not ended.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

use super::authority::IssuedRecord;

/// Finds a record by its serial number at once, and forgets in the order of ends.
#[derive(Debug, Default)]
pub(super) struct Live {
    records: HashMap<[u8; 16], IssuedRecord>,
    ends: BinaryHeap<Reverse<(u64, [u8; 16])>>,
    /// The last end of what each signer has signed, whether it is still here or not.
    last: HashMap<u32, u64>,
}

/// Forgotten with each one that is added: more than one, so that what has ended never piles up.
const FORGOTTEN_AT_ONCE: usize = 4;

impl Live {
    /// Adds `record`, and makes room for it.
    pub(super) fn insert(&mut self, record: IssuedRecord, now: u64) {
        self.forget(now, FORGOTTEN_AT_ONCE);
        self.note(record.signer, record.not_after);
        if record.not_after < now {
            return;
        }
        self.ends.push(Reverse((record.not_after, record.serial)));
        self.records.insert(record.serial, record);
    }

    /// Notes a certificate that has no record: the CA's own server's.
    pub(super) fn note(&mut self, signer: u32, not_after: u64) {
        let last = self.last.entry(signer).or_default();
        *last = (*last).max(not_after);
    }

    /// Forgets up to `most` of those that have ended.
    pub(super) fn forget(&mut self, now: u64, most: usize) {
        for _ in 0..most {
            match self.ends.peek() {
                Some(Reverse((end, serial))) if *end < now => self.records.remove(serial),
                _ => break,
            };
            self.ends.pop();
        }
    }

    pub(super) fn get(&self, serial: &[u8; 16], now: u64) -> Option<&IssuedRecord> {
        self.records
            .get(serial)
            .filter(|record| record.not_after >= now)
    }

    /// When the last certificate of a signer ends; 0 if none is known.
    pub(super) fn last_end(&self, signer: u32) -> u64 {
        self.last.get(&signer).copied().unwrap_or(0)
    }

    pub(super) fn iter(&self, now: u64) -> impl Iterator<Item = &IssuedRecord> {
        self.records
            .values()
            .filter(move |record| record.not_after >= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(serial: u8, not_after: u64) -> IssuedRecord {
        IssuedRecord {
            serial: [serial; 16],
            not_after,
            signer: 1,
            identity: "spiffe://a/ns/b/sa/c".parse().unwrap(),
            node: None,
        }
    }

    #[test]
    fn forgets_what_has_ended() {
        let mut live = Live::default();
        for (serial, end) in [(1, 100), (2, 300), (3, 200)] {
            live.insert(record(serial, end), 50);
        }
        assert!(live.get(&[1; 16], 100).is_some(), "good to its last second");
        assert!(live.get(&[1; 16], 101).is_none());
        assert_eq!(live.iter(101).count(), 2);
        live.insert(record(4, 400), 250);
        assert_eq!(live.records.len(), 2);
        live.insert(record(5, 10), 250);
        assert!(live.get(&[5; 16], 0).is_none());
        live.forget(u64::MAX, usize::MAX);
        assert!(live.records.is_empty() && live.ends.is_empty());
        assert_eq!(live.last_end(1), 400, "what a signer has done stays known");
        live.note(1, 500);
        assert_eq!((live.last_end(1), live.last_end(2)), (500, 0));
    }
}
