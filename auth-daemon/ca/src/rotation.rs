//! When each step of a root rotation is due. Pure: times are seconds since the Unix epoch.
//!
//! Roots are identified by number, in the order in which they were made.

use std::fmt;

use auth_tunnel::tls::rfc3339;
use serde::{Deserialize, Serialize};

use crate::signer::{Life, ROOT_BACKDATE};

/// Seconds added to every expiry time before the CA relies on it, to allow for clock skew between nodes.
pub(crate) const CLOCK_SKEW: u64 = 5;

/// Which root signs, and where a rotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rotation {
    /// The root that signs.
    pub(crate) signing: u32,
    pub(crate) phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Phase {
    /// One root, which signs.
    Steady,
    /// The next root is published but does not sign until `until`, so that every node trusts it first.
    Spreading { next: u32, until: u64 },
    /// The new root signs. The old one stays trusted until `after`, when everything that it signed has expired.
    Retiring { old: u32, after: u64 },
}

impl Rotation {
    pub(crate) fn steady(signing: u32) -> Self {
        Self {
            signing,
            phase: Phase::Steady,
        }
    }

    /// Publishes `next`, which signs after `spread` seconds, or earlier if the signing root expires at `end` before.
    /// Returns `None` during a rotation.
    pub(crate) fn start(self, next: u32, now: u64, spread: u64, end: u64) -> Option<Self> {
        let until = now
            .saturating_add(spread)
            .min(end.saturating_sub(CLOCK_SKEW));
        (self.phase == Phase::Steady).then_some(Self {
            signing: self.signing,
            phase: Phase::Spreading { next, until },
        })
    }

    /// The numbers of all trusted roots, the signing one first.
    pub(crate) fn trusted(self) -> impl Iterator<Item = u32> {
        let other = match self.phase {
            Phase::Steady => None,
            Phase::Spreading { next, .. } => Some(next),
            Phase::Retiring { old, .. } => Some(old),
        };
        [Some(self.signing), other].into_iter().flatten()
    }

    /// When the next step is due; `None` outside a rotation.
    pub(crate) fn due(self) -> Option<u64> {
        match self.phase {
            Phase::Steady => None,
            Phase::Spreading { until, .. } => Some(until),
            Phase::Retiring { after, .. } => Some(after),
        }
    }

    /// The rotation after its next step, if that is due at `now`. `longest` is the longest lifetime, in seconds, of a
    /// certificate that the signing root may have signed: a root that stops signing now is needed for that long.
    pub(crate) fn step(self, now: u64, longest: u64) -> Option<Self> {
        self.due().filter(|&due| due <= now)?;
        match self.phase {
            Phase::Steady => None,
            Phase::Spreading { next, .. } => Some(Self {
                signing: next,
                phase: Phase::Retiring {
                    old: self.signing,
                    after: now.saturating_add(longest).saturating_add(CLOCK_SKEW),
                },
            }),
            Phase::Retiring { .. } => Some(Self::steady(self.signing)),
        }
    }
}

impl Phase {
    /// The name in the status.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Spreading { .. } => "spreading",
            Self::Retiring { .. } => "retiring",
        }
    }
}

/// The phase, for people.
impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.phase.name())?;
        match self.phase {
            Phase::Steady => Ok(()),
            Phase::Spreading { until, .. } => {
                write!(f, ": the new root signs from {}", rfc3339(until))
            }
            Phase::Retiring { after, .. } => {
                write!(f, ": the old root is removed at {}", rfc3339(after))
            }
        }
    }
}

/// When the CA starts to replace a root automatically: when a fifth of its life is left, or earlier if a rotation with
/// `spread` and certificates of `lifetime` seconds takes longer than that.
pub(crate) fn starts_by_itself(life: Life, spread: u64, lifetime: u64) -> u64 {
    let made = life.begin.saturating_add(ROOT_BACKDATE);
    let fifth = life.end.saturating_sub(made) / 5;
    life.end
        .saturating_sub(fifth.max(least_left(spread, lifetime)))
}

/// The remaining life that a root needs for an orderly rotation, in seconds.
pub(crate) fn least_left(spread: u64, lifetime: u64) -> u64 {
    spread
        .saturating_add(lifetime)
        .saturating_add(2 * CLOCK_SKEW)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000_000;
    const FAR: u64 = u64::MAX;

    #[test]
    fn takes_one_step_after_the_other() {
        let steady = Rotation::steady(1);
        assert_eq!(steady.due(), None);
        let spreading = steady.start(2, NOW, 100, FAR).unwrap();
        assert_eq!(spreading.trusted().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(spreading.start(3, NOW, 100, FAR), None, "one at a time");
        assert_eq!(spreading.step(NOW + 99, 500), None);
        let retiring = spreading.step(NOW + 100, 500).unwrap();
        assert_eq!(retiring.signing, 2);
        assert_eq!(retiring.trusted().collect::<Vec<_>>(), [2, 1]);
        assert_eq!(retiring.start(3, NOW, 100, FAR), None);
        assert_eq!(retiring.due(), Some(NOW + 605));
        assert_eq!(retiring.step(NOW + 604, 500), None);
        assert_eq!(retiring.step(NOW + 605, 500), Some(Rotation::steady(2)));
    }

    #[test]
    fn does_not_wait_for_a_root_that_expires() {
        let spreading = |end| Rotation::steady(1).start(2, NOW, 1000, end).unwrap();
        assert_eq!(spreading(NOW + 500).due(), Some(NOW + 495));
        assert!(spreading(NOW - 10).step(NOW, 0).is_some());
    }

    #[test]
    fn starts_with_a_fifth_left_or_in_time() {
        let life = |length| Life {
            begin: NOW - ROOT_BACKDATE,
            end: NOW + length,
        };
        assert_eq!(starts_by_itself(life(10_000), 10, 10), NOW + 8_000);
        let early = starts_by_itself(life(10_000), 1_000, 3_000);
        assert_eq!(early, NOW + 10_000 - 4_010);
    }

    proptest! {
        /// Whatever the timing: a root is trusted before it signs, and while anything that it signed is valid.
        #[test]
        fn every_valid_certificate_has_a_trusted_root(
            steps in prop::collection::vec((0..500u64, 0..5u8, 1..400u64), 1..200),
            spread in 0..300u64,
        ) {
            let (mut now, mut made) = (NOW, 1);
            let mut rotation = Rotation::steady(1);
            let mut ends = std::collections::HashMap::<u32, u64>::new();
            let mut published = std::collections::HashMap::from([(1, 0)]);
            for (passed, event, lifetime) in steps {
                now += passed;
                match event {
                    0 => if let Some(next) = rotation.start(made + 1, now, spread, FAR) {
                        made += 1;
                        published.insert(made, now);
                        rotation = next;
                    }
                    1 => {
                        let end = ends.entry(rotation.signing).or_default();
                        *end = (*end).max(now + lifetime);
                    }
                    _ => if let Some(next) = rotation.step(now, 400) {
                        if next.signing != rotation.signing {
                            prop_assert!(published[&next.signing] + spread <= now);
                        }
                        rotation = next;
                    }
                }
                for (root, end) in &ends {
                    prop_assert!(*end < now || rotation.trusted().any(|trusted| trusted == *root));
                }
            }
        }
    }
}
