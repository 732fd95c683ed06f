//! Limits the access log's lines of each pod, so that one pod's connections do not crowd out the lines of others.

use std::{
    collections::{HashMap, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    time::Instant,
};

use auth_mesh::ObjectName;

use super::{
    access_log::{Direction, Finished, Outcome},
    line_limit::LineLimit,
    sharded::Sharded,
};

/// Maximum number of lines in ten seconds about a pod's connections in one direction that ended in order. More than a pod
/// makes that a few cores serve: the log of what is in order is complete unless a pod floods.
const IN_ORDER: u32 = 100_000;
/// The same about those that were refused or reset for one reason.
const OF_REASON: u32 = 1000;
/// Maximum number of reasons that are counted separately for a pod. Peers write parts of some.
const REASONS: usize = 64;

/// Numbers of logged lines about the pods' connections, by the cookie of their netns.
#[derive(Debug, Default)]
pub(super) struct AccessLimits(Sharded<Pods>);

type Pods = HashMap<u64, HashMap<Kind, Limited>>;

/// What lines have in common that are limited together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    direction: Direction,
    outcome: Outcome,
    /// Hash of the reason's words, or 0 for all reasons beyond [`REASONS`].
    reason: u64,
}

#[derive(Debug)]
struct Limited {
    limit: LineLimit,
    /// A reason of this kind.
    reason: String,
}

impl AccessLimits {
    /// Whether to write a line about the connection.
    pub(super) fn pass(&self, finished: &Finished, now: Instant) -> bool {
        let mut kind = Kind {
            direction: finished.direction,
            outcome: finished.outcome,
            reason: words(&finished.reason),
        };
        let mut pods = self.0.of(finished.pod);
        let kinds = pods.entry(finished.pod).or_default();
        if kinds.len() >= REASONS && !kinds.contains_key(&kind) {
            kind.reason = 0;
        }
        let limited = kinds.entry(kind).or_insert_with(|| Limited {
            limit: LineLimit::default(),
            reason: finished.reason.clone(),
        });
        let most = match finished.outcome {
            Outcome::Ok => IN_ORDER,
            Outcome::Refused | Outcome::Reset => OF_REASON,
        };
        limited.limit.note(1, most, now).is_some()
    }

    /// Logs how many lines were left out in the intervals that are over, and forgets these. `name` returns the name of the
    /// pod whose netns has a cookie.
    pub(super) fn tell(&self, now: Instant, name: impl Fn(u64) -> Option<ObjectName>) {
        for mut pods in self.0.each() {
            pods.retain(|cookie, kinds| {
                kinds.retain(|kind, limited| match limited.limit.left_out(now) {
                    None => true,
                    Some(0) => false,
                    Some(left_out) => {
                        let pod = name(*cookie).map_or_else(String::new, |name| name.to_string());
                        tracing::warn!(
                            pod,
                            direction = kind.direction.name(),
                            result = kind.outcome.name(),
                            reason = limited.reason,
                            left_out,
                            "access log lines left out"
                        );
                        false
                    }
                });
                !kinds.is_empty()
            });
        }
    }
}

/// Hashes the words of a reason that have no digit: not its addresses, ports and sizes.
fn words(reason: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    for word in reason.split_ascii_whitespace() {
        if !word.bytes().any(|byte| byte.is_ascii_digit()) {
            word.hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::line_limit::INTERVAL;

    fn finished(pod: u64, outcome: Outcome, reason: String) -> Finished {
        Finished {
            pod,
            outcome,
            reason,
            ..Finished::example()
        }
    }

    #[test]
    fn one_pod_and_reason_does_not_silence_others() {
        let (limits, now) = (AccessLimits::default(), Instant::now());
        let pass = |pod, reason| limits.pass(&finished(pod, Outcome::Refused, reason), now);
        let passed = (0..OF_REASON * 2).filter(|port| pass(1, format!("10.0.0.1:{port}: denied")));
        assert_eq!(passed.count(), OF_REASON as usize);
        assert!(pass(2, "10.0.0.1:1: denied".into()), "another pod");
        assert!(pass(1, "no certificate".into()), "another reason");
        assert!(limits.pass(&finished(1, Outcome::Ok, String::new()), now));
    }

    #[test]
    fn reasons_that_peers_write_take_no_endless_room() {
        let (limits, now) = (AccessLimits::default(), Instant::now());
        let letters = |number: usize| "x".repeat(number);
        let passed = (1..10_000).filter(|number| {
            let reason = letters(*number % 5000);
            limits.pass(&finished(1, Outcome::Reset, reason), now)
        });
        assert!(passed.count() < 10_000 / 2);
        assert!(limits.0.of(1)[&1].len() <= REASONS + 1);
        limits.tell(now + INTERVAL, |_| None);
        assert!(limits.0.each().all(|pods| pods.is_empty()));
    }
}
