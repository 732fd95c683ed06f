//! When to reconcile which object: at once after a change, with growing pauses after failures. No I/O.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// First and longest pause after a failure.
const RETRY: Duration = Duration::from_secs(2);
const MAX_RETRY: Duration = Duration::from_secs(60);

/// When each object is due, by name.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    due: BTreeMap<String, Instant>,
    /// The pause after the last failure.
    pauses: BTreeMap<String, Duration>,
}

impl Schedule {
    pub(crate) fn next(&self) -> Option<Instant> {
        self.due.values().min().copied()
    }

    pub(crate) fn now(&mut self, name: &str) {
        // After a failure, only the end of the pause makes it due.
        if !self.pauses.contains_key(name) {
            self.due.insert(name.to_owned(), Instant::now());
        }
    }

    pub(crate) fn after(&mut self, name: &str, wait: Duration) {
        self.pauses.remove(name);
        self.due.insert(name.to_owned(), Instant::now() + wait);
    }

    pub(crate) fn failed(&mut self, name: &str) {
        let pause = self.pauses.get(name).map_or(RETRY, |pause| *pause * 2);
        let pause = pause.min(MAX_RETRY);
        self.pauses.insert(name.to_owned(), pause);
        self.due.insert(name.to_owned(), Instant::now() + pause);
    }

    pub(crate) fn forget(&mut self, name: &str) {
        self.pauses.remove(name);
        self.due.remove(name);
    }

    /// Removes and returns up to `most` of the due names.
    pub(crate) fn take(&mut self, now: Instant, most: usize) -> Vec<String> {
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
    fn pauses_grow_with_failures() {
        let mut schedule = Schedule::default();
        schedule.now("web");
        let now = Instant::now();
        assert_eq!(schedule.take(now, 8), ["web"]);
        for _ in 0..20 {
            schedule.failed("web");
        }
        let pause = schedule.next().unwrap().duration_since(now);
        assert!(
            pause > MAX_RETRY - RETRY && pause < MAX_RETRY + RETRY,
            "{pause:?}"
        );
        let before = schedule.next();
        schedule.now("web");
        assert_eq!(
            schedule.next(),
            before,
            "an event does not shorten the pause"
        );
        schedule.after("web", Duration::ZERO);
        assert_eq!(schedule.take(Instant::now(), 8), ["web"]);
    }

    #[test]
    fn takes_a_limited_number() {
        let mut schedule = Schedule::default();
        for number in 0..20 {
            schedule.now(&number.to_string());
        }
        assert_eq!(schedule.take(Instant::now(), 8).len(), 8);
        assert_eq!(schedule.take(Instant::now(), 100).len(), 12);
    }
}
