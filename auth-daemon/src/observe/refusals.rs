//! Connections that were refused because a pod, or a peer of it, took more than its share: counted, and logged at most once
//! in a while.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use super::line_limit::LineLimit;
use auth_mesh::ObjectName;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Why a connection was refused before anything was done for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Refusal {
    /// The pod has opened as many connections as its share allows.
    Outbound,
    /// Connections to the pod take its share.
    Inbound,
    /// A peer takes its share of the connections to the pod.
    Peer,
    /// Too many handshakes with the pod, in all or from one address, are incomplete.
    Handshakes,
}

impl Refusal {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound-connections",
            Self::Inbound => "inbound-connections",
            Self::Peer => "peer-connections",
            Self::Handshakes => "handshakes",
        }
    }

    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Outbound => {
                "the pod holds its share of this node's connections: let it close some, or raise the daemon's limit of \
                 open files or memory"
            }
            Self::Inbound => {
                "connections to the pod hold its share of this node's: let its clients close some, or raise the daemon's \
                 limit of open files or memory"
            }
            Self::Peer => {
                "this client holds its share of the connections to the pod, or to all pods of this node: let it close some, \
                 or raise the daemon's limit of open files or memory"
            }
            Self::Handshakes => {
                "too many handshakes with the pod are incomplete: find out whether the client is malicious"
            }
        }
    }
}

/// The refusals since the daemon started.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    by_pod: Mutex<BTreeMap<(ObjectName, Refusal), Refused>>,
    total: Family<Reason, Counter>,
}

#[derive(Debug, Default)]
struct Refused {
    count: u64,
    limit: LineLimit,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

impl Refusals {
    /// Registers the counters with Prometheus.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "refused_shares",
            "Connections that were refused because a pod or a peer took more than its share",
            self.total.clone(),
        );
    }

    /// Counts a refusal. Logs it, unless a line about this pod and reason was logged a moment ago.
    pub(crate) fn note(&self, pod: &ObjectName, refusal: Refusal, peer: std::net::SocketAddr) {
        let reason = refusal.name();
        self.total.get_or_create(&Reason { reason }).inc();
        let now = Instant::now();
        if let Some(refused) = self.count(pod, refusal, now) {
            tracing::warn!(
                %pod, reason, %peer, refused,
                "connection refused: {}", refusal.advice()
            );
        }
    }

    /// Returns the number of refusals since the last line, including this one, if another line is due.
    fn count(&self, pod: &ObjectName, refusal: Refusal, now: Instant) -> Option<u64> {
        let mut by_pod = self.lock();
        let refused = by_pod.entry((pod.clone(), refusal)).or_default();
        refused.count += 1;
        refused.limit.note(1, 1, now)
    }

    /// The number of refusals of a pod by reason, without those that are zero.
    pub(crate) fn of(&self, pod: &ObjectName) -> BTreeMap<&'static str, u64> {
        let by_pod = self.lock();
        let own = by_pod.iter().filter(|((name, _), _)| name == pod);
        own.map(|((_, refusal), refused)| (refusal.name(), refused.count))
            .collect()
    }

    /// Forgets pods that are gone, so that the counts stay bounded.
    pub(crate) fn retain(&self, keep: impl Fn(&ObjectName) -> bool) {
        self.lock().retain(|(pod, _), _| keep(pod));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(ObjectName, Refusal), Refused>> {
        self.by_pod.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::line_limit::INTERVAL;

    #[test]
    fn a_line_counts_all_events_since_the_last() {
        let refusals = Refusals::default();
        let pod = |name: &str| ObjectName {
            namespace: "default".into(),
            name: name.into(),
        };
        let start = Instant::now();
        assert_eq!(refusals.count(&pod("a"), Refusal::Outbound, start), Some(1));
        for _ in 0..5 {
            assert_eq!(refusals.count(&pod("a"), Refusal::Outbound, start), None);
        }
        assert_eq!(refusals.count(&pod("a"), Refusal::Peer, start), Some(1));
        assert_eq!(refusals.count(&pod("b"), Refusal::Outbound, start), Some(1));
        let later = start + INTERVAL;
        assert_eq!(refusals.count(&pod("a"), Refusal::Outbound, later), Some(6));
        assert_eq!(refusals.of(&pod("a"))["outbound-connections"], 7);
        refusals.retain(|name| *name == pod("b"));
        assert!(refusals.of(&pod("a")).is_empty());
    }
}
