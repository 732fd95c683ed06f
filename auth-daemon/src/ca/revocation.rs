//! Revocation lists (RFC 5280 §5): written by the CA, one for each certificate that signs, and read by those who
//! believe it.

use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use x509_parser::{
    asn1_rs::BitString,
    extensions::X509Extension,
    oid_registry::{
        OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_CRL_NUMBER,
        OID_X509_EXT_INVALIDITY_DATE, OID_X509_EXT_REASON_CODE,
    },
    prelude::FromDer as _,
    revocation_list::CertificateRevocationList,
    verify::verify_signature,
    x509::{AlgorithmIdentifier, ReasonCode},
};

use super::{
    der::{self, BIT_STRING, SEQUENCE},
    live::Live,
    signer::{self, SignError, Signer},
    state::{Core, RevokedSerial, Since},
};
use crate::tunnel::trust::Reason;

/// How long a list is good for, in seconds. The next one comes at half of it.
pub(super) const LIFE: u64 = 24 * 60 * 60;
/// Longest list that is read, in bytes.
const MAX_BYTES: usize = 16 << 20;
/// Most entries of one that is read.
const MAX_ENTRIES: usize = 500_000;

/// All that is on a list at `now`: certificates that are revoked, or were given to a node that is.
pub(super) fn entries(core: &Core, live: &Live, now: u64) -> Vec<([u8; 16], RevokedSerial)> {
    let revoked = core.serials.iter();
    let mut entries: Vec<_> = revoked
        .filter(|(_, revoked)| revoked.not_after.is_none_or(|end| end >= now))
        .map(|(&serial, &revoked)| (serial, revoked))
        .collect();
    if !core.nodes.is_empty() {
        entries.extend(live.iter(now).filter_map(|record| {
            let &since = core.nodes.get(record.node.as_ref()?)?;
            let revoked = RevokedSerial {
                since,
                not_after: Some(record.not_after),
                signer: Some(record.signer),
            };
            let own = core.serials.contains_key(&record.serial);
            (!own).then_some((record.serial, revoked))
        }));
    }
    entries
}

/// The list that signer `number` signs at `now`: of `entries` its own, and those that no present signer is known to have
/// signed.
pub(super) fn write(
    core: &Core,
    entries: &[([u8; 16], RevokedSerial)],
    number: u32,
    signer: &Signer,
    now: u64,
) -> Result<Vec<u8>, SignError> {
    let elsewhere = |by| by != number && core.signers.contains_key(&by);
    let revoked_certs = entries
        .iter()
        .filter(|(_, revoked)| !revoked.signer.is_some_and(elsewhere))
        .map(|(serial, revoked)| entry(serial, revoked.since))
        .collect::<Result<_, _>>()?;
    signer.crl(CertificateRevocationListParams {
        this_update: signer::time(now)?,
        next_update: signer::time(now.saturating_add(LIFE))?,
        crl_number: SerialNumber::from(core.crl_number),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    })
}

fn entry(serial: &[u8; 16], since: Since) -> Result<RevokedCertParams, SignError> {
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: signer::time(since.at)?,
        reason_code: match since.reason {
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

/// Why a list is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCrl {
    /// More than is read.
    #[error("the CRL has {0}; at most {1} are read")]
    TooLong(String, String),
    /// Not DER, or not of RFC 5280's form.
    #[error("the CRL cannot be parsed")]
    Malformed,
    /// None of the certificates given is the signer's.
    #[error("the CRL is not signed by the CA")]
    Signer,
    /// It says something that must not be passed over, and is not understood here.
    #[error("the CRL has the critical extension {0}, which is not known here")]
    Extension(String),
}

/// The serial numbers on the list `der`, in lower-case hexadecimal as [`crate::tunnel::svid::Svid::serial`] has them, and
/// the reasons. One of `signers` has to have signed it: roots, or intermediate certificates that a root stands behind.
///
/// That `der` is the newest there is, is for the caller to know. A list that has passed its end is read, too: a CA that
/// is away takes nothing back.
pub fn read_crl(
    der: &[u8],
    signers: &[CertificateDer<'_>],
) -> Result<Vec<(String, Reason)>, InvalidCrl> {
    if der.len() > MAX_BYTES {
        let found = format!("{} bytes", der.len());
        return Err(InvalidCrl::TooLong(found, MAX_BYTES.to_string()));
    }
    // Nothing of it is parsed before it is known to be the CA's.
    verify(der, signers)?;
    count_entries(der)?;
    let (_, list) = CertificateRevocationList::from_der(der).map_err(|_| InvalidCrl::Malformed)?;
    check_extensions(
        list.extensions(),
        &[
            OID_X509_EXT_CRL_NUMBER,
            OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
        ],
    )?;
    list.iter_revoked_certificates()
        .map(|entry| {
            check_extensions(
                entry.extensions(),
                &[OID_X509_EXT_REASON_CODE, OID_X509_EXT_INVALIDITY_DATE],
            )?;
            let reason = entry.reason_code().map_or(ReasonCode(0), |(_, code)| code);
            Ok((signer::hex(entry.raw_serial()), read_reason(reason)))
        })
        .collect()
}

fn verify(der: &[u8], signers: &[CertificateDer<'_>]) -> Result<(), InvalidCrl> {
    // CertificateList ::= SEQUENCE { tbsCertList, signatureAlgorithm, signatureValue } (§5.1)
    let parts = (|| {
        let mut outer = der::only(SEQUENCE, der)?.content;
        let list = der::take_tag(SEQUENCE, &mut outer)?;
        let algorithm = der::take_tag(SEQUENCE, &mut outer)?.whole;
        let signature = der::take_tag(BIT_STRING, &mut outer)?.whole;
        let mut fields = list.content;
        let mut field = der::take(&mut fields)?;
        if field.tag == der::INTEGER {
            field = der::take(&mut fields)?;
        }
        // Both name the algorithm, and must agree (§5.1.1.2).
        let agreed = field.whole == algorithm;
        let issuer = der::take_tag(SEQUENCE, &mut fields)?.whole;
        (agreed && outer.is_empty()).then_some((list.whole, issuer, algorithm, signature))
    })();
    let (list, issuer, algorithm, signature) = parts.ok_or(InvalidCrl::Malformed)?;
    let (_, algorithm) =
        AlgorithmIdentifier::from_der(algorithm).map_err(|_| InvalidCrl::Malformed)?;
    let (_, signature) = BitString::from_der(signature).map_err(|_| InvalidCrl::Malformed)?;
    let whole_bytes = signature.unused_bits == 0;
    let signed = whole_bytes
        && signers.iter().any(|signer| {
            signer::parse(signer).is_ok_and(|signer| {
                signer.subject().as_raw() == issuer
                    && verify_signature(signer.public_key(), &algorithm, &signature, list).is_ok()
            })
        });
    if signed {
        Ok(())
    } else {
        Err(InvalidCrl::Signer)
    }
}

/// Of the sequences in a TBSCertList, the third is the entries: algorithm, issuer, revokedCertificates (§5.1).
fn count_entries(der: &[u8]) -> Result<(), InvalidCrl> {
    let counted = (|| {
        let mut fields = der::take(&mut der::only(SEQUENCE, der)?.content)?.content;
        let mut sequences = 0;
        while let Some(field) = der::take(&mut fields) {
            sequences += usize::from(field.tag == SEQUENCE);
            if sequences == 3 {
                let mut entries = field.content;
                return Some(std::iter::from_fn(|| der::take(&mut entries)).count());
            }
        }
        Some(0)
    })();
    match counted {
        Some(..=MAX_ENTRIES) => Ok(()),
        Some(count) => Err(InvalidCrl::TooLong(
            format!("{count} entries"),
            MAX_ENTRIES.to_string(),
        )),
        None => Err(InvalidCrl::Malformed),
    }
}

/// A list with a critical extension that is not understood must not be used (§5.2 and §5.3).
fn check_extensions(
    extensions: &[X509Extension<'_>],
    known: &[x509_parser::asn1_rs::Oid<'_>],
) -> Result<(), InvalidCrl> {
    let unknown = extensions
        .iter()
        .find(|extension| extension.critical && !known.contains(&extension.oid));
    match unknown {
        Some(extension) => Err(InvalidCrl::Extension(extension.oid.to_id_string())),
        None => Ok(()),
    }
}

/// What is not known here is revoked all the same. `removeFromCRL` has no meaning on a complete list (§5.3.1).
fn read_reason(code: ReasonCode) -> Reason {
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

    use super::*;
    use crate::{
        ca::{
            authority::{IssuedRecord, KeyAlgorithm},
            state::integer_hex,
        },
        mesh::TrustDomain,
    };

    const NOW: u64 = 1_800_000_000;

    fn ca(algorithm: KeyAlgorithm) -> (Core, Signer) {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let root = signer::make_root(&domain, algorithm, 1_000_000, NOW).unwrap();
        let core = Core::of_root(&domain, root).unwrap();
        let stored = &core.signers[&1];
        let key = signer::key_from_pem(stored.key.as_ref().unwrap()).unwrap();
        let signer = Signer::root(key, stored.certificate.clone()).unwrap();
        (core, signer)
    }

    fn revoked(reason: Reason, not_after: Option<u64>, signer: Option<u32>) -> RevokedSerial {
        let at = NOW - 10;
        RevokedSerial {
            since: Since { reason, at },
            not_after,
            signer,
        }
    }

    fn list(core: &Core, live: &Live, signer: &Signer) -> Vec<(String, Reason)> {
        let der = write(core, &entries(core, live, NOW), 1, signer, NOW).unwrap();
        let mut list = read_crl(&der, &[signer.certificate().clone()]).unwrap();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }

    #[test]
    fn each_list_has_what_its_signer_answers_for() {
        let (mut core, signer) = ca(KeyAlgorithm::P256);
        core.add_signer(core.signers[&1].clone());
        let mut live = Live::default();
        for (serial, by, node) in [(0x60, 1, "a"), (0x61, 1, "b"), (0x62, 2, "a")] {
            live.insert(
                IssuedRecord {
                    serial: [serial; 16],
                    not_after: NOW + 100,
                    signer: by,
                    identity: "spiffe://cluster.local/ns/a/sa/b".parse().unwrap(),
                    node: Some(node.into()),
                },
                NOW,
            );
        }
        let some = Some(NOW + 5);
        core.serials = [
            ([0x41; 16], revoked(Reason::KeyCompromise, some, Some(1))),
            ([0x42; 16], revoked(Reason::Superseded, some, Some(2))),
            // Of a signer that is gone, of nobody known, and ended.
            ([0x43; 16], revoked(Reason::Unspecified, some, Some(9))),
            ([0x44; 16], revoked(Reason::CertificateHold, None, None)),
            (
                [0x45; 16],
                revoked(Reason::Unspecified, Some(NOW - 1), Some(1)),
            ),
        ]
        .into();
        let on_node = Since {
            reason: Reason::PrivilegeWithdrawn,
            at: NOW,
        };
        core.nodes = [("a".to_owned(), on_node)].into();
        let expected = [
            ([0x41; 16], Reason::KeyCompromise),
            ([0x43; 16], Reason::Unspecified),
            ([0x44; 16], Reason::CertificateHold),
            ([0x60; 16], Reason::PrivilegeWithdrawn),
        ];
        let expected = expected.map(|(serial, reason)| (signer::hex(&serial), reason));
        assert_eq!(list(&core, &live, &signer), expected);
    }

    #[test]
    fn refuses_the_lists_of_others() {
        let (core, signer) = ca(KeyAlgorithm::P384);
        let (_, other) = ca(KeyAlgorithm::P384);
        let der = write(&core, &[], 1, &signer, NOW).unwrap();
        let own = [other.certificate().clone(), signer.certificate().clone()];
        assert_eq!(read_crl(&der, &own), Ok(Vec::new()));
        assert_eq!(read_crl(&der, &own[..1]), Err(InvalidCrl::Signer));
        assert_eq!(read_crl(&der, &[]), Err(InvalidCrl::Signer));
        let longer = [&der[..], &[0]].concat();
        assert_eq!(read_crl(&longer, &own), Err(InvalidCrl::Malformed));
        let huge = vec![0x30; MAX_BYTES + 1];
        assert!(matches!(
            read_crl(&huge, &own),
            Err(InvalidCrl::TooLong(..))
        ));
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        let (core, signer) = ca(KeyAlgorithm::P256);
        let der = signer
            .crl(CertificateRevocationListParams {
                this_update: signer::time(NOW).unwrap(),
                next_update: signer::time(NOW + 1).unwrap(),
                crl_number: SerialNumber::from(1),
                // Critical: says that the list is not about all certificates.
                issuing_distribution_point: Some(rcgen::CrlIssuingDistributionPoint {
                    distribution_point: rcgen::CrlDistributionPoint {
                        uris: vec!["http://a/".into()],
                    },
                    scope: None,
                }),
                revoked_certs: Vec::new(),
                key_identifier_method: KeyIdMethod::Sha256,
            })
            .unwrap();
        let read = read_crl(&der, &[core.signers[&1].certificate.clone()]);
        assert!(matches!(read, Err(InvalidCrl::Extension(_))), "{read:?}");
    }

    #[test]
    fn counts_entries_before_it_reads_them() {
        let list = |entries: usize| {
            let entries = der::element(SEQUENCE, &[&[SEQUENCE, 0].repeat(entries)]);
            let none = [SEQUENCE, 0];
            let fields = der::element(SEQUENCE, &[&none, &none, &entries]);
            der::element(SEQUENCE, &[&fields])
        };
        assert_eq!(count_entries(&list(MAX_ENTRIES)), Ok(()));
        let error = count_entries(&list(MAX_ENTRIES + 1)).unwrap_err();
        assert!(matches!(error, InvalidCrl::TooLong(..)), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn is_read_as_it_was_written(
            serials in prop::collection::btree_map(any::<[u8; 16]>(), 0..8usize, 0..200),
            ed25519 in any::<bool>(),
            at in any::<prop::sample::Index>(),
        ) {
            let (mut core, signer) = ca(if ed25519 { KeyAlgorithm::Ed25519 } else { KeyAlgorithm::P256 });
            core.crl_number = NOW;
            core.serials = serials.iter().map(|(serial, reason)| {
                (*serial, revoked(Reason::ALL[*reason], Some(NOW), Some(1)))
            }).collect();
            let mut expected: Vec<_> = serials.iter().map(|(serial, reason)| {
                (integer_hex(serial), Reason::ALL[*reason])
            }).collect();
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(list(&core, &Live::default(), &signer), expected);
            // Whatever is changed on the way, nothing is believed and nothing panics.
            let entries = entries(&core, &Live::default(), NOW);
            let mut changed = write(&core, &entries, 1, &signer, NOW).unwrap();
            let at = at.index(changed.len());
            changed[at] ^= 1;
            prop_assert!(read_crl(&changed, &[signer.certificate().clone()]).is_err());
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_crl(&bytes, &[CertificateDer::from(bytes.clone())]);
            let _ = count_entries(&bytes);
        }
    }
}
