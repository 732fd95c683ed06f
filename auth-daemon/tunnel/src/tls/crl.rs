//! Certificate revocation lists (RFC 5280 §5), as the CA publishes them.

use rustls::pki_types::CertificateDer;
use x509_parser::{
    asn1_rs::{Any, Oid},
    certificate::X509Certificate,
    extensions::X509Extension,
    oid_registry::{
        OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_CRL_NUMBER,
        OID_X509_EXT_INVALIDITY_DATE, OID_X509_EXT_REASON_CODE,
    },
    prelude::FromDer as _,
    revocation_list::CertificateRevocationList,
    x509::ReasonCode,
};

use super::trust::Reason;

/// Maximum size of a list, in bytes. Enough for about 500,000 entries.
const MAX_BYTES: usize = 16 << 20;
/// First byte of a DER SEQUENCE (X.690 §8.9).
const SEQUENCE: u8 = 0x30;
/// First byte of a DER BIT STRING (X.690 §8.6).
const BIT_STRING: u8 = 0x03;

/// Why a list is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCrl {
    /// Larger than the maximum size.
    #[error("the CRL has {0} bytes; at most {MAX_BYTES} are read")]
    TooLong(usize),
    /// Not valid DER, or not in the form that RFC 5280 defines.
    #[error("the CRL cannot be parsed")]
    Malformed,
    /// Not signed by any of the given certificates.
    #[error("the CRL is not signed by the CA")]
    Signer,
    /// Has an unsupported critical extension, so it must not be used (§5.2 and §5.3).
    #[error("the CRL has the unsupported critical extension {0}")]
    Extension(String),
}

/// Reads the list `der`. Returns the revoked serial numbers, in lower-case hexadecimal like
/// [`Svid::serial`](super::svid::Svid::serial), with their reasons. The list must be signed by one of `signers`: roots,
/// or intermediates under a root.
///
/// The caller must ensure that `der` is the newest list. A list past its `nextUpdate` is accepted too, because
/// revocations stay in force while the CA is down.
pub fn read(
    der: &[u8],
    signers: &[CertificateDer<'_>],
) -> Result<Vec<(String, Reason)>, InvalidCrl> {
    if der.len() > MAX_BYTES {
        return Err(InvalidCrl::TooLong(der.len()));
    }
    let Ok(([], list)) = CertificateRevocationList::from_der(der) else {
        return Err(InvalidCrl::Malformed);
    };
    // The signed and the unsigned part name the algorithm, and must agree (§5.1.1.2).
    let agreed = algorithms_agree(der).unwrap_or(false) && list.signature_value.unused_bits == 0;
    let signed = |signer: &CertificateDer<'_>| {
        X509Certificate::from_der(signer).is_ok_and(|(_, signer)| {
            signer.subject().as_raw() == list.issuer().as_raw()
                && list.verify_signature(signer.public_key()).is_ok()
        })
    };
    if !agreed || !signers.iter().any(signed) {
        return Err(InvalidCrl::Signer);
    }
    let known = [
        OID_X509_EXT_CRL_NUMBER,
        OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
    ];
    check_extensions(list.extensions(), &known)?;
    list.iter_revoked_certificates()
        .map(|entry| {
            let known = [OID_X509_EXT_REASON_CODE, OID_X509_EXT_INVALIDITY_DATE];
            check_extensions(entry.extensions(), &known)?;
            let reason = entry.reason_code().map_or(ReasonCode(0), |(_, code)| code);
            let serial = entry.raw_serial().iter();
            Ok((
                serial.map(|byte| format!("{byte:02x}")).collect(),
                reason_of(reason),
            ))
        })
        .collect()
}

/// Whether the unsigned parts of a CRL of version 2 are DER, and name the same algorithm as the signed part, byte by byte: the
/// parser accepts some other encodings. `None` if the structure differs.
fn algorithms_agree(der: &[u8]) -> Option<bool> {
    let (_, list) = Any::from_der(der).ok()?;
    let (unsigned, signed) = Any::from_der(list.data).ok()?;
    let (signature, _) = Any::from_der(unsigned).ok()?;
    let (after_version, _) = Any::from_der(signed.data).ok()?;
    let (after_algorithm, _) = Any::from_der(after_version).ok()?;
    let outer = unsigned.strip_suffix(signature)?;
    let inner = after_version.strip_suffix(after_algorithm)?;
    Some(outer == inner && der.starts_with(&[SEQUENCE]) && signature.starts_with(&[BIT_STRING]))
}

fn check_extensions(extensions: &[X509Extension<'_>], known: &[Oid<'_>]) -> Result<(), InvalidCrl> {
    let unknown = extensions
        .iter()
        .find(|extension| extension.critical && !known.contains(&extension.oid));
    match unknown {
        Some(extension) => Err(InvalidCrl::Extension(extension.oid.to_id_string())),
        None => Ok(()),
    }
}

/// Maps a reason code. An unknown reason still revokes. `removeFromCRL` has no meaning on a complete list (§5.3.1).
fn reason_of(code: ReasonCode) -> Reason {
    match code {
        ReasonCode::KeyCompromise => Reason::KeyCompromise,
        ReasonCode::CACompromise => Reason::CaCompromise,
        ReasonCode::AffiliationChanged => Reason::AffiliationChanged,
        ReasonCode::Superseded => Reason::Superseded,
        ReasonCode::CessationOfOperation => Reason::CessationOfOperation,
        ReasonCode::CertificateHold => Reason::CertificateHold,
        ReasonCode::PrivilegeWithdrawn => Reason::PrivilegeWithdrawn,
        _ => Reason::Unspecified,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint,
        CrlIssuingDistributionPoint, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
        RevocationReason, RevokedCertParams, SerialNumber, date_time_ymd,
    };

    use super::*;

    /// Creates a root and a list that it signed.
    fn list(
        change: impl FnOnce(&mut CertificateRevocationListParams),
    ) -> (CertificateDer<'static>, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.distinguished_name.push(DnType::CommonName, "root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::CrlSign];
        let der = root.self_signed(&key).unwrap().der().clone();
        let mut params = CertificateRevocationListParams {
            this_update: date_time_ymd(2026, 1, 1),
            next_update: date_time_ymd(2026, 1, 2),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from_slice(&[0x41; 16]),
                revocation_time: date_time_ymd(2026, 1, 1),
                reason_code: Some(RevocationReason::Superseded),
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut params);
        let list = params.signed_by(&Issuer::new(root, &key)).unwrap();
        (der, list.der().to_vec())
    }

    #[test]
    fn reads_serials_and_reasons_of_its_signer_only() {
        let (root, der) = list(|_| {});
        let (other, _) = list(|_| {});
        let expected = Ok(vec![("41".repeat(16), Reason::Superseded)]);
        assert_eq!(read(&der, &[other.clone(), root.clone()]), expected);
        assert_eq!(read(&der, &[other]), Err(InvalidCrl::Signer));
        assert_eq!(read(&der, &[]), Err(InvalidCrl::Signer));
        let longer = [&der[..], &[0]].concat();
        let signers = [root];
        assert_eq!(read(&longer, &signers), Err(InvalidCrl::Malformed));
        let huge = read(&vec![0x30; MAX_BYTES + 1], &signers);
        assert!(matches!(huge, Err(InvalidCrl::TooLong(_))));
    }

    #[test]
    fn refuses_a_change_of_any_bit() {
        let (root, der) = list(|_| {});
        let signers = [root];
        for (at, bit) in (0..der.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut changed = der.clone();
            changed[at] ^= 1 << bit;
            assert!(read(&changed, &signers).is_err(), "bit {bit} of byte {at}");
        }
    }

    #[test]
    fn refuses_unsupported_critical_extensions() {
        // This extension means that the list does not cover all certificates.
        let (root, der) = list(|params| {
            params.issuing_distribution_point = Some(CrlIssuingDistributionPoint {
                distribution_point: CrlDistributionPoint {
                    uris: vec!["http://a/".into()],
                },
                scope: None,
            });
        });
        let refused = read(&der, &[root]);
        assert!(
            matches!(refused, Err(InvalidCrl::Extension(_))),
            "{refused:?}"
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes, &[CertificateDer::from(bytes.clone())]);
        }
    }
}
