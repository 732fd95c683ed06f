//! Certificates that this CA issued and has not revoked, presented over TLS for renewal.

use auth_tunnel::tls::svid::NodeCertificate;
use rustls::pki_types::CertificateDer;

use super::{Attestor, Caller, Credentials, Unattested};
use crate::authority::Leader;

/// Identifies workloads, and machines that have joined, by their certificates.
pub struct Certificates {
    leader: Leader,
}

impl Certificates {
    /// Accepts what the leader has issued.
    pub fn new(leader: Leader) -> Self {
        Self { leader }
    }

    fn caller(&self, certificate: &CertificateDer<'_>) -> Result<Caller, Unattested> {
        let refused = |why: String| Unattested(format!("the client certificate is refused: {why}"));
        let authority = self.leader.borrow().clone();
        let authority =
            authority.ok_or_else(|| Unattested("this replica is not the leader".into()))?;
        // The connection may be older than its certificate's expiry or revocation, and a root may have other issuers.
        if let Some(NodeCertificate { node, .. }) = authority.node(certificate).map_err(refused)? {
            return Ok(Caller::Node { node });
        }
        let svid = authority.verify(certificate).map_err(refused)?;
        let node = svid.node.filter(|node| !node.is_empty()).ok_or_else(|| {
            refused("it does not name a node where its pod runs: use a token".into())
        })?;
        authority
            .check_since_join(&node, svid.not_before)
            .map_err(refused)?;
        Ok(Caller::Workload {
            identity: svid.identity,
            node: node.to_string(),
        })
    }
}

#[tonic::async_trait]
impl Attestor for Certificates {
    async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>> {
        credentials.certificate.map(|shown| self.caller(shown))
    }
}
