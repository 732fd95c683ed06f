//! The CA's server: who asks, what it may have, and the answer. Istio's certificate service, and the trust of the
//! domain for those who watch it.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use futures_util::{Stream, stream};
use prometheus_client::metrics::gauge::Gauge;
use prost_types::value::Kind as FieldKind;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, service::Routes};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    attest::{Attestor, Caller, Credentials, Unattested, certificate::Certificates},
    authority::{Authority, Published, Refusal},
    counters::{Counters, Kind},
    listener::{Listener, Peer, Watching},
    operator, pem,
    placement::{self, Denied, Grant},
    proto::{
        auth::{
            Denial, Trust, WatchRequest,
            trust_service_server::{TrustService, TrustServiceServer},
        },
        istio::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_server::{
                IstioCertificateService, IstioCertificateServiceServer,
            },
        },
    },
    serving,
};
use crate::{
    answers::{answer, open_metrics},
    config::CaConfig,
    mesh::{Identity, Registry, TrustDomain},
    tunnel::{svid::Svid, tls::unix_seconds},
};

/// Largest request, in bytes.
const MAX_REQUEST: usize = 64 << 10;
/// How long a request waits for the registry to learn of a pod: the node may know it a moment earlier.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest bearer token, in bytes.
const MAX_TOKEN: usize = 12 << 10;
/// In the metadata of a request (Istio's `security.ImpersonatedIdentity`).
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
const NOT_THE_LEADER: &str = "this replica is not the leader";

/// The authority, while this replica is the one that writes its state.
pub type Leader = watch::Receiver<Option<Arc<Authority>>>;

/// Everything that answers.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    readiness: Option<TcpListener>,
    operator: operator::Socket,
    desk: Arc<Desk>,
    names: Vec<String>,
}

impl Server {
    /// Takes the addresses and the operator's socket of `config`. Asks `attestors` in their order who calls; holders
    /// of certificates that `authority` issued are known besides.
    pub async fn bind(
        config: &CaConfig,
        mut attestors: Vec<Arc<dyn Attestor>>,
        registry: Arc<Registry>,
        authority: Leader,
    ) -> anyhow::Result<Self> {
        let own = Certificates::new(config.trust_domain.clone(), authority.clone());
        attestors.push(Arc::new(own));
        let readiness = match config.readiness {
            Some(address) => Some(listen("readiness", address).await?),
            None => None,
        };
        Ok(Self {
            listener: listen("listen", config.listen).await?,
            readiness,
            operator: operator::Socket::take(&config.operator_socket).await?,
            desk: Arc::new(Desk {
                trust_domain: config.trust_domain.clone(),
                attestors,
                registry,
                authority,
                counters: Arc::default(),
                lifetime: config.certificate_lifetime,
            }),
            names: config.server_names.clone(),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stopped` says so; requests under way are answered.
    pub async fn run(self, stopped: watch::Receiver<bool>) {
        let Self {
            listener,
            readiness,
            operator,
            desk,
            names,
        } = self;
        let tls = serving::Current::default();
        // The first caller finds a certificate.
        if let Some(leader) = desk.authority.borrow().clone() {
            let roots = leader.published().borrow().roots.clone();
            serving::renew(&leader, &roots, &names, &desk.trust_domain, &tls);
        }
        let renewal = tokio::spawn(serving::keep_current(
            desk.authority.clone(),
            names,
            desk.trust_domain.clone(),
            tls.clone(),
        ));
        if let Some(readiness) = readiness {
            let counted = desk.clone();
            let metrics = move || std::future::ready(counted.metrics());
            let (desk, tls, stopped) = (desk.clone(), tls.clone(), stopped.clone());
            let ready = move || {
                let standby = desk.authority.borrow().is_none();
                let knows_pods = *desk.registry.changes().borrow() > 0;
                let can_serve =
                    (standby || tls.load().is_some()) && knows_pods && !*stopped.borrow();
                std::future::ready(if can_serve {
                    (
                        StatusCode::OK,
                        if standby { "standing by\n" } else { "ready\n" },
                    )
                } else {
                    (
                        StatusCode::SERVICE_UNAVAILABLE,
                        "not ready: pods are not known yet, there is no certificate of its own, or it stops\n",
                    )
                })
            };
            tokio::spawn(async move {
                let routes = Router::new()
                    .route("/healthz/ready", get(ready))
                    .route("/metrics", get(metrics));
                answer(readiness, routes).await;
            });
        }
        let requests = IstioCertificateServiceServer::from_arc(desk.clone())
            .max_decoding_message_size(MAX_REQUEST);
        let watches = TrustServiceServer::new(Watches {
            desk: desk.clone(),
            stopped: stopped.clone(),
        })
        .max_decoding_message_size(MAX_REQUEST);
        let counters = desk.counters.clone();
        let listener = Listener {
            tcp: listener,
            tls,
            routes: Routes::new(requests).add_service(watches).prepare(),
            counters: counters.clone(),
        };
        tokio::join!(
            listener.serve(stopped.clone()),
            operator.serve(desk.authority.clone(), counters, stopped)
        );
        renewal.abort();
    }
}

async fn listen(field: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("{field}: cannot listen on {address}; is another CA running here?")
    })
}

/// Where requests are decided on.
#[derive(Debug)]
struct Desk {
    trust_domain: TrustDomain,
    attestors: Vec<Arc<dyn Attestor>>,
    registry: Arc<Registry>,
    authority: Leader,
    counters: Arc<Counters>,
    lifetime: Duration,
}

/// A refusal, with what is logged of it.
struct Refused {
    kind: Kind,
    caller: Option<Caller>,
    asked: Option<String>,
    why: String,
}

impl Refused {
    fn new(kind: Kind, why: impl Into<String>) -> Self {
        Self {
            kind,
            caller: None,
            asked: None,
            why: why.into(),
        }
    }

    fn of(self, caller: &Caller) -> Self {
        Self {
            caller: Some(caller.clone()),
            ..self
        }
    }

    fn status(&self) -> Status {
        let code = match self.kind {
            Kind::Unattested => Code::Unauthenticated,
            Kind::Denied | Kind::Revoked => Code::PermissionDenied,
            Kind::Malformed => Code::InvalidArgument,
            Kind::TooLarge => Code::ResourceExhausted,
            Kind::Unavailable => Code::Unavailable,
        };
        // Texts of others may hold what a header cannot.
        let why: String = self.why.chars().take(512).collect();
        Status::new(code, why)
    }
}

impl Desk {
    /// What Prometheus is told.
    fn metrics(&self) -> impl IntoResponse + use<> {
        let mut registry = prometheus_client::registry::Registry::with_prefix("auth_ca");
        self.counters.register(&mut registry);
        let leads = Gauge::<u64, AtomicU64>::default();
        leads.set(self.authority.borrow().is_some().into());
        registry.register("leader", "Whether this replica signs", leads);
        open_metrics(&registry)
    }

    fn leader(&self) -> Result<Arc<Authority>, Refused> {
        let authority = self.authority.borrow().clone();
        authority.ok_or_else(|| Refused::new(Kind::Unavailable, NOT_THE_LEADER))
    }

    /// Who calls. A token counts for more than a certificate, and a bad one is not made good by a certificate.
    async fn attest(&self, peer: &Peer, metadata: &MetadataMap) -> Result<Caller, Refused> {
        let unattested = |why: &str| Refused::new(Kind::Unattested, why);
        let bearer = bearer(metadata).map_err(|why| unattested(&why.0))?;
        let credentials = match bearer {
            Some(bearer) => Credentials {
                bearer: Some(bearer),
                certificate: None,
            },
            None => Credentials {
                bearer: None,
                certificate: peer.certificate.as_ref(),
            },
        };
        for attestor in &self.attestors {
            if let Some(outcome) = attestor.attest(credentials).await {
                return outcome.map_err(|why| unattested(&why.0));
            }
        }
        Err(unattested(if bearer.is_some() {
            "the token is no known node's, and of no known issuer"
        } else {
            "neither a bearer token nor a client certificate is shown"
        }))
    }

    /// What the caller may have; waits a little for a pod that is not known yet.
    async fn place(&self, caller: &Caller, asked: Option<&Identity>) -> Result<Grant, Denied> {
        let mut changes = self.registry.changes();
        let deadline = Instant::now() + PATIENCE;
        loop {
            changes.borrow_and_update();
            let snapshot = self.registry.snapshot();
            match placement::decide(caller, asked, &self.trust_domain, &snapshot) {
                Err(denied @ Denied::NotThere { .. }) => {
                    if !matches!(timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                        return Err(denied);
                    }
                }
                decided => return decided,
            }
        }
    }

    async fn issue(
        &self,
        peer: &Peer,
        metadata: &MetadataMap,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let authority = self.leader()?;
        let caller = self.attest(peer, metadata).await?;
        let asked = impersonated(request).map_err(|refused| refused.of(&caller))?;
        let mut issued = self
            .issue_for(&authority, &caller, asked.as_deref(), request)
            .await;
        if let Err(refused) = &mut issued {
            refused.caller = Some(caller);
            refused.asked = asked;
        }
        let (chain, grant) = issued?;
        let leaf = Svid::parse(&chain[0], self.trust_domain.as_str()).ok();
        self.counters.issued.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            peer = %peer.address,
            identity = %grant.identity,
            node = grant.node.as_deref().unwrap_or_default(),
            serial = leaf.as_ref().map_or("", |leaf| &*leaf.serial),
            not_after = leaf.as_ref().map_or(0, |leaf| unix_seconds(leaf.not_after)),
            "certificate issued"
        );
        Ok(chain
            .iter()
            .map(|certificate| pem::certificate(certificate))
            .collect())
    }

    /// The chain, root included.
    async fn issue_for(
        &self,
        authority: &Authority,
        caller: &Caller,
        asked: Option<&str>,
        request: &IstioCertificateRequest,
    ) -> Result<(Vec<CertificateDer<'static>>, Grant), Refused> {
        let malformed = |why: String| Refused::new(Kind::Malformed, why);
        let csr = CertificateSigningRequestDer::from_pem_slice(request.csr.as_bytes())
            .map_err(|_| malformed("csr: is not a CERTIFICATE REQUEST in PEM".into()))?;
        let asked: Option<Identity> = asked
            .map(|asked| {
                asked
                    .parse()
                    .map_err(|error| malformed(format!("metadata.ImpersonatedIdentity: {error}")))
            })
            .transpose()?;
        let grant = self.place(caller, asked.as_ref()).await.map_err(|denied| {
            let kind = match denied {
                Denied::Unnamed(_) => Kind::Malformed,
                _ => Kind::Denied,
            };
            Refused::new(kind, denied.to_string())
        })?;
        let lifetime = match u64::try_from(request.validity_duration) {
            Ok(seconds @ 1..) => Duration::from_secs(seconds).min(self.lifetime),
            _ => self.lifetime,
        };
        let mut chain = authority
            .issue(&grant.identity, &csr, lifetime, grant.node.as_deref())
            .await
            .map_err(refused)?;
        let published = authority.published();
        let root = root_of(&chain, &published.borrow().roots);
        match root {
            Some(root) => chain.push(root),
            None => {
                tracing::error!(identity = %grant.identity, "no published root stands behind the new certificate");
                return Err(Refused::new(
                    Kind::Unavailable,
                    "the CA has no root for what it signs",
                ));
            }
        }
        Ok((chain, grant))
    }

    /// Notes a refusal and turns it into an answer.
    fn refuse(&self, peer: &Peer, refused: &Refused) -> Status {
        self.counters.refused(refused.kind);
        tracing::warn!(
            peer = %peer.address,
            caller = refused.caller.as_ref().map(ToString::to_string).unwrap_or_default(),
            asked = refused.asked.as_deref().map(|asked| asked.chars().take(256).collect::<String>()).unwrap_or_default(),
            kind = refused.kind.name(),
            why = refused.why,
            "request refused"
        );
        refused.status()
    }
}

fn refused(refusal: Refusal) -> Refused {
    match refusal {
        Refusal::Request(why) => Refused::new(Kind::Malformed, why),
        Refusal::Revoked(revoked) => Refused::new(Kind::Revoked, revoked.to_string()),
        // Paths and names of the CA's own are for its log.
        Refusal::Store(error) => {
            tracing::error!(%error, "the CA's state cannot be kept; nothing is issued");
            Refused::new(
                Kind::Unavailable,
                "the CA cannot keep its state; its log says why",
            )
        }
        Refusal::State(why) => Refused::new(Kind::Unavailable, why),
    }
}

/// The token of `authorization`, whose scheme is written in any case (RFC 9110 §11.1).
fn bearer(metadata: &MetadataMap) -> Result<Option<&str>, Unattested> {
    let refused = |why: &str| Unattested(why.to_owned());
    let mut values = metadata.get_all("authorization").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(refused("there is more than one authorization"));
    }
    let value = value
        .to_str()
        .map_err(|_| refused("authorization is not text"))?;
    let token = match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => return Err(refused("authorization is no bearer token")),
    };
    match token.len() {
        0 => Err(refused("the bearer token is empty")),
        1..=MAX_TOKEN => Ok(Some(token)),
        _ => Err(refused("the bearer token is too long")),
    }
}

/// Whom a node asks for. Istio's clients leave it out, or empty, where they ask for themselves.
fn impersonated(request: &IstioCertificateRequest) -> Result<Option<String>, Refused> {
    let metadata = request.metadata.as_ref();
    match metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY)) {
        None => Ok(None),
        Some(value) => match &value.kind {
            Some(FieldKind::StringValue(text)) if text.is_empty() => Ok(None),
            Some(FieldKind::StringValue(text)) => Ok(Some(text.clone())),
            _ => Err(Refused::new(
                Kind::Malformed,
                "metadata.ImpersonatedIdentity: is not a string",
            )),
        },
    }
}

/// The root that issued the last of `chain`: by its name, and by its key where two roots have one name.
fn root_of(
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'static>],
) -> Option<CertificateDer<'static>> {
    use x509_parser::extensions::ParsedExtension as E;
    let (_, last) = X509Certificate::from_der(chain.last()?).ok()?;
    let issuer_key = last
        .iter_extensions()
        .find_map(|e| match e.parsed_extension() {
            E::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0),
            _ => None,
        });
    let found = roots.iter().find(|root| {
        let Ok((_, root)) = X509Certificate::from_der(root) else {
            return false;
        };
        let key = root
            .iter_extensions()
            .find_map(|e| match e.parsed_extension() {
                E::SubjectKeyIdentifier(id) => Some(id.0),
                _ => None,
            });
        let same_key = match (issuer_key, key) {
            (Some(issuer), Some(key)) => issuer == key,
            _ => true,
        };
        root.subject().as_raw() == last.issuer().as_raw() && same_key
    });
    found.cloned()
}

/// Who is at the other end: the listener says it with each request.
fn peer<T>(request: &Request<T>) -> Result<Arc<Peer>, Status> {
    let peer = request.extensions().get::<Arc<Peer>>();
    peer.cloned()
        .ok_or_else(|| Status::internal("the connection is not known"))
}

#[tonic::async_trait]
impl IstioCertificateService for Desk {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = peer(&request)?;
        let (metadata, _, request) = request.into_parts();
        match self.issue(&peer, &metadata, &request).await {
            Ok(cert_chain) => Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Err(refused) => Err(self.refuse(&peer, &refused)),
        }
    }
}

/// Tells daemons whom to believe.
#[derive(Debug)]
struct Watches {
    desk: Arc<Desk>,
    stopped: watch::Receiver<bool>,
}

/// One daemon's watch.
struct Watcher {
    leader: Leader,
    published: watch::Receiver<Arc<Published>>,
    stopped: watch::Receiver<bool>,
    first: bool,
    _watching: Watching,
}

impl Watcher {
    /// The next thing to say: the newest trust, whatever was missed since the last one. `None` ends the stream.
    async fn next(&mut self) -> Option<Result<Trust, Status>> {
        let over = |why: &str| Some(Err(Status::unavailable(why)));
        if !std::mem::take(&mut self.first) {
            tokio::select! {
                _ = self.stopped.wait_for(|stopped| *stopped) => return over("the CA stops"),
                _ = self.leader.changed() => return over(NOT_THE_LEADER),
                changed = self.published.changed() => if changed.is_err() {
                    return over(NOT_THE_LEADER);
                },
            }
        }
        Some(Ok(message(&self.published.borrow_and_update())))
    }
}

#[tonic::async_trait]
impl TrustService for Watches {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Trust, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let peer = peer(&request)?;
        let refuse = |refused: Refused| self.desk.refuse(&peer, &refused);
        let mut leader = self.desk.authority.clone();
        let authority = leader.borrow_and_update().clone();
        let authority =
            authority.ok_or_else(|| refuse(Refused::new(Kind::Unavailable, NOT_THE_LEADER)))?;
        let caller = self
            .desk
            .attest(&peer, request.metadata())
            .await
            .map_err(refuse)?;
        let watching = peer.watch().ok_or_else(|| {
            let why = "this connection watches the trust often enough already";
            refuse(Refused::new(Kind::TooLarge, why).of(&caller))
        })?;
        tracing::info!(peer = %peer.address, %caller, "watches the trust");
        let watcher = Watcher {
            leader,
            published: authority.published(),
            stopped: self.stopped.clone(),
            first: true,
            _watching: watching,
        };
        let watcher = stream::unfold(Some(watcher), |watcher| async move {
            let mut watcher = watcher?;
            let next = watcher.next().await?;
            let watcher = next.is_ok().then_some(watcher);
            Some((next, watcher))
        });
        Ok(Response::new(Box::pin(watcher)))
    }
}

fn message(published: &Published) -> Trust {
    let denial = |name: &str, reason: &crate::tunnel::trust::Reason| Denial {
        name: name.to_owned(),
        reason: reason.as_str().to_owned(),
    };
    Trust {
        version: published.version,
        roots: published.roots.iter().map(|root| root.to_vec()).collect(),
        crls: published.crls.clone(),
        denied_identities: published
            .identities
            .iter()
            .map(|(identity, reason)| denial(identity.as_str(), reason))
            .collect(),
        denied_nodes: published
            .nodes
            .iter()
            .map(|(node, reason)| denial(node, reason))
            .collect(),
        phase: published.phase.clone(),
        intermediates: published
            .intermediates
            .iter()
            .map(|certificate| certificate.to_vec())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair};

    use super::*;

    fn authorization(values: &[&str]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for value in values {
            metadata.append("authorization", value.parse().unwrap());
        }
        metadata
    }

    #[test]
    fn bearer_tokens() {
        assert_eq!(bearer(&MetadataMap::new()), Ok(None));
        for good in ["Bearer x", "bearer x", "BEARER   x "] {
            assert_eq!(bearer(&authorization(&[good])), Ok(Some("x")), "{good}");
        }
        let long = format!("Bearer {}", "x".repeat(MAX_TOKEN + 1));
        for bad in [
            &["Basic x"][..],
            &["Bearer"],
            &["Bearer "],
            &["x"],
            &["Bearer x", "Bearer x"],
            &[&long],
        ] {
            assert!(bearer(&authorization(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn impersonation_is_a_string_or_nothing() {
        let request = |kind: Option<FieldKind>| IstioCertificateRequest {
            metadata: Some(prost_types::Struct {
                fields: [(
                    IMPERSONATED_IDENTITY.to_owned(),
                    prost_types::Value { kind },
                )]
                .into(),
            }),
            ..Default::default()
        };
        let read = |request: &IstioCertificateRequest| {
            impersonated(request).map_err(|refused| refused.kind)
        };
        assert_eq!(read(&IstioCertificateRequest::default()), Ok(None));
        let text = |text: &str| request(Some(FieldKind::StringValue(text.into())));
        assert_eq!(read(&text("")), Ok(None));
        assert_eq!(read(&text("spiffe://x")), Ok(Some("spiffe://x".into())));
        for bad in [None, Some(FieldKind::NumberValue(1.0))] {
            assert_eq!(read(&request(bad)), Err(Kind::Malformed));
        }
    }

    /// A root called "root" and a leaf under it.
    fn root_and_leaf(with_key_ids: bool) -> (CertificateDer<'static>, CertificateDer<'static>) {
        let (root_key, leaf_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut root = CertificateParams::default();
        root.distinguished_name.push(DnType::CommonName, "root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_identifier_method = KeyIdMethod::Sha256;
        let certificate = root.self_signed(&root_key).unwrap();
        let mut leaf = CertificateParams::default();
        leaf.use_authority_key_identifier_extension = with_key_ids;
        let leaf = leaf
            .signed_by(&leaf_key, &Issuer::new(root, &root_key))
            .unwrap();
        (certificate.der().clone(), leaf.der().clone())
    }

    #[test]
    fn finds_the_root_behind_a_chain() {
        let (one, of_one) = root_and_leaf(true);
        let (two, of_two) = root_and_leaf(true);
        let roots = [one.clone(), two.clone()];
        assert_eq!(root_of(&[of_one], &roots), Some(one.clone()));
        assert_eq!(root_of(std::slice::from_ref(&of_two), &roots), Some(two));
        assert_eq!(root_of(&[of_two], std::slice::from_ref(&one)), None);
        let (old, of_old) = root_and_leaf(false);
        assert_eq!(root_of(&[of_old], std::slice::from_ref(&old)), Some(old));
        assert_eq!(root_of(&[], &roots), None);
        assert_eq!(root_of(&[CertificateDer::from(vec![1])], &roots), None);
    }
}
