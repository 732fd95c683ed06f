//! The keys that istiod signs with, if a user plugs in their own (`cacerts`), and their rotation.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// Roots of a mesh, the last of which signs, in the files that istiod follows.
#[derive(Debug)]
pub struct IstioCa {
    folder: PathBuf,
    /// The trusted roots, in PEM.
    roots: Vec<String>,
    signer: Root,
    /// Trusted, but not signing yet.
    next: Option<Root>,
}

struct Root {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// A workload's certificate, its key, and the roots, all in PEM.
#[derive(Debug, Clone)]
pub struct IstioSvid {
    /// The leaf.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// The trusted roots.
    pub roots: String,
}

impl IstioCa {
    /// Creates a root, and writes its files into `folder`.
    pub fn make(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let signer = Root::make("first")?;
        let ca = Self {
            folder: folder.to_owned(),
            roots: vec![signer.certificate.pem()],
            signer,
            next: None,
        };
        ca.write()?;
        Ok(ca)
    }

    /// The folder with its files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The trusted roots, in PEM.
    pub fn roots(&self) -> String {
        self.roots.concat()
    }

    /// Begins a rotation: another root is trusted, and the present one signs.
    pub fn add_root(&mut self) -> Result<()> {
        let next = Root::make("next")?;
        self.roots.push(next.certificate.pem());
        self.next = Some(next);
        self.write()
    }

    /// Continues the rotation: the new root signs, and both are trusted.
    pub fn sign_with_new_root(&mut self) -> Result<()> {
        self.signer = self.next.take().context("no rotation has begun")?;
        self.write()
    }

    /// Ends the rotation: the old root is no longer trusted.
    pub fn remove_old_root(&mut self) -> Result<()> {
        self.roots.remove(0);
        self.write()
    }

    /// Issues a certificate for the service account, as istiod would.
    pub fn issue(&self, namespace: &str, account: &str) -> Result<IstioSvid> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        Ok(IstioSvid {
            certificate: params.signed_by(&key, &self.signer.issuer)?.pem(),
            key: key.serialize_pem(),
            roots: self.roots(),
        })
    }

    /// istiod reads all files 100 ms after the first change.
    fn write(&self) -> Result<()> {
        let certificate = self.signer.certificate.pem();
        for (name, text) in [
            ("ca-key.pem", self.signer.issuer.key().serialize_pem()),
            ("ca-cert.pem", certificate.clone()),
            ("cert-chain.pem", certificate),
            ("root-cert.pem", self.roots()),
        ] {
            let path = self.folder.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

impl Root {
    fn make(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params
            .distinguished_name
            .push(DnType::OrganizationName, "mesh");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            certificate,
            issuer: Issuer::new(params, key),
        })
    }
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").finish_non_exhaustive()
    }
}
