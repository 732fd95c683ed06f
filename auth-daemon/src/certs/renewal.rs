//! When to ask for a certificate again. Pure: time and chance come from the caller.

use std::time::{Duration, SystemTime};

use crate::tunnel::svid::Svid;

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// How long to wait, at `now`, before `svid` is renewed: until half of its life has passed, give or take a tenth of
/// it, so that a cluster started at one moment does not renew at one moment. `chance` is between 0 and 1.
pub(super) fn renew_in(svid: &Svid, now: SystemTime, chance: f64) -> Duration {
    let left = svid.not_after.duration_since(now).unwrap_or_default();
    left.mul_f64(0.4 + 0.2 * chance.clamp(0.0, 1.0))
        .max(Duration::from_millis(500))
}

/// How long to wait after the `failures`th failure in a row: twice as long each time, within bounds, half of it by
/// chance. `chance` is between 0 and 1.
pub(super) fn retry_in(failures: u32, chance: f64) -> Duration {
    let doubled = FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled
        .min(LAST_RETRY)
        .mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn svid(now: SystemTime, life: Duration) -> Svid {
        Svid {
            identity: "spiffe://a/ns/b/sa/c".parse().unwrap(),
            serial: "1".into(),
            not_before: now,
            not_after: now + life,
        }
    }

    #[test]
    fn renews_around_half_life() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let svid = svid(now, Duration::from_secs(1000));
        assert_eq!(renew_in(&svid, now, 0.0), Duration::from_secs(400));
        assert_eq!(renew_in(&svid, now, 0.5), Duration::from_secs(500));
        assert_eq!(renew_in(&svid, now, 1.0), Duration::from_secs(600));
        let late = now + Duration::from_secs(2000);
        assert_eq!(renew_in(&svid, late, 0.5), Duration::from_millis(500));
    }

    #[test]
    fn backs_off_within_bounds() {
        assert_eq!(retry_in(1, 1.0), Duration::from_secs(1));
        assert_eq!(retry_in(2, 1.0), Duration::from_secs(2));
        assert_eq!(retry_in(3, 0.0), Duration::from_secs(2));
        assert_eq!(retry_in(100, 1.0), LAST_RETRY);
    }
}
