//! The cluster's own CA and keys. The mesh's CA is separate.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// A folder with `ca.crt`, the keys `accounts.key` and `accounts.pub` of service account tokens, and issued
/// certificates.
pub(super) struct Pki {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub(super) fn make(folder: &Path) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key)?;
        let pki = Self {
            folder: folder.to_owned(),
            issuer: Issuer::new(params, key),
        };
        pki.write("ca.crt", certificate.pem())?;
        let accounts = KeyPair::generate()?;
        pki.write("accounts.key", accounts.serialize_pem())?;
        pki.write("accounts.pub", accounts.public_key_pem())?;
        Ok(pki)
    }

    /// Issues `NAME.crt` with key `NAME.key`, for a common name, an organization and subject alternative names.
    pub(super) fn leaf(
        &self,
        name: &str,
        (common_name, organization): (&str, Option<&str>),
        names: &[&str],
    ) -> Result<()> {
        let key = KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names)?;
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        if let Some(organization) = organization {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer)?;
        self.write(&format!("{name}.crt"), certificate.pem())?;
        self.write(&format!("{name}.key"), key.serialize_pem())
    }

    fn write(&self, name: &str, content: String) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
    }
}

impl fmt::Debug for Pki {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pki")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}
