//! Counters of connections that have ended, for Prometheus.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::access_log::Finished;
use auth_mesh::policy::Decision;

/// Counters of connections that have ended since the daemon started.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    connections: Family<Ended, Counter>,
    bytes: Family<Carried, Counter>,
    denied: Family<Denied, Counter>,
    would_be_denied: Family<Denied, Counter>,
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
            self.denied.clone(),
        );
        registry.register(
            "dry_run_denials",
            "Connections that were allowed, and would be denied if all dry-run policies were enforced, by the policies \
             behind it",
            self.would_be_denied.clone(),
        );
    }

    pub(super) fn count_denied(&self, decision: &Decision) {
        count_policies(&self.denied, decision);
    }

    pub(super) fn count_dry_run(&self, decision: &Decision) {
        count_policies(&self.would_be_denied, decision);
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

fn count_policies(counters: &Family<Denied, Counter>, decision: &Decision) {
    for (kind, policy) in decision.policies() {
        let denied = Denied {
            kind: kind.as_str(),
            policy: policy.to_string(),
        };
        counters.get_or_create(&denied).inc();
    }
}
