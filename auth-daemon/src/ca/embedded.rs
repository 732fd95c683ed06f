//! A CA without a server: the trust domain's root key in a folder that its daemons share.
//!
//! For a laptop, a test, or a few nodes with a shared file system. Whoever reads the folder is the CA.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
    string::Ia5String,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

use super::{BACKDATE, IssueError, IssueFuture, Issued, Issuer};
use crate::{
    mesh::{Identity, TrustDomain},
    tunnel::trust::{Trust, TrustBundle, TrustStore},
};

/// Root key and certificate, PEM, in one file so that they come to be at one instant. Mode 0600.
const ROOT_FILE: &str = "root.pem";
/// The certificate alone, for those who verify.
const CERTIFICATE_FILE: &str = "root-cert.pem";
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// A root is made once for nodes whose clocks may differ by much.
const ROOT_BACKDATE: Duration = Duration::from_secs(24 * 60 * 60);

/// Signs with a root key read from a folder.
pub struct EmbeddedCa {
    trust_domain: TrustDomain,
    issuer: rcgen::Issuer<'static, KeyPair>,
    trust: Arc<TrustStore>,
    lifetime: Duration,
}

/// Why the folder cannot serve as a CA. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum UnusableCa {
    /// Reading or writing failed.
    #[error("ca.directory: {path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// Others than the owner may read the key.
    #[error(
        "ca.directory: {path}: mode {mode:03o} lets others than its owner in; the root key may be known to them. \
         If it is not, run `chmod 600 {path}`"
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Others than the owner may put another key in place.
    #[error(
        "ca.directory: {path}: {what}: somebody else could put a root of their own here. \
         Give it to the daemon's user and run `chmod 700 {path}`"
    )]
    Writable {
        /// The folder or file.
        path: PathBuf,
        /// Who may write there.
        what: String,
    },
    /// Not the PEM that this daemon writes.
    #[error("ca.directory: {path}: {what}")]
    Malformed {
        /// The key file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A root of another trust domain.
    #[error("ca.directory: {path}: is the root of {found:?}, but trustDomain is {expected:?}")]
    TrustDomain {
        /// The key file.
        path: PathBuf,
        /// The URI in the root.
        found: String,
        /// The trust domain configured.
        expected: String,
    },
}

impl EmbeddedCa {
    /// Opens the CA in `directory`, making it if there is none. Several daemons may do so at once: one root results.
    ///
    /// `lifetime` is that of the certificates it will issue.
    pub fn open(
        directory: &Path,
        trust_domain: &TrustDomain,
        lifetime: Duration,
    ) -> Result<Self, UnusableCa> {
        let path = directory.join(ROOT_FILE);
        let io = |error| UnusableCa::Io {
            path: path.clone(),
            error,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(io)?;
        check_owner(directory, &fs::metadata(directory).map_err(io)?)?;
        if !path.try_exists().map_err(io)? {
            create(directory, &path, trust_domain).map_err(io)?;
        }
        let ca = Self::read(&path, trust_domain, lifetime)?;
        let certificate = directory.join(CERTIFICATE_FILE);
        if !certificate.exists() {
            let pem = fs::read_to_string(&path).map_err(io)?;
            // The part behind the key; `read` has seen that there is one.
            let begin = pem.find("-----BEGIN CERTIFICATE").unwrap_or(pem.len());
            write_atomically(&certificate, &pem.as_bytes()[begin..], 0o644).map_err(|error| {
                UnusableCa::Io {
                    path: certificate.clone(),
                    error,
                }
            })?;
        }
        Ok(ca)
    }

    fn read(
        path: &Path,
        trust_domain: &TrustDomain,
        lifetime: Duration,
    ) -> Result<Self, UnusableCa> {
        let io = |error| UnusableCa::Io {
            path: path.to_owned(),
            error,
        };
        let malformed = |what: String| UnusableCa::Malformed {
            path: path.to_owned(),
            what,
        };
        let mut file = fs::File::open(path).map_err(io)?;
        // Of the open file: nobody can put another in its place meanwhile.
        let metadata = file.metadata().map_err(io)?;
        check_owner(path, &metadata)?;
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(UnusableCa::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let mut pem = String::new();
        io::Read::read_to_string(&mut io::Read::take(&mut file, 1 << 20), &mut pem).map_err(io)?;
        let key = KeyPair::from_pem(&pem)
            .map_err(|error| malformed(format!("has no usable private key: {error}")))?;
        let root = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| malformed(format!("has no certificate: {error:?}")))?;
        let found =
            root_uri(&root).ok_or_else(|| malformed("is no root of a trust domain".into()))?;
        if found != format!("spiffe://{trust_domain}") {
            return Err(UnusableCa::TrustDomain {
                path: path.to_owned(),
                found,
                expected: trust_domain.to_string(),
            });
        }
        let issuer = rcgen::Issuer::from_ca_cert_der(&root, key)
            .map_err(|error| malformed(format!("has an unusable certificate: {error}")))?;
        Ok(Self {
            trust_domain: trust_domain.clone(),
            issuer,
            trust: Arc::new(TrustStore::new(Trust::fixed(TrustBundle {
                trust_domain: trust_domain.clone(),
                roots: vec![root],
            }))),
            lifetime,
        })
    }

    fn sign(&self, identity: &Identity, csr: &[u8]) -> Result<Issued, IssueError> {
        let failed = |error: rcgen::Error| IssueError(format!("{identity}: {error}"));
        if identity.trust_domain() != self.trust_domain.as_str() {
            return Err(IssueError(format!(
                "{identity} is not of trust domain {}",
                self.trust_domain
            )));
        }
        let csr = CertificateSigningRequestDer::from(csr);
        let mut request = CertificateSigningRequestParams::from_der(&csr).map_err(failed)?;
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(
            Ia5String::try_from(identity.as_str()).map_err(failed)?,
        )];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        params.not_before = now - BACKDATE;
        params.not_after = now + self.lifetime;
        request.params = params;
        let certificate = request.signed_by(&self.issuer).map_err(failed)?;
        Ok(Issued {
            chain: vec![certificate.der().clone()],
        })
    }
}

impl Issuer for EmbeddedCa {
    fn issue<'a>(&'a self, identity: &'a Identity, csr: &'a [u8]) -> IssueFuture<'a> {
        Box::pin(async move { self.sign(identity, csr) })
    }

    fn trust(&self) -> &Arc<TrustStore> {
        &self.trust
    }
}

impl std::fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

/// Refuses what is another user's, or what others may write to.
fn check_owner(path: &Path, metadata: &fs::Metadata) -> Result<(), UnusableCa> {
    let writable = |what| UnusableCa::Writable {
        path: path.to_owned(),
        what,
    };
    let own = nix::unistd::geteuid().as_raw();
    if metadata.uid() != own && metadata.uid() != 0 {
        return Err(writable(format!("belongs to user {}", metadata.uid())));
    }
    let mode = metadata.mode() & 0o777;
    if metadata.is_dir() && mode & 0o022 != 0 {
        return Err(writable(format!("mode {mode:03o} lets others write")));
    }
    Ok(())
}

fn create(directory: &Path, path: &Path, trust_domain: &TrustDomain) -> io::Result<()> {
    let pem = make_root(trust_domain).map_err(io::Error::other)?;
    let draft = directory.join(format!(".{ROOT_FILE}.{:016x}", rand::random::<u64>()));
    write_new(&draft, pem.as_bytes(), 0o600)?;
    // A link, unlike a rename, never replaces: of daemons that start at once, the first one's root counts.
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::File::open(directory)?.sync_all(),
    }
}

fn make_root(trust_domain: &TrustDomain) -> Result<String, rcgen::Error> {
    let key = KeyPair::generate()?;
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain.as_str());
    params
        .distinguished_name
        .push(DnType::CommonName, "auth-daemon root");
    params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!(
        "spiffe://{trust_domain}"
    ))?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    params.not_before = now - ROOT_BACKDATE;
    params.not_after = now + ROOT_LIFE;
    let root = params.self_signed(&key)?;
    Ok(format!("{}{}", key.serialize_pem(), root.pem()))
}

/// 127 random bits: unique without a record, positive without a leading zero (RFC 5280 §4.1.2.2).
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn root_uri(root: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(root).ok()?;
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => {
                names.general_names.iter().find_map(|name| match name {
                    GeneralName::URI(uri) => Some((*uri).to_owned()),
                    _ => None,
                })
            }
            _ => None,
        })
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let draft = path.with_extension(format!("{:016x}", rand::random::<u64>()));
    write_new(&draft, content, mode)?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::tunnel::svid::Svid;

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    fn open(directory: &Path) -> Result<EmbeddedCa, UnusableCa> {
        EmbeddedCa::open(directory, &domain(), Duration::from_secs(3600))
    }

    #[test]
    fn daemons_that_start_at_once_share_one_root() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("ca");
        let roots: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| open(&directory).unwrap().trust.current()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(roots.iter().all(|root| *root == roots[0]));
        let mut names: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [CERTIFICATE_FILE, ROOT_FILE], "no drafts are left");
        let mode = fs::metadata(directory.join(ROOT_FILE)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn issues_svids() {
        let folder = tempfile::tempdir().unwrap();
        let ca = open(folder.path()).unwrap();
        let identity = domain().identity("default", "web").unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".into()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let csr = CertificateParams::new(vec!["evil.example".into()])
            .unwrap()
            .serialize_request(&key)
            .unwrap();
        let issued = ca.sign(&identity, csr.der()).unwrap();
        let svid = Svid::parse(&issued.chain[0], "cluster.local").unwrap();
        assert_eq!(svid.identity, identity);
        let (_, certificate) =
            x509_parser::certificate::X509Certificate::from_der(&issued.chain[0]).unwrap();
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1, "only what the CA says");
        assert_eq!(svid.serial.len(), 32);
        let other = "spiffe://other/ns/a/sa/b".parse().unwrap();
        assert!(ca.sign(&other, csr.der()).is_err());
        assert!(ca.sign(&identity, b"rubbish").is_err());
    }

    #[test]
    fn refuses_folders_that_are_not_safe_or_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path()).unwrap();
        let other: TrustDomain = "example.org".parse().unwrap();
        let error = EmbeddedCa::open(folder.path(), &other, Duration::from_secs(60)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("is the root of \"spiffe://cluster.local\""),
            "{error}"
        );
        let path = folder.path().join(ROOT_FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("mode 640") && error.contains("chmod 600"),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("mode 770 lets others write"), "{error}");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&path, "rubbish").unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no usable private key"), "{error}");
    }
}
