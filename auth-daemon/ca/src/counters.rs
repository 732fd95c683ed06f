//! What the CA's server has done since it started, for Prometheus and for the status.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::status::ServerStatus;

/// Kinds of refused requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The caller is unknown.
    Unattested,
    /// The caller is known, but must not have this.
    Denied,
    /// The request is malformed, or its key is weak.
    Malformed,
    /// The identity or the node is revoked.
    Revoked,
    /// The request exceeds a limit.
    TooLarge,
    /// This replica is not the leader, or the request took too long.
    Unavailable,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Unattested,
        Self::Denied,
        Self::Malformed,
        Self::Revoked,
        Self::TooLarge,
        Self::Unavailable,
    ];

    /// The name in logs, metrics and the status.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unattested => "unattested",
            Self::Denied => "denied",
            Self::Malformed => "malformed",
            Self::Revoked => "revoked",
            Self::TooLarge => "tooLarge",
            Self::Unavailable => "unavailable",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    why: &'static str,
}

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) issued: Counter,
    pub(crate) failed_handshakes: Counter,
    pub(crate) refused_connections: Counter,
    refused: Family<Why, Counter>,
}

impl Counters {
    pub(crate) fn refused(&self, kind: Kind) {
        self.of(kind).inc();
    }

    fn of(&self, kind: Kind) -> Counter {
        let why = kind.name();
        self.refused.get_or_create(&Why { why }).clone()
    }

    /// Adds all counters to `registry`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let _ = Kind::ALL.map(|kind| self.of(kind));
        registry.register("issued", "Certificates issued", self.issued.clone());
        registry.register(
            "failed_handshakes",
            "TLS handshakes of callers that failed",
            self.failed_handshakes.clone(),
        );
        registry.register(
            "refused_connections",
            "Connections refused before TLS, because a limit was reached",
            self.refused_connections.clone(),
        );
        registry.register("refused_requests", "Requests refused", self.refused.clone());
    }

    pub(crate) fn status(&self) -> ServerStatus {
        let refused = Kind::ALL.map(|kind| (kind.name().to_owned(), self.of(kind).get().into()));
        ServerStatus {
            issued: self.issued.get(),
            refused: refused.into_iter().collect(),
            failed_handshakes: self.failed_handshakes.get(),
            refused_connections: self.refused_connections.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_each_kind() {
        let counters = Counters::default();
        for kind in Kind::ALL {
            counters.refused(kind);
        }
        counters.refused(Kind::Revoked);
        let status = counters.status();
        assert_eq!(status.refused["revoked"], 2);
        assert_eq!((&status.refused["denied"], status.issued), (&1.into(), 0));
    }
}
