//! Maps that stay bounded.

use std::{collections::HashMap, hash::Hash, time::SystemTime};

/// Removes entries of the kind `of` until `keep` of them are left, those with the earliest `last` first. Returns the number of
/// entries that were removed.
pub(super) fn drop_oldest<K: Eq + Hash, V>(
    map: &mut HashMap<K, V>,
    keep: usize,
    of: impl Fn(&K) -> bool,
    last: impl Fn(&V) -> SystemTime,
) -> u64 {
    let matching = map.iter().filter(|(key, _)| of(key));
    let mut times: Vec<_> = matching.map(|(_, value)| last(value)).collect();
    let Some(mut excess) = times.len().checked_sub(keep).filter(|excess| *excess > 0) else {
        return 0;
    };
    let dropped = excess as u64;
    let (_, newest_dropped, _) = times.select_nth_unstable(excess - 1);
    let until = *newest_dropped;
    map.retain(|key, value| {
        let goes = excess > 0 && of(key) && last(value) <= until;
        excess -= usize::from(goes);
        !goes
    });
    dropped
}
