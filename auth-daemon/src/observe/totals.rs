//! Counters of connections that have ended, for Prometheus.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::access_log::Finished;

/// The most policies that each of the metrics counts separately. Further ones count under an empty name.
const MAX_POLICIES: usize = 1024;
use auth_mesh::policy::{Decision, Verdict};

/// Counters of connections that have ended since the daemon started.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    connections: Family<Ended, Counter>,
    bytes: Family<Carried, Counter>,
    denied: ByPolicy,
    would_be_denied: ByPolicy,
}

/// Denials by the policies behind them.
#[derive(Clone, Debug, Default)]
struct ByPolicy {
    counters: Family<Denied, Counter>,
    /// How many policies have a counter.
    known: Arc<AtomicUsize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    direction: &'static str,
    path: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Carried {
    direction: &'static str,
    path: &'static str,
    to: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Denied {
    kind: &'static str,
    policy: String,
}

impl Totals {
    /// Registers the counters with Prometheus.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "connections",
            "Connections that have ended",
            self.connections.clone(),
        );
        registry.register(
            "connection_bytes",
            "What connections that have ended carried for the apps, in bytes",
            self.bytes.clone(),
        );
        registry.register(
            "policy_denials",
            "Connections that were denied, by the policies behind it",
            self.denied.counters.clone(),
        );
        registry.register(
            "dry_run_denials",
            "Connections that were allowed, and would be denied if all dry-run policies were enforced, by the policies \
             behind it",
            self.would_be_denied.counters.clone(),
        );
    }

    /// Counts what policies deny, or would deny.
    pub(super) fn count_verdict(&self, verdict: &Verdict) {
        let dry_run = verdict.dry_run.as_ref();
        if !verdict.allowed() {
            self.denied.count(&verdict.decision);
        } else if let Some(decision) = dry_run.filter(|decision| !decision.allowed()) {
            self.would_be_denied.count(decision);
        }
    }

    pub(super) fn count(&self, finished: &Finished) {
        let (direction, path) = (finished.direction.name(), finished.path.name());
        self.connections
            .get_or_create(&Ended {
                direction,
                path,
                result: finished.outcome.name(),
            })
            .inc();
        for (to, bytes) in [
            ("server", finished.bytes_to_server),
            ("client", finished.bytes_to_client),
        ] {
            self.bytes
                .get_or_create(&Carried {
                    direction,
                    path,
                    to,
                })
                .inc_by(bytes);
        }
    }
}

impl ByPolicy {
    fn count(&self, decision: &Decision) {
        for (kind, policy) in decision.policies() {
            let mut denied = Denied {
                kind: kind.as_str(),
                policy: policy.to_string(),
            };
            if self.counters.get(&denied).is_none() {
                // Two threads may both find a policy new, and count it twice: the number is then an upper bound.
                if self.known.fetch_add(1, Ordering::Relaxed) >= MAX_POLICIES {
                    denied.policy.clear();
                }
            }
            self.counters.get_or_create(&denied).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::{ObjectName, policy::Hit};

    use super::*;

    #[test]
    fn policies_that_come_and_go_take_no_endless_room() {
        let denied = ByPolicy::default();
        let by = |number: usize| {
            let policy = ObjectName {
                namespace: "shop".into(),
                name: format!("p{number}"),
            };
            Decision::Denied(Hit {
                policy: policy.into(),
                rule: None,
            })
        };
        for _ in 0..2 {
            for number in 0..MAX_POLICIES + 10 {
                denied.count(&by(number));
            }
        }
        let of = |policy: String| {
            let kind = "AuthorizationPolicy";
            let counter = denied.counters.get(&Denied { kind, policy });
            counter.map(|counter| counter.get())
        };
        assert_eq!(of("shop/p0".into()), Some(2));
        assert_eq!(of(format!("shop/p{}", MAX_POLICIES - 1)), Some(2));
        assert_eq!(of(format!("shop/p{MAX_POLICIES}")), None);
        assert_eq!(of(String::new()), Some(20));
    }
}
