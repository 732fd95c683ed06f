//! How a machine outside Kubernetes proves to the CA which node it is: with a certificate of the node's own, which it gets once
//! by a join token and renews by itself. Its key is the only private key that the daemon keeps on a disk, so that the machine
//! is still a member of the trust domain after a reboot.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use auth_ca_api::{
    istio::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    pem,
};
use auth_mesh::TrustDomain;
use auth_support::files::{self, Readers};
use auth_tunnel::tls::{rfc3339, svid::NodeCertificate, trust::TrustBundle, unix_seconds};
use futures_util::future::{BoxFuture, FutureExt, ready};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

use super::{
    Access, Bearer, Stream,
    client::{MAX_ANSWER, read_chain},
    health::Authentication,
    link::{Link, explain_status, read_roots, token_in},
    renewal::Schedule,
};
use crate::config::{CaServer, Join, Proof};

/// Key and certificate, PEM.
const CREDENTIALS: &str = "node.pem";
/// The key of a join that has begun. It is kept until there is a certificate, because the CA repeats a lost answer only to
/// the same key.
const JOINING: &str = "joining.pem";
const MAX_FILE: u64 = 256 << 10;
/// One request.
const DEADLINE: Duration = Duration::from_secs(10);

/// The machine that this daemon runs on, as a node of the trust domain.
#[derive(Debug)]
pub(super) struct Machine {
    server: CaServer,
    join: Join,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Option<Arc<Held>>,
    /// Why there is none.
    failure: Option<String>,
}

/// The node's key and its certificate.
#[derive(Debug)]
struct Held {
    key: KeyPair,
    certified: Arc<CertifiedKey>,
    certificate: NodeCertificate,
}

impl Machine {
    /// Fails if the machine has neither a certificate that is valid nor a token, or if others may read its key.
    pub(super) fn check(server: &CaServer, join: &Join) -> Result<(), String> {
        let machine = Self::open(server.clone(), join.clone())?;
        if machine.lock().held.is_some() {
            return Ok(());
        }
        token_in(&join.token_file)
            .map(drop)
            .map_err(|why| server.field(format!("{why}; the node has not joined yet")))
    }

    /// Reads what the machine has kept.
    pub(super) fn open(server: CaServer, join: Join) -> Result<Self, String> {
        let file = join.directory.join(CREDENTIALS);
        let failed = |why: String| {
            format!(
                "{}.nodeDirectory: {}: {why}",
                server.section,
                file.display()
            )
        };
        let held = match read(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error.to_string())),
            Ok(pem) => Some(Held::from_pem(&pem, &join.trust_domain).map_err(failed)?),
        };
        if let Some(held) = &held
            && held.certificate.node != join.node
        {
            return Err(failed(format!(
                "is of node {}, but nodeName is {}: correct it, or remove the file and join again",
                held.certificate.node, join.node
            )));
        }
        Ok(Self {
            server,
            join,
            state: Mutex::new(State {
                held: held.map(Arc::new),
                failure: None,
            }),
        })
    }

    /// Joins if the machine has no valid certificate, and renews the certificate at half of its life, for ever. `lifetime` is
    /// the one to ask for.
    pub(super) async fn keep_current(self: Arc<Self>, link: Arc<Link>, lifetime: Duration) {
        // Renewed at the start, too: so the log says at once if the CA does not know this machine any more.
        let mut schedule = Schedule::new(SystemTime::now());
        loop {
            link.health.authenticated_by(self.status());
            let wait = schedule.sleep(SystemTime::now());
            if !wait.is_zero() {
                sleep(wait).await;
                continue;
            }
            let request = self.obtain(&link, lifetime);
            let obtained = timeout(DEADLINE, request).await;
            let now = SystemTime::now();
            match obtained.unwrap_or_else(|_| Err(format!("no answer within {DEADLINE:?}"))) {
                Ok(held) => {
                    let certificate = &held.certificate;
                    let delay = schedule.issued(certificate.not_after, now, rand::random());
                    tracing::info!(
                        node = certificate.node, serial = %certificate.serial, renew_in_seconds = delay.as_secs(),
                        "node certificate issued"
                    );
                    *self.lock() = State {
                        held: Some(held),
                        failure: None,
                    };
                }
                Err(error) => {
                    let delay = schedule.failed(now, rand::random(), None);
                    let valid = self.valid().is_some();
                    tracing::error!(
                        error,
                        still_valid = valid,
                        retry_in_seconds = delay.as_secs(),
                        "no node certificate issued"
                    );
                    self.lock().failure = Some(error);
                }
            }
        }
    }

    /// Renews the certificate, or joins if there is none to renew, or the CA refuses to renew it and there is a token.
    async fn obtain(&self, link: &Arc<Link>, lifetime: Duration) -> Result<Arc<Held>, String> {
        let token = token_in(&self.join.token_file).map_err(|why| self.server.field(why));
        let held = self.lock().held.clone();
        let before = match (self.valid(), held) {
            (Some(held), _) => match (self.request(link, &held.key, lifetime).await, &token) {
                (Ok(chain), _) => return self.keep(&held.key, chain),
                (Err(refused), Ok(_)) if refused.code() == Code::Unauthenticated => {
                    format!("its certificate is refused: {}; ", refused.message())
                }
                (Err(failed), _) => return Err(self.explain(&failed)),
            },
            (None, Some(expired)) => format!(
                "its certificate expired at {}; ",
                rfc3339(unix_seconds(expired.certificate.not_after))
            ),
            (None, None) => String::new(),
        };
        let failed = |why: String| format!("node {} cannot join: {before}{why}", self.join.node);
        token.map_err(|why| failed(format!("{why}; {}", self.advice())))?;
        let key = self.joining_key().map_err(failed)?;
        // Without the old certificate, which the CA may not accept even in a handshake.
        let server = CaServer {
            proof: Proof::Token(self.join.token_file.clone()),
            ..self.server.clone()
        };
        let known = TrustBundle {
            trust_domain: self.join.trust_domain.clone(),
            roots: link.trust.current().bundle.roots.clone(),
        };
        let anonymous = Arc::new(Link::new((&server).into(), Arc::new(server), known));
        let chain = self.request(&anonymous, &key, lifetime).await;
        let chain = chain.map_err(|status| failed(self.explain(&status)))?;
        let held = self.keep(&key, chain).map_err(failed)?;
        // A next join has a key of its own.
        let _ = fs::remove_file(self.join.directory.join(JOINING));
        Ok(held)
    }

    /// The text of a failed request, with what to do if the CA does not know the caller.
    fn explain(&self, status: &Status) -> String {
        let why = explain_status(status);
        match status.code() {
            Code::Unauthenticated => format!("{why}; {}", self.advice()),
            _ => why,
        }
    }

    fn advice(&self) -> String {
        let Join {
            node, token_file, ..
        } = &self.join;
        format!(
            "a new token for {} comes from `auth-daemon ca token create --node {node}` on the CA's host, with --replace \
             if the node has joined before",
            token_file.display()
        )
    }

    /// One request for the certificate of `key`.
    async fn request(
        &self,
        link: &Arc<Link>,
        key: &KeyPair,
        lifetime: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, Status> {
        let request = link.request(IstioCertificateRequest {
            csr: self
                .csr(key)
                .map_err(|error| Status::internal(error.to_string()))?,
            validity_duration: i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: None,
        });
        let request = request.await.map_err(Status::internal)?;
        let channel = link
            .channel(|endpoint| endpoint)
            .map_err(Status::internal)?;
        let mut client =
            IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let answer = client.create_certificate(request).await?;
        read_chain(&answer.into_inner()).map_err(Status::internal)
    }

    /// A CSR for the node's name, PEM.
    fn csr(&self, key: &KeyPair) -> Result<String, rcgen::Error> {
        let uri = NodeCertificate::uri(&self.join.node, &self.join.trust_domain);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
        let csr = params.serialize_request(key)?;
        Ok(pem::encode("CERTIFICATE REQUEST", csr.der()))
    }

    /// Writes the key and the chain to the disk, before they are used.
    fn keep(
        &self,
        key: &KeyPair,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Arc<Held>, String> {
        let all = key.serialize_pem() + &pem::certificates(&chain);
        let held = Held::from_pem(all.as_bytes(), &self.join.trust_domain)?;
        let named = &held.certificate;
        if named.node != self.join.node
            || unix_seconds(named.not_after) <= unix_seconds(SystemTime::now())
        {
            return Err(format!(
                "the CA answers with a certificate of node {} until {}",
                named.node,
                rfc3339(unix_seconds(named.not_after))
            ));
        }
        let written = write(&self.join.directory, CREDENTIALS, all.as_bytes());
        written.map_err(|error| self.unwritable(&error))?;
        Ok(Arc::new(held))
    }

    /// The key to join with: that of a join that was interrupted, or a new one.
    fn joining_key(&self) -> Result<KeyPair, String> {
        let file = self.join.directory.join(JOINING);
        match read(&file) {
            Ok(pem) => {
                let pem = String::from_utf8_lossy(&pem);
                KeyPair::from_pem(&pem).map_err(|error| format!("{}: {error}", file.display()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = KeyPair::generate().map_err(|error| error.to_string())?;
                let written = write(
                    &self.join.directory,
                    JOINING,
                    key.serialize_pem().as_bytes(),
                );
                written.map_err(|error| self.unwritable(&error))?;
                Ok(key)
            }
            Err(error) => Err(format!("{}: {error}", file.display())),
        }
    }

    fn unwritable(&self, error: &io::Error) -> String {
        let directory = self.join.directory.display();
        format!(
            "{}.nodeDirectory: {directory}: {error}",
            self.server.section
        )
    }

    fn valid(&self) -> Option<Arc<Held>> {
        let held = self.lock().held.clone();
        held.filter(|held| held.certificate.not_after > SystemTime::now())
    }

    fn status(&self) -> Authentication {
        match self.lock().held.as_ref() {
            Some(held) => Authentication::Certificate {
                node: held.certificate.node.clone(),
                not_after: rfc3339(unix_seconds(held.certificate.not_after)),
            },
            None => Authentication::JoinToken,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn from_pem(pem: &[u8], trust_domain: &TrustDomain) -> Result<Self, String> {
        let text = String::from_utf8_lossy(pem);
        let key =
            KeyPair::from_pem(&text).map_err(|error| format!("has no usable key: {error}"))?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        let leaf = chain.first().ok_or("has no certificate")?;
        let certificate =
            NodeCertificate::parse(leaf, trust_domain).map_err(|error| error.to_string())?;
        let signing = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing = any_ecdsa_type(&signing).map_err(|error| error.to_string())?;
        let certified = CertifiedKey::new(chain, signing);
        certified
            .keys_match()
            .map_err(|error| format!("key and certificate do not match: {error}"))?;
        Ok(Self {
            key,
            certified: Arc::new(certified),
            certificate,
        })
    }
}

/// Roots and connections are those of the server; the certificate says who asks.
impl Access for Machine {
    fn roots(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        read_roots(&self.server)
    }

    fn token(&self) -> BoxFuture<'_, Result<Option<Bearer>, String>> {
        let why = || {
            let failure = self.lock().failure.clone();
            failure.unwrap_or_else(|| format!("node {} has not joined yet", self.join.node))
        };
        ready(self.valid().map(|_| None).ok_or_else(why)).boxed()
    }

    fn certificate(&self) -> Option<Arc<CertifiedKey>> {
        Some(self.valid()?.certified.clone())
    }

    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        self.server.dial()
    }
}

/// Reads a file with a key. Fails if it is not this user's, or others may read it.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_file() || metadata.uid() != nix::unistd::geteuid().as_raw() {
        let why = format!("is not a file of user {}", nix::unistd::geteuid());
        return Err(io::Error::other(why));
    }
    files::read_own(path, MAX_FILE, Readers::Nobody)
}

/// Replaces a file that nobody else may read, atomically, and syncs it to the disk.
fn write(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    files::create_own_directory(directory)?;
    let draft = directory.join(format!(".{name}.{:016x}", rand::random::<u64>()));
    files::write_new(&draft, content, 0o600)
        .and_then(|()| fs::rename(&draft, directory.join(name)))
        .inspect_err(|_| drop(fs::remove_file(&draft)))?;
    fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("deep/node");
        write(&directory, CREDENTIALS, b"key").unwrap();
        let path = directory.join(CREDENTIALS);
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap(), b"key");
        write(&directory, CREDENTIALS, b"next").unwrap();
        assert_eq!(read(&path).unwrap(), b"next");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "no drafts");
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(read(&path).is_err(), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let link = directory.join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(read(&link).is_err(), "a link");
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            assert!(read(&path).is_err(), "another user's");
        }
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(write(&directory, CREDENTIALS, b"key").is_err());
    }
}
