//! When to ask for a certificate. Pure: time and chance come from the caller.

use std::time::{Duration, SystemTime};

use crate::{backoff, tunnel::svid::Svid};

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// A certificate that lives for no time at all is not asked for again and again without a pause.
const SHORTEST: Duration = Duration::from_millis(500);
/// The longest sleep in one piece: the clock may be set meanwhile, or the machine sleep.
const LOOK: Duration = Duration::from_secs(60);

/// When the next request for one identity is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    due: SystemTime,
    /// In a row.
    failures: u32,
}

impl Schedule {
    /// The first request is due at once.
    pub(super) fn new(now: SystemTime) -> Self {
        Self {
            due: now,
            failures: 0,
        }
    }

    /// How long to sleep at `now` before looking again; zero when the request is due.
    pub(super) fn sleep(&self, now: SystemTime) -> Duration {
        self.due.duration_since(now).unwrap_or_default().min(LOOK)
    }

    /// A certificate came. The next is due when half of what is left of its life has passed, give or take a tenth, so
    /// that a cluster started at one moment does not renew at one moment. `chance` is between 0 and 1.
    ///
    /// Returns how long that is.
    pub(super) fn issued(&mut self, svid: &Svid, now: SystemTime, chance: f64) -> Duration {
        self.failures = 0;
        let left = svid.not_after.duration_since(now).unwrap_or_default();
        self.after(
            left.mul_f64(0.4 + 0.2 * chance.clamp(0.0, 1.0))
                .max(SHORTEST),
            now,
        )
    }

    /// None came. The next is due after twice as long each time, within bounds, half of it by chance. `chance` is
    /// between 0 and 1.
    ///
    /// Returns how long that is.
    pub(super) fn failed(&mut self, now: SystemTime, chance: f64) -> Duration {
        let pause = backoff::pause(FIRST_RETRY, LAST_RETRY, self.failures, chance);
        self.failures = self.failures.saturating_add(1);
        self.after(pause, now)
    }

    /// The certificate in use was revoked: the next is due now, or soon, if the CA has just refused one.
    pub(super) fn revoked(&mut self, now: SystemTime) {
        if self.failures == 0 {
            self.due = self.due.min(now);
        }
    }

    /// Something has changed at the CA: what it refused before it may grant now, and is asked for within a second, by
    /// `chance`, which is between 0 and 1.
    pub(super) fn hope(&mut self, now: SystemTime, chance: f64) {
        if self.failures > 0 {
            let soon = now + FIRST_RETRY.mul_f64(chance.clamp(0.0, 1.0));
            self.due = self.due.min(soon);
        }
    }

    fn after(&mut self, delay: Duration, now: SystemTime) -> Duration {
        self.due = now + delay;
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        START + Duration::from_secs(seconds)
    }

    fn svid(not_after: SystemTime) -> Svid {
        Svid {
            identity: "spiffe://a/ns/b/sa/c".parse().unwrap(),
            serial: "1".into(),
            not_before: START,
            not_after,
        }
    }

    #[test]
    fn asks_at_once_and_renews_around_half_life() {
        for (chance, expected) in [(0.0, 400), (0.5, 500), (1.0, 600)] {
            let mut schedule = Schedule::new(at(0));
            assert_eq!(schedule.sleep(at(0)), Duration::ZERO);
            let delay = schedule.issued(&svid(at(1000)), at(0), chance);
            assert_eq!(delay, Duration::from_secs(expected));
            assert_eq!(schedule.sleep(at(0)), LOOK);
            assert_eq!(schedule.sleep(at(expected - 1)), Duration::from_secs(1));
            assert_eq!(schedule.sleep(at(expected)), Duration::ZERO);
        }
        let mut schedule = Schedule::new(at(0));
        assert_eq!(schedule.issued(&svid(at(10)), at(20), 0.5), SHORTEST);
    }

    #[test]
    fn backs_off_within_bounds_and_forgets_when_one_comes() {
        let mut schedule = Schedule::new(at(0));
        for (chance, expected) in [(1.0, 1.0), (1.0, 2.0), (0.0, 2.0), (1.0, 8.0)] {
            let delay = schedule.failed(at(0), chance);
            assert_eq!(delay, Duration::from_secs_f64(expected));
        }
        for _ in 0..100 {
            schedule.failed(at(0), 1.0);
        }
        assert_eq!(schedule.failed(at(0), 1.0), LAST_RETRY);
        schedule.issued(&svid(at(1000)), at(0), 0.5);
        assert_eq!(schedule.failed(at(0), 1.0), FIRST_RETRY);
    }

    #[test]
    fn a_clock_that_is_set_forward_is_noticed() {
        let mut schedule = Schedule::new(at(0));
        schedule.issued(&svid(at(86_400)), at(0), 0.5);
        assert_eq!(schedule.sleep(at(60)), LOOK);
        assert_eq!(schedule.sleep(at(50_000)), Duration::ZERO);
    }

    #[test]
    fn a_change_at_the_ca_is_a_reason_to_ask_again() {
        let mut schedule = Schedule::new(at(0));
        schedule.issued(&svid(at(1000)), at(0), 0.5);
        schedule.hope(at(10), 0.5);
        assert_eq!(schedule.sleep(at(440)), LOOK, "it has what it wants");
        for _ in 0..10 {
            schedule.failed(at(500), 1.0);
        }
        assert_eq!(schedule.sleep(at(500)), LOOK);
        schedule.hope(at(500), 0.5);
        assert_eq!(schedule.sleep(at(500)), Duration::from_millis(500));
    }

    #[test]
    fn a_revoked_certificate_is_replaced_at_once_unless_the_ca_refuses() {
        let mut schedule = Schedule::new(at(0));
        schedule.issued(&svid(at(1000)), at(0), 0.5);
        schedule.revoked(at(10));
        assert_eq!(schedule.sleep(at(10)), Duration::ZERO);
        schedule.failed(at(10), 1.0);
        schedule.revoked(at(10));
        assert_eq!(schedule.sleep(at(10)), FIRST_RETRY);
    }
}
