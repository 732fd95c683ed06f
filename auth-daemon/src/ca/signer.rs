//! One key that signs, with the certificate that says so.

use std::{fmt, net::IpAddr, sync::Arc};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    SignatureAlgorithm, SigningKey, string::Ia5String,
};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    sign::CertifiedKey,
};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, extensions::ParsedExtension, prelude::FromDer};

use super::{
    BACKDATE,
    authority::KeyAlgorithm,
    csr::RequestedKey,
    der::{self, BIT_STRING, SEQUENCE},
};
use crate::mesh::{Identity, TrustDomain};

/// A root is made once for nodes whose clocks may differ by much, in seconds.
pub(super) const ROOT_BACKDATE: u64 = 24 * 60 * 60;
/// What an issuer must have left of its own life to sign, in seconds.
const LEAST_LEFT: u64 = 60;

/// Signs certificates and revocation lists.
pub(super) struct Signer {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    /// What a leaf is shown with: this one's certificate and those above it, without the root. None of a root's.
    above: Vec<CertificateDer<'static>>,
    /// Subject of the certificate, DER as it stands there.
    name: Vec<u8>,
    key_identifier: Vec<u8>,
    drafts: rcgen::Issuer<'static, Unsigned>,
    life: Life,
}

/// The seconds of the Unix epoch that a chain is good for: its last begin and its first end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) begin: u64,
    pub(super) end: u64,
}

/// A certificate fresh from the key.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) serial: [u8; 16],
    pub(super) not_after: u64,
}

/// A root that was just made. Has no `Debug`: there is a key in it.
pub(super) struct NewRoot {
    /// PKCS #8.
    pub(super) key_pem: String,
    pub(super) certificate_pem: String,
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignError {
    /// There would be no time to use it.
    #[error("the CA's certificate {0}: rotate the root, or plug in a new intermediate certificate")]
    Ending(String),
    /// A name that no certificate can carry.
    #[error("{0:?} is neither a DNS name nor an IP address")]
    Name(String),
    /// A certificate for nobody.
    #[error("no name to put into the certificate")]
    NoName,
    #[error("signing failed: {0}")]
    Failed(#[from] rcgen::Error),
    #[error("signing failed: {0}")]
    Tls(#[from] rustls::Error),
    /// rcgen's draft is not of the form that RFC 5280 gives it.
    #[error("signing failed: the draft cannot be taken apart")]
    Draft,
    #[error("time {0} is out of range")]
    Time(u64),
}

impl Signer {
    /// Signs with `key` as the subject of `certificate`. `above` goes with each leaf; `life` is the chain's.
    pub(super) fn new(
        key: KeyPair,
        certificate: CertificateDer<'static>,
        above: Vec<CertificateDer<'static>>,
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
        // Put in as it stands in the certificate, later: rcgen's names hold one value of a type, not `DC=a, DC=b`.
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
            above,
            name,
            key_identifier,
            life,
        })
    }

    /// A self-signed root.
    pub(super) fn root(key: KeyPair, certificate: CertificateDer<'static>) -> Result<Self, String> {
        let parsed = parse(&certificate)?;
        parsed
            .verify_signature(None)
            .map_err(|_| "the certificate is not self-signed".to_owned())?;
        check_may_sign(&parsed)?;
        let life = life(&parsed);
        Self::new(key, certificate, Vec::new(), life)
    }

    /// The certificate that stands for the key.
    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What a leaf is shown with, without the root.
    pub(super) fn above(&self) -> &[CertificateDer<'static>] {
        &self.above
    }

    /// When the chain above a leaf begins and ends.
    pub(super) fn life(&self) -> Life {
        self.life
    }

    /// The key's own SubjectPublicKeyInfo, DER.
    pub(super) fn spki(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// Its kind, as people call it.
    pub(super) fn algorithm(&self) -> String {
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

    /// An X.509-SVID of `identity` for `key`: the URI is the only name in it (SPIFFE X509-SVID §2 and §4).
    ///
    /// Lives for `lifetime` seconds from `now`, or as long as the chain above it.
    pub(super) fn svid(
        &self,
        identity: &Identity,
        key: &RequestedKey,
        lifetime: u64,
        now: u64,
    ) -> Result<Leaf, SignError> {
        let uri = Ia5String::try_from(identity.as_str())?;
        let purposes = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.leaf(key, vec![SanType::URI(uri)], purposes, lifetime, now)
    }

    /// A fresh P-256 key and a server's certificate for DNS names and IP addresses: no SVID, it has no URI.
    pub(super) fn serving(
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
        let key = KeyPair::generate()?;
        let purposes = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = self.leaf(&key, names, purposes, lifetime, now)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let certified = CertifiedKey::new(self.chain(&leaf), any_ecdsa_type(&key)?);
        certified.keys_match()?;
        Ok((Arc::new(certified), leaf))
    }

    /// `leaf` and what leads from it to the root.
    pub(super) fn chain(&self, leaf: &Leaf) -> Vec<CertificateDer<'static>> {
        let mut chain = Vec::with_capacity(1 + self.above.len());
        chain.push(leaf.certificate.clone());
        chain.extend_from_slice(&self.above);
        chain
    }

    fn leaf(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        purposes: Vec<ExtendedKeyUsagePurpose>,
        lifetime: u64,
        now: u64,
    ) -> Result<Leaf, SignError> {
        if now < self.life.begin {
            let early = self.life.begin - now;
            let what = format!("begins in {early} s only; compare the clock (NTP)");
            return Err(SignError::Ending(what));
        }
        match self.life.end.checked_sub(now) {
            Some(LEAST_LEFT..) => {}
            Some(left) => return Err(SignError::Ending(format!("ends in {left} s"))),
            None => return Err(SignError::Ending("has ended".into())),
        }
        let serial = random_serial();
        let not_after = now.saturating_add(lifetime).min(self.life.end);
        let not_before = now.saturating_sub(BACKDATE.as_secs()).max(self.life.begin);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = purposes;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = time(not_before)?;
        params.not_after = time(not_after)?;
        let draft = params.signed_by(key, &self.drafts)?;
        Ok(Leaf {
            certificate: self.sign(draft.der())?.into(),
            serial,
            not_after,
        })
    }

    /// The revocation list that `params` describe (RFC 5280 §5).
    pub(super) fn crl(
        &self,
        mut params: rcgen::CertificateRevocationListParams,
    ) -> Result<Vec<u8>, SignError> {
        params.key_identifier_method = KeyIdMethod::PreSpecified(self.key_identifier.clone());
        let draft = params.signed_by(&self.drafts)?;
        self.sign(draft.der())
    }

    /// Puts the issuer's name into a draft of a certificate or a CRL, and signs it.
    fn sign(&self, draft: &[u8]) -> Result<Vec<u8>, SignError> {
        let (to_be_signed, algorithm) = self.named(draft).ok_or(SignError::Draft)?;
        let signature = self.key.sign(&to_be_signed)?;
        let signature = der::element(BIT_STRING, &[&[0], &signature]);
        Ok(der::element(
            SEQUENCE,
            &[&to_be_signed, algorithm, &signature],
        ))
    }

    fn named<'a>(&self, draft: &'a [u8]) -> Option<(Vec<u8>, &'a [u8])> {
        let mut outer = der::only(SEQUENCE, draft)?.content;
        let body = der::take_tag(SEQUENCE, &mut outer)?.content;
        let algorithm = der::take_tag(SEQUENCE, &mut outer)?.whole;
        // Of both, the first sequence is the algorithm and the second one the issuer (RFC 5280 §4.1 and §5.1).
        let mut rest = body;
        while der::take(&mut rest)?.tag != SEQUENCE {}
        let before = &body[..body.len() - rest.len()];
        der::take_tag(SEQUENCE, &mut rest).filter(|name| name.content.is_empty())?;
        Some((
            der::element(SEQUENCE, &[before, &self.name, rest]),
            algorithm,
        ))
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("life", &self.life)
            .finish_non_exhaustive()
    }
}

/// Stands for the key while rcgen writes what is to be signed.
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

/// Makes a self-signed root of `trust_domain`.
pub(super) fn make_root(
    trust_domain: &TrustDomain,
    algorithm: KeyAlgorithm,
    lifetime: u64,
    now: u64,
) -> Result<NewRoot, SignError> {
    let key = KeyPair::generate_for(match algorithm {
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
    // A name of its own for each root: chains and revocation lists are found by it.
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
    params.not_after = time(now.saturating_add(lifetime))?;
    let root = params.self_signed(&key)?;
    Ok(NewRoot {
        key_pem: key.serialize_pem(),
        certificate_pem: root.pem(),
    })
}

/// A trust domain may be longer than an organization's name (64 characters, RFC 5280 §A.1); the URI has all of it.
fn organization(trust_domain: &TrustDomain) -> String {
    trust_domain.as_str().chars().take(64).collect()
}

/// Reads a private key: PKCS #8, SEC 1 or PKCS #1, behind whatever else a tool has put into the file.
pub(super) fn key_from_pem(pem: &str) -> Result<KeyPair, String> {
    use rustls::pki_types::pem::PemObject;
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
            "has a key of the kind {:?}; P-256, P-384, Ed25519 and RSA are used",
            key.algorithm()
        ));
    }
    Ok(key)
}

/// Parses a certificate that has to be the whole of `der`.
pub(super) fn parse<'a>(der: &'a [u8]) -> Result<X509Certificate<'a>, String> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err("the certificate cannot be parsed".into()),
    }
}

/// Whether a certificate may sign others: CA:TRUE and keyCertSign (RFC 5280 §4.2.1.3 and §4.2.1.9).
pub(super) fn check_may_sign(certificate: &X509Certificate<'_>) -> Result<(), String> {
    let constraints = certificate.basic_constraints().ok().flatten();
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err("the certificate is no CA's (basicConstraints lacks CA:TRUE)".into());
    }
    match certificate.key_usage() {
        Ok(None) => Ok(()),
        Ok(Some(usage)) if usage.value.key_cert_sign() => Ok(()),
        _ => Err("the certificate may not sign others (keyUsage lacks keyCertSign)".into()),
    }
}

/// When a certificate begins and ends.
pub(super) fn life(certificate: &X509Certificate<'_>) -> Life {
    let validity = certificate.validity();
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Life {
        begin: seconds(validity.not_before),
        end: seconds(validity.not_after),
    }
}

/// The URIs among a certificate's names.
pub(super) fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Vec<&'a str> {
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

/// RFC 7093 §2, method 1, as rcgen derives it.
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

pub(super) fn time(seconds: u64) -> Result<OffsetDateTime, SignError> {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(SignError::Time(seconds))
}

/// 126 random bits: unique without a record, positive and 16 octets long without a leading zero (RFC 5280 §4.1.2.2).
pub(super) fn random_serial() -> [u8; 16] {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x3f | 0x40;
    bytes
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 0xf])
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}
