//! The CA's server: the port for callers, the operator's socket, readiness and metrics.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::AtomicU64},
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use anyhow::Context;
use auth_ca_api::{
    auth::trust_service_server::TrustServiceServer,
    istio::istio_certificate_service_server::IstioCertificateServiceServer,
};
use auth_mesh::Registry;
use auth_support::http_server::{answer, open_metrics};
use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry as MetricsRegistry};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http},
};
use tower::layer::layer_fn;

use crate::{
    attest::{Attestor, certificate::Certificates},
    audit,
    authority::Leader,
    config::CaConfig,
    connections::{self, Peer},
    counters::{Counters, Kind},
    operator,
    quotas::{Limits, Quotas},
    server_tls::{self, CurrentTls},
    service::{CaService, Queues, TrustWatches},
};

/// Largest request, in bytes.
const MAX_REQUEST: usize = 64 << 10;
/// Until the answer to a request, or its beginning.
const REQUEST: Duration = Duration::from_secs(10);
/// For requests in progress when the server stops.
const GRACE: Duration = Duration::from_secs(10);
/// A peer that is gone is detected within two of these.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Requests of a connection at once. A node's daemon has one connection for all of its requests.
const MAX_STREAMS: u32 = 32;
/// Unread bytes that are accepted on a stream and on a connection.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;
const MAX_HEADERS: u32 = 16 << 10;
/// Connections after their handshake that wait for the HTTP/2 server.
const ACCEPTED: usize = 64;

/// The bound server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    readiness: Option<TcpListener>,
    operator: operator::Socket,
    service: Arc<CaService>,
    names: Vec<String>,
}

impl Server {
    /// Binds the addresses and the operator's socket of `config`. `attestors` identify callers, in this order; holders of
    /// certificates that the leader issued are known besides. Callers have the quotas `limits`.
    pub async fn bind(
        config: &CaConfig,
        mut attestors: Vec<Arc<dyn Attestor>>,
        registry: Arc<Registry>,
        leader: Leader,
        limits: Limits,
    ) -> anyhow::Result<Self> {
        attestors.push(Arc::new(Certificates::new(leader.clone())));
        let readiness = match config.readiness {
            Some(address) => Some(listen("readiness", address).await?),
            None => None,
        };
        Ok(Self {
            listener: listen("listen", config.listen).await?,
            readiness,
            operator: operator::Socket::bind(&config.operator_socket).await?,
            service: Arc::new(CaService {
                trust_domain: config.trust_domain.clone(),
                attestors,
                registry,
                leader,
                counters: Arc::default(),
                quotas: Arc::new(Quotas::new(limits)),
                queues: Queues::new(),
                lifetime: config.certificate_lifetime,
            }),
            names: config.server_names.clone(),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stopped` is true. Requests in progress are answered.
    pub async fn run(self, stopped: watch::Receiver<bool>) {
        let service = self.service;
        let (leader, counters) = (service.leader.clone(), service.counters.clone());
        let quotas = service.quotas.clone();
        let tls = CurrentTls::default();
        // The first caller finds a certificate.
        if let Some(authority) = leader.borrow().clone() {
            let roots = authority.published().borrow().roots.clone();
            server_tls::renew(&authority, &roots, &self.names, &service.trust_domain, &tls);
        }
        let renewal = tokio::spawn(server_tls::keep_current(
            leader.clone(),
            self.names,
            service.trust_domain.clone(),
            tls.clone(),
        ));
        if let Some(readiness) = self.readiness {
            let routes = health(service.clone(), tls.clone(), stopped.clone());
            tokio::spawn(answer(readiness, routes));
        }
        let (accepted, incoming) = mpsc::channel(ACCEPTED);
        let accepting = connections::accept(
            self.listener,
            tls,
            counters.clone(),
            accepted,
            stopped.clone(),
        );
        let serving = serve(service, incoming, stopped.clone());
        let operator = self.operator.serve(leader, counters, quotas, stopped);
        tokio::join!(accepting, serving, operator);
        renewal.abort();
    }
}

async fn listen(field: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("{field}: cannot listen on {address}; is another CA running here?")
    })
}

/// Readiness and metrics.
fn health(service: Arc<CaService>, tls: CurrentTls, stopped: watch::Receiver<bool>) -> Router {
    let counted = service.clone();
    let ready = move || {
        let standby = service.leader.borrow().is_none();
        let knows_pods = *service.registry.changes().borrow() > 0;
        let can_serve = (standby || tls.load().is_some()) && knows_pods && !*stopped.borrow();
        let answer = match (can_serve, standby) {
            (true, true) => (StatusCode::OK, "standby\n"),
            (true, false) => (StatusCode::OK, "ready\n"),
            (false, _) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "not ready: pods are not known yet, there is no server certificate, or the CA is stopping\n",
            ),
        };
        std::future::ready(answer)
    };
    Router::new()
        .route("/healthz/ready", get(ready))
        .route("/metrics", get(async move || metrics(&counted)))
}

fn metrics(service: &CaService) -> impl IntoResponse + use<> {
    let mut registry = MetricsRegistry::with_prefix("auth_ca");
    service.counters.register(&mut registry);
    let leader = Gauge::<u64, AtomicU64>::default();
    leader.set(service.leader.borrow().is_some().into());
    registry.register("leader", "Whether this replica signs", leader);
    open_metrics(&registry)
}

/// Serves HTTP/2 on the accepted connections.
async fn serve(
    service: Arc<CaService>,
    incoming: mpsc::Receiver<std::io::Result<connections::Connection>>,
    mut stopped: watch::Receiver<bool>,
) {
    let counters = service.counters.clone();
    let watches = TrustWatches {
        service: service.clone(),
        stopped: stopped.clone(),
    };
    let watches = TrustServiceServer::new(watches).max_decoding_message_size(MAX_REQUEST);
    let requests = IstioCertificateServiceServer::from_arc(service);
    let requests = requests.max_decoding_message_size(MAX_REQUEST);
    let mut stop = stopped.clone();
    let serving = tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .layer(layer_fn(move |inner| Guarded {
            inner,
            counters: counters.clone(),
        }))
        .add_service(requests)
        .add_service(watches)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async move {
            let _ = stop.wait_for(|stopped| *stopped).await;
        });
    tokio::pin!(serving);
    let stop = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let ended = tokio::select! {
        ended = serving.as_mut() => Some(ended),
        () = stop => timeout(GRACE, serving).await.ok(),
    };
    if let Some(Err(error)) = ended {
        tracing::error!(%error, "server ended");
    }
}

/// Gives each request its deadline, marks its connection as in use, and counts what tonic refuses.
#[derive(Clone)]
struct Guarded<S> {
    inner: S,
    counters: Arc<Counters>,
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let guard = peer.as_ref().map(Peer::request);
        let path = request.uri().path().chars().take(128).collect::<String>();
        let answer = self.inner.call(request);
        let counters = self.counters.clone();
        Box::pin(async move {
            let answer = timeout(REQUEST, answer).await;
            drop(guard);
            let refused = |kind: Kind, why: &str| {
                counters.refused(kind);
                if let Some(peer) = &peer {
                    audit::refused(peer, None, Some(&path), kind.name(), why);
                }
            };
            Ok(match answer {
                // tonic's code for a message over the limit.
                Ok(Ok(answer)) if code(&answer) == Some(Code::OutOfRange) => {
                    let why = "the request is larger than the CA accepts";
                    refused(Kind::TooLarge, why);
                    Status::resource_exhausted(why).into_http()
                }
                Ok(Ok(answer)) => answer,
                Err(_) => {
                    let why = format!("not answered within {REQUEST:?}");
                    refused(Kind::Unavailable, &why);
                    Status::deadline_exceeded(why).into_http()
                }
            })
        })
    }
}

/// The code of an answer without a body.
fn code(answer: &http::Response<Body>) -> Option<Code> {
    let status = answer.headers().get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}
