//! How a machine outside Kubernetes proves to the CA which node it is: with a certificate of the node's own, which it
//! gets once by a join token and then renews. Its key is the only private key that the daemon keeps on a disk, so that
//! the machine is still a member of the trust domain after a reboot.

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
        let machine = Self::read(server.clone(), join.clone())?;
        if machine.lock().held.is_some() {
            return Ok(());
        }
        token_in(&join.token_file)
            .map(drop)
            .map_err(|why| server.field(format!("{why}; the node has not joined yet")))
    }

    /// Reads what the machine has kept, and removes what an interruption has left. Only the daemon may do that: it could be
    /// writing.
    pub(super) fn open(server: CaServer, join: Join) -> Result<Self, String> {
        let machine = Self::read(server, join)?;
        machine.remove_leftovers();
        Ok(machine)
    }

    fn read(server: CaServer, join: Join) -> Result<Self, String> {
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

    /// Removes drafts, and the key of a join that has succeeded.
    fn remove_leftovers(&self) {
        let directory = &self.join.directory;
        let removed = remove_drafts(directory).and_then(|()| match self.is_joining_key_used() {
            true => remove(directory, JOINING),
            false => Ok(()),
        });
        if let Err(error) = removed {
            tracing::warn!(error = self.unwritable(&error), "leftover files remain");
        }
    }

    /// Whether the key to join with is already that of the certificate.
    fn is_joining_key_used(&self) -> bool {
        let held = self.lock().held.clone();
        let joining = read(&self.join.directory.join(JOINING)).ok();
        let joining =
            joining.and_then(|pem| KeyPair::from_pem(&String::from_utf8_lossy(&pem)).ok());
        match (held, joining) {
            (Some(held), Some(key)) => held.key.public_key_raw() == key.public_key_raw(),
            _ => false,
        }
    }

    /// Joins if the machine has no valid certificate, and renews the certificate at half of its life, forever.
    pub(super) async fn keep_current(self: Arc<Self>, link: Arc<Link>) {
        // Renewed at the start, too: so the log says at once if the CA does not know this machine any more.
        let mut schedule = Schedule::new(SystemTime::now());
        loop {
            link.health.authenticated_by(self.status());
            let wait = schedule.sleep(SystemTime::now());
            if !wait.is_zero() {
                sleep(wait).await;
                continue;
            }
            let obtained = self.obtain(&link).await;
            let now = SystemTime::now();
            match obtained {
                Ok((held, unwritten)) => {
                    if let Some(error) = unwritten {
                        tracing::error!(
                            error,
                            "the new node certificate was not written to the disk: after a restart, the node has the previous one"
                        );
                        link.health.failed_here(&error);
                    }
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

    /// Renews the certificate, or joins if there is none to renew, or it cannot be renewed and there is a token. Also returns
    /// why a renewed certificate was not written.
    async fn obtain(&self, link: &Arc<Link>) -> Result<(Arc<Held>, Option<String>), String> {
        let token = token_in(&self.join.token_file).map_err(|why| self.server.field(why));
        let held = self.lock().held.clone();
        let before = match (self.valid(), held) {
            (Some(held), _) => match (self.renew(link, &held.key).await, &token) {
                (Ok((held, pem)), _) => {
                    self.forget_joining_key();
                    // Its key is on the disk already, so nothing is lost if this is not.
                    return Ok((held, self.keep(&pem).err()));
                }
                // A handshake that refuses the certificate looks like a failed connection.
                (Err(failed), Ok(_)) => {
                    format!(
                        "its certificate is not renewed: {}; ",
                        explain_status(&failed)
                    )
                }
                (Err(failed), Err(_)) => return Err(self.explain(&failed)),
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
        let known = TrustBundle::of_roots(
            self.join.trust_domain.clone(),
            link.trust.current().bundle.roots.clone(),
        );
        let anonymous = Arc::new(Link::new((&server).into(), Arc::new(server), known));
        let chain = self.request(&anonymous, &key).await.map_err(|status| {
            // The CA repeats no answer to this key, and may refuse it because an earlier token was used with it.
            if status.code() == Code::Unauthenticated {
                self.forget_joining_key();
            }
            failed(self.explain(&status))
        })?;
        let (held, pem) = self.read_answer(&key, chain).map_err(failed)?;
        self.keep(&pem).map_err(failed)?;
        self.forget_joining_key();
        Ok((held, None))
    }

    /// The next join uses a new key.
    fn forget_joining_key(&self) {
        if let Err(error) = remove(&self.join.directory, JOINING) {
            tracing::warn!(error = self.unwritable(&error), "{JOINING} remains");
        }
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

    async fn renew(&self, link: &Arc<Link>, key: &KeyPair) -> Result<(Arc<Held>, String), Status> {
        let chain = self.request(link, key).await?;
        self.read_answer(key, chain).map_err(Status::internal)
    }

    /// One request for the certificate of `key`.
    async fn request(
        &self,
        link: &Arc<Link>,
        key: &KeyPair,
    ) -> Result<Vec<CertificateDer<'static>>, Status> {
        let answer = timeout(DEADLINE, self.ask(link, key)).await;
        answer.unwrap_or_else(|_| {
            let why = format!("no answer within {DEADLINE:?}");
            Err(Status::deadline_exceeded(why))
        })
    }

    async fn ask(
        &self,
        link: &Arc<Link>,
        key: &KeyPair,
    ) -> Result<Vec<CertificateDer<'static>>, Status> {
        let request = link.request(IstioCertificateRequest {
            csr: self
                .csr(key)
                .map_err(|error| Status::internal(error.to_string()))?,
            // The longest that the CA grants, because it is how long the machine may be off.
            validity_duration: 0,
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

    /// Checks the answer for `key`. Also returns both as PEM.
    fn read_answer(
        &self,
        key: &KeyPair,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<(Arc<Held>, String), String> {
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
        Ok((Arc::new(held), all))
    }

    /// Writes key and chain to the disk.
    fn keep(&self, pem: &str) -> Result<(), String> {
        let written = write(&self.join.directory, CREDENTIALS, pem.as_bytes());
        written.map_err(|error| self.unwritable(&error))
    }

    /// The key to join with: that of a join that was interrupted, or a new one.
    fn joining_key(&self) -> Result<KeyPair, String> {
        if self.is_joining_key_used() {
            self.forget_joining_key();
        }
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
        match self.valid() {
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

/// Removes a file, if it exists, and syncs that to the disk.
fn remove(directory: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(directory.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => fs::File::open(directory)?.sync_all(),
    }
}

/// Removes what interrupted calls of [`write`] have left.
fn remove_drafts(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let is_draft = [CREDENTIALS, JOINING].iter().any(|of| {
            let rest = name
                .strip_prefix('.')
                .and_then(|rest| rest.strip_prefix(of));
            rest.is_some_and(|rest| rest.starts_with('.'))
        });
        if is_draft {
            remove(directory, &name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use auth_tunnel::tls::svid::{NODE_EXTENSION, encode_node};
    use rcgen::{CustomExtension, KeyUsagePurpose};

    use super::*;

    #[test]
    fn a_node_is_known_by_a_certificate_until_that_expires() {
        let folder = tempfile::tempdir().unwrap();
        let join = Join {
            node: "vm-1".into(),
            trust_domain: TrustDomain::default(),
            token_file: folder.path().join("token"),
            directory: folder.path().join("node"),
        };
        let server = CaServer {
            section: "ca",
            address: "ca:15012".into(),
            server_name: "ca".into(),
            root_file: folder.path().join("roots"),
            proof: Proof::Join(join.clone()),
            cluster_id: "Kubernetes".into(),
        };
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
        for (not_after, known) in [(now - hour, false), (now + hour, true)] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            let uri = NodeCertificate::uri("vm-1", &join.trust_domain);
            params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            let name = CustomExtension::from_oid_content(&NODE_EXTENSION, encode_node("vm-1"));
            params.custom_extensions.push(name);
            params.not_after = not_after.into();
            let pem = key.serialize_pem() + &params.self_signed(&key).unwrap().pem();
            write(&join.directory, CREDENTIALS, pem.as_bytes()).unwrap();
            let machine = Machine::open(server.clone(), join.clone()).unwrap();
            let status = machine.status();
            assert_eq!(status == Authentication::JoinToken, !known, "{status:?}");
            assert_eq!(machine.certificate().is_some(), known);
        }
    }

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
