//! Certificate revocation lists (RFC 5280 §5), one for each trusted signer. [`auth_tunnel::tls::crl`] reads them.

use auth_tunnel::tls::trust::Reason;
use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};

use crate::{
    signer::{self, SignError, Signer},
    state::{CaState, Revocation, Serial},
};

/// Validity of a list, in seconds. The CA signs the next one at half of it.
pub(crate) const LIFETIME: u64 = 24 * 60 * 60;

/// Signs the list of all revoked serial numbers at `now`. Serial numbers are random, so one that another signer issued
/// does no harm here, and the CA need not know which signer that was.
pub(crate) fn write(state: &CaState, signer: &Signer, now: u64) -> Result<Vec<u8>, SignError> {
    let serials = state.revoked.serials.iter();
    let revoked_certs = serials
        .map(|(serial, &revocation)| entry(serial.0, revocation))
        .collect::<Result<_, _>>()?;
    signer.crl(CertificateRevocationListParams {
        this_update: signer::time(now)?,
        next_update: signer::time(now.saturating_add(LIFETIME))?,
        crl_number: SerialNumber::from(state.crl_number),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    })
}

fn entry(serial: Serial, revocation: Revocation) -> Result<RevokedCertParams, SignError> {
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(&serial.0),
        revocation_time: signer::time(revocation.at)?,
        reason_code: match revocation.reason {
            Reason::Unspecified => None,
            Reason::KeyCompromise => Some(RevocationReason::KeyCompromise),
            Reason::CaCompromise => Some(RevocationReason::CaCompromise),
            Reason::AffiliationChanged => Some(RevocationReason::AffiliationChanged),
            Reason::Superseded => Some(RevocationReason::Superseded),
            Reason::CessationOfOperation => Some(RevocationReason::CessationOfOperation),
            Reason::CertificateHold => Some(RevocationReason::CertificateHold),
            Reason::PrivilegeWithdrawn => Some(RevocationReason::PrivilegeWithdrawn),
        },
        invalidity_date: None,
    })
}

#[cfg(test)]
mod tests {
    use auth_mesh::TrustDomain;
    use auth_tunnel::tls::crl;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        config::{KeyAlgorithm, RootSettings},
        state::{StoredSigner, Text},
    };

    const NOW: u64 = 1_800_000_000;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn is_read_as_written_and_refused_when_changed(
            serials in prop::collection::btree_map(any::<[u8; 16]>(), 0..8usize, 0..200),
            ed25519 in any::<bool>(),
            at in any::<prop::sample::Index>(),
        ) {
            let algorithm = if ed25519 { KeyAlgorithm::Ed25519 } else { KeyAlgorithm::P256 };
            let domain: TrustDomain = "cluster.local".parse().unwrap();
            let settings = RootSettings { algorithm, ..RootSettings::default() };
            let signer = signer::make_root(&domain, &settings, NOW).unwrap();
            let mut state = CaState::new(&domain, StoredSigner::root(&signer, 60));
            state.crl_number = NOW;
            for (serial, reason) in &serials {
                let revocation = Revocation { reason: Reason::ALL[*reason], at: NOW };
                state.revoked.serials.insert(Text(Serial(*serial)), revocation);
            }
            let mut expected: Vec<_> = serials.iter().map(|(serial, reason)| {
                (Serial(*serial).der_hex(), Reason::ALL[*reason])
            }).collect();
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            let der = write(&state, &signer, NOW).unwrap();
            let signers = [signer.certificate().clone()];
            let mut list = crl::read(&der, &signers).unwrap();
            list.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(list, expected);
            let mut changed = der;
            let at = at.index(changed.len());
            changed[at] ^= 1;
            prop_assert!(crl::read(&changed, &signers).is_err());
        }
    }
}
