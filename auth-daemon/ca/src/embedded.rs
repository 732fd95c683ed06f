//! The embedded CA: the trust domain's root key in a directory that its daemons share, for a laptop, a test, or a few
//! nodes with a shared file system. Whoever can read the directory is the CA.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use auth_mesh::{Identity, TrustDomain};
use auth_tunnel::tls::{
    trust::{Trust, TrustBundle, TrustStore},
    unix_seconds,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::{
    config::KeyAlgorithm,
    csr::RequestedKey,
    files::{self, write_new},
    signer::{self, Signer},
    store::directory::{EMBEDDED as ROOT_FILE, ROOTS as CERTIFICATE_FILE, STATE},
};

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Signs with a root key from a directory.
pub struct EmbeddedCa {
    trust_domain: TrustDomain,
    signer: Signer,
    trust: Arc<TrustStore>,
    lifetime: Duration,
}

/// Why the directory cannot be used. Each error names the file.
#[derive(Debug, thiserror::Error)]
pub enum UnusableCa {
    /// Reading or writing failed.
    #[error("ca.directory: {path}: {error}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// Others than the owner can read the key.
    #[error(
        "ca.directory: {path}: mode {mode:03o} allows others than its owner to read it; they may know the root key. \
         If they do not, run `chmod 600 {path}`"
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Others than the owner can replace the key.
    #[error(
        "ca.directory: {path}: {what}: somebody else could put a root of their own here. \
         Give it to the daemon's user and run `chmod 700 {path}`"
    )]
    Writable {
        /// The directory or file.
        path: PathBuf,
        /// Who can write there.
        what: String,
    },
    /// The key file is not what this daemon writes.
    #[error("ca.directory: {path}: {what}")]
    Malformed {
        /// The key file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The directory belongs to a CA with a server.
    #[error(
        "ca.directory: {path}: is the state of `auth-daemon ca`: configure that CA's address instead of this directory"
    )]
    NotEmbedded {
        /// The state file.
        path: PathBuf,
    },
    /// The root is another trust domain's.
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
    /// Opens the CA in `directory`, or creates it. Several daemons may do so at once: they get the same root. `lifetime` is
    /// that of its certificates.
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
            let state = directory.join(STATE);
            if state.exists() {
                return Err(UnusableCa::NotEmbedded { path: state });
            }
            create(directory, &path, trust_domain).map_err(io)?;
        }
        let ca = Self::read(&path, trust_domain, lifetime)?;
        let certificate = directory.join(CERTIFICATE_FILE);
        if !certificate.exists() {
            let pem = fs::read_to_string(&path).map_err(io)?;
            // The part after the key, which `read` has checked.
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
        // Of the open file, so that nobody can replace it meanwhile.
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

    /// Signs the key of `csr` (PKCS #10, DER) for `identity`. Returns the leaf and its intermediates, or what is wrong.
    pub fn issue(
        &self,
        identity: &Identity,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, String> {
        if identity.trust_domain() != self.trust_domain.as_str() {
            return Err(format!(
                "{identity} is not of trust domain {}",
                self.trust_domain
            ));
        }
        let failed = |error: &dyn std::fmt::Display| format!("{identity}: {error}");
        let key = RequestedKey::from_csr(csr).map_err(|error| failed(&error))?;
        let now = unix_seconds(SystemTime::now());
        let leaf = self
            .signer
            .svid(identity, &key, None, self.lifetime.as_secs(), now)
            .map_err(|error| failed(&error))?;
        Ok(self.signer.chain(&leaf))
    }

    /// The trust bundle, which never changes.
    pub fn trust(&self) -> &Arc<TrustStore> {
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

/// Refuses files of other users, and those that others can write.
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
    // Key and certificate are in one file, so that they appear together.
    let pem = root.key_pem + &root.certificate_pem;
    let draft = directory.join(format!(".{ROOT_FILE}.{:016x}", rand::random::<u64>()));
    write_new(&draft, pem.as_bytes(), 0o600)?;
    // Unlike a rename, a link never replaces a file: of several daemons, the first one's root is used.
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
    use auth_tunnel::tls::svid::Svid;

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    fn open(directory: &Path) -> Result<EmbeddedCa, UnusableCa> {
        EmbeddedCa::open(directory, &domain(), Duration::from_secs(3600))
    }

    #[test]
    fn daemons_that_start_together_share_one_root() {
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
        assert_eq!(names, [CERTIFICATE_FILE, ROOT_FILE], "no drafts remain");
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
        let chain = ca.issue(&identity, csr.der()).unwrap();
        let svid = Svid::parse(&chain[0], "cluster.local").unwrap();
        assert_eq!(svid.identity, identity);
        let (_, certificate) =
            x509_parser::certificate::X509Certificate::from_der(&chain[0]).unwrap();
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1, "only the CA's name");
        assert_eq!(svid.serial.len(), 32);
        let other = "spiffe://other/ns/a/sa/b".parse().unwrap();
        assert!(ca.issue(&other, csr.der()).is_err());
        assert!(ca.issue(&identity, b"rubbish").is_err());
    }

    #[test]
    fn refuses_unsafe_and_foreign_directories() {
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
