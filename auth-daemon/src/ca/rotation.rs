//! The rotation of the root, without doing it: which root signs, which is only believed, and what is due when. Pure;
//! times are seconds of the Unix epoch.

use serde::{Deserialize, Serialize};

use super::signer::{Life, ROOT_BACKDATE};

/// How much longer than the last certificate under it an old root is believed: clocks of nodes differ a little.
const AFTERWARDS: u64 = 60;

/// Roots are known by number here, in the order in which they were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rotation {
    /// Who signs.
    pub(super) signing: u32,
    pub(super) phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Phase {
    /// One root, which signs.
    Steady,
    /// A new root is published, so that all believe it before it signs.
    Spreading { next: u32, until: u64 },
    /// The new root signs. The old one is believed until nothing under it lives: at `after` at the soonest.
    Retiring { old: u32, after: u64 },
}

impl Rotation {
    pub(super) fn steady(signing: u32) -> Self {
        Self {
            signing,
            phase: Phase::Steady,
        }
    }

    /// Publishes `next`, which signs after `spread` seconds; sooner if `end`, that of the root that signs now, is near.
    /// `None` while a rotation is under way.
    pub(super) fn start(self, next: u32, now: u64, spread: u64, end: u64) -> Option<Self> {
        let until = now
            .saturating_add(spread)
            .min(end.saturating_sub(AFTERWARDS));
        (self.phase == Phase::Steady).then_some(Self {
            signing: self.signing,
            phase: Phase::Spreading { next, until },
        })
    }

    /// The numbers of all roots that are believed; the one that signs comes first.
    pub(super) fn believed(self) -> impl Iterator<Item = u32> {
        let other = match self.phase {
            Phase::Steady => None,
            Phase::Spreading { next, .. } => Some(next),
            Phase::Retiring { old, .. } => Some(old),
        };
        [Some(self.signing), other].into_iter().flatten()
    }

    /// When the next step is due. `last_end` says when the last certificate under a root ends.
    pub(super) fn due(self, last_end: impl Fn(u32) -> u64) -> Option<u64> {
        match self.phase {
            Phase::Steady => None,
            Phase::Spreading { until, .. } => Some(until),
            Phase::Retiring { old, after } => {
                Some(after.max(last_end(old).saturating_add(AFTERWARDS)))
            }
        }
    }

    /// What it is after the next step, if that is due at `now`.
    pub(super) fn step(self, now: u64, last_end: impl Fn(u32) -> u64) -> Option<Self> {
        self.due(&last_end).filter(|&due| due <= now)?;
        match self.phase {
            Phase::Steady => None,
            Phase::Spreading { next, .. } => Some(Self {
                signing: next,
                phase: Phase::Retiring {
                    old: self.signing,
                    after: last_end(self.signing).max(now).saturating_add(AFTERWARDS),
                },
            }),
            Phase::Retiring { .. } => Some(Self::steady(self.signing)),
        }
    }
}

/// When a root of `life` has to begin to be replaced: with a fifth of its life left, or sooner if what it still has to
/// do takes longer than that (`spread`, and then certificates of `lifetime`, in seconds).
pub(super) fn starts_by_itself(life: Life, spread: u64, lifetime: u64) -> u64 {
    let made = life.begin.saturating_add(ROOT_BACKDATE);
    let fifth = life.end.saturating_sub(made) / 5;
    life.end
        .saturating_sub(fifth.max(least_left(spread, lifetime)))
}

/// What a root must have left to be replaced in good order, in seconds.
pub(super) fn least_left(spread: u64, lifetime: u64) -> u64 {
    spread
        .saturating_add(lifetime)
        .saturating_add(2 * AFTERWARDS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000_000;
    const FAR: u64 = u64::MAX;

    #[test]
    fn one_step_after_the_other() {
        let steady = Rotation::steady(1);
        assert_eq!(steady.due(|_| FAR - 60), None);
        let spreading = steady.start(2, NOW, 100, FAR).unwrap();
        assert_eq!(spreading.believed().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(spreading.start(3, NOW, 100, FAR), None, "one at a time");
        assert_eq!(spreading.step(NOW + 99, |_| NOW), None);
        // What was issued under the old root ends 500 s after it has signed for the last time.
        let ends = |root| if root == 1 { NOW + 600 } else { FAR - 60 };
        let retiring = spreading.step(NOW + 100, ends).unwrap();
        assert_eq!(retiring.signing, 2);
        assert_eq!(retiring.believed().collect::<Vec<_>>(), [2, 1]);
        assert_eq!(retiring.start(3, NOW, 100, FAR), None);
        assert_eq!(retiring.due(ends), Some(NOW + 660));
        assert_eq!(retiring.step(NOW + 659, ends), None);
        // Of what was known only when it ended the signing, nothing is left, as after a restart.
        assert_eq!(retiring.step(NOW + 659, |_| 0), None);
        // Something that was on its way then has come to be known since.
        assert_eq!(retiring.due(|_| NOW + 700), Some(NOW + 760));
        assert_eq!(retiring.step(NOW + 660, ends), Some(Rotation::steady(2)));
    }

    #[test]
    fn a_root_that_ends_does_not_wait() {
        let spreading = |end| Rotation::steady(1).start(2, NOW, 1000, end).unwrap();
        assert_eq!(spreading(NOW + 500).due(|_| 0), Some(NOW + 440));
        let ended = spreading(NOW - 10);
        assert!(ended.step(NOW, |_| 0).is_some());
    }

    #[test]
    fn starts_with_a_fifth_left_or_in_time() {
        let life = |length| Life {
            begin: NOW - ROOT_BACKDATE,
            end: NOW + length,
        };
        assert_eq!(starts_by_itself(life(10_000), 10, 10), NOW + 8_000);
        assert_eq!(
            starts_by_itself(life(10_000), 1_000, 3_000),
            NOW + 10_000 - 4_120
        );
    }

    proptest! {
        /// Whatever the clock does: a root is believed before it signs and for as long as anything under it lives.
        #[test]
        fn nobody_meets_a_root_that_it_does_not_believe(
            steps in prop::collection::vec((0..500u64, 0..5u8, 1..400u64), 1..200),
            spread in 0..300u64,
        ) {
            let (mut now, mut made) = (NOW, 1);
            let mut rotation = Rotation::steady(1);
            let mut ends = std::collections::HashMap::<u32, u64>::new();
            let mut published = std::collections::HashMap::from([(1, 0)]);
            for (passed, event, life) in steps {
                now += passed;
                match event {
                    0 => if let Some(next) = rotation.start(made + 1, now, spread, FAR) {
                        made += 1;
                        published.insert(made, now);
                        rotation = next;
                    }
                    1 => {
                        let end = ends.entry(rotation.signing).or_default();
                        *end = (*end).max(now + life);
                    }
                    _ => if let Some(next) = rotation.step(now, |root| ends.get(&root).copied().unwrap_or(0)) {
                        if next.signing != rotation.signing {
                            prop_assert!(published[&next.signing] + spread <= now);
                        }
                        rotation = next;
                    }
                }
                for (root, end) in &ends {
                    prop_assert!(*end < now || rotation.believed().any(|believed| believed == *root));
                }
            }
        }
    }
}
