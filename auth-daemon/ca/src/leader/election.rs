//! Leader election by a Lease: what to do next, from the Lease and this process's own clock. No I/O.

use std::time::Duration;

use tokio::time::Instant;

/// The times of an election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A Lease that was not renewed for so long may be taken over.
    pub lease: Duration,
    /// How often the leader renews it, and the others read it.
    pub renew: Duration,
    /// A leader that could not renew for so long steps down. Shorter than `lease`.
    pub give_up: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew: Duration::from_secs(2),
            give_up: Duration::from_secs(10),
        }
    }
}

/// Longest lease of another holder that is respected: a wrong number in the object must not block the election.
const MAX_LEASE: Duration = Duration::from_secs(60);

/// The content of the Lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Its holder; empty if there is none.
    pub holder: String,
    /// How long it is valid after a renewal.
    pub duration: Duration,
    /// Its resource version, which changes with each renewal.
    pub version: String,
}

/// What to do with the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Create it, with this candidate as holder.
    Create,
    /// Make this candidate its holder.
    Take,
    /// Renew it.
    Renew,
    /// Another candidate is the leader.
    Wait,
    /// Step down: another candidate took it over.
    StepDown,
}

/// One candidate's view of the election.
#[derive(Debug)]
pub struct Election {
    name: String,
    timing: Timing,
    /// When the last successful renewal was sent; `None` if this is not the leader.
    renewed: Option<Instant>,
    /// Another holder's Lease, and since when it is unchanged.
    seen: Option<(View, Instant)>,
}

impl Election {
    /// `name` is unique to this candidate.
    pub fn new(name: String, timing: Timing) -> Self {
        Self {
            name,
            timing,
            renewed: None,
            seen: None,
        }
    }

    /// What to do at `now` with this Lease. If a write succeeds, call [`Election::renewed`].
    pub fn next(&mut self, now: Instant, lease: Option<&View>) -> Move {
        let Some(lease) = lease else {
            self.seen = None;
            return Move::Create;
        };
        if lease.holder == self.name {
            self.seen = None;
            return if self.leads(now) {
                Move::Renew
            } else {
                Move::Take
            };
        }
        if self.renewed.is_some() {
            self.renewed = None;
            return Move::StepDown;
        }
        if lease.holder.is_empty() {
            return Move::Take;
        }
        // The times in the Lease are by the holder's clock, which may be wrong: only our own observations count.
        let since = match &self.seen {
            Some((seen, since)) if seen == lease => *since,
            _ => {
                self.seen = Some((lease.clone(), now));
                now
            }
        };
        let holds = lease.duration.clamp(self.timing.lease, MAX_LEASE);
        if now.duration_since(since) >= holds {
            Move::Take
        } else {
            Move::Wait
        }
    }

    /// A write to the Lease that was sent at `sent` succeeded: this is the leader.
    pub fn renewed(&mut self, sent: Instant) {
        self.renewed = Some(sent);
        self.seen = None;
    }

    /// This candidate is no longer the leader.
    pub fn step_down(&mut self) {
        self.renewed = None;
    }

    /// Whether this is the leader at `now`.
    pub fn leads(&self, now: Instant) -> bool {
        self.until().is_some_and(|until| now < until)
    }

    /// Until when this is the leader if no further write succeeds.
    pub fn until(&self) -> Option<Instant> {
        self.renewed.map(|sent| sent + self.timing.give_up)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn lease(holder: &str, version: u32) -> View {
        View {
            holder: holder.into(),
            duration: 15 * SECOND,
            version: version.to_string(),
        }
    }

    fn election(name: &str) -> Election {
        Election::new(name.into(), Timing::default())
    }

    #[test]
    fn the_first_candidate_creates_and_renews_the_lease() {
        let (mut a, start) = (election("a"), Instant::now());
        assert_eq!(a.next(start, None), Move::Create);
        assert!(!a.leads(start), "not before the write succeeded");
        a.renewed(start);
        assert!(a.leads(start));
        assert_eq!(
            a.next(start + 2 * SECOND, Some(&lease("a", 1))),
            Move::Renew
        );
    }

    #[test]
    fn takes_over_a_lease_that_was_not_renewed_by_its_own_clock() {
        let (mut b, start) = (election("b"), Instant::now());
        assert_eq!(b.next(start, Some(&lease("a", 1))), Move::Wait);
        assert_eq!(
            b.next(start + 14 * SECOND, Some(&lease("a", 2))),
            Move::Wait
        );
        assert_eq!(
            b.next(start + 28 * SECOND, Some(&lease("a", 2))),
            Move::Wait
        );
        assert_eq!(
            b.next(start + 29 * SECOND, Some(&lease("a", 2))),
            Move::Take
        );
    }

    #[test]
    fn takes_a_released_lease_at_once() {
        let (mut b, start) = (election("b"), Instant::now());
        assert_eq!(b.next(start, Some(&lease("", 9))), Move::Take);
    }

    #[test]
    fn steps_down_when_it_cannot_renew() {
        let (mut a, start) = (election("a"), Instant::now());
        a.renewed(start);
        assert!(a.leads(start + 9 * SECOND));
        assert!(!a.leads(start + 10 * SECOND));
        assert_eq!(a.until(), Some(start + 10 * SECOND));
        // No other candidate took it over meanwhile, so it can be taken again.
        assert_eq!(
            a.next(start + 11 * SECOND, Some(&lease("a", 1))),
            Move::Take
        );
    }

    #[test]
    fn steps_down_when_replaced() {
        let (mut a, start) = (election("a"), Instant::now());
        a.renewed(start);
        assert_eq!(a.next(start + SECOND, Some(&lease("b", 5))), Move::StepDown);
        assert!(!a.leads(start + SECOND));
        assert_eq!(a.next(start + SECOND, Some(&lease("b", 5))), Move::Wait);
    }

    #[test]
    fn ignores_wrong_durations() {
        for (duration, wait) in [(0, 15), (1, 15), (30, 30), (u64::from(u32::MAX), 60)] {
            let (mut b, start) = (election("b"), Instant::now());
            let lease = View {
                duration: Duration::from_secs(duration),
                ..lease("a", 1)
            };
            assert_eq!(b.next(start, Some(&lease)), Move::Wait);
            let almost = Duration::from_secs(wait) - Duration::from_millis(1);
            assert_eq!(
                b.next(start + almost, Some(&lease)),
                Move::Wait,
                "{duration}"
            );
            let then = Duration::from_secs(wait);
            assert_eq!(b.next(start + then, Some(&lease)), Move::Take, "{duration}");
        }
    }

    proptest! {
        /// With reads at any time, and lost writes and answers, there are never two leaders.
        #[test]
        fn never_two_leaders(steps in proptest::collection::vec((0..3_usize, 0..4000_u64, 0..4_u8), 1..400)) {
            let mut candidates = ["a", "b", "c"].map(election);
            let mut current: Option<View> = None;
            let mut writes = 0_u32;
            let mut now = Instant::now();
            for (who, pause, luck) in steps {
                now += Duration::from_millis(pause);
                let name = candidates[who].name.clone();
                let next = candidates[who].next(now, current.as_ref());
                if matches!(next, Move::Create | Move::Take | Move::Renew) && luck > 0 {
                    writes += 1;
                    current = Some(lease(&name, writes));
                    // Luck 1: written, but the answer is lost.
                    if luck > 1 {
                        candidates[who].renewed(now);
                    }
                }
                let leaders: Vec<_> = candidates.iter().filter(|c| c.leads(now)).collect();
                prop_assert!(leaders.len() <= 1, "{leaders:?}");
            }
        }
    }
}
