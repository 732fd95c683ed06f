//! X.509-SVIDs: extracts the identity of a certificate, and validates the certificate's form (SPIFFE X509-SVID §2 to
//! §4).

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use x509_parser::{
    asn1_rs::{ToDer as _, Utf8String},
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension, X509Extension},
    prelude::FromDer,
};

use auth_mesh::{Identity, InvalidIdentity, TrustDomain};

/// Object identifier of the certificate extension that names the node to which the certificate was issued: a
/// non-critical UTF8String. Nodes use it to reject certificates of a revoked node. Arc 2.25 needs no registration
/// (X.667).
pub const NODE_EXTENSION: [u64; 3] = [2, 25, 3_713_620_917_452_836_174];

/// Encodes the content of the extension for `node` as DER. An empty name means that the CA does not know the node.
pub fn encode_node(node: &str) -> Vec<u8> {
    // Encoding a string in memory cannot fail.
    node.to_der_vec().unwrap_or_default()
}

/// Object identifier of the certificate extension that names the person to whom the certificate was issued: a
/// non-critical UTF8String. Servers write it to their access log. Arc 2.25 needs no registration (X.667).
pub const PERSON_EXTENSION: [u64; 3] = [2, 25, 3_713_620_917_452_836_175];

/// Encodes the content of the extension for `person` as DER. `None` if a certificate that names `person` would be refused.
pub fn encode_person(person: &str) -> Option<Vec<u8>> {
    is_person(person).then(|| person.to_der_vec().ok())?
}

/// A leaf certificate with exactly one SPIFFE identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Svid {
    /// Identity of the workload.
    pub identity: Identity,
    /// Serial number, in lower-case hexadecimal.
    pub serial: Arc<str>,
    /// The node that it was issued to, from [`NODE_EXTENSION`]. Empty if the CA did not know the node, `None` if the
    /// certificate has no such extension.
    pub node: Option<Arc<str>>,
    /// The person who acts as the workload, and who has verified the name, from [`PERSON_EXTENSION`]. `None` if the
    /// certificate is a workload's own.
    pub person: Option<Arc<str>>,
    /// Start of the validity period.
    pub not_before: SystemTime,
    /// End of the validity period.
    pub not_after: SystemTime,
}

/// Maximum length of a node name (a DNS subdomain, RFC 1123), in bytes.
const MAX_NODE: usize = 253;
/// Maximum length of a person's name, in bytes.
const MAX_PERSON: usize = 256;

/// Why a certificate is not an SVID of a workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSvid {
    /// Not a valid X.509 certificate, or has a malformed extension.
    #[error("certificate cannot be parsed")]
    Malformed,
    /// The subject alternative name does not contain exactly one URI.
    #[error("certificate has {0} URI SANs; an SVID has exactly one")]
    UriSans(usize),
    /// The URI is not the SPIFFE ID of a service account.
    #[error("URI SAN {uri:?} is not the SPIFFE ID of a service account: {why}")]
    Identity {
        /// The URI, truncated to 256 characters.
        uri: String,
        /// What is wrong with it.
        why: InvalidIdentity,
    },
    /// The URI is not the name of a node of the trust domain.
    #[error("URI SAN {0:?} does not name a node of this trust domain")]
    NotANode(String),
    /// The SPIFFE ID belongs to another trust domain.
    #[error("identity {0} is of another trust domain")]
    TrustDomain(Identity),
    /// A CA certificate instead of a workload's.
    #[error("certificate is a CA's, not a workload's")]
    CertificateAuthority,
    /// The key usage lacks digitalSignature, or includes one that a workload must not have.
    #[error("key usage must include digitalSignature and neither keyCertSign nor cRLSign")]
    KeyUsage,
}

impl Svid {
    /// Parses a leaf certificate of `trust_domain`. Its identity is under the trust domain's own name, even if that in the
    /// certificate is under an alias. Does not verify the chain, the signature or the validity period.
    pub fn parse(der: &[u8], trust_domain: &TrustDomain) -> Result<Self, InvalidSvid> {
        let svid = Self::parse_of_any(der, trust_domain)?;
        match svid.identity.trust_domain() == trust_domain.as_str() {
            true => Ok(svid),
            false => Err(InvalidSvid::TrustDomain(svid.identity)),
        }
    }

    /// Parses a leaf certificate of any trust domain; `own` is the mesh's. Otherwise like [`Svid::parse`]. What a
    /// certificate of another trust domain says of a node and a person is left out: those names are not this mesh's.
    pub fn parse_of_any(der: &[u8], own: &TrustDomain) -> Result<Self, InvalidSvid> {
        let leaf = Leaf::parse(der)?;
        let identity: Identity = leaf.uri.parse().map_err(|why| InvalidSvid::Identity {
            uri: leaf.uri.chars().take(256).collect(),
            why,
        })?;
        let resolved = own.resolve(&identity);
        let is_own = resolved.is_some();
        Ok(Self {
            identity: resolved.unwrap_or(identity),
            serial: leaf.serial,
            node: leaf.node.filter(|_| is_own),
            person: leaf.person.filter(|_| is_own),
            not_before: leaf.not_before,
            not_after: leaf.not_after,
        })
    }
}

/// Returns the SPIFFE ID in a leaf certificate, with any path. Otherwise like [`Svid::parse_of_any`].
pub fn spiffe_id(der: &[u8]) -> Result<String, InvalidSvid> {
    Ok(Leaf::parse(der)?.uri)
}

/// A node's own certificate, with which its daemon authenticates to the CA. Its URI is no [`Identity`], so [`Svid::parse`] and
/// whatever uses it (tunnels, policies, federation) refuse it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCertificate {
    /// The node's name.
    pub node: String,
    /// Serial number, in lower-case hexadecimal.
    pub serial: Arc<str>,
    /// End of the validity period.
    pub not_after: SystemTime,
}

impl NodeCertificate {
    /// The SPIFFE ID of `node`.
    pub fn uri(node: &str, trust_domain: &TrustDomain) -> String {
        format!("spiffe://{}/node/{node}", trust_domain.as_str())
    }

    /// Parses a certificate of a node of `trust_domain`. Does not verify the chain, the signature or the validity period.
    pub fn parse(der: &[u8], trust_domain: &TrustDomain) -> Result<Self, InvalidSvid> {
        let leaf = Leaf::parse(der)?;
        match leaf.node {
            Some(node) if leaf.uri == Self::uri(&node, trust_domain) => Ok(Self {
                node: node.to_string(),
                serial: leaf.serial,
                not_after: leaf.not_after,
            }),
            _ => Err(InvalidSvid::NotANode(leaf.uri.chars().take(256).collect())),
        }
    }
}

/// A leaf certificate of the form of an SVID, with any URI.
struct Leaf {
    uri: String,
    serial: Arc<str>,
    node: Option<Arc<str>>,
    person: Option<Arc<str>>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Leaf {
    fn parse(der: &[u8]) -> Result<Self, InvalidSvid> {
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| InvalidSvid::Malformed)?;
        if !rest.is_empty() {
            return Err(InvalidSvid::Malformed);
        }
        let mut uris = Vec::new();
        let mut signs = None;
        let (mut node, mut person) = (None, None);
        for extension in certificate.extensions() {
            if is(extension, NODE_EXTENSION) {
                take(extension, &mut node, |name| name.len() <= MAX_NODE)?;
            } else if is(extension, PERSON_EXTENSION) {
                take(extension, &mut person, is_person)?;
            }
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
        if signs != Some(true) {
            return Err(InvalidSvid::KeyUsage);
        }
        let validity = certificate.validity();
        Ok(Self {
            uri: uri.to_owned(),
            serial: certificate
                .raw_serial()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
                .into(),
            node,
            person,
            not_before: at(validity.not_before.timestamp()),
            not_after: at(validity.not_after.timestamp()),
        })
    }
}

fn is(extension: &X509Extension<'_>, identifier: [u64; 3]) -> bool {
    let arcs = extension.oid.iter();
    arcs.is_some_and(|arcs| arcs.eq(identifier))
}

/// Puts the UTF8String in `extension` into `name`. Fails if it is not one, is not `valid`, or is the second.
fn take(
    extension: &X509Extension<'_>,
    name: &mut Option<Arc<str>>,
    valid: impl FnOnce(&str) -> bool,
) -> Result<(), InvalidSvid> {
    let found = match Utf8String::from_der(extension.value) {
        Ok(([], found)) if valid(found.as_ref()) => found.as_ref().into(),
        _ => return Err(InvalidSvid::Malformed),
    };
    match name.replace(found) {
        None => Ok(()),
        Some(_) => Err(InvalidSvid::Malformed),
    }
}

/// Whether a certificate can name a person like this: not empty, at most 256 bytes, and no control characters, so that logs can
/// contain it as it is.
pub fn is_person(name: &str) -> bool {
    (1..=MAX_PERSON).contains(&name.len()) && !name.chars().any(char::is_control)
}

fn at(unix_seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair, KeyUsagePurpose,
        SanType, string::Ia5String,
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
        Svid::parse(der, &TrustDomain::default())
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
    fn reads_the_node() {
        let with = |content: Vec<u8>| {
            let extension = CustomExtension::from_oid_content(&NODE_EXTENSION, content);
            parse(&certificate(|p| p.custom_extensions = vec![extension]))
        };
        assert_eq!(parse(&certificate(|_| {})).unwrap().node, None);
        for name in ["node-a", ""] {
            let svid = with(encode_node(name)).unwrap();
            assert_eq!(svid.node.as_deref(), Some(name));
        }
        for bad in [
            vec![],
            vec![4, 1, b'a'],
            [encode_node("a"), vec![0]].concat(),
        ] {
            assert_eq!(with(bad), Err(InvalidSvid::Malformed));
        }
        let long = with(encode_node(&"a".repeat(MAX_NODE + 1)));
        assert_eq!(long, Err(InvalidSvid::Malformed));
    }

    #[test]
    fn a_nodes_certificate_is_no_workloads() {
        let with = |text: &str, node: &str| {
            let extension = CustomExtension::from_oid_content(&NODE_EXTENSION, encode_node(node));
            certificate(|params| {
                params.subject_alt_names = vec![uri(text)];
                params.custom_extensions = vec![extension];
            })
        };
        let read = |der: &[u8]| NodeCertificate::parse(der, &TrustDomain::default());
        let good = with("spiffe://cluster.local/node/vm-1", "vm-1");
        assert_eq!(read(&good).unwrap().node, "vm-1");
        let error = parse(&good).unwrap_err();
        assert!(matches!(error, InvalidSvid::Identity { .. }), "{error}");
        for (text, node) in [
            ("spiffe://cluster.local/node/vm-1", "vm-2"),
            ("spiffe://other/node/vm-1", "vm-1"),
            (WEB, "vm-1"),
        ] {
            let error = read(&with(text, node)).unwrap_err();
            assert!(matches!(error, InvalidSvid::NotANode(_)), "{error}");
        }
        assert!(read(&certificate(|_| {})).is_err());
    }

    #[test]
    fn reads_the_person() {
        let with = |contents: Vec<Vec<u8>>| {
            let extensions = contents
                .into_iter()
                .map(|content| CustomExtension::from_oid_content(&PERSON_EXTENSION, content));
            parse(&certificate(|p| p.custom_extensions = extensions.collect()))
        };
        assert_eq!(with(vec![]).unwrap().person, None);
        let alice = encode_person("oidc:alice@example.com").unwrap();
        let svid = with(vec![alice.clone()]).unwrap();
        assert_eq!(svid.person.as_deref(), Some("oidc:alice@example.com"));
        for bad in ["", "a\nb", "a\u{85}b", &"a".repeat(MAX_PERSON + 1)] {
            assert_eq!(encode_person(bad), None);
            let bad = bad.to_der_vec().unwrap();
            assert_eq!(with(vec![bad]), Err(InvalidSvid::Malformed));
        }
        assert_eq!(
            with(vec![alice.clone(), alice]),
            Err(InvalidSvid::Malformed)
        );
        assert_eq!(with(vec![vec![]]), Err(InvalidSvid::Malformed));
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
