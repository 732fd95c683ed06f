//! When to scan for pods' processes, and when to walk through all processes of the node.

use std::time::{Duration, Instant};

use crate::Pauses;

/// Pause before a scan if the kernel has reported a netns: it may be the new sandbox of a pod that is found.
const AFTER_REPORT: Duration = Duration::from_secs(1);
/// Pause between walks while a netns is held for the processes in it.
const HELD: Duration = Duration::from_secs(1);

/// Decides when to scan.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    pauses: Pauses,
    /// Whether the kernel has reported a netns since the last scan started.
    reported: bool,
    /// When the last scan of all pods started. `None` if one is due now.
    full: Option<Instant>,
}

impl Schedule {
    /// Call when a new pod is to be searched for.
    pub(super) fn news(&mut self) {
        self.pauses.restart();
    }

    pub(super) fn reported(&mut self) {
        self.reported = true;
        self.pauses.restart();
    }

    /// Call when a netns that was found may belong to another pod too.
    pub(super) fn doubt(&mut self) {
        self.full = None;
    }

    /// Call when a scan starts. Returns whether it covers all pods.
    pub(super) fn begun(&mut self, now: Instant, missing: bool) -> bool {
        self.reported = false;
        let is_full = !missing || self.full.is_none_or(|full| now - full >= Pauses::SLOW);
        if is_full {
            self.full = Some(now);
        }
        is_full
    }

    pub(super) fn ended(&mut self, now: Instant, effort: Duration) {
        self.pauses.ended(now, effort);
    }

    /// Time of the next scan, where `missing` says whether any pod is not found. `None` if no scan has run yet, so that
    /// one is due now.
    pub(super) fn due(&self, missing: bool) -> Option<Instant> {
        let pause = match (missing, self.reported) {
            (true, true) => Duration::ZERO,
            _ if self.full.is_none() => Duration::ZERO,
            (true, false) => self.pauses.while_missing(),
            (false, true) => AFTER_REPORT,
            (false, false) => Pauses::SLOW,
        };
        self.pauses.due(pause)
    }
}

/// Decides when to walk through all processes.
#[derive(Debug, Default)]
pub(super) struct Walks {
    pauses: Pauses,
    /// Whether there is a held netns that has not been counted.
    pub(super) is_due: bool,
}

impl Walks {
    pub(super) fn ended(&mut self, now: Instant, effort: Duration) {
        self.pauses.ended(now, effort);
    }

    /// Time of the next walk, where `held` says whether any netns is held for its processes. `None` if it is due now.
    pub(super) fn due(&self, held: bool) -> Option<Instant> {
        let pause = match (self.is_due, held) {
            (true, _) => Duration::ZERO,
            (false, true) => HELD,
            (false, false) => Pauses::SLOW,
        };
        self.pauses.due(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn looks_often_for_what_is_missing_and_less_often_in_time() {
        let mut schedule = Schedule::default();
        assert_eq!(schedule.due(true), None, "at once");
        let now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..9 {
            schedule.begun(now, true);
            schedule.ended(now, MS(1));
            pauses.push(schedule.due(true).unwrap() - now);
        }
        let expected = [20, 40, 80, 160, 320, 640, 1000, 1000, 1000];
        assert_eq!(pauses, expected.map(MS));
        assert_eq!(schedule.due(false), Some(now + Pauses::SLOW));
        // A new pod to wait for: the pauses start again.
        schedule.news();
        assert_eq!(schedule.due(true), Some(now + MS(20)));
    }

    #[test]
    fn a_report_of_the_kernel_causes_a_scan_at_once() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        for _ in 0..9 {
            schedule.begun(now, true);
            schedule.ended(now, MS(2));
        }
        schedule.reported();
        assert_eq!(schedule.due(true), Some(now + MS(8)), "but for the rest");
        assert_eq!(schedule.due(false), Some(now + AFTER_REPORT));
        // A report during a scan, which may have started too early to find the netns.
        schedule.begun(now, true);
        schedule.reported();
        schedule.ended(now, MS(2));
        assert_eq!(schedule.due(true), Some(now + MS(8)));
        schedule.begun(now, true);
        schedule.ended(now, MS(2));
        assert_eq!(schedule.due(true), Some(now + MS(40)));
    }

    #[test]
    fn found_pods_are_looked_at_again_now_and_then() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        assert!(schedule.begun(now, true), "the first is for all");
        schedule.ended(now, MS(1));
        assert!(!schedule.begun(now + MS(20), true));
        assert!(schedule.begun(now + MS(30), false));
        assert!(!schedule.begun(now + Pauses::SLOW, true));
        assert!(schedule.begun(now + Pauses::SLOW + MS(30), true));
        schedule.doubt();
        assert_eq!(schedule.due(false), Some(now + MS(4)), "soon");
        assert!(schedule.begun(now + Pauses::SLOW + MS(40), true));
    }

    #[test]
    fn held_netns_are_counted_every_second() {
        let mut walks = Walks::default();
        assert_eq!(walks.due(true), None, "at once");
        let now = Instant::now();
        walks.ended(now, MS(1));
        assert_eq!(walks.due(true), Some(now + HELD));
        assert_eq!(walks.due(false), Some(now + Pauses::SLOW));
        walks.is_due = true;
        assert_eq!(walks.due(true), Some(now + MS(4)), "soon");
        walks.ended(now, Duration::from_secs(4));
        assert_eq!(
            walks.due(true),
            Some(now + Duration::from_secs(16)),
            "after a rest"
        );
    }

    #[test]
    fn looking_leaves_most_of_the_time() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        schedule.begun(now, true);
        schedule.reported();
        schedule.ended(now, Duration::from_secs(4));
        assert_eq!(schedule.due(true), Some(now + Duration::from_secs(16)));
    }
}
