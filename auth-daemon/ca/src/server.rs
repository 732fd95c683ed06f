//! The CA's server: the port for callers, the operator's socket, readiness and metrics.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use anyhow::Context;
use auth_ca_api::{
    auth::trust_service_server::TrustServiceServer,
    istio::istio_certificate_service_server::IstioCertificateServiceServer,
};
use auth_mesh::Registry;
use auth_support::http_server::{answer as answer_http, open_metrics};
use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry as MetricsRegistry};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tonic::{Code, Status, body::Body, codegen::http, service::Routes};
use tower::ServiceExt;

use crate::{
    attest::{Attestor, certificate::Certificates},
    audit,
    authority::Leader,
    config::CaConfig,
    connections::{Connection, Peer, Serving},
    counters::Kind,
    fair_queue::FairQueue,
    operator,
    quotas::{Limits, Quotas},
    server_tls::{self, CurrentTls},
    service::{CaService, TrustWatches},
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
/// For [`tokio::runtime::Builder::event_interval`]: how many tasks the runtime polls before it looks for packets again.
/// The default, 61, would let a flood of requests delay the packets of others by milliseconds.
pub const EVENT_INTERVAL: u32 = 4;

/// The bound server.
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
                turns: FairQueue::of_processors(),
                attestations: FairQueue::new(32, 8),
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
            tokio::spawn(answer_http(readiness, routes));
        }
        let (routes, turns) = (routes(&service, &stopped), service.turns.clone());
        let (placing, serving, stop) = (service.clone(), service, stopped.clone());
        let serving = Serving {
            tls,
            counters: counters.clone(),
            quotas: quotas.clone(),
            turns,
            source: move |address| placing.source(address),
            serve: move |connection| {
                serve(connection, routes.clone(), serving.clone(), stop.clone())
            },
        };
        let serving = serving.accept(self.listener, stopped.clone(), GRACE);
        let operator = self.operator.serve(leader, counters, quotas, stopped);
        tokio::join!(serving, operator);
        renewal.abort();
    }
}

/// The services that callers reach.
fn routes(service: &Arc<CaService>, stopped: &watch::Receiver<bool>) -> Routes {
    let watches = TrustServiceServer::new(TrustWatches {
        service: service.clone(),
        stopped: stopped.clone(),
    });
    let requests = IstioCertificateServiceServer::from_arc(service.clone());
    Routes::new(requests.max_decoding_message_size(MAX_REQUEST))
        .add_service(watches.max_decoding_message_size(MAX_REQUEST))
        .prepare()
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

/// Runs the tasks of a connection in the turns of its source.
#[derive(Clone)]
struct InTurns {
    turns: Arc<FairQueue>,
    source: Arc<str>,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for InTurns {
    fn execute(&self, task: F) {
        tokio::spawn(self.turns.clone().run(self.source.clone(), task));
    }
}

/// Serves HTTP/2 on `connection` until it ends. When `stopped` is true, requests in progress are answered.
async fn serve(
    connection: Connection,
    routes: Routes,
    service: Arc<CaService>,
    mut stopped: watch::Receiver<bool>,
) {
    let peer = connection.peer.clone();
    let tasks = InTurns {
        turns: service.turns.clone(),
        source: peer.source.clone(),
    };
    let caller = peer.clone();
    let answer = service_fn(move |request| {
        let guard = caller.request();
        let answer = answer(routes.clone(), service.clone(), caller.clone(), request);
        async move {
            let answer = answer.await;
            drop(guard);
            Ok::<_, Infallible>(answer)
        }
    });
    let served = http2::Builder::new(tasks)
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(Some(KEEPALIVE))
        .keep_alive_timeout(KEEPALIVE)
        .serve_connection(TokioIo::new(connection), answer);
    let mut served = pin!(served);
    let stop = async {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stop => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(peer = %peer.address, %error, "connection ended");
    }
}

/// Answers `request` within its deadline, and counts what tonic refuses.
async fn answer(
    routes: Routes,
    service: Arc<CaService>,
    peer: Arc<Peer>,
    mut request: http::Request<Incoming>,
) -> http::Response<Body> {
    let path = request.uri().path().chars().take(128).collect::<String>();
    request.extensions_mut().insert(peer.clone());
    let answer = timeout(REQUEST, routes.oneshot(request)).await;
    let refused = |kind: Kind, why: &str| {
        service.counters.refused(kind);
        // The caller may be unknown, so it has no quota yet.
        if service.quotas.report(&peer.source) {
            audit::refused(peer.address, None, Some(&path), kind.name(), why);
        }
    };
    match answer {
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
    }
}

/// The code of an answer without a body.
fn code(answer: &http::Response<Body>) -> Option<Code> {
    let status = answer.headers().get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}
