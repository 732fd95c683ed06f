//! A certificate that this CA issued and has not revoked, shown over TLS: for renewal.

use std::{future, sync::Arc};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::{Attestation, Attestor, Caller, Credentials, Unattested};
use crate::{ca::authority::Authority, mesh::TrustDomain, tunnel::svid::Svid};

/// Knows workloads by their certificates.
#[derive(Debug)]
pub struct Certificates {
    trust_domain: TrustDomain,
    authority: watch::Receiver<Option<Arc<Authority>>>,
}

impl Certificates {
    /// Believes what `authority` has issued.
    pub fn new(
        trust_domain: TrustDomain,
        authority: watch::Receiver<Option<Arc<Authority>>>,
    ) -> Self {
        Self {
            trust_domain,
            authority,
        }
    }

    fn caller(&self, certificate: &CertificateDer<'_>) -> Result<Caller, Unattested> {
        let refused = |why: String| Unattested(why);
        let svid = Svid::parse(certificate, self.trust_domain.as_str())
            .map_err(|error| refused(format!("the client certificate is refused: {error}")))?;
        let authority = self.authority.borrow().clone();
        let authority =
            authority.ok_or_else(|| refused("this replica is not the leader".into()))?;
        // The chain holds to the roots; but what this CA does not know it did not issue, or it has ended since the
        // connection was made.
        let record = serial(&svid.serial)
            .and_then(|serial| authority.issued(&serial))
            .filter(|record| record.identity == svid.identity)
            .ok_or_else(|| {
                refused(format!(
                    "the client certificate {} of {} is none of this CA's that is valid",
                    svid.serial, svid.identity
                ))
            })?;
        authority
            .check(&record)
            .map_err(|revoked| refused(revoked.to_string()))?;
        Ok(Caller::Workload {
            identity: record.identity,
            node: record.node,
        })
    }
}

/// A serial number of this CA, from its hexadecimal digits as DER has them: without leading zeros, but for one that
/// says that the number is positive (X.690 §8.3).
fn serial(hexadecimal: &str) -> Option<[u8; 16]> {
    let number = u128::from_str_radix(hexadecimal, 16).ok()?;
    Some(number.to_be_bytes())
}

impl Attestor for Certificates {
    fn attest<'a>(&'a self, credentials: Credentials<'a>) -> Attestation<'a> {
        let caller = credentials
            .certificate
            .map(|certificate| self.caller(certificate));
        Box::pin(future::ready(caller))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_in_any_der_form() {
        let mut expected = [0; 16];
        expected[15] = 0x7f;
        assert_eq!(serial("7f"), Some(expected));
        assert_eq!(serial(&format!("00{}", "ff".repeat(16))), Some([0xff; 16]));
        for bad in ["", "xy", &"11".repeat(17)] {
            assert_eq!(serial(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn only_a_certificate_and_only_of_the_leader() {
        let (_leader, authority) = watch::channel(None);
        let attestor = Certificates::new("cluster.local".parse().unwrap(), authority);
        assert_eq!(attestor.attest(Credentials::default()).await, None);
        let rubbish = CertificateDer::from(vec![0x30, 0]);
        let refused = attestor
            .attest(Credentials {
                bearer: None,
                certificate: Some(&rubbish),
            })
            .await;
        assert!(matches!(refused, Some(Err(_))));
    }
}
