//! The CA's server: the port for callers, the operator's socket, readiness and metrics.

use std::{
    convert::Infallible,
    io::ErrorKind,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use anyhow::Context;
use auth_ca_api::{
    auth::{jwt_service_server::JwtServiceServer, trust_service_server::TrustServiceServer},
    istio::istio_certificate_service_server::IstioCertificateServiceServer,
};
use auth_mesh::Registry;
use auth_support::{
    connection_limit::ConnectionLimit,
    fair_queue::FairQueue,
    http_server::{answer as answer_http, open_metrics},
};
use auth_tunnel::tls::explain;
use axum::{Router, http::StatusCode, response::IntoResponse, routing::get};
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry as MetricsRegistry};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{Code, Status, body::Body, codegen::http, service::Routes};
use tower::ServiceExt;

use crate::{
    attest::{Attestor, certificate::Certificates},
    audit,
    authority::Leader,
    config::CaConfig,
    connection::{Connection, Peer, Source},
    counters::Kind,
    operator,
    quotas::{Limits, Quotas},
    server_tls::{self, CurrentTls},
    service::{CaService, TrustWatches},
};

/// From TCP to the end of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
const MAX_HANDSHAKES: usize = 1024;
const MAX_HANDSHAKES_PER_SOURCE: usize = 256;
const MAX_CONNECTIONS: usize = 16_384;
/// All pods of a node may call from one address.
const MAX_CONNECTIONS_PER_SOURCE: usize = 256;
const CLOSED: &str = "the peer closed the connection";
/// How often exhausted limits are logged, at most.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
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
        let tls = CurrentTls::default();
        if let Some(readiness) = self.readiness {
            let routes = health(service.clone(), tls.clone(), stopped.clone());
            tokio::spawn(answer_http(readiness, routes));
        }
        let front = Arc::new(Front {
            routes: routes(&service, &stopped),
            service: service.clone(),
            tls: tls.clone(),
            stopped: stopped.clone(),
        });
        let trust_domain = &service.trust_domain;
        let renewal =
            server_tls::keep_current(service.leader.clone(), &self.names, trust_domain, &tls);
        let (counters, quotas) = (service.counters.clone(), service.quotas.clone());
        let operator = self
            .operator
            .serve(service.leader.clone(), counters, quotas, stopped);
        let serving = async { tokio::join!(front.accept(self.listener), operator) };
        tokio::select! {
            // First, so that the first caller finds a certificate.
            biased;
            never = renewal => match never {},
            _ = serving => {}
        }
    }
}

/// The services that callers reach.
fn routes(service: &Arc<CaService>, stopped: &watch::Receiver<bool>) -> Routes {
    let watches = TrustServiceServer::new(TrustWatches {
        service: service.clone(),
        stopped: stopped.clone(),
    });
    let jwts = JwtServiceServer::from_arc(service.clone());
    let requests = IstioCertificateServiceServer::from_arc(service.clone());
    Routes::new(requests.max_decoding_message_size(MAX_REQUEST))
        .add_service(jwts.max_decoding_message_size(MAX_REQUEST))
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
    turns: Arc<FairQueue<Arc<str>>>,
    source: Arc<Source>,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for InTurns {
    fn execute(&self, task: F) {
        let source = self.source.clone();
        tokio::spawn(self.turns.clone().run(move || source.get(), task));
    }
}

/// What connections need.
struct Front {
    service: Arc<CaService>,
    routes: Routes,
    tls: CurrentTls,
    stopped: watch::Receiver<bool>,
}

impl Front {
    /// Accepts connections from `tcp` until the server stops, then gives those that are open [`GRACE`] to end. Everything
    /// is limited before a caller is known: handshakes and connections, in total and for each address, and their times.
    async fn accept(self: Arc<Self>, tcp: TcpListener) {
        let handshakes = ConnectionLimit::new(MAX_HANDSHAKES, MAX_HANDSHAKES_PER_SOURCE);
        let connections = ConnectionLimit::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE);
        let (handshakes, connections) = (Arc::new(handshakes), Arc::new(connections));
        let mut stopped = self.stopped.clone();
        let mut logged: Option<Instant> = None;
        let mut tasks = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => break,
                Some(_) = tasks.join_next() => continue,
                incoming = tcp.accept() => incoming,
            };
            let (stream, address) = match incoming {
                Ok(incoming) => incoming,
                // Errors of one connection pass; a lack of file descriptors lasts.
                Err(error) => {
                    tracing::error!(%error, "connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let ip = address.ip().to_canonical();
            let permits = (handshakes.admit(ip), connections.admit(ip));
            let (Some(handshake), Some(connection)) = permits else {
                self.service.counters.refused_connections.inc();
                if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                    logged = Some(Instant::now());
                    tracing::warn!(
                        peer = %address, handshakes = handshakes.taken(), connections = connections.taken(),
                        "connection refused: too many connections or handshakes"
                    );
                }
                continue;
            };
            // A replica that was never the leader has no certificate yet: callers try another one.
            let Some(tls) = self.tls.load_full() else {
                tracing::debug!(peer = %address, "connection closed: this replica is not the leader");
                continue;
            };
            let front = self.clone();
            let source = Source::new(self.service.source(ip));
            // All work on connections, from the handshake on, has turns by source.
            let turns = self.service.turns.clone();
            let key = source.clone();
            tasks.spawn(turns.run(move || key.get(), async move {
                let tls = front.shake_hands(stream, address, &source.get(), tls).await;
                drop(handshake);
                if let Some(tls) = tls {
                    front
                        .serve(Connection::new(tls, address, source, connection))
                        .await;
                }
            }));
        }
        drop(tcp);
        let all_ended = async { while tasks.join_next().await.is_some() {} };
        let _ = timeout(GRACE, all_ended).await;
    }

    /// The TLS handshake. Counts and logs its failure.
    async fn shake_hands(
        &self,
        tcp: TcpStream,
        address: SocketAddr,
        source: &str,
        tls: Arc<ServerConfig>,
    ) -> Option<TlsStream<TcpStream>> {
        let late = |_| Err(format!("not finished within {HANDSHAKE:?}"));
        let handshake = timeout(HANDSHAKE, handshake_with(tcp, tls)).await;
        match handshake.unwrap_or_else(late) {
            Ok(tls) => return Some(tls),
            // Probes only check whether the port is open.
            Err(why) if why == CLOSED => {
                tracing::debug!(peer = %address, why, "TLS handshake failed");
            }
            Err(why) if self.service.quotas.report(source) => {
                audit::refused(address, None, None, "handshake", &why);
            }
            Err(_) => {}
        }
        self.service.counters.failed_handshakes.inc();
        None
    }

    /// Serves HTTP/2 on `connection` until it ends. When the server stops, requests in progress are answered.
    async fn serve(self: Arc<Self>, connection: Connection) {
        let peer = connection.peer.clone();
        let tasks = InTurns {
            turns: self.service.turns.clone(),
            source: peer.source.clone(),
        };
        let mut stopped = self.stopped.clone();
        let caller = peer.clone();
        let answer = service_fn(move |request| {
            let (front, caller) = (self.clone(), caller.clone());
            let guard = caller.request();
            async move {
                let answer = front.answer(caller, request).await;
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
        let stop = async { drop(stopped.wait_for(|stopped| *stopped).await) };
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
        &self,
        peer: Arc<Peer>,
        mut request: http::Request<Incoming>,
    ) -> http::Response<Body> {
        let path = request.uri().path().chars().take(128).collect::<String>();
        request.extensions_mut().insert(peer.clone());
        let answer = timeout(REQUEST, self.routes.clone().oneshot(request)).await;
        let refused = |kind: Kind, why: &str| {
            self.service.counters.refused(kind);
            // The caller may be unknown, so it has no quota yet.
            if self.service.quotas.report(&peer.source.get()) {
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
}

async fn handshake_with(
    tcp: TcpStream,
    tls: Arc<ServerConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    tcp.set_nodelay(true).map_err(|error| error.to_string())?;
    let stream = TlsAcceptor::from(tls).accept(tcp).await.map_err(|error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        match inner {
            Some(error) => explain(error),
            None if error.kind() == ErrorKind::UnexpectedEof => CLOSED.to_owned(),
            None => error.to_string(),
        }
    })?;
    // Old clients offer no protocol, and mean HTTP/2 (gRPC has no other).
    match stream.get_ref().1.alpn_protocol() {
        None | Some(b"h2") => Ok(stream),
        Some(_) => Err("the peer does not offer HTTP/2".into()),
    }
}

/// The code of an answer without a body.
fn code(answer: &http::Response<Body>) -> Option<Code> {
    let status = answer.headers().get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}
