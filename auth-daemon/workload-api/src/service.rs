//! What the API answers to one workload.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use auth_mesh::Identity;
use auth_tunnel::tls::{
    svid::Svid,
    trust::{Trust, TrustStore},
};
use futures_util::{Stream, stream};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::api::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svidRequest,
    X509svidResponse, spiffe_workload_api_server::SpiffeWorkloadApi,
};
use crate::{JwtIssuer, jwt};

/// Maximum number of open streams of a workload.
const MAX_STREAMS: usize = 32;
/// How long a request waits for the workload's first certificate.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(10);
/// Every request must have this in its metadata, which a browser or a forged HTTP request cannot add (SPIFFE Workload
/// Endpoint §5).
const REQUIRED: (&str, &str) = ("workload.spiffe.io", "true");
const NO_KEYS: &str = "no key that verifies JWT-SVIDs is known: the mesh's CA issues none (istiod, or a CA in a directory) or has not \
                       answered yet, and no federated trust domain publishes one";

/// A certificate with its key.
#[derive(Debug)]
pub struct X509Svid {
    /// Its content.
    pub svid: Svid,
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key.
    pub key: PrivatePkcs8KeyDer<'static>,
}

/// What the API serves to one workload.
#[derive(Clone, Debug)]
pub struct Served {
    /// The workload's identity.
    pub identity: Identity,
    /// The workload's certificate, and each that replaces it. The sender ends all streams when it is dropped.
    pub svid: watch::Receiver<Option<Arc<X509Svid>>>,
    /// Notified when the workload asks for its certificate.
    pub wanted: Arc<Notify>,
    /// The trust bundle.
    pub trust: Arc<TrustStore>,
    /// Where its JWT-SVIDs come from.
    pub jwts: Arc<dyn JwtIssuer>,
}

impl Served {
    /// Returns the roots of all trust domains, by their SPIFFE IDs.
    fn roots(&self) -> BTreeMap<String, Vec<u8>> {
        let (own, foreign) = (self.trust.current(), self.trust.foreign());
        let mut roots: BTreeMap<_, _> = foreign
            .iter()
            .map(|(name, roots)| (id(name), concat(roots)))
            .collect();
        let bundle = &own.bundle;
        roots.insert(id(bundle.trust_domain.as_str()), concat(&bundle.roots));
        roots
    }

    /// Returns the certificate, unless it has expired or is revoked.
    fn current(&mut self, trust: &Trust) -> Option<Arc<X509Svid>> {
        let current = self.svid.borrow_and_update().clone();
        current.filter(|held| {
            held.svid.not_after > SystemTime::now() && trust.revoked.check(&held.svid).is_ok()
        })
    }
}

/// The API of one workload.
#[derive(Debug)]
pub(crate) struct Service {
    served: Served,
    streams: Arc<Semaphore>,
}

impl Service {
    pub(crate) fn new(served: Served) -> Self {
        Self {
            served,
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
        }
    }

    /// Checks a request that opens a stream, and counts the stream until the permit is dropped.
    fn open<T>(&self, request: &Request<T>) -> Result<OwnedSemaphorePermit, Status> {
        check_metadata(request.metadata())?;
        let permit = self.streams.clone().try_acquire_owned();
        permit.map_err(|_| {
            Status::resource_exhausted(format!(
                "the workload has {MAX_STREAMS} streams open: keep one for each use, and close the others"
            ))
        })
    }
}

fn check_metadata(metadata: &MetadataMap) -> Result<(), Status> {
    let (name, value) = REQUIRED;
    let given = metadata.get(name).map(|given| given.as_bytes());
    if given == Some(value.as_bytes()) {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "the request's metadata lacks {name}: {value}, which SPIFFE's clients send"
    )))
}

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Service {
    type FetchX509SVIDStream = Answers<X509svidResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let permit = self.open(&request)?;
        self.served.wanted.notify_one();
        let mut state = Following::new(self.served.clone(), permit);
        let first = timeout(FIRST_CERTIFICATE, state.next_svid());
        let first = first.await.unwrap_or_else(|_| {
            Some(Err(Status::unavailable(format!(
                "the CA has issued no certificate of {} within {FIRST_CERTIFICATE:?}: the node daemon's log says why",
                state.served.identity
            ))))
        });
        let first = first.ok_or_else(ended)??;
        let rest = stream::unfold(state, async |mut state| {
            Some((state.next_svid().await?, state))
        });
        let first = stream::once(std::future::ready(Ok(first)));
        Ok(Response::new(Box::pin(stream::StreamExt::chain(
            first, rest,
        ))))
    }

    type FetchX509BundlesStream = Answers<X509BundlesResponse>;

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        let permit = self.open(&request)?;
        let state = Following::new(self.served.clone(), permit);
        let answers = stream::unfold(state, async |mut state| {
            let answer = X509BundlesResponse {
                bundles: state.next_bundles(Served::roots).await?,
            };
            Some((Ok(answer), state))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let _permit = self.open(&request)?;
        let answer = jwt::fetch(&self.served, request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        let permit = self.open(&request)?;
        if self.served.trust.jwt_keys().is_empty() {
            return Err(Status::unavailable(NO_KEYS));
        }
        let state = Following::new(self.served.clone(), permit);
        let answers = stream::unfold(state, async |mut state| {
            let bundles = state.next_bundles(|served| jwt::bundles(&served.trust));
            let answer = JwtBundlesResponse {
                bundles: bundles.await?,
            };
            Some((Ok(answer), state))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        let _permit = self.open(&request)?;
        let answer = jwt::validate(&self.served.trust, request.get_ref())?;
        Ok(Response::new(answer))
    }
}

/// The certificates one after the other, as the API has them.
fn concat(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    let ders: Vec<&[u8]> = certificates.iter().map(AsRef::as_ref).collect();
    ders.concat()
}

/// The SPIFFE ID of a trust domain, by which the API names bundles.
pub(crate) fn id(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

fn ended() -> Status {
    Status::unavailable("the node daemon serves this workload no more")
}

/// A stream: what it follows, and what it has sent.
struct Following {
    served: Served,
    trust_changes: watch::Receiver<u64>,
    /// The serial number of the last certificate sent.
    sent_serial: Option<Arc<str>>,
    /// The last bundles sent, by the trust domain's SPIFFE ID.
    sent_bundles: Option<BTreeMap<String, Vec<u8>>>,
    _permit: OwnedSemaphorePermit,
}

impl Following {
    fn new(served: Served, permit: OwnedSemaphorePermit) -> Self {
        Self {
            trust_changes: served.trust.changes(),
            served,
            sent_serial: None,
            sent_bundles: None,
            _permit: permit,
        }
    }

    /// Returns the certificate and the bundle as soon as one of them differs from what was sent. `None` when the workload is
    /// served no more.
    async fn next_svid(&mut self) -> Option<Result<X509svidResponse, Status>> {
        loop {
            self.trust_changes.borrow_and_update();
            let trust = self.served.trust.current();
            if let Err(revoked) = trust.revoked.check_identity(&self.served.identity) {
                return Some(Err(Status::permission_denied(revoked.to_string())));
            }
            let roots = self.served.roots();
            if let Some(current) = self.served.current(&trust)
                && (self.sent_serial.as_ref() != Some(&current.svid.serial)
                    || self.sent_bundles.as_ref() != Some(&roots))
            {
                let mut federated_bundles = roots.clone();
                let own = federated_bundles.remove(&id(trust.bundle.trust_domain.as_str()));
                self.sent_bundles = Some(roots);
                self.sent_serial = Some(current.svid.serial.clone());
                return Some(Ok(X509svidResponse {
                    svids: vec![crate::api::X509svid {
                        spiffe_id: current.svid.identity.to_string(),
                        x509_svid: concat(&current.chain),
                        x509_svid_key: current.key.secret_pkcs8_der().to_vec(),
                        bundle: own.unwrap_or_default(),
                    }],
                    federated_bundles,
                }));
            }
            self.changed().await?;
        }
    }

    /// Returns the bundles as soon as they differ from what was sent. `None` when the workload is served no more.
    async fn next_bundles(
        &mut self,
        bundles: impl Fn(&Served) -> BTreeMap<String, Vec<u8>>,
    ) -> Option<BTreeMap<String, Vec<u8>>> {
        loop {
            self.trust_changes.borrow_and_update();
            let bundles = bundles(&self.served);
            if self.sent_bundles.as_ref() != Some(&bundles) {
                return Some(self.sent_bundles.insert(bundles).clone());
            }
            self.changed().await?;
        }
    }

    /// Waits for another certificate or another bundle.
    async fn changed(&mut self) -> Option<()> {
        tokio::select! {
            changed = self.served.svid.changed() => changed.ok(),
            changed = self.trust_changes.changed() => changed.ok(),
        }
    }
}
