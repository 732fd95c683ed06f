//! What the CA's server has done since it started.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
    },
    registry::Registry,
};
use serde_json::{Value, json};

/// Kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nobody knows who asks.
    Unattested,
    /// It is known who asks, and that it must not have this.
    Denied,
    /// What was asked for makes no sense, or is weak.
    Malformed,
    /// Revoked before.
    Revoked,
    /// More than is read.
    TooLarge,
    /// Not now: not the leader, or the state cannot be kept.
    Unavailable,
}

const KINDS: [(Kind, &str); 6] = [
    (Kind::Unattested, "unattested"),
    (Kind::Denied, "denied"),
    (Kind::Malformed, "malformed"),
    (Kind::Revoked, "revoked"),
    (Kind::TooLarge, "tooLarge"),
    (Kind::Unavailable, "unavailable"),
];

impl Kind {
    /// For logs and the status.
    pub(super) fn name(self) -> &'static str {
        KINDS[self as usize].1
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    why: &'static str,
}

/// Counts for the status.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) issued: AtomicU64,
    pub(super) failed_handshakes: AtomicU64,
    pub(super) refused_connections: AtomicU64,
    refused: [AtomicU64; KINDS.len()],
}

impl Counters {
    pub(super) fn refused(&self, kind: Kind) {
        self.refused[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds them to what Prometheus is told.
    pub(super) fn register(&self, registry: &mut Registry) {
        let count = |counter: &AtomicU64| ConstCounter::new(counter.load(Ordering::Relaxed));
        registry.register("issued", "Certificates issued", count(&self.issued));
        registry.register(
            "failed_handshakes",
            "TLS handshakes of callers that failed",
            count(&self.failed_handshakes),
        );
        registry.register(
            "refused_connections",
            "Connections refused before TLS, for want of a place",
            count(&self.refused_connections),
        );
        let refused = Family::<Why, Counter>::default();
        for (kind, why) in KINDS {
            let count = self.refused[kind as usize].load(Ordering::Relaxed);
            refused.get_or_create(&Why { why }).inc_by(count);
        }
        registry.register("refused_requests", "Requests refused", refused);
    }

    pub(super) fn to_json(&self) -> Value {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let refused: serde_json::Map<_, _> = KINDS
            .iter()
            .map(|(kind, name)| {
                (
                    (*name).to_owned(),
                    count(&self.refused[*kind as usize]).into(),
                )
            })
            .collect();
        json!({
            "issued": count(&self.issued),
            "refused": refused,
            "failedHandshakes": count(&self.failed_handshakes),
            "refusedConnections": count(&self.refused_connections),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_counter() {
        let counters = Counters::default();
        for (index, (kind, name)) in KINDS.into_iter().enumerate() {
            assert_eq!((kind as usize, kind.name()), (index, name));
            counters.refused(kind);
        }
        counters.refused(Kind::Revoked);
        let json = counters.to_json();
        assert_eq!(json["refused"]["revoked"], 2);
        assert_eq!(json["refused"]["denied"], 1);
        assert_eq!(json["issued"], 0);
    }
}
