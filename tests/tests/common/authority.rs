//! Certificates of any kind.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_tests::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, date_time_ymd,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};

/// The SPIFFE ID of a service account in namespace `default` of `cluster.local`.
pub(crate) fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

/// A CA that signs any certificate.
pub(crate) struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    /// The CA that daemons share in the folder.
    pub(crate) fn stolen(folder: &Path) -> Result<Self> {
        let pem = fs::read_to_string(folder.join("root.pem")).context("reading the root")?;
        let root = CertificateDer::from_pem_slice(pem.as_bytes()).context("the root")?;
        let key = KeyPair::from_pem(&pem).context("the root's key")?;
        Ok(Self(Issuer::from_ca_cert_der(&root, key)?))
    }

    /// A CA with its own key and the same subject as the daemons' CA.
    pub(crate) fn another() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.subject_alt_names = vec![uri("spiffe://cluster.local")?];
        Ok(Self(Issuer::new(params, KeyPair::generate()?)))
    }

    /// A CA of a foreign trust domain, with the same subject as the daemons' CA, and its root in PEM.
    pub(crate) fn foreign() -> Result<(Self, String)> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?.pem();
        Ok((Self(Issuer::new(params, key)), root))
    }

    /// A CA whose certificate and key, both in PEM, another program may use, too.
    pub(crate) fn shared() -> Result<(Self, String, String)> {
        let (authority, root) = Self::foreign()?;
        let key = authority.0.key().serialize_pem();
        Ok((authority, root, key))
    }

    /// A workload with a valid certificate that signs other certificates with it. Also returns the certificate.
    pub(crate) fn below(&self) -> Result<(Self, CertificateDer<'static>)> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(&[&spiffe("intruder")], |_| {})?;
        let certificate = params.signed_by(&key, &self.0)?.der().clone();
        // rcgen requires that an issuer is allowed to sign.
        params.key_usages.clear();
        Ok((Self(Issuer::new(params, key)), certificate))
    }

    /// Issues a valid certificate for the service account `default`.
    pub(crate) fn mint(&self, account: &str) -> Result<Presented> {
        self.mint_with(&[&spiffe(account)], |_| {})
    }

    /// Issues a certificate with these URI SANs and any other defects.
    pub(crate) fn mint_with(
        &self,
        uris: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<Presented> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params(uris, change)?.signed_by(&key, &self.0)?;
        Presented::new(certificate.der().clone(), &key)
    }
}

/// Creates a self-signed certificate with its key.
pub(crate) fn self_signed(account: &str) -> Result<Presented> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params(&[&spiffe(account)], |_| {})?.self_signed(&key)?;
    Presented::new(certificate.der().clone(), &key)
}

fn params(uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = uris.iter().map(|text| uri(text)).collect::<Result<_>>()?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.is_ca = IsCa::ExplicitNoCa;
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2090, 1, 1);
    change(&mut params);
    Ok(params)
}

pub(crate) fn uri(text: &str) -> Result<SanType> {
    Ok(SanType::URI(text.try_into()?))
}

/// A certificate and its key, as a TLS peer presents them.
#[derive(Debug, Clone)]
pub(crate) struct Presented {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key_pem: String,
}

/// The files that another program reads.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) root: PathBuf,
}

/// Issues a certificate for a service account by the CA that daemons share in `ca`, and writes it, its key and the root
/// to a folder.
pub(crate) fn files(ca: &Path, account: &str, folder: &Path) -> Result<Files> {
    let authority = Authority::stolen(ca)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params(&[&spiffe(account)], |_| {})?.signed_by(&key, &authority.0)?;
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        anyhow::Ok(path)
    };
    let both = fs::read_to_string(ca.join("root.pem")).context("reading the root")?;
    // The root's key is in the same file.
    let (root, _) = both.split_once(END).context("no certificate")?;
    let (_, root) = root.split_once(BEGIN).context("no certificate")?;
    Ok(Files {
        certificate: write("certificate.pem", &certificate.pem())?,
        key: write("key.pem", &key.serialize_pem())?,
        root: write("root.pem", &format!("{BEGIN}{root}{END}\n"))?,
    })
}

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

impl Presented {
    fn new(leaf: CertificateDer<'static>, key: &KeyPair) -> Result<Self> {
        Ok(Self {
            chain: vec![leaf],
            key_pem: key.serialize_pem(),
        })
    }

    pub(crate) fn resolver(&self) -> Result<Arc<SingleCertAndKey>> {
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).context("a key")?;
        // Unlike rustls' builders, this does not verify that the certificate makes sense.
        let certified = CertifiedKey::new(self.chain.clone(), any_supported_type(&key)?);
        Ok(Arc::new(SingleCertAndKey::from(certified)))
    }
}
