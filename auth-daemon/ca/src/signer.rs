//! A signing key with its certificate.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use auth_mesh::{Identity, TrustDomain};
use auth_tunnel::tls::svid::{
    NODE_EXTENSION, NodeCertificate, PERSON_EXTENSION, encode_node, encode_person,
};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber, SignatureAlgorithm, SigningKey, string::Ia5String,
};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject},
    sign::CertifiedKey,
};
use time::OffsetDateTime;
use x509_parser::{
    asn1_rs::{Any, BitString, Sequence, Tag, ToDer as _},
    certificate::X509Certificate,
    extensions::ParsedExtension,
    prelude::FromDer,
};

use crate::{
    config::{KeyAlgorithm, RootSettings},
    csr::RequestedKey,
};

/// Seconds by which a certificate is valid before it is issued, to allow for clock skew between nodes.
pub(crate) const BACKDATE: u64 = 300;
/// The same for roots, which are made once for nodes whose clocks may differ a lot.
pub(crate) const ROOT_BACKDATE: u64 = 24 * 60 * 60;
/// Seconds of its own life that an issuer must have left to sign.
const LEAST_LEFT: u64 = 60;

/// Signs certificates and revocation lists.
pub(crate) struct Signer {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    /// The intermediates between a leaf and the root, this signer's own first. Empty for a root.
    intermediates: Vec<CertificateDer<'static>>,
    /// The certificate's subject, DER.
    name: Vec<u8>,
    key_identifier: Vec<u8>,
    drafts: rcgen::Issuer<'static, Unsigned>,
    life: Life,
}

/// The validity of a whole chain, in seconds since the Unix epoch: the latest begin and the earliest end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) begin: u64,
    pub(crate) end: u64,
}

/// Whom a certificate is issued to, besides its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder<'a> {
    /// The pods of the identity on the node with this name. An empty name means that the node is not known.
    Node(&'a str),
    /// The person with this name, who acts as the identity and only as a client.
    Person(&'a str),
}

/// A newly signed certificate.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) not_after: u64,
}

/// Why signing failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    /// The issuer is not valid for long enough.
    #[error("the CA's certificate {0}: rotate the root, or configure a new intermediate")]
    Validity(String),
    /// Not a name for a server certificate.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    /// A server certificate without names.
    #[error("there is no name for the certificate")]
    NoName,
    #[error("signing failed: {0}")]
    Failed(#[from] rcgen::Error),
    #[error("signing failed: {0}")]
    Tls(#[from] rustls::Error),
    /// rcgen's draft does not have RFC 5280's form.
    #[error("signing failed: the draft cannot be parsed")]
    Draft,
    /// The name of a person cannot be in a certificate.
    #[error("the person's name is empty, longer than 256 bytes, or has control characters")]
    Person,
    #[error("time {0} is out of range")]
    Time(u64),
    #[error("the new root cannot be used: {0}")]
    Root(String),
}

impl Signer {
    /// Signs with `key` as the subject of `certificate`. `intermediates` are sent with each leaf; `life` is the chain's.
    pub(crate) fn new(
        key: KeyPair,
        certificate: CertificateDer<'static>,
        intermediates: Vec<CertificateDer<'static>>,
        life: Life,
    ) -> Result<Self, String> {
        let parsed = parse(&certificate)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err("the private key does not belong to the certificate".into());
        }
        let name = parsed.subject().as_raw().to_vec();
        let key_identifier = subject_key_identifier(&parsed)
            .map_or_else(|| derived_key_identifier(&key), <[u8]>::to_vec);
        let mut params = CertificateParams::default();
        // `sign` inserts the real name: rcgen's names hold only one value of each type, not `DC=a, DC=b`.
        params.distinguished_name = DistinguishedName::new();
        params.key_identifier_method = KeyIdMethod::PreSpecified(key_identifier.clone());
        let unsigned = Unsigned {
            algorithm: key.algorithm(),
            public_key: key.der_bytes().to_vec(),
        };
        Ok(Self {
            drafts: rcgen::Issuer::new(params, unsigned),
            key,
            certificate,
            intermediates,
            name,
            key_identifier,
            life,
        })
    }

    /// The same signer with these intermediates, and the validity of the whole chain.
    pub(crate) fn with_chain(
        self,
        intermediates: Vec<CertificateDer<'static>>,
        life: Life,
    ) -> Self {
        Self {
            intermediates,
            life,
            ..self
        }
    }

    /// A self-signed root.
    pub(crate) fn root(key: KeyPair, certificate: CertificateDer<'static>) -> Result<Self, String> {
        let parsed = parse(&certificate)?;
        parsed
            .verify_signature(None)
            .map_err(|_| "the certificate is not self-signed".to_owned())?;
        check_may_sign(&parsed)?;
        let life = life(&parsed);
        Self::new(key, certificate, Vec::new(), life)
    }

    /// The key, PKCS #8 in PEM.
    pub(crate) fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The certificate of the key.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The intermediates that are sent with a leaf.
    pub(crate) fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    /// The validity of the chain above a leaf.
    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// The key's SubjectPublicKeyInfo, DER.
    pub(crate) fn spki(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// The usual name of the key's algorithm.
    pub(crate) fn algorithm(&self) -> String {
        let algorithm = self.key.algorithm();
        if *algorithm == rcgen::PKCS_ECDSA_P256_SHA256 {
            "P-256".into()
        } else if *algorithm == rcgen::PKCS_ECDSA_P384_SHA384 {
            "P-384".into()
        } else if *algorithm == rcgen::PKCS_ED25519 {
            "Ed25519".into()
        } else if *algorithm == rcgen::PKCS_RSA_SHA256 {
            "RSA".into()
        } else {
            format!("{algorithm:?}")
        }
    }

    /// Signs an X.509-SVID of `identity` for `key`: the URI is its only name (SPIFFE X509-SVID §2 and §4). With `holder`,
    /// an extension names that.
    ///
    /// It is valid for `lifetime` seconds from `now`, or as long as the chain above it.
    pub(crate) fn svid(
        &self,
        identity: &Identity,
        key: &RequestedKey,
        holder: Option<Holder<'_>>,
        lifetime: u64,
        now: u64,
    ) -> Result<Leaf, SignError> {
        let purposes = match holder {
            // A person must not be able to answer for the account's services.
            Some(Holder::Person(_)) => vec![ExtendedKeyUsagePurpose::ClientAuth],
            _ => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        };
        let extension = match holder {
            None => None,
            Some(Holder::Node(node)) => Some((NODE_EXTENSION, encode_node(node))),
            Some(Holder::Person(person)) => {
                let content = encode_person(person).ok_or(SignError::Person)?;
                Some((PERSON_EXTENSION, content))
            }
        };
        let extension = extension
            .map(|(identifier, content)| CustomExtension::from_oid_content(&identifier, content));
        let uri = Ia5String::try_from(identity.as_str())?;
        let mut params = leaf_params(vec![SanType::URI(uri)], purposes);
        params.custom_extensions.extend(extension);
        self.leaf(key, params, lifetime, now)
    }

    /// Signs the certificate of `node` itself, a client's, for `key`. It is no SVID of a workload. Its validity is that of
    /// [`Signer::svid`].
    pub(crate) fn node(
        &self,
        node: &str,
        trust_domain: &TrustDomain,
        key: &RequestedKey,
        lifetime: u64,
        now: u64,
    ) -> Result<Leaf, SignError> {
        let uri = NodeCertificate::uri(node, trust_domain);
        let uri = Ia5String::try_from(uri.as_str())?;
        let purposes = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let mut params = leaf_params(vec![SanType::URI(uri)], purposes);
        let name = CustomExtension::from_oid_content(&NODE_EXTENSION, encode_node(node));
        params.custom_extensions.push(name);
        self.leaf(key, params, lifetime, now)
    }

    /// Makes a P-256 key and a server certificate for DNS names and IP addresses. It has no URI, so it is no SVID.
    pub(crate) fn server_certificate(
        &self,
        names: &[String],
        lifetime: u64,
        now: u64,
    ) -> Result<(Arc<CertifiedKey>, Leaf), SignError> {
        let names = names
            .iter()
            .map(|name| san(name))
            .collect::<Result<Vec<_>, _>>()?;
        if names.is_empty() {
            return Err(SignError::NoName);
        }
        self.server(names, lifetime, now)
    }

    /// Makes a P-256 key and an X.509-SVID for a server of the CA's own, with the SPIFFE ID `id`.
    pub(crate) fn server_svid(
        &self,
        id: &str,
        lifetime: u64,
        now: u64,
    ) -> Result<(Arc<CertifiedKey>, Leaf), SignError> {
        let uri = SanType::URI(Ia5String::try_from(id)?);
        self.server(vec![uri], lifetime, now)
    }

    fn server(
        &self,
        names: Vec<SanType>,
        lifetime: u64,
        now: u64,
    ) -> Result<(Arc<CertifiedKey>, Leaf), SignError> {
        let key = KeyPair::generate()?;
        let purposes = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = self.leaf(&key, leaf_params(names, purposes), lifetime, now)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let certified = CertifiedKey::new(self.chain(&leaf), any_ecdsa_type(&key)?);
        certified.keys_match()?;
        Ok((Arc::new(certified), leaf))
    }

    /// `leaf` and its intermediates, without the root.
    pub(crate) fn chain(&self, leaf: &Leaf) -> Vec<CertificateDer<'static>> {
        let mut chain = Vec::with_capacity(1 + self.intermediates.len());
        chain.push(leaf.certificate.clone());
        chain.extend_from_slice(&self.intermediates);
        chain
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        mut params: CertificateParams,
        lifetime: u64,
        now: u64,
    ) -> Result<Leaf, SignError> {
        if now < self.life.begin {
            let early = self.life.begin - now;
            let what = format!("is not valid for another {early} s; check the clock (NTP)");
            return Err(SignError::Validity(what));
        }
        match self.life.end.checked_sub(now) {
            Some(LEAST_LEFT..) => {}
            Some(left) => return Err(SignError::Validity(format!("expires in {left} s"))),
            None => return Err(SignError::Validity("has expired".into())),
        }
        let not_after = now.saturating_add(lifetime).min(self.life.end);
        let not_before = now.saturating_sub(BACKDATE).max(self.life.begin);
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()));
        params.not_before = time(not_before)?;
        params.not_after = time(not_after)?;
        let draft = params.signed_by(key, &self.drafts)?;
        Ok(Leaf {
            certificate: self.sign(draft.der())?.into(),
            not_after,
        })
    }

    /// Signs the revocation list that `params` describe (RFC 5280 §5).
    pub(crate) fn crl(
        &self,
        mut params: rcgen::CertificateRevocationListParams,
    ) -> Result<Vec<u8>, SignError> {
        params.key_identifier_method = KeyIdMethod::PreSpecified(self.key_identifier.clone());
        let draft = params.signed_by(&self.drafts)?;
        self.sign(draft.der())
    }

    /// Puts the issuer's name into a draft of a certificate or a CRL, and signs it.
    fn sign(&self, draft: &[u8]) -> Result<Vec<u8>, SignError> {
        self.insert_name(draft).ok_or(SignError::Draft)?
    }

    fn insert_name(&self, draft: &[u8]) -> Option<Result<Vec<u8>, SignError>> {
        // Both are SEQUENCE { body SEQUENCE, algorithm SEQUENCE, signature } (RFC 5280 §4.1 and §5.1).
        let (_, draft) = Sequence::from_der(draft).ok()?;
        let (rest, body) = Sequence::from_der(&draft.content).ok()?;
        let (_, algorithm) = Sequence::from_der(rest).ok()?;
        // In the body, the first SEQUENCE is the algorithm and the second one the issuer, empty so far.
        let mut rest = &*body.content;
        loop {
            let (after, any) = Any::from_der(rest).ok()?;
            rest = after;
            if any.tag() == Tag::Sequence {
                break;
            }
        }
        let before = &body.content[..body.content.len() - rest.len()];
        let (after, empty) = Sequence::from_der(rest).ok()?;
        if !empty.content.is_empty() {
            return None;
        }
        let sequence =
            |parts: &[&[u8]]| Sequence::new(Cow::Owned(parts.concat())).to_der_vec().ok();
        let body = sequence(&[before, &self.name, after])?;
        let algorithm = algorithm.to_der_vec().ok()?;
        let signature = match self.key.sign(&body) {
            Ok(signature) => BitString::new(0, &signature).to_der_vec().ok()?,
            Err(error) => return Some(Err(error.into())),
        };
        sequence(&[&body, &algorithm, &signature]).map(Ok)
    }
}

/// Stands in for the key while rcgen writes a draft.
struct Unsigned {
    algorithm: &'static SignatureAlgorithm,
    public_key: Vec<u8>,
}

impl PublicKeyData for Unsigned {
    fn der_bytes(&self) -> &[u8] {
        &self.public_key
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

impl SigningKey for Unsigned {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(Vec::new())
    }
}

fn leaf_params(names: Vec<SanType>, purposes: Vec<ExtendedKeyUsagePurpose>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = purposes;
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params
}

/// Makes a self-signed root of `trust_domain`.
pub(crate) fn make_root(
    trust_domain: &TrustDomain,
    settings: &RootSettings,
    now: u64,
) -> Result<Signer, SignError> {
    let key = KeyPair::generate_for(match settings.algorithm {
        KeyAlgorithm::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
        KeyAlgorithm::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
        KeyAlgorithm::Ed25519 => &rcgen::PKCS_ED25519,
    })?;
    let serial = random_serial();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, organization(trust_domain));
    // Each root has a name of its own, because chains and revocation lists are found by it.
    params.distinguished_name.push(
        DnType::CommonName,
        format!("auth-daemon root {}", hex(&serial[..4])),
    );
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!(
        "spiffe://{trust_domain}"
    ))?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = time(now.saturating_sub(ROOT_BACKDATE))?;
    params.not_after = time(now.saturating_add(settings.lifetime.as_secs()))?;
    let certificate = params.self_signed(&key)?.der().clone();
    Signer::root(key, certificate).map_err(SignError::Root)
}

/// Reads a root that [`make_root`] made, with its key, and the trust domain in its name.
pub(crate) fn read_root(pem: &str) -> Result<(TrustDomain, Signer), String> {
    let key = key_from_pem(pem)?;
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| format!("has no certificate: {error}"))?;
    let trust_domain = uris(&parse(&certificate)?)
        .first()
        .and_then(|uri| uri.strip_prefix("spiffe://"))
        .and_then(|name| name.parse().ok())
        .ok_or("is not the root of a trust domain")?;
    let signer =
        Signer::root(key, certificate).map_err(|what| format!("cannot be used: {what}"))?;
    Ok((trust_domain, signer))
}

/// An organization's name has at most 64 characters (RFC 5280 §A.1); the URI holds longer trust domains whole.
fn organization(trust_domain: &TrustDomain) -> String {
    trust_domain.as_str().chars().take(64).collect()
}

/// Reads the first private key in a PEM text: PKCS #8, SEC 1 or PKCS #1.
pub(crate) fn key_from_pem(pem: &str) -> Result<KeyPair, String> {
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| "has no usable private key (PEM, not encrypted)".to_owned())?;
    let key =
        KeyPair::try_from(&key).map_err(|error| format!("has no usable private key: {error}"))?;
    let known = [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ];
    if !known.contains(&key.algorithm()) {
        return Err(format!(
            "has a key of the kind {:?}; P-256, P-384, Ed25519 and RSA are supported",
            key.algorithm()
        ));
    }
    Ok(key)
}

/// Parses a certificate, which must be the whole of `der`.
pub(crate) fn parse<'a>(der: &'a [u8]) -> Result<X509Certificate<'a>, String> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err("the certificate cannot be parsed".into()),
    }
}

/// Whether a certificate may sign others: CA:TRUE and keyCertSign (RFC 5280 §4.2.1.3 and §4.2.1.9).
pub(crate) fn check_may_sign(certificate: &X509Certificate<'_>) -> Result<(), String> {
    let constraints = certificate.basic_constraints().ok().flatten();
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(
            "the certificate is not a CA certificate (basicConstraints lacks CA:TRUE)".into(),
        );
    }
    match certificate.key_usage() {
        Ok(None) => Ok(()),
        Ok(Some(usage)) if usage.value.key_cert_sign() => Ok(()),
        _ => Err("the certificate may not sign others (keyUsage lacks keyCertSign)".into()),
    }
}

/// The validity of one certificate.
pub(crate) fn life(certificate: &X509Certificate<'_>) -> Life {
    let validity = certificate.validity();
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Life {
        begin: seconds(validity.not_before),
        end: seconds(validity.not_after),
    }
}

/// The URIs in a certificate's subject alternative name.
pub(crate) fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Vec<&'a str> {
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| &names.value.general_names);
    names
        .into_iter()
        .flatten()
        .filter_map(|name| match name {
            x509_parser::extensions::GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect()
}

fn subject_key_identifier<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(identifier) => Some(identifier.0),
            _ => None,
        })
}

/// As rcgen derives it (RFC 7093 §2, method 1).
fn derived_key_identifier(key: &KeyPair) -> Vec<u8> {
    let digest =
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &key.subject_public_key_info());
    digest.as_ref()[..20].to_vec()
}

fn san(name: &str) -> Result<SanType, SignError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    match ServerName::try_from(name) {
        Ok(ServerName::DnsName(_)) => Ok(SanType::DnsName(Ia5String::try_from(name)?)),
        _ => Err(SignError::Name(name.chars().take(256).collect())),
    }
}

pub(crate) fn time(seconds: u64) -> Result<OffsetDateTime, SignError> {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(SignError::Time(seconds))
}

/// 126 random bits: unique without a record, positive, and 16 octets without a leading zero (RFC 5280 §4.1.2.2).
fn random_serial() -> [u8; 16] {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x3f | 0x40;
    bytes
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 0xf])
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}
