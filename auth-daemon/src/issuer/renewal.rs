//! When to request a certificate. Pure: time and chance come from the caller.

use std::time::{Duration, SystemTime};

use auth_support::backoff;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// The longest pause that a CA can ask for: the longest that this project's CA does.
const LONGEST_RETRY: Duration = Duration::from_secs(3600);
/// The least pause, even for certificates with no lifetime left.
const SHORTEST: Duration = Duration::from_millis(500);
/// The longest sleep at once: the clock may be set meanwhile, or the machine suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// When the next request for one identity is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    due: SystemTime,
    /// In a row.
    failures: u32,
    /// Before this, the CA does not want another request.
    not_before: SystemTime,
}

impl Schedule {
    /// The first request is due at once.
    pub(super) fn new(now: SystemTime) -> Self {
        Self {
            due: now,
            failures: 0,
            not_before: now,
        }
    }

    /// How long to sleep at `now` before the next check; zero when the request is due.
    pub(super) fn sleep(&self, now: SystemTime) -> Duration {
        self.due
            .duration_since(now)
            .unwrap_or_default()
            .min(LONGEST_SLEEP)
    }

    /// A certificate that is valid until `not_after` was issued. The next is due when half of its remaining life has passed,
    /// give or take a tenth, so that a cluster that started at once does not renew at once. `chance` is between 0 and 1.
    ///
    /// Returns how long that is.
    pub(super) fn issued(
        &mut self,
        not_after: SystemTime,
        now: SystemTime,
        chance: f64,
    ) -> Duration {
        self.failures = 0;
        let left = not_after.duration_since(now).unwrap_or_default();
        self.after(
            left.mul_f64(0.4 + 0.2 * chance.clamp(0.0, 1.0))
                .max(SHORTEST),
            now,
        )
    }

    /// A request failed. The next is due after a pause that doubles each time, within bounds, half of it by `chance`,
    /// which is between 0 and 1. If the CA asks for a longer pause (`retry_after`), it is that, and up to half of it more.
    ///
    /// Returns how long that is.
    pub(super) fn failed(
        &mut self,
        now: SystemTime,
        chance: f64,
        retry_after: Option<Duration>,
    ) -> Duration {
        let pause = backoff::pause(FIRST_RETRY, LAST_RETRY, self.failures, chance);
        self.failures = self.failures.saturating_add(1);
        let asked = retry_after.unwrap_or_default().min(LONGEST_RETRY);
        self.not_before = now + asked;
        let spread = asked.mul_f64(1.0 + 0.5 * chance.clamp(0.0, 1.0));
        self.after(pause.max(spread), now)
    }

    /// The certificate was revoked. The next is due now, or after the pause if the CA has just refused one.
    pub(super) fn revoked(&mut self, now: SystemTime) {
        if self.failures == 0 {
            self.due = self.due.min(now);
        }
    }

    /// The trust bundle has changed: what the CA refused before it may grant now. A retry is due within a second, by
    /// `chance`, which is between 0 and 1.
    pub(super) fn trust_changed(&mut self, now: SystemTime, chance: f64) {
        if self.failures > 0 {
            let soon = now + FIRST_RETRY.mul_f64(chance.clamp(0.0, 1.0));
            self.due = self.due.min(soon.max(self.not_before));
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

    #[test]
    fn requests_at_once_and_renews_around_half_life() {
        for (chance, expected) in [(0.0, 400), (0.5, 500), (1.0, 600)] {
            let mut schedule = Schedule::new(at(0));
            assert_eq!(schedule.sleep(at(0)), Duration::ZERO);
            let delay = schedule.issued(at(1000), at(0), chance);
            assert_eq!(delay, Duration::from_secs(expected));
            assert_eq!(schedule.sleep(at(0)), LONGEST_SLEEP);
            assert_eq!(schedule.sleep(at(expected - 1)), Duration::from_secs(1));
            assert_eq!(schedule.sleep(at(expected)), Duration::ZERO);
        }
        let mut schedule = Schedule::new(at(0));
        assert_eq!(schedule.issued(at(10), at(20), 0.5), SHORTEST);
    }

    #[test]
    fn backs_off_within_bounds_until_a_success() {
        let mut schedule = Schedule::new(at(0));
        for (chance, expected) in [(1.0, 1.0), (1.0, 2.0), (0.0, 2.0), (1.0, 8.0)] {
            let delay = schedule.failed(at(0), chance, None);
            assert_eq!(delay, Duration::from_secs_f64(expected));
        }
        for _ in 0..100 {
            schedule.failed(at(0), 1.0, None);
        }
        assert_eq!(schedule.failed(at(0), 1.0, None), LAST_RETRY);
        schedule.issued(at(1000), at(0), 0.5);
        assert_eq!(schedule.failed(at(0), 1.0, None), FIRST_RETRY);
    }

    #[test]
    fn waits_as_long_as_the_ca_asks_and_a_little_more() {
        let seconds = |s| Some(Duration::from_secs(s));
        let mut schedule = Schedule::new(at(0));
        for (chance, expected) in [(0.0, 100), (1.0, 150)] {
            let delay = schedule.failed(at(0), chance, seconds(100));
            assert_eq!(delay, Duration::from_secs(expected));
        }
        schedule.trust_changed(at(10), 0.5);
        assert_eq!(schedule.sleep(at(99)), Duration::from_secs(1));
        assert_eq!(
            schedule.failed(at(100), 0.0, seconds(1_000_000)),
            LONGEST_RETRY
        );
        for _ in 0..10 {
            schedule.failed(at(100), 1.0, None);
        }
        let longer = schedule.failed(at(100), 1.0, seconds(1));
        assert_eq!(longer, LAST_RETRY, "its own pause is longer");
    }

    #[test]
    fn notices_a_clock_set_forward() {
        let mut schedule = Schedule::new(at(0));
        schedule.issued(at(86_400), at(0), 0.5);
        assert_eq!(schedule.sleep(at(60)), LONGEST_SLEEP);
        assert_eq!(schedule.sleep(at(50_000)), Duration::ZERO);
    }

    #[test]
    fn retries_when_the_trust_bundle_changes() {
        let mut schedule = Schedule::new(at(0));
        schedule.issued(at(1000), at(0), 0.5);
        schedule.trust_changed(at(10), 0.5);
        assert_eq!(
            schedule.sleep(at(440)),
            LONGEST_SLEEP,
            "it has a certificate"
        );
        for _ in 0..10 {
            schedule.failed(at(500), 1.0, None);
        }
        assert_eq!(schedule.sleep(at(500)), LONGEST_SLEEP);
        schedule.trust_changed(at(500), 0.5);
        assert_eq!(schedule.sleep(at(500)), Duration::from_millis(500));
    }

    #[test]
    fn replaces_a_revoked_certificate_at_once_unless_the_ca_refuses() {
        let mut schedule = Schedule::new(at(0));
        schedule.issued(at(1000), at(0), 0.5);
        schedule.revoked(at(10));
        assert_eq!(schedule.sleep(at(10)), Duration::ZERO);
        schedule.failed(at(10), 1.0, None);
        schedule.revoked(at(10));
        assert_eq!(schedule.sleep(at(10)), FIRST_RETRY);
    }
}
