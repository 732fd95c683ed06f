//! Measurements: samples by row, system and round, and statistics of them.

use std::collections::BTreeMap;

use super::system::System;

/// All samples so far.
#[derive(Debug, Default)]
pub(super) struct Results {
    samples: BTreeMap<(&'static str, System), BTreeMap<usize, f64>>,
}

/// A system's samples of a row, summarized in three numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
    /// The number of samples.
    pub(super) rounds: usize,
}

impl Results {
    pub(super) fn add(&mut self, key: &'static str, system: System, round: usize, value: f64) {
        let samples = self.samples.entry((key, system)).or_default();
        samples.insert(round, value);
    }

    /// Whether any system has the row.
    pub(super) fn has(&self, key: &str) -> bool {
        self.samples.keys().any(|(other, _)| *other == key)
    }

    /// Samples in the order of the rounds.
    pub(super) fn samples(&self, key: &'static str, system: System) -> Vec<f64> {
        let samples = self.samples.get(&(key, system));
        samples.map_or_else(Vec::new, |samples| samples.values().copied().collect())
    }

    pub(super) fn summary(&self, key: &'static str, system: System) -> Option<Summary> {
        let samples = self.samples(key, system);
        Some(Summary {
            median: median(&samples)?,
            least: samples.iter().copied().reduce(f64::min)?,
            most: samples.iter().copied().reduce(f64::max)?,
            rounds: samples.len(),
        })
    }

    /// The ratio of one system's value to another's: the median of the ratios in each round, because two runs of one
    /// round are made within seconds of each other.
    pub(super) fn ratio(&self, key: &'static str, of: System, to: System) -> Option<f64> {
        let of = self.samples.get(&(key, of))?;
        let to = self.samples.get(&(key, to))?;
        let ratios: Vec<f64> = of
            .iter()
            .filter_map(|(round, value)| Some(value / to.get(round)?))
            .filter(|ratio| ratio.is_finite())
            .collect();
        median(&ratios)
    }
}

/// The median: the middle value, or the mean of the two middle values.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(*upper);
    }
    Some(f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, *upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_summary_has_the_spread() {
        let mut results = Results::default();
        for (round, value) in [5.0, 1.0, 3.0].into_iter().enumerate() {
            results.add("x", System::Ours, round, value);
        }
        let summary = Summary {
            median: 3.0,
            least: 1.0,
            most: 5.0,
            rounds: 3,
        };
        assert_eq!(results.summary("x", System::Ours), Some(summary));
        assert_eq!(results.summary("x", System::Envoy), None);
        assert!(results.has("x") && !results.has("y"));
    }

    #[test]
    fn ratios_pair_the_rounds() {
        let mut results = Results::default();
        // The machine became twice as fast after the first round, and one run failed.
        for (round, direct, ours) in [(0, 10.0, 5.0), (1, 20.0, 10.0), (2, 20.0, 12.0)] {
            results.add("x", System::Direct, round, direct);
            results.add("x", System::Ours, round, ours);
        }
        results.add("x", System::Direct, 3, 20.0);
        assert_eq!(results.ratio("x", System::Ours, System::Direct), Some(0.5));
        assert_eq!(results.ratio("x", System::Ours, System::Envoy), None);
        results.add("y", System::Ours, 0, 1.0);
        results.add("y", System::Direct, 0, 0.0);
        assert_eq!(results.ratio("y", System::Ours, System::Direct), None);
    }
}
