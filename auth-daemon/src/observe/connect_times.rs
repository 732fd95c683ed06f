//! How long connections took until they were established, as counts in ranges.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::size::{BLOCK, HeapSize};

/// Ranges between two powers of two: a percentile is at most an eighth too high.
const RANGES: u64 = 8;

/// Numbers of connections by the time that they took. The JSON form is a list of ranges: the longest time in the range, in
/// microseconds, and the number of connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>")]
pub struct ConnectTimes(Vec<(u64, u64)>);

/// Takes ranges in any order.
impl From<Vec<(u64, u64)>> for ConnectTimes {
    fn from(ranges: Vec<(u64, u64)>) -> Self {
        let sorted: BTreeMap<_, _> = ranges.into_iter().collect();
        Self(sorted.into_iter().collect())
    }
}

impl ConnectTimes {
    /// Counts a connection.
    pub(crate) fn count(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.add_range(end_of_range(micros), 1);
    }

    /// Adds the connections that `other` has counted.
    pub(crate) fn add(&mut self, other: &Self) {
        for (end, count) in &other.0 {
            self.add_range(*end, *count);
        }
    }

    /// Adds connections to the range that ends at `end`.
    fn add_range(&mut self, end: u64, more: u64) {
        match self.0.binary_search_by_key(&end, |(end, _)| *end) {
            Ok(at) => self.0[at].1 = self.0[at].1.saturating_add(more),
            Err(at) => self.0.insert(at, (end, more)),
        }
    }

    /// How many are in the range that ends at `end`.
    fn in_range(&self, end: u64) -> u64 {
        let found = self.0.binary_search_by_key(&end, |(end, _)| *end);
        found.map_or(0, |at| self.0[at].1)
    }

    /// Returns the connections that were counted since `before`. All, if `before` counted some that are not counted here.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let is_later = before
            .0
            .iter()
            .all(|(end, count)| self.in_range(*end) >= *count);
        if !is_later {
            return self.clone();
        }
        let added = self.0.iter().filter_map(|(end, count)| {
            let added = count - before.in_range(*end);
            (added > 0).then_some((*end, added))
        });
        Self(added.collect())
    }

    /// Returns a time that `percent` of 100 connections did not exceed. `None` if none was counted.
    pub(crate) fn percentile(&self, percent: u64) -> Option<Duration> {
        let total: u64 = self.0.iter().map(|(_, count)| count).sum();
        let wanted = (total * percent).div_ceil(100).max(1);
        let mut sum = 0;
        self.0.iter().find_map(|(end, count)| {
            sum += count;
            (sum >= wanted).then(|| Duration::from_micros(*end))
        })
    }
}

impl HeapSize for ConnectTimes {
    fn heap_size(&self) -> usize {
        match self.0.capacity() {
            0 => 0,
            capacity => capacity * size_of::<(u64, u64)>() + BLOCK,
        }
    }
}

/// The largest number of microseconds in the range of `micros`.
fn end_of_range(micros: u64) -> u64 {
    // Below that, each microsecond is a range.
    if micros < RANGES {
        return micros;
    }
    let width = (1 << micros.ilog2()) / RANGES;
    micros | (width - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(micros: impl IntoIterator<Item = u64>) -> ConnectTimes {
        let mut times = ConnectTimes::default();
        for micros in micros {
            times.count(Duration::from_micros(micros));
        }
        times
    }

    #[test]
    fn a_range_ends_at_most_an_eighth_later() {
        for micros in (0..100_000).chain([u64::MAX - 1, u64::MAX]) {
            let end = end_of_range(micros);
            assert!(end >= micros && end - micros <= micros / RANGES, "{micros}");
            assert_eq!(end_of_range(end), end, "{micros}");
        }
    }

    #[test]
    fn percentiles() {
        assert_eq!(times([]).percentile(50), None);
        let many = times((0..99).map(|_| 100).chain([5000]));
        let is_about = |percent, micros: u64| {
            let found = many.percentile(percent).unwrap().as_micros() as u64;
            (micros..=micros + micros / RANGES).contains(&found)
        };
        assert!(is_about(50, 100) && is_about(99, 100) && is_about(100, 5000));
    }

    #[test]
    fn what_was_added_since() {
        let (before, now) = (times([1, 100]), times([1, 100, 100, 7]));
        assert_eq!(now.since(&before), times([100, 7]));
        assert_eq!(before.since(&now), before, "the daemon has restarted");
        let mut sum = before.clone();
        sum.add(&now.since(&before));
        assert_eq!(sum, now);
    }

    #[test]
    fn ranges_stay_few() {
        // From a microsecond to the ten seconds that a connection may take.
        let all = times((0..10_000_000).step_by(37));
        assert!(all.0.len() < 170, "{}", all.0.len());
    }
}
