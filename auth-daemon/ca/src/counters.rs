//! What the CA's server has done since it started, for Prometheus and for the status.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::{
    quotas::{Quota, Quotas},
    status::ServerStatus,
};

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
    /// A quota of the caller is used up.
    OverQuota,
    /// This replica is not the leader, or the request took too long.
    Unavailable,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Unattested,
        Self::Denied,
        Self::Malformed,
        Self::Revoked,
        Self::TooLarge,
        Self::OverQuota,
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
            Self::OverQuota => "overQuota",
            Self::Unavailable => "unavailable",
        }
    }
}

/// Counters that differ by one label.
type Labelled = Family<[(&'static str, &'static str); 1], Counter>;

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) issued: Counter,
    pub(crate) issued_jwts: Counter,
    pub(crate) failed_handshakes: Counter,
    pub(crate) refused_connections: Counter,
    refused: Labelled,
    over_quota: Labelled,
}

impl Counters {
    pub(crate) fn refused(&self, kind: Kind) {
        self.of(kind).inc();
    }

    fn of(&self, kind: Kind) -> Counter {
        let why = [("why", kind.name())];
        self.refused.get_or_create(&why).clone()
    }

    pub(crate) fn over_quota(&self, quota: Quota) {
        self.of_quota(quota).inc();
    }

    fn of_quota(&self, quota: Quota) -> Counter {
        let quota = [("quota", quota.name())];
        self.over_quota.get_or_create(&quota).clone()
    }

    /// Adds all counters to `registry`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let _ = Kind::ALL.map(|kind| self.of(kind));
        let _ = Quota::ALL.map(|quota| self.of_quota(quota));
        registry.register("issued", "Certificates issued", self.issued.clone());
        registry.register("issued_jwts", "JWT-SVIDs issued", self.issued_jwts.clone());
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
        registry.register(
            "over_quota",
            "Requests refused because a quota of their node was used up",
            self.over_quota.clone(),
        );
    }

    pub(crate) fn status(&self, quotas: &Quotas) -> ServerStatus {
        let refused = Kind::ALL.map(|kind| (kind.name().to_owned(), self.of(kind).get().into()));
        let over_quota = Quota::ALL.map(|q| (q.name().to_owned(), self.of_quota(q).get().into()));
        ServerStatus {
            issued: self.issued.get(),
            refused: refused.into_iter().collect(),
            failed_handshakes: self.failed_handshakes.get(),
            refused_connections: self.refused_connections.get(),
            over_quota: over_quota.into_iter().collect(),
            nodes: quotas.status(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quotas::Limits;

    #[test]
    fn counts_each_kind() {
        let counters = Counters::default();
        for kind in Kind::ALL {
            counters.refused(kind);
        }
        counters.refused(Kind::Revoked);
        counters.over_quota(Quota::NodeRate);
        let mut registry = Registry::with_prefix("auth_ca");
        counters.register(&mut registry);
        let mut metrics = String::new();
        prometheus_client::encoding::text::encode(&mut metrics, &registry).unwrap();
        for line in [
            "auth_ca_refused_requests_total{why=\"revoked\"} 2\n",
            "auth_ca_over_quota_total{quota=\"nodeRate\"} 1\n",
        ] {
            assert!(metrics.contains(line), "{metrics}");
        }
        let status = counters.status(&Quotas::new(Limits::default()));
        assert_eq!(status.over_quota["nodeRate"], 1);
        assert_eq!(status.refused["revoked"], 2);
        assert_eq!((&status.refused["denied"], status.issued), (&1.into(), 0));
    }
}
