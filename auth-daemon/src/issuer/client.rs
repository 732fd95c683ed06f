//! The client of the trust domain's CA: Istio's certificate service over TLS, with a bearer token.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use auth_ca_api::{
    IMPERSONATED_IDENTITY,
    auth::{IssueJwtRequest, jwt_service_client::JwtServiceClient},
    istio::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_client::IstioCertificateServiceClient,
    },
    pem,
};
use prost_types::value::Kind as FieldKind;
use rustls::{
    pki_types::{CertificateDer, pem::PemObject},
    sign::CertifiedKey,
};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{sleep, timeout},
};
use tonic::{Code, Request, Response, Status, transport::Channel};
use tonic_types::StatusExt;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    CaHealth, IssueError, IssueFuture, Issued, Issuer,
    access::Access,
    link::{Link, ServerNames, explain_status},
    machine::Machine,
    trust_watch,
};
use crate::config::{CaServer, Proof};
use auth_jwt::Audience;
use auth_mesh::{Identity, TrustDomain};
use auth_tunnel::tls::{
    svid::Svid,
    trust::{TrustBundle, TrustStore},
};

/// One request, with all attempts.
const DEADLINE: Duration = Duration::from_secs(10);
/// A replica that is not the leader refuses at once, and the next connection may reach the leader.
const ATTEMPTS: u32 = 4;
const RETRY: Duration = Duration::from_millis(100);
/// Largest answer, in bytes, and most certificates in it.
pub(super) const MAX_ANSWER: usize = 256 << 10;
const MAX_CHAIN: usize = 16;

/// Requests certificates from the CA, and watches its trust bundle.
#[derive(Debug)]
pub struct CaClient {
    link: Arc<Link>,
    lifetime: Duration,
    /// The connection of all requests, and its number.
    channel: Mutex<(u64, Option<Open>)>,
    contact: watch::Receiver<bool>,
    /// Watches the trust bundle, and keeps the node's own certificate current.
    tasks: Vec<AbortHandle>,
}

/// A connection, and the certificate that it was opened with.
#[derive(Debug)]
struct Open {
    channel: Channel,
    certificate: Option<Arc<CertifiedKey>>,
}

/// Why the configuration cannot be used. Names the field and the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnusableServer(pub(super) String);

impl CaClient {
    /// Starts to watch the CA's trust bundle, without waiting for it: until it arrives, the roots are those of the root
    /// file. Requests certificates of `lifetime` for workloads. Must be called within a tokio runtime.
    pub fn start(
        server: CaServer,
        trust_domain: TrustDomain,
        lifetime: Duration,
    ) -> Result<Self, UnusableServer> {
        server.check().map_err(UnusableServer)?;
        let names = (&server).into();
        let Proof::Join(join) = server.proof.clone() else {
            return Self::start_through(names, Arc::new(server), trust_domain, lifetime);
        };
        let machine = Machine::open(server, join).map_err(UnusableServer)?;
        let machine = Arc::new(machine);
        let mut client = Self::start_through(names, machine.clone(), trust_domain, lifetime)?;
        let task = tokio::spawn(machine.keep_current(client.link.clone()));
        client.tasks.push(task.abort_handle());
        Ok(client)
    }

    /// The same with another way to reach the CA.
    pub fn start_through(
        names: ServerNames,
        access: Arc<dyn Access>,
        trust_domain: TrustDomain,
        lifetime: Duration,
    ) -> Result<Self, UnusableServer> {
        let roots = access.roots().map_err(UnusableServer)?;
        let known = TrustBundle::of_roots(trust_domain, roots);
        let link = Arc::new(Link::new(names, access, known));
        let (contacted, contact) = watch::channel(false);
        let watcher = tokio::spawn(trust_watch::keep_current(link.clone(), contacted));
        Ok(Self {
            link,
            lifetime,
            channel: Mutex::default(),
            contact,
            tasks: vec![watcher.abort_handle()],
        })
    }

    fn channel(&self) -> Result<(u64, Channel), String> {
        let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, open) = &mut *held;
        // The CA refuses requests on a connection whose certificate has expired since.
        let certificate = self.link.access.certificate();
        let current = certificate.as_ref().map(Arc::as_ptr);
        if let Some(open) = open
            && open.certificate.as_ref().map(Arc::as_ptr) == current
        {
            return Ok((*number, open.channel.clone()));
        }
        let channel = self.link.channel(|endpoint| endpoint)?;
        *number += 1;
        *open = Some(Open {
            channel: channel.clone(),
            certificate,
        });
        Ok((*number, channel))
    }

    /// Drops connection number `failed`, unless another one has replaced it.
    fn forget(&self, failed: u64) {
        let mut held = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if held.0 == failed {
            held.1 = None;
        }
    }

    async fn ask(
        &self,
        identity: &Identity,
        csr: &[u8],
        lifetime: Duration,
    ) -> Result<Issued, IssueError> {
        let lifetime = lifetime.min(self.lifetime);
        let csr = pem::encode("CERTIFICATE REQUEST", csr);
        self.link.access.prove(&csr).await;
        let request = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(identity)),
        };
        let answer = self.call(request, |channel, request| async move {
            let client = IstioCertificateServiceClient::new(channel);
            let mut client = client.max_decoding_message_size(MAX_ANSWER);
            client.create_certificate(request).await
        });
        let answer = answer.await?;
        let trust_domain = &self.link.trust.current().bundle.trust_domain;
        let chain = read_answer(&answer, identity, trust_domain)?;
        // Revocations and new roots must be known before the certificate is used.
        self.contacted().await?;
        Ok(Issued { chain })
    }

    async fn ask_jwt(
        &self,
        identity: &Identity,
        audience: &Audience,
    ) -> Result<String, IssueError> {
        let request = IssueJwtRequest {
            identity: identity.to_string(),
            audience: audience.to_vec(),
        };
        let answer = self.call(request, |channel, request| async move {
            let client = JwtServiceClient::new(channel);
            let mut client = client.max_decoding_message_size(MAX_ANSWER);
            client.issue(request).await
        });
        let answer = answer.await.map_err(|error| match error.code {
            Code::Unimplemented => IssueError::unsupported(),
            _ => error,
        })?;
        // Without the keys, the token cannot be verified.
        self.contacted().await?;
        Ok(answer.token)
    }

    /// Sends a request, and repeats it a few times while the CA is unavailable, such as between two leaders.
    async fn call<M: Clone, T, F>(
        &self,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<T, IssueError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut attempt = 1;
        loop {
            let request = self.link.request(message.clone()).await?;
            let (number, channel) = self.channel()?;
            let status = match call(channel, request).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            match status.code() {
                Code::Unavailable if attempt < ATTEMPTS => {
                    self.forget(number);
                    tracing::debug!(
                        why = explain_status(&status),
                        attempt,
                        "request to the CA retried"
                    );
                    sleep(RETRY.mul_f64(f64::from(attempt) * (0.5 + rand::random::<f64>()))).await;
                    attempt += 1;
                    continue;
                }
                Code::Unavailable | Code::Unknown | Code::Cancelled => self.forget(number),
                _ => {}
            }
            return Err(IssueError {
                why: explain_status(&status),
                retry_after: retry_after(&status),
                code: status.code(),
            });
        }
    }

    /// Waits until the first trust bundle of the CA has been applied, or the CA is known to send none.
    async fn contacted(&self) -> Result<(), String> {
        let mut contact = self.contact.clone();
        let contacted = contact.wait_for(|contact| *contact).await;
        contacted.map_err(|_| "the CA's trust bundle is not watched any more".to_owned())?;
        Ok(())
    }

    /// Returns the answer to a request, or fails at the deadline. Errors name the CA.
    async fn in_time<T>(
        &self,
        asked: impl Future<Output = Result<T, IssueError>>,
    ) -> Result<T, IssueError> {
        let asked = timeout(DEADLINE, asked).await;
        asked
            .unwrap_or_else(|_| {
                // The connection may be dead without a sign of it.
                let held = self
                    .channel
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
                self.forget(held);
                let missing = if *self.contact.borrow() {
                    ""
                } else {
                    ", or does not send its trust bundle"
                };
                Err(format!("it does not answer within {DEADLINE:?}{missing}").into())
            })
            .map_err(|error| IssueError {
                why: format!("the CA at {}: {}", self.link.address(), error.why),
                ..error
            })
    }
}

impl Drop for CaClient {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Issuer for CaClient {
    fn issue_for<'a>(
        &'a self,
        identity: &'a Identity,
        csr: &'a [u8],
        lifetime: Duration,
    ) -> IssueFuture<'a> {
        Box::pin(self.in_time(self.ask(identity, csr, lifetime)))
    }

    fn issue_jwt<'a>(
        &'a self,
        identity: &'a Identity,
        audience: &'a Audience,
    ) -> IssueFuture<'a, String> {
        Box::pin(self.in_time(self.ask_jwt(identity, audience)))
    }

    fn trust(&self) -> &Arc<TrustStore> {
        &self.link.trust
    }

    fn health(&self) -> Option<&Arc<CaHealth>> {
        Some(&self.link.health)
    }
}

/// How long the CA asks to wait (`google.rpc.RetryInfo`).
fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

fn impersonating(identity: &Identity) -> prost_types::Struct {
    let value = prost_types::Value {
        kind: Some(FieldKind::StringValue(identity.as_str().to_owned())),
    };
    prost_types::Struct {
        fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into(),
    }
}

/// The chain in an answer for `identity`, as [`read_chain`] returns it. Refused if it is for another one.
fn read_answer(
    answer: &IstioCertificateResponse,
    identity: &Identity,
    trust_domain: &TrustDomain,
) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain = read_chain(answer)?;
    let svid = Svid::parse(&chain[0], trust_domain)
        .map_err(|error| format!("it answers with an unusable certificate: {error}"))?;
    if svid.identity != *identity {
        return Err(format!(
            "it answers with a certificate of {}",
            svid.identity
        ));
    }
    Ok(chain)
}

/// The chain in an answer, leaf first, without the roots: at least the leaf.
pub(super) fn read_chain(
    answer: &IstioCertificateResponse,
) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut own: Vec<CertificateDer<'static>> = Vec::new();
    let mut count = 0;
    for pem in &answer.cert_chain {
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let certificate =
                certificate.map_err(|_| "it answers with what is not PEM".to_owned())?;
            count += 1;
            if count > MAX_CHAIN {
                return Err(format!(
                    "it answers with more than {MAX_CHAIN} certificates"
                ));
            }
            // The leaf, then its intermediates. The roots after them are of no use to a peer, which has its own.
            if own.is_empty() || !is_root(&certificate)? {
                own.push(certificate);
            }
        }
    }
    if own.is_empty() {
        return Err("it answers without a certificate".into());
    }
    Ok(own)
}

fn is_root(certificate: &[u8]) -> Result<bool, String> {
    let (_, parsed) = X509Certificate::from_der(certificate)
        .map_err(|_| "it answers with a chain that cannot be parsed".to_owned())?;
    Ok(parsed.subject().as_raw() == parsed.issuer().as_raw())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
        string::Ia5String,
    };

    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

    /// A root, and a leaf for `uri` under it.
    fn chain(uri: &str) -> [String; 2] {
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut root = CertificateParams::default();
        root.distinguished_name.push(DnType::CommonName, "root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_pem = root.self_signed(&root_key).unwrap().pem();
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri).unwrap())];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let leaf = leaf
            .signed_by(&key, &rcgen::Issuer::new(root, &root_key))
            .unwrap();
        [leaf.pem(), root_pem]
    }

    fn read(cert_chain: &[String]) -> Result<usize, String> {
        let answer = IstioCertificateResponse {
            cert_chain: cert_chain.to_vec(),
        };
        let chain = read_answer(
            &answer,
            &WEB.parse().unwrap(),
            &"cluster.local".parse().unwrap(),
        )?;
        Ok(chain.len())
    }

    #[test]
    fn removes_the_roots() {
        let chain = chain(WEB);
        assert_eq!(read(&chain), Ok(1));
        assert_eq!(read(&[chain.concat()]), Ok(1), "all in one");
        assert_eq!(read(&chain[..1]), Ok(1));
        let [leaf, root] = &chain;
        let other = &self::chain(WEB)[1];
        let bundle = format!("{root}{other}");
        assert_eq!(read(&[leaf.clone(), bundle]), Ok(1), "during a rotation");
    }

    #[test]
    fn refuses_hostile_answers() {
        let [leaf, root] = chain(WEB);
        let rubbish = pem::certificate(&[0x30, 0x03, 1, 1, 1]);
        for (answer, expected) in [
            (vec![], "without a certificate"),
            (vec!["x".into()], "without a certificate"),
            (vec![root.clone()], "unusable"),
            (vec![rubbish.clone()], "unusable"),
            (vec![leaf.clone(), rubbish], "cannot be parsed"),
            (vec![leaf.clone(), leaf[..60].to_owned()], "not PEM"),
            (vec![leaf.clone(); 17], "more than 16"),
            (
                chain("spiffe://cluster.local/ns/default/sa/api").into(),
                "sa/api",
            ),
            (
                chain("spiffe://other/ns/default/sa/web").into(),
                "another trust domain",
            ),
        ] {
            let why = read(&answer).unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
    }

    proptest! {
        #[test]
        fn refuses_rubbish(der in prop::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,64}") {
            prop_assert!(read(&[pem::certificate(&der)]).is_err());
            prop_assert!(read(&[text]).is_err());
        }
    }
}
