//! The embedded CA: the trust domain's root key in a directory that its daemons share, for a laptop, a test, or a few
//! nodes with a shared file system. Whoever can read the directory is the CA.

use std::{
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use auth_ca_api::pem;
use auth_mesh::{Identity, TrustDomain};
use auth_support::files::{self, Readers, write_new};
use auth_tunnel::tls::{
    trust::{Trust, TrustBundle, TrustStore},
    unix_seconds,
};
use rustls::pki_types::CertificateDer;

use crate::{
    config::RootSettings,
    csr::RequestedKey,
    signer::{self, Signer},
    store::directory::{EMBEDDED as ROOT_FILE, ROOTS as CERTIFICATE_FILE, STATE},
};

/// Largest key file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Signs with a root key from a directory.
pub struct EmbeddedCa {
    trust_domain: TrustDomain,
    signer: Signer,
    trust: Arc<TrustStore>,
    lifetime: Duration,
}

/// Why the directory cannot be used. Names the file.
#[derive(Debug, thiserror::Error)]
#[error("ca.directory: {0}")]
pub struct UnusableDirectory(String);

impl UnusableDirectory {
    fn new(path: &Path, what: impl std::fmt::Display) -> Self {
        Self(format!("{}: {what}", path.display()))
    }
}

impl EmbeddedCa {
    /// Opens the CA in `directory`, or creates it. Several daemons may do so at once: they get the same root. `lifetime` is
    /// that of its certificates.
    pub fn open(
        directory: &Path,
        trust_domain: &TrustDomain,
        lifetime: Duration,
    ) -> Result<Self, UnusableDirectory> {
        let path = directory.join(ROOT_FILE);
        let failed = |error: io::Error| UnusableDirectory::new(&path, error);
        files::create_own_directory(directory)
            .map_err(|error| UnusableDirectory::new(directory, error))?;
        if !path.try_exists().map_err(failed)? {
            let state = directory.join(STATE);
            if state.exists() {
                let what = "is the state of `auth-daemon ca`: configure that CA's address instead of this directory";
                return Err(UnusableDirectory::new(&state, what));
            }
            create(directory, &path, trust_domain).map_err(failed)?;
        }
        let pem = files::read_own(&path, MAX_BYTES, Readers::Nobody)
            .and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other))
            .map_err(failed)?;
        let ca = Self::from_pem(&pem, trust_domain, lifetime)
            .map_err(|what| UnusableDirectory::new(&path, what))?;
        let certificate = directory.join(CERTIFICATE_FILE);
        if !certificate.exists() {
            // The part after the key, which has been checked.
            let begin = pem.find("-----BEGIN CERTIFICATE").unwrap_or(pem.len());
            write_atomically(&certificate, &pem.as_bytes()[begin..])
                .map_err(|error| UnusableDirectory::new(&certificate, error))?;
        }
        Ok(ca)
    }

    fn from_pem(pem: &str, trust_domain: &TrustDomain, lifetime: Duration) -> Result<Self, String> {
        let (found, signer) = signer::read_root(pem)?;
        if found.as_str() != trust_domain.as_str() {
            return Err(format!(
                "is the root of \"spiffe://{found}\", but trustDomain is {:?}",
                trust_domain.as_str()
            ));
        }
        let bundle =
            TrustBundle::of_roots(trust_domain.clone(), vec![signer.certificate().clone()]);
        Ok(Self {
            trust_domain: trust_domain.clone(),
            signer,
            trust: Arc::new(TrustStore::new(Trust::fixed(bundle))),
            lifetime,
        })
    }

    /// Signs the key of `csr` (PKCS #10, DER) for `identity`, for `lifetime` or the CA's own if that is shorter. Returns the
    /// leaf and its intermediates, or what is wrong.
    pub fn issue(
        &self,
        identity: &Identity,
        csr: &[u8],
        lifetime: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, String> {
        let own = &self.trust_domain;
        if identity.trust_domain() != own.as_str() {
            return Err(format!("{identity} is not of trust domain {own}"));
        }
        let failed = |error: &dyn std::fmt::Display| format!("{identity}: {error}");
        let key = RequestedKey::from_csr(csr).map_err(|error| failed(&error))?;
        let lifetime = lifetime.min(self.lifetime).as_secs();
        let now = unix_seconds(SystemTime::now());
        let leaf = self.signer.svid(identity, &key, None, lifetime, now);
        Ok(self.signer.chain(&leaf.map_err(|error| failed(&error))?))
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

fn create(directory: &Path, path: &Path, trust_domain: &TrustDomain) -> io::Result<()> {
    let (settings, now) = (RootSettings::default(), unix_seconds(SystemTime::now()));
    let root = signer::make_root(trust_domain, &settings, now).map_err(io::Error::other)?;
    // Key and certificate are in one file, so that they appear together.
    let pem = root.key_pem() + &pem::certificate(root.certificate());
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

fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft = path.with_extension(format!("{:016x}", rand::random::<u64>()));
    write_new(&draft, content, 0o644)?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use auth_tunnel::tls::svid::Svid;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    fn open(directory: &Path) -> Result<EmbeddedCa, UnusableDirectory> {
        EmbeddedCa::open(directory, &domain(), Duration::from_secs(3600))
    }

    #[test]
    fn daemons_that_start_together_share_one_root() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("ca");
        let open = || open(&directory).unwrap().trust.current();
        let roots: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            let joined = threads.into_iter().map(|thread| thread.join().unwrap());
            joined.collect()
        });
        assert!(roots.iter().all(|root| *root == roots[0]));
        let entries = fs::read_dir(&directory).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
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
        let csr = params.serialize_request(&key).unwrap();
        let chain = ca.issue(&identity, csr.der(), Duration::MAX).unwrap();
        let svid = Svid::parse(&chain[0], &TrustDomain::default()).unwrap();
        assert_eq!((svid.identity, svid.node), (identity.clone(), None));
        let leaf = signer::parse(&chain[0]).unwrap();
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1, "only the CA's name");
        let other = "spiffe://other/ns/a/sa/b".parse().unwrap();
        assert!(ca.issue(&other, csr.der(), Duration::MAX).is_err());
        assert!(ca.issue(&identity, b"rubbish", Duration::MAX).is_err());
    }

    #[test]
    fn refuses_unsafe_and_foreign_directories() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path()).unwrap();
        let other: TrustDomain = "example.org".parse().unwrap();
        let error = EmbeddedCa::open(folder.path(), &other, Duration::from_secs(60));
        let error = error.unwrap_err().to_string();
        let expected = "is the root of \"spiffe://cluster.local\"";
        assert!(error.contains(expected), "{error}");
        let key = folder.path().join(ROOT_FILE);
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        let refused = |expected: &str| {
            let error = open(folder.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        mode(&key, 0o640);
        refused("mode 640");
        refused("chmod 600");
        mode(&key, 0o600);
        mode(folder.path(), 0o770);
        refused("mode 770 lets others write");
        mode(folder.path(), 0o700);
        fs::write(&key, "rubbish").unwrap();
        refused("no usable private key");
    }
}
