//! A CA for the sidecars, in place of istiod.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};

/// A root key and its certificate, which exist as long as one mesh.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
}

/// The files that a sidecar reads.
pub(crate) struct Files {
    /// Its certificate.
    pub(crate) certificate: PathBuf,
    /// The certificate's key.
    pub(crate) key: PathBuf,
    /// The root that it trusts.
    pub(crate) root: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.subject_alt_names = vec![uri(TRUST_DOMAIN)?];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// Issues a certificate for a service account in namespace `default`, and writes it to files in a folder.
    pub(crate) fn issue(&self, account: &str, folder: &Path) -> Result<Files> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri(&spiffe(account))?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            anyhow::Ok(path)
        };
        Ok(Files {
            certificate: write("certificate.pem", certificate.pem())?,
            key: write("key.pem", key.serialize_pem())?,
            root: write("root.pem", self.certificate.pem())?,
        })
    }
}

/// The SPIFFE ID of a service account in namespace `default`.
pub(crate) fn spiffe(account: &str) -> String {
    format!("{TRUST_DOMAIN}/ns/default/sa/{account}")
}

fn uri(text: &str) -> Result<SanType> {
    Ok(SanType::URI(text.try_into().context("a URI")?))
}

/// The prefix of all identities.
pub(crate) const TRUST_DOMAIN: &str = "spiffe://cluster.local";
