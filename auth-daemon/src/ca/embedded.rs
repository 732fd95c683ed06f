//! A CA without a server: the trust domain's root key in a folder that its daemons share.
//!
//! For a laptop, a test, or a few nodes with a shared file system. Whoever reads the folder is the CA.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::{
    IssueError, IssueFuture, Issued, Issuer,
    authority::KeyAlgorithm,
    csr::RequestedKey,
    files::{self, write_new},
    signer::{self, Signer},
    store::directory::{CORE, EMBEDDED as ROOT_FILE, ROOTS as CERTIFICATE_FILE},
};
use crate::{
    mesh::{Identity, TrustDomain},
    tunnel::{
        tls::unix_seconds,
        trust::{Trust, TrustBundle, TrustStore},
    },
};

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Signs with a root key read from a folder.
pub struct EmbeddedCa {
    trust_domain: TrustDomain,
    signer: Signer,
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
    /// The folder belongs to a CA on the network.
    #[error(
        "ca.directory: {path}: is the state of `auth-daemon ca`: its nodes take certificates from its address, not from \
         this folder"
    )]
    NotEmbedded {
        /// The state file.
        path: PathBuf,
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
            let core = directory.join(CORE);
            if core.exists() {
                return Err(UnusableCa::NotEmbedded { path: core });
            }
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
        if let Some(mode) = files::exposed_mode(&metadata) {
            return Err(UnusableCa::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        check_owner(path, &metadata)?;
        let pem = files::read_at_most(&mut file, 1 << 20)
            .and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other))
            .map_err(io)?;
        let key = signer::key_from_pem(&pem).map_err(malformed)?;
        let root = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| malformed(format!("has no certificate: {error:?}")))?;
        let parsed = signer::parse(&root).map_err(malformed)?;
        let uris = signer::uris(&parsed);
        let found = uris
            .first()
            .ok_or_else(|| malformed("is no root of a trust domain".into()))?;
        if *found != format!("spiffe://{trust_domain}") {
            return Err(UnusableCa::TrustDomain {
                path: path.to_owned(),
                found: (*found).to_owned(),
                expected: trust_domain.to_string(),
            });
        }
        let signer = Signer::root(key, root.clone())
            .map_err(|what| malformed(format!("cannot be used: {what}")))?;
        Ok(Self {
            trust_domain: trust_domain.clone(),
            signer,
            trust: Arc::new(TrustStore::new(Trust::fixed(TrustBundle {
                trust_domain: trust_domain.clone(),
                roots: vec![root],
            }))),
            lifetime,
        })
    }

    fn sign(&self, identity: &Identity, csr: &[u8]) -> Result<Issued, IssueError> {
        if identity.trust_domain() != self.trust_domain.as_str() {
            return Err(IssueError(format!(
                "{identity} is not of trust domain {}",
                self.trust_domain
            )));
        }
        let failed = |error: &dyn std::fmt::Display| IssueError(format!("{identity}: {error}"));
        let key = RequestedKey::from_csr(csr).map_err(|error| failed(&error))?;
        let now = unix_seconds(SystemTime::now());
        let leaf = self
            .signer
            .svid(identity, &key, self.lifetime.as_secs(), now)
            .map_err(|error| failed(&error))?;
        Ok(Issued {
            chain: self.signer.chain(&leaf),
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
    match files::writable_by_others(metadata) {
        Some(what) => Err(UnusableCa::Writable {
            path: path.to_owned(),
            what,
        }),
        None => Ok(()),
    }
}

fn create(directory: &Path, path: &Path, trust_domain: &TrustDomain) -> io::Result<()> {
    let now = unix_seconds(SystemTime::now());
    let root = signer::make_root(trust_domain, KeyAlgorithm::P256, ROOT_LIFE.as_secs(), now)
        .map_err(io::Error::other)?;
    // In one file, so that they come to be at one instant.
    let pem = root.key_pem + &root.certificate_pem;
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

fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let draft = path.with_extension(format!("{:016x}", rand::random::<u64>()));
    write_new(&draft, content, mode)?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use x509_parser::prelude::FromDer;

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
