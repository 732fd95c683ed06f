//! X.509-SVIDs: which identity a certificate carries, and whether it may (SPIFFE X509-SVID §2 to §4).

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use crate::mesh::{Identity, InvalidIdentity};

/// A leaf certificate that names one identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Svid {
    /// Whose it is.
    pub identity: Identity,
    /// Serial number, in lower-case hexadecimal.
    pub serial: Arc<str>,
    /// Not valid before.
    pub not_before: SystemTime,
    /// Not valid after.
    pub not_after: SystemTime,
}

/// Why a certificate is no SVID of a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSvid {
    /// Not X.509, or with a malformed extension.
    #[error("certificate cannot be parsed")]
    Malformed,
    /// Anything but one URI in the subject alternative name.
    #[error("certificate has {0} URI SANs; an SVID has exactly one")]
    UriSans(usize),
    /// The URI is no SPIFFE ID of a service account.
    #[error("URI SAN {uri:?} is no SPIFFE ID of a service account: {why}")]
    Identity {
        /// The URI, cut to 256 characters.
        uri: String,
        /// What is wrong with it.
        why: InvalidIdentity,
    },
    /// A SPIFFE ID of another trust domain.
    #[error("identity {0} is of another trust domain")]
    TrustDomain(Identity),
    /// A CA certificate where a workload's is due.
    #[error("certificate is a CA's, not a workload's")]
    CertificateAuthority,
    /// Key usages that a workload must not have, or lacks.
    #[error("key usage must include digitalSignature and neither keyCertSign nor cRLSign")]
    KeyUsage,
}

impl Svid {
    /// Reads a leaf certificate of `trust_domain`. The chain, the signature and the life are for others to check.
    pub fn parse(der: &[u8], trust_domain: &str) -> Result<Self, InvalidSvid> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| InvalidSvid::Malformed)?;
        if !rest.is_empty() {
            return Err(InvalidSvid::Malformed);
        }
        let mut uris = Vec::new();
        let mut signs = None;
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(names) => {
                    uris.extend(names.general_names.iter().filter_map(|name| match name {
                        GeneralName::URI(uri) => Some(*uri),
                        _ => None,
                    }));
                }
                ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                    return Err(InvalidSvid::CertificateAuthority);
                }
                ParsedExtension::KeyUsage(usage) => {
                    signs = Some(
                        usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign(),
                    );
                }
                ParsedExtension::ParseError { .. } => return Err(InvalidSvid::Malformed),
                _ => {}
            }
        }
        let [uri] = uris[..] else {
            return Err(InvalidSvid::UriSans(uris.len()));
        };
        let identity: Identity = uri.parse().map_err(|why| InvalidSvid::Identity {
            uri: uri.chars().take(256).collect(),
            why,
        })?;
        if identity.trust_domain() != trust_domain {
            return Err(InvalidSvid::TrustDomain(identity));
        }
        if signs != Some(true) {
            return Err(InvalidSvid::KeyUsage);
        }
        let validity = certificate.validity();
        Ok(Self {
            identity,
            serial: certificate
                .raw_serial()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
                .into(),
            not_before: at(validity.not_before.timestamp()),
            not_after: at(validity.not_after.timestamp()),
        })
    }
}

fn at(unix_seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType,
        string::Ia5String,
    };

    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(WEB)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        change(&mut params);
        params
            .self_signed(&KeyPair::generate().unwrap())
            .unwrap()
            .der()
            .to_vec()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(Ia5String::try_from(text).unwrap())
    }

    fn parse(der: &[u8]) -> Result<Svid, InvalidSvid> {
        Svid::parse(der, "cluster.local")
    }

    #[test]
    fn a_workloads_certificate() {
        let svid = parse(&certificate(|_| {})).unwrap();
        assert_eq!(svid.identity.as_str(), WEB);
        let with_dns = certificate(|params| {
            params
                .subject_alt_names
                .push(SanType::DnsName("web".try_into().unwrap()));
        });
        assert_eq!(parse(&with_dns).unwrap().identity.as_str(), WEB);
    }

    #[test]
    fn refuses_what_is_no_svid() {
        use InvalidSvid as E;
        type Expected = fn(&InvalidSvid) -> bool;
        let cases: [(_, Expected); 8] = [
            (vec![0x30, 0], |e| *e == E::Malformed),
            ([certificate(|_| {}), vec![0]].concat(), |e| {
                *e == E::Malformed
            }),
            (certificate(|p| p.subject_alt_names.clear()), |e| {
                *e == E::UriSans(0)
            }),
            (
                certificate(|p| {
                    p.subject_alt_names
                        .push(uri("spiffe://cluster.local/ns/a/sa/b"))
                }),
                |e| *e == E::UriSans(2),
            ),
            (
                certificate(|p| p.subject_alt_names = vec![uri("https://example.org/")]),
                |e| matches!(e, E::Identity { .. }),
            ),
            (
                certificate(|p| p.subject_alt_names = vec![uri("spiffe://other/ns/a/sa/b")]),
                |e| matches!(e, E::TrustDomain(_)),
            ),
            (
                certificate(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
                |e| *e == E::CertificateAuthority,
            ),
            (
                certificate(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
                |e| *e == E::KeyUsage,
            ),
        ];
        for (der, expected) in cases {
            let error = parse(&der).unwrap_err();
            assert!(expected(&error), "{error}");
        }
        assert_eq!(
            parse(&certificate(|p| p.key_usages.clear())),
            Err(InvalidSvid::KeyUsage)
        );
    }
}
