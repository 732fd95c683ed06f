//! What the API answers to one workload.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use auth_mesh::Identity;
use auth_tunnel::tls::{
    svid::Svid,
    trust::{ForeignBundles, Trust, TrustStore},
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

/// Maximum number of open streams of a workload.
const MAX_STREAMS: usize = 32;
/// How long a request waits for the workload's first certificate.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(10);
/// Every request must have this in its metadata, which a browser or a forged HTTP request cannot add (SPIFFE Workload
/// Endpoint §5).
const REQUIRED: (&str, &str) = ("workload.spiffe.io", "true");
const NO_JWT: &str =
    "the mesh's CA signs X.509 certificates only, so there are no JWT-SVIDs: use the X.509-SVID";

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
}

impl Served {
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
            Some((state.next_bundles().await?, state))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch_jwtsvid(
        &self,
        _: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        Err(Status::unimplemented(NO_JWT))
    }

    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_jwt_bundles(
        &self,
        _: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(Status::unimplemented(NO_JWT))
    }

    async fn validate_jwtsvid(
        &self,
        _: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        Err(Status::unimplemented(NO_JWT))
    }
}

/// The certificates one after the other, as the API has them.
fn concat(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    let ders: Vec<&[u8]> = certificates.iter().map(AsRef::as_ref).collect();
    ders.concat()
}

/// The SPIFFE ID of a trust domain, by which the API names bundles.
fn id(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

fn by_trust_domain(bundles: &ForeignBundles) -> impl Iterator<Item = (String, Vec<u8>)> {
    bundles
        .iter()
        .map(|(name, roots)| (id(name), concat(roots)))
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
    /// The last bundles sent: the mesh's own, and the foreign ones.
    sent_bundles: Option<(Vec<CertificateDer<'static>>, Arc<ForeignBundles>)>,
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
            let bundles = (trust.bundle.roots.clone(), self.served.trust.foreign());
            if let Some(current) = self.served.current(&trust)
                && (self.sent_serial.as_ref() != Some(&current.svid.serial)
                    || self.sent_bundles.as_ref() != Some(&bundles))
            {
                let (roots, foreign) = &*self.sent_bundles.insert(bundles);
                self.sent_serial = Some(current.svid.serial.clone());
                return Some(Ok(X509svidResponse {
                    svids: vec![crate::api::X509svid {
                        spiffe_id: current.svid.identity.to_string(),
                        x509_svid: concat(&current.chain),
                        x509_svid_key: current.key.secret_pkcs8_der().to_vec(),
                        bundle: concat(roots),
                    }],
                    federated_bundles: by_trust_domain(foreign).collect(),
                }));
            }
            self.changed().await?;
        }
    }

    /// Returns the bundle as soon as it differs from what was sent. `None` when the workload is served no more.
    async fn next_bundles(&mut self) -> Option<Result<X509BundlesResponse, Status>> {
        loop {
            self.trust_changes.borrow_and_update();
            let trust = self.served.trust.current();
            let bundles = (trust.bundle.roots.clone(), self.served.trust.foreign());
            if self.sent_bundles.as_ref() != Some(&bundles) {
                let (roots, foreign) = &*self.sent_bundles.insert(bundles);
                let own = id(trust.bundle.trust_domain.as_str());
                let all = by_trust_domain(foreign).chain([(own, concat(roots))]);
                return Some(Ok(X509BundlesResponse {
                    bundles: all.collect(),
                }));
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
