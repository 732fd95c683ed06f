//! Maps that stay bounded.

use std::{collections::HashMap, hash::Hash, time::SystemTime};

/// How much of a map is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    /// The most entries.
    pub(super) entries: usize,
    /// The most that they may take together, in bytes.
    pub(super) bytes: usize,
}

/// Removes entries of the kind `of` until the others of that kind are within `limit`, those with the earliest `last` first.
/// `size` returns what an entry takes, in bytes. Returns the number of entries that were removed.
pub(super) fn drop_oldest<K: Eq + Hash, V>(
    map: &mut HashMap<K, V>,
    limit: Limit,
    of: impl Fn(&K) -> bool,
    last: impl Fn(&V) -> SystemTime,
    size: impl Fn(&K, &V) -> usize,
) -> u64 {
    let matching = map.iter().filter(|(key, _)| of(key));
    let mut sizes: Vec<_> = matching
        .map(|(key, value)| (last(value), size(key, value)))
        .collect();
    let mut bytes: usize = sizes.iter().map(|(_, size)| size).sum();
    let mut entries = sizes.len();
    let is_over = |entries: usize, bytes: usize| entries > limit.entries || bytes > limit.bytes;
    if !is_over(entries, bytes) {
        return 0;
    }
    // When the newest of those that go was last used.
    let mut until = None;
    sizes.sort_unstable_by_key(|(last, _)| *last);
    let (mut left, mut left_bytes) = (entries, bytes);
    for (last, size) in sizes {
        if !is_over(left, left_bytes) {
            break;
        }
        until = Some(last);
        (left, left_bytes) = (left - 1, left_bytes - size);
    }
    let before = entries;
    map.retain(|key, value| {
        // Of those at that time, no more than must.
        let goes = of(key)
            && (Some(last(value)) < until || Some(last(value)) == until && is_over(entries, bytes));
        if goes {
            entries -= 1;
            bytes -= size(key, value);
        }
        !goes
    });
    (before - entries) as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Which of the entries `time: size` are left.
    fn left(entries: &[(u64, usize)], limit: Limit) -> Vec<u64> {
        let mut map: HashMap<u64, usize> = entries.iter().copied().collect();
        let at = |second| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let times: HashMap<usize, u64> =
            entries.iter().map(|(time, size)| (*size, *time)).collect();
        let before = map.len();
        let dropped = drop_oldest(
            &mut map,
            limit,
            |time| *time > 0,
            |size| at(times[size]),
            |_, size| *size,
        );
        assert_eq!(before - map.len(), dropped as usize);
        let mut left: Vec<_> = map.into_keys().collect();
        left.sort_unstable();
        left
    }

    #[test]
    fn the_oldest_go_first_by_number_and_by_size() {
        let entries = [(1, 10), (2, 30), (3, 20), (4, 5)];
        let limit = |entries, bytes| Limit { entries, bytes };
        assert_eq!(left(&entries, limit(4, 65)), [1, 2, 3, 4]);
        assert_eq!(left(&entries, limit(2, 65)), [3, 4]);
        assert_eq!(left(&entries, limit(4, 64)), [2, 3, 4]);
        assert_eq!(left(&entries, limit(4, 54)), [3, 4]);
        assert_eq!(left(&entries, limit(4, 0)), [0; 0]);
        // Others are neither counted nor dropped.
        assert_eq!(left(&[(0, 99), (5, 1)], limit(1, 1)), [0, 5]);
    }
}
