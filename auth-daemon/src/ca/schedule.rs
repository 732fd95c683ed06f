//! When to look after what: soon after something happened to it, less and less often after failures. No I/O.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// First and longest pause after a failure.
const RETRY: Duration = Duration::from_secs(2);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// What is due when, by name.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    due: BTreeMap<String, Instant>,
    /// The pause after the last failure.
    pauses: BTreeMap<String, Duration>,
}

impl Schedule {
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.values().min().copied()
    }

    pub(super) fn at_once(&mut self, name: &str) {
        // After a failure the pause counts.
        if !self.pauses.contains_key(name) {
            self.due.insert(name.to_owned(), Instant::now());
        }
    }

    pub(super) fn after(&mut self, name: &str, wait: Duration) {
        self.pauses.remove(name);
        self.due.insert(name.to_owned(), Instant::now() + wait);
    }

    pub(super) fn again(&mut self, name: &str) {
        let pause = self.pauses.get(name).map_or(RETRY, |pause| *pause * 2);
        let pause = pause.min(MAX_RETRY);
        self.pauses.insert(name.to_owned(), pause);
        self.due.insert(name.to_owned(), Instant::now() + pause);
    }

    pub(super) fn forget(&mut self, name: &str) {
        self.pauses.remove(name);
        self.due.remove(name);
    }

    /// Takes out up to `most` of those that are due.
    pub(super) fn take(&mut self, now: Instant, most: usize) -> Vec<String> {
        let due = self.due.iter().filter(|(_, at)| **at <= now);
        let due: Vec<_> = due.map(|(name, _)| name.clone()).take(most).collect();
        for name in &due {
            self.due.remove(name);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_tried_again_less_and_less_often() {
        let mut schedule = Schedule::default();
        schedule.at_once("web");
        let now = Instant::now();
        assert_eq!(schedule.take(now, 8), ["web"]);
        for _ in 0..20 {
            schedule.again("web");
        }
        let pause = schedule.next().unwrap().duration_since(now);
        assert!(
            pause > MAX_RETRY - RETRY && pause < MAX_RETRY + RETRY,
            "{pause:?}"
        );
        let before = schedule.next();
        schedule.at_once("web");
        assert_eq!(
            schedule.next(),
            before,
            "an event does not shorten the pause"
        );
        schedule.after("web", Duration::ZERO);
        assert_eq!(schedule.take(Instant::now(), 8), ["web"]);
    }

    #[test]
    fn only_so_many_at_once() {
        let mut schedule = Schedule::default();
        for number in 0..20 {
            schedule.at_once(&number.to_string());
        }
        assert_eq!(schedule.take(Instant::now(), 8).len(), 8);
        assert_eq!(schedule.take(Instant::now(), 100).len(), 12);
    }
}
