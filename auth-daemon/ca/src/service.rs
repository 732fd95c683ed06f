//! What the CA answers: Istio's certificate service, JWT-SVIDs, and the trust bundle for those who watch it.

mod jwt;
mod nodes;

use std::{net::IpAddr, pin::Pin, sync::Arc, time::Duration};

use auth_ca_api::{
    IMPERSONATED_IDENTITY, JOIN_TOKEN_PREFIX,
    auth::{Denial, Trust, WatchRequest, trust_service_server::TrustService},
    istio::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::IstioCertificateService,
    },
    pem,
};
use auth_mesh::{Identity, Registry, TrustDomain};
use auth_support::fair_queue::FairQueue;
use auth_tunnel::tls::{
    svid::{Svid, is_person},
    trust::Reason,
};
use futures_util::{Stream, stream};
use prost_types::value::Kind as FieldKind;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use tokio::sync::watch;
use tonic::{
    Code, Request, Response, Status,
    metadata::{MetadataMap, MetadataValue},
};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    attest::{Attestor, Caller, Credentials, Unattested},
    audit,
    authority::{Authority, Holder, Issued, Leader, Published, Refusal},
    connection::{Peer, WatchGuard},
    counters::{Counters, Kind},
    placement::{self, Denied, Grant},
    quotas::{Exceeded, InProgress, Quotas},
};

/// Longest bearer token, in bytes.
const MAX_TOKEN: usize = 12 << 10;
/// Longest lifetime of a person's certificate: a person who may no longer act as an account loses access after this time.
const PERSON_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// How long an answer is held back from a caller that is over a quota, at least. At most twice as long, so that the
/// caller's next requests do not come all at once.
const HELD_BACK: Duration = Duration::from_secs(1);
pub(crate) const NOT_THE_LEADER: &str = "this replica is not the leader";

/// Decides on requests.
pub(crate) struct CaService {
    pub(crate) trust_domain: TrustDomain,
    /// Asked in this order who the caller is.
    pub(crate) attestors: Vec<Arc<dyn Attestor>>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) leader: Leader,
    pub(crate) counters: Arc<Counters>,
    pub(crate) quotas: Arc<Quotas>,
    /// Turns of sources on the processors.
    pub(crate) turns: Arc<FairQueue<Arc<str>>>,
    /// Turns of sources at attestation: more than processors, because reviews of tokens wait for the API server.
    pub(crate) attestations: Arc<FairQueue<Arc<str>>>,
    /// Longest lifetime of a certificate.
    pub(crate) lifetime: Duration,
}

/// A refusal, and what is logged of it.
struct Refused {
    kind: Kind,
    caller: Option<Box<Caller>>,
    asked: Option<String>,
    why: String,
    /// Of what the caller, or its address, has used up a quota.
    over: Option<Box<Over>>,
}

/// What is used up.
enum Over {
    Quota(Exceeded),
    /// The failed attestations of this source.
    Failures(String),
}

impl Refused {
    fn new(kind: Kind, why: impl Into<String>) -> Self {
        Self {
            kind,
            caller: None,
            asked: None,
            why: why.into(),
            over: None,
        }
    }

    fn by(self, caller: &Caller) -> Self {
        Self {
            caller: Some(Box::new(caller.clone())),
            ..self
        }
    }

    fn status(&self) -> Status {
        let code = match self.kind {
            Kind::Unattested => Code::Unauthenticated,
            Kind::Denied | Kind::Revoked => Code::PermissionDenied,
            Kind::Malformed => Code::InvalidArgument,
            Kind::TooLarge | Kind::OverQuota => Code::ResourceExhausted,
            Kind::Unavailable => Code::Unavailable,
        };
        let why = self.why.chars().take(512).collect::<String>();
        match self.over.as_deref() {
            Some(Over::Quota(exceeded)) => {
                let details = ErrorDetails::with_retry_info(Some(exceeded.retry));
                Status::with_error_details(code, why, details)
            }
            _ => Status::new(code, why),
        }
    }
}

impl From<Exceeded> for Refused {
    fn from(exceeded: Exceeded) -> Self {
        Self {
            over: Some(Box::new(Over::Quota(exceeded))),
            ..Self::new(Kind::OverQuota, exceeded.to_string())
        }
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Request(why) => Self::new(Kind::Malformed, why),
            Refusal::Revoked(revoked) => Self::new(Kind::Revoked, revoked.to_string()),
            // The CA's paths and names are for its own log.
            Refusal::Store(error) => {
                tracing::error!(%error, "CA state cannot be stored");
                Self::new(
                    Kind::Unavailable,
                    "the CA cannot store its state; its log says why",
                )
            }
            Refusal::State(why) => Self::new(Kind::Unavailable, why),
        }
    }
}

impl CaService {
    fn authority(&self) -> Result<Arc<Authority>, Refused> {
        let leader = self.leader.borrow().clone();
        leader.ok_or_else(|| Refused::new(Kind::Unavailable, NOT_THE_LEADER))
    }

    /// Where connections from `address` come from, before their caller is known: the node whose daemon called from there
    /// last, the node of the pod with that address, or the address. A stolen node can claim any address for one of its
    /// pods, so what a node has proved comes first.
    pub(crate) fn source(&self, address: IpAddr) -> Arc<str> {
        if let Some(node) = self.quotas.node_at(address) {
            return node;
        }
        match self.registry.snapshot().pod(address) {
            Some(pod) if !pod.node.is_empty() => pod.node.as_str().into(),
            _ => address.to_string().into(),
        }
    }

    /// Identifies the caller. A caller that returns before its retry time is refused before it costs anything.
    async fn identify(&self, peer: &Peer, metadata: &MetadataMap) -> Result<Caller, Refused> {
        if let Some((caller, exceeded)) = peer.over_rate.still(authorization(metadata)) {
            return Err(Refused::from(exceeded).by(&caller));
        }
        self.attest(peer, metadata).await
    }

    /// Attests the caller.
    async fn attest(&self, peer: &Peer, metadata: &MetadataMap) -> Result<Caller, Refused> {
        let source = &peer.source.get();
        let turn = self.attestations.turn(source).await;
        let attested = self.attest_now(peer, metadata).await;
        drop(turn);
        if let Ok(Caller::Node { node }) = &attested {
            self.quotas.attested(node, peer.address.ip().to_canonical());
            peer.source.set(node);
        }
        attested.map_err(|unattested| self.unattested(source, unattested.0))
    }

    /// A failure of `source` to prove who it is. Many of them are answered slowly.
    fn unattested(&self, source: &str, why: String) -> Refused {
        let over = (!self.quotas.failure(source)).then(|| Over::Failures(source.to_owned()));
        Refused {
            over: over.map(Box::new),
            ..Refused::new(Kind::Unattested, why)
        }
    }

    /// A token takes precedence over a certificate, which does not make up for a bad token.
    async fn attest_now(&self, peer: &Peer, metadata: &MetadataMap) -> Result<Caller, Unattested> {
        let bearer = bearer(metadata)?;
        let certificate = peer.certificate.as_ref().filter(|_| bearer.is_none());
        let credentials = Credentials {
            bearer,
            certificate,
        };
        if bearer.is_some_and(is_join_token) {
            let why = "a join token is accepted for a node's own certificate only";
            return Err(Unattested(why.into()));
        }
        for attestor in &self.attestors {
            if let Some(outcome) = attestor.attest(credentials).await {
                let caller = outcome?;
                return match bearer.and(caller.node()) {
                    Some(node) if self.has_joined(node) => Err(Unattested(format!(
                        "a machine outside the cluster has joined as node {node}: revoke that node, and give the machine \
                         another name"
                    ))),
                    _ => Ok(caller),
                };
            }
        }
        let why = if bearer.is_some() {
            "the token is no known node's, and of no known issuer"
        } else {
            "the request has neither a bearer token nor a client certificate"
        };
        Err(Unattested(why.into()))
    }

    /// Who a person is by what else the holder of the CSR's key has proved, if a certificate can name that.
    async fn proved(&self, caller: &Caller, csr: &[u8]) -> Option<String> {
        for attestor in &self.attestors {
            let proved = attestor.proved(caller, csr).await;
            if proved.as_deref().is_some_and(is_person) {
                return proved;
            }
        }
        None
    }

    /// Decides what the caller may have. Waits a little for a pod that is not known yet.
    async fn place(&self, caller: &Caller, asked: Option<&Identity>) -> Result<Grant, Denied> {
        placement::settle(
            &self.registry,
            |snapshot| placement::decide(caller, asked, &self.trust_domain, snapshot),
            |denied| matches!(denied, Denied::NotThere { .. }),
        )
        .await
    }

    async fn issue(
        &self,
        peer: &Peer,
        metadata: &MetadataMap,
        request: &IstioCertificateRequest,
    ) -> Result<Vec<String>, Refused> {
        let authority = self.authority()?;
        let bearer = bearer(metadata).ok().flatten();
        if let Some(token) = bearer.filter(|token| is_join_token(token)) {
            return self.join(peer, token, request).await;
        }
        let caller = self.identify(peer, metadata).await?;
        let asked = impersonated(request).map_err(|refused| refused.by(&caller))?;
        if let (Caller::Node { node }, None, None, Some(certificate)) =
            (&caller, &asked, bearer, &peer.certificate)
        {
            let renewed = self.renew_node(peer, (&caller, node), certificate, request);
            let renewed = renewed.await;
            return renewed.map_err(|refused| attribute(refused, peer, metadata, &caller, None));
        }
        let issued = self
            .issue_for(&authority, &caller, asked.as_deref(), request)
            .await;
        let (issued, grant) =
            issued.map_err(|refused| attribute(refused, peer, metadata, &caller, asked))?;
        // A process that was stopped meanwhile may have lost the Lease.
        self.authority()?;
        let leaf = Svid::parse(&issued.chain[0], &self.trust_domain).ok();
        self.counters.issued.inc();
        audit::issued(peer.address, &caller, &grant, leaf.as_ref());
        Ok(answer(&issued))
    }

    async fn issue_for(
        &self,
        authority: &Authority,
        caller: &Caller,
        asked: Option<&str>,
        request: &IstioCertificateRequest,
    ) -> Result<(Issued, Grant), Refused> {
        let csr = csr(request)?;
        let (grant, _in_progress) = self.grant(caller, asked).await?;
        let proved = self.proved(caller, &csr).await;
        let (most, holder) = match caller {
            Caller::Person { person, .. } => (
                self.lifetime.min(PERSON_LIFETIME),
                Holder::Person(proved.as_deref().unwrap_or(person)),
            ),
            _ => (self.lifetime, Holder::Node(&grant.node)),
        };
        let lifetime = match requested(request) {
            Duration::ZERO => most,
            lifetime => lifetime.min(most),
        };
        let issued = authority.issue(&grant.identity, &csr, lifetime, holder)?;
        Ok((issued, grant))
    }

    /// Decides what `caller` gets, within its quotas: the identity `asked`, or its own. The request counts as in progress until
    /// the second value is dropped.
    async fn grant(
        &self,
        caller: &Caller,
        asked: Option<&str>,
    ) -> Result<(Grant, InProgress), Refused> {
        let parse = |asked: &str| {
            let parsed = asked.parse::<Identity>();
            parsed.map_err(|error| Refused::new(Kind::Malformed, format!("{asked:.256?}: {error}")))
        };
        let asked = asked.map(parse).transpose()?;
        // A pod's own requests count for its identity first, so that they cannot use up the quota of its node.
        if let Caller::Workload { identity, node } = caller {
            self.quotas.certificate(node, identity)?;
        }
        let in_progress = self.quotas.request(caller.counts_for())?;
        let grant = self.place(caller, asked.as_ref()).await.map_err(|denied| {
            let kind = match denied {
                Denied::Unnamed(_) => Kind::Malformed,
                _ => Kind::Denied,
            };
            Refused::new(kind, denied.to_string())
        })?;
        if let Caller::Node { .. } | Caller::Person { .. } = caller {
            self.quotas
                .certificate(caller.counts_for(), &grant.identity)?;
        }
        Ok((grant, in_progress))
    }

    /// Admits a watch of the trust bundle, which counts as a request while it is opened.
    async fn admit_watch(
        &self,
        peer: &Arc<Peer>,
        metadata: &MetadataMap,
    ) -> Result<(Arc<Authority>, Caller, WatchGuard), Refused> {
        let authority = self.authority()?;
        let caller = self.attest(peer, metadata).await?;
        let counted = self.quotas.request(caller.counts_for());
        counted.map_err(|exceeded| Refused::from(exceeded).by(&caller))?;
        let guard = peer.watch().ok_or_else(|| {
            let why = "this connection has too many watches already";
            Refused::new(Kind::TooLarge, why).by(&caller)
        })?;
        Ok((authority, caller, guard))
    }

    /// Counts and logs a refusal, and turns it into an answer. One that is over a quota has to wait for it, so that a
    /// caller that does not heed the retry time costs little.
    async fn refuse(&self, peer: &Peer, refused: Refused) -> Status {
        self.counters.refused(refused.kind);
        let caller = refused.caller.as_deref();
        let logged = match refused.over.as_deref() {
            None => true,
            Some(Over::Failures(source)) => self.quotas.report(source),
            Some(Over::Quota(exceeded)) => {
                self.counters.over_quota(exceeded.quota);
                self.quotas
                    .report(caller.map(Caller::counts_for).unwrap_or_default())
            }
        };
        if logged {
            let asked = refused.asked.as_deref();
            audit::refused(
                peer.address,
                caller,
                asked,
                refused.kind.name(),
                &refused.why,
            );
        }
        if refused.over.is_some() {
            tokio::time::sleep(HELD_BACK.mul_f64(1.0 + rand::random::<f64>())).await;
        }
        refused.status()
    }
}

/// Adds the caller and what it `asked` for to a refusal. A caller that is over a quota is remembered until its retry time.
fn attribute(
    refused: Refused,
    peer: &Peer,
    metadata: &MetadataMap,
    caller: &Caller,
    asked: Option<String>,
) -> Refused {
    if let Some(Over::Quota(exceeded)) = refused.over.as_deref() {
        let credentials = authorization(metadata);
        peer.over_rate.note(credentials, caller, *exceeded);
    }
    Refused {
        asked,
        ..refused.by(caller)
    }
}

/// The CSR of a request, DER.
fn csr(
    request: &IstioCertificateRequest,
) -> Result<CertificateSigningRequestDer<'static>, Refused> {
    CertificateSigningRequestDer::from_pem_slice(request.csr.as_bytes())
        .map_err(|_| Refused::new(Kind::Malformed, "csr: is not a CERTIFICATE REQUEST in PEM"))
}

/// The lifetime that a request asks for; zero for the longest.
fn requested(request: &IstioCertificateRequest) -> Duration {
    Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0))
}

/// The answer to a request as Istio's clients expect it: the last element holds everything that the caller is to trust.
fn answer(issued: &Issued) -> Vec<String> {
    let chain = issued.chain.iter().map(|der| pem::certificate(der));
    chain.chain([pem::certificates(&issued.roots)]).collect()
}

fn is_join_token(bearer: &str) -> bool {
    bearer.starts_with(JOIN_TOKEN_PREFIX)
}

fn authorization(metadata: &MetadataMap) -> &[u8] {
    let value = metadata.get("authorization");
    value.map(MetadataValue::as_bytes).unwrap_or_default()
}

/// The token of `authorization`, whose scheme may have any case (RFC 9110 §11.1).
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
        _ => return Err(refused("authorization is not a bearer token")),
    };
    match token.len() {
        0 => Err(refused("the bearer token is empty")),
        1..=MAX_TOKEN => Ok(Some(token)),
        _ => Err(refused("the bearer token is too long")),
    }
}

/// The identity that a node asks for. Istio's clients leave it out, or empty, to ask for themselves.
fn impersonated(request: &IstioCertificateRequest) -> Result<Option<String>, Refused> {
    let metadata = request.metadata.as_ref();
    match metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY)) {
        None => Ok(None),
        Some(value) => match &value.kind {
            Some(FieldKind::StringValue(text)) if text.is_empty() => Ok(None),
            Some(FieldKind::StringValue(text)) => Ok(Some(text.clone())),
            _ => {
                let why = format!("metadata.{IMPERSONATED_IDENTITY}: is not a string");
                Err(Refused::new(Kind::Malformed, why))
            }
        },
    }
}

fn peer<T>(request: &Request<T>) -> Result<Arc<Peer>, Status> {
    let peer = request.extensions().get::<Arc<Peer>>();
    peer.cloned()
        .ok_or_else(|| Status::internal("the connection is not known"))
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = peer(&request)?;
        let (metadata, _, request) = request.into_parts();
        match self.issue(&peer, &metadata, &request).await {
            Ok(cert_chain) => Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Err(refused) => Err(self.refuse(&peer, refused).await),
        }
    }
}

/// Streams the trust bundle to daemons.
pub(crate) struct TrustWatches {
    pub(crate) service: Arc<CaService>,
    pub(crate) stopped: watch::Receiver<bool>,
}

/// The watch of one daemon.
struct Watcher {
    leader: Leader,
    published: watch::Receiver<Arc<Published>>,
    stopped: watch::Receiver<bool>,
    first: bool,
    _guard: WatchGuard,
}

impl Watcher {
    /// The next message: the newest bundle, whatever was missed since the last one. An error ends the stream.
    async fn next(&mut self) -> Result<Trust, Status> {
        if !std::mem::take(&mut self.first) {
            let ended = tokio::select! {
                _ = self.stopped.wait_for(|stopped| *stopped) => Some("the CA is stopping"),
                _ = self.leader.changed() => Some(NOT_THE_LEADER),
                changed = self.published.changed() => changed.err().map(|_| NOT_THE_LEADER),
            };
            if let Some(why) = ended {
                return Err(Status::unavailable(why));
            }
        }
        Ok(message(&self.published.borrow_and_update()))
    }
}

#[tonic::async_trait]
impl TrustService for TrustWatches {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Trust, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (peer, service) = (peer(&request)?, &*self.service);
        let mut leader = service.leader.clone();
        leader.mark_unchanged();
        let (authority, caller, guard) = match service.admit_watch(&peer, request.metadata()).await
        {
            Ok(admitted) => admitted,
            Err(refused) => return Err(service.refuse(&peer, refused).await),
        };
        tracing::info!(peer = %peer.address, %caller, "trust watch started");
        let watcher = Watcher {
            leader,
            published: authority.published(),
            stopped: self.stopped.clone(),
            first: true,
            _guard: guard,
        };
        let messages = stream::unfold(Some(watcher), |watcher| async move {
            let mut watcher = watcher?;
            let next = watcher.next().await;
            let watcher = next.is_ok().then_some(watcher);
            Some((next, watcher))
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

fn message(published: &Published) -> Trust {
    let denial = |name: &str, reason: &Reason| Denial {
        name: name.to_owned(),
        reason: reason.as_str().to_owned(),
    };
    let ders =
        |certificates: &[CertificateDer<'_>]| certificates.iter().map(|c| c.to_vec()).collect();
    let (identities, nodes) = (&published.revoked.identities, &published.revoked.nodes);
    Trust {
        version: published.version,
        roots: ders(&published.roots),
        crls: published.crls.clone(),
        denied_identities: identities
            .iter()
            .map(|(identity, reason)| denial(identity.as_str(), reason))
            .collect(),
        denied_nodes: nodes
            .iter()
            .map(|(node, reason)| denial(node, reason))
            .collect(),
        phase: published.phase.clone(),
        intermediates: ders(&published.intermediates),
        jwt_keys: published.jwt_keys.to_json(),
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::{Inventory, ObjectName, Snapshot, Workload};

    use super::*;
    use crate::{connection::Source, quotas::Limits};

    struct NodeB;

    #[tonic::async_trait]
    impl Attestor for NodeB {
        async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>> {
            let node = "b".to_owned();
            credentials.bearer.map(|_| Ok(Caller::Node { node }))
        }
    }

    #[tokio::test]
    async fn a_pod_that_claims_the_address_of_a_node_does_not_share_its_turns() {
        let address: IpAddr = "10.0.0.2".parse().unwrap();
        let name = ObjectName {
            namespace: "default".into(),
            name: "web".into(),
        };
        let identity = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        let registry = Registry::new();
        registry.publish(Snapshot::new(Inventory {
            workloads: vec![Workload {
                node: "a".into(),
                addresses: vec![address],
                ..Workload::new(name, identity)
            }],
            services: vec![],
        }));
        let service = CaService {
            trust_domain: TrustDomain::default(),
            attestors: vec![Arc::new(NodeB)],
            registry: Arc::new(registry),
            leader: watch::channel(None).1,
            counters: Arc::default(),
            quotas: Arc::new(Quotas::new(Limits::default())),
            turns: FairQueue::of_processors(),
            attestations: FairQueue::new(32, 8),
            lifetime: Duration::from_secs(60),
        };
        assert_eq!(&*service.source(address), "a");
        let source = Source::new(service.source(address));
        let peer = Peer::new((address, 1).into(), source, None);
        let mut metadata = MetadataMap::new();
        assert!(service.attest(&peer, &metadata).await.is_err());
        assert_eq!(&*peer.source.get(), "a");
        metadata.insert("authorization", "Bearer x".parse().unwrap());
        assert!(service.attest(&peer, &metadata).await.is_ok());
        assert_eq!(&*peer.source.get(), "b");
        assert_eq!(&*service.source(address), "b");
    }

    #[test]
    fn reads_bearer_tokens() {
        let authorization = |values: &[&str]| {
            let mut metadata = MetadataMap::new();
            for value in values {
                metadata.append("authorization", value.parse().unwrap());
            }
            metadata
        };
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
}
