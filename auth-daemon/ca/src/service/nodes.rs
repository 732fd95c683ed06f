//! Nodes' own certificates: for a join token, and for the certificate before.

use auth_ca_api::istio::IstioCertificateRequest;
use auth_tunnel::tls::svid::NodeCertificate;
use rustls::pki_types::CertificateDer;

use super::{CaService, Refused, answer, csr, requested};
use crate::{
    attest::Caller,
    audit,
    authority::{Issued, Refusal},
    connection::Peer,
};

impl CaService {
    /// Whether a machine has joined as `node`.
    pub(super) fn has_joined(&self, node: &str) -> bool {
        let leader = self.leader.borrow();
        leader.as_ref().is_some_and(|ca| ca.has_joined(node))
    }

    /// Uses a join token: the caller gets its node's own certificate.
    pub(super) async fn join(
        &self,
        peer: &Peer,
        token: &str,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let authority = self.authority()?;
        let source = &peer.source.get();
        let _turn = self.attestations.turn(source).await;
        let failed = |refusal| match refusal {
            Refusal::Request(why) => self.unattested(source, why),
            refusal => refusal.into(),
        };
        // First, so that each attempt with a wrong token counts as a failed attestation, whatever else is wrong with it.
        let node = authority.node_of_token(token).map_err(failed)?;
        let _in_progress = self.quotas.request(&node)?;
        let csr = csr(request)?;
        let joined = authority.join(token, &csr, requested(request)).await;
        let (node, issued) = joined.map_err(failed)?;
        // A process that was stopped meanwhile may have lost the Lease.
        self.authority()?;
        self.quotas
            .attested(&node, peer.address.ip().to_canonical());
        Ok(self.to_node("nodeJoined", peer, &node, &issued))
    }

    /// Renews the certificate of a node that asks for itself with that certificate.
    pub(super) async fn renew_node(
        &self,
        peer: &Peer,
        (caller, node): (&Caller, &str),
        certificate: &CertificateDer<'static>,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let _in_progress = self.quotas.request(caller.counts_for())?;
        let issued =
            self.authority()?
                .renew_node(certificate, &csr(request)?, requested(request))?;
        self.authority()?;
        Ok(self.to_node("nodeRenewed", peer, node, &issued))
    }

    /// Counts and logs a node's certificate, and turns it into an answer.
    fn to_node(
        &self,
        event: &'static str,
        peer: &Peer,
        node: &str,
        issued: &Issued,
    ) -> Vec<String> {
        self.counters.issued.inc();
        if let Ok(leaf) = NodeCertificate::parse(&issued.chain[0], &self.trust_domain) {
            audit::node(event, peer.address, node, &leaf);
        }
        answer(issued)
    }
}
