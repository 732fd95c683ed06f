//! Performance targets of the project. A missed target is reported, but is not a failure: speed depends on the machine.

use super::loads::row;
use super::number::number;
use super::results::Results;
use super::system::System;

/// A bound on one row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) key: &'static str,
    bound: Bound,
    /// The reference that the value is divided by, if any.
    to: Option<System>,
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// A target and its result.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Verdict {
    pub(super) key: &'static str,
    /// Text such as `at least 1.60 × envoy`.
    pub(super) wanted: String,
    /// `None` if it was not measured.
    pub(super) value: Option<f64>,
    pub(super) met: Option<bool>,
}

impl Target {
    pub(super) fn judge(&self, results: &Results) -> Verdict {
        let value = match self.to {
            Some(to) => results.ratio(self.key, System::Ours, to),
            None => results
                .summary(self.key, System::Ours)
                .map(|summary| summary.median),
        };
        let (word, bound) = match self.bound {
            Bound::AtLeast(bound) => ("at least", bound),
            Bound::AtMost(bound) => ("at most", bound),
        };
        let unit = match self.to {
            Some(system) => format!("× {system}"),
            None => row(self.key).map_or("", |row| row.unit).to_owned(),
        };
        Verdict {
            key: self.key,
            wanted: format!("{word} {} {unit}", number(bound)),
            value,
            met: value.map(|value| match self.bound {
                Bound::AtLeast(bound) => value >= bound,
                Bound::AtMost(bound) => value <= bound,
            }),
        }
    }
}

const fn at_least(key: &'static str, times: f64, to: System) -> Target {
    Target {
        key,
        bound: Bound::AtLeast(times),
        to: Some(to),
    }
}

const fn at_most(key: &'static str, times: f64, to: System) -> Target {
    Target {
        key,
        bound: Bound::AtMost(times),
        to: Some(to),
    }
}

const fn no_more(key: &'static str, value: f64) -> Target {
    Target {
        key,
        bound: Bound::AtMost(value),
        to: None,
    }
}

pub(super) const TARGETS: [Target; 27] = [
    at_least("stream", 1.6, System::Envoy),
    at_least("stream", 1.83, System::Ztunnel),
    at_least("stream", 0.55, System::Direct),
    at_least("streams-8", 1.6, System::Envoy),
    at_least("streams-8", 2.0, System::Ztunnel),
    at_least("streams-8", 0.45, System::Direct),
    at_least("keep-alive-32", 1.7, System::Envoy),
    at_least("keep-alive-32", 1.7, System::Ztunnel),
    at_least("keep-alive-32", 0.5, System::Direct),
    at_most("keep-alive-1-p50", 0.65, System::Envoy),
    at_most("keep-alive-1-p50", 0.65, System::Ztunnel),
    at_least("connections-32", 4.0, System::Envoy),
    at_least("connections-32", 1.8, System::Ztunnel),
    at_least("connections-32", 0.55, System::Direct),
    at_most("set-up-p50", 0.6, System::Ztunnel),
    at_least("beside-share", 1.0, System::Envoy),
    at_most("beside-p99", 1.0, System::Envoy),
    at_least("node-stream", 0.95, System::Direct),
    at_most("node-keep-alive-1-p50", 1.05, System::Direct),
    at_least("outside-stream", 0.98, System::Direct),
    at_most("outside-keep-alive-1-p50", 1.02, System::Direct),
    no_more("idle-client", 4.0),
    no_more("idle-server", 4.0),
    no_more("memory-client", 15.0),
    no_more("memory-client-peak", 25.0),
    no_more("memory-server", 15.0),
    no_more("memory-server-peak", 25.0),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_about_a_row() {
        for target in TARGETS {
            assert!(row(target.key).is_some(), "{}", target.key);
        }
    }

    #[test]
    fn targets_are_met_missed_or_not_measured() {
        let mut results = Results::default();
        results.add("stream", System::Envoy, 0, 5.0);
        results.add("stream", System::Ours, 0, 8.0);
        results.add("idle-client", System::Ours, 0, 16.5);
        let met = |target: Target| target.judge(&results).met;
        assert_eq!(met(at_least("stream", 1.6, System::Envoy)), Some(true));
        assert_eq!(met(at_least("stream", 1.7, System::Envoy)), Some(false));
        assert_eq!(met(at_most("stream", 1.5, System::Envoy)), Some(false));
        assert_eq!(met(at_least("stream", 0.5, System::Direct)), None);
        let verdict = no_more("idle-client", 16.0).judge(&results);
        assert_eq!(verdict.met, Some(false));
        assert_eq!(verdict.wanted, "at most 16.0 KiB");
    }
}
