//! The CA's port: TLS 1.3 and HTTP/2, bounded in every way before anybody is known.

use std::{
    convert::Infallible,
    future::Future,
    io::ErrorKind,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Body as HttpBody, Bytes, Service, StdError, http},
    service::Routes,
};

use super::{
    counters::{Counters, Kind},
    serving::Current,
};
use crate::{
    places::{Place, Places},
    tunnel::tls::explain,
};

/// TCP to the end of TLS.
const HANDSHAKE: Duration = Duration::from_secs(5);
const MAX_HANDSHAKES: usize = 1024;
const MAX_HANDSHAKES_PER_SOURCE: usize = 256;
const MAX_CONNECTIONS: usize = 16_384;
/// Callers behind one address: a node's pods, each with an agent of its own.
const MAX_CONNECTIONS_PER_SOURCE: usize = 1024;
/// Answer to a request, or its beginning.
const REQUEST: Duration = Duration::from_secs(10);
/// A new connection asks for something soon.
const FIRST_REQUEST: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(300);
/// For requests under way when the connection is to end.
const GRACE: Duration = Duration::from_secs(10);
/// A peer that is gone is noticed within two of these.
const KEEPALIVE: Duration = Duration::from_secs(10);
const MAX_STREAMS: u32 = 128;
/// Of one caller at once: each may hold one message that the caller is slow to read.
const MAX_WATCHES: usize = 4;
/// Largest request that is let in on a stream, and on a connection, unread.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 128 << 10;
const MAX_HEADERS: u32 = 16 << 10;
const HUNG_UP: &str = "the peer hung up";
/// How often full tables are logged, at most.
const COMPLAIN: Duration = Duration::from_secs(10);

/// Who is at the other end of a connection. Each request has it in its extensions.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// Holds to the CA's roots, and the peer has its key.
    pub(super) certificate: Option<CertificateDer<'static>>,
    watches: AtomicUsize,
    requests: watch::Sender<usize>,
}

impl Peer {
    fn new(address: SocketAddr, certificate: Option<CertificateDer<'static>>) -> Self {
        Self {
            address,
            certificate,
            watches: AtomicUsize::new(0),
            requests: watch::Sender::new(0),
        }
    }

    /// The connection is in use until the guard is dropped.
    fn busy(self: &Arc<Self>) -> Busy {
        self.requests.send_modify(|count| *count += 1);
        Busy(self.clone())
    }

    /// One watch more on this connection; `None` where there are too many.
    pub(super) fn watch(self: &Arc<Self>) -> Option<Watching> {
        let before = self.watches.fetch_add(1, Ordering::Relaxed);
        let watching = Watching { _busy: self.busy() };
        (before < MAX_WATCHES).then_some(watching)
    }

    /// Returns when nothing has been asked for `first`, or, after the first request, for `later`.
    async fn idle(&self, first: Duration, later: Duration) {
        let mut requests = self.requests.subscribe();
        let mut patience = first;
        loop {
            let asked = *requests.borrow_and_update() > 0;
            let change = requests.changed();
            // The sender is in `self`.
            if asked {
                let _ = change.await;
            } else if timeout(patience, change).await.is_err() {
                return;
            }
            patience = later;
        }
    }
}

struct Busy(Arc<Peer>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.requests.send_modify(|count| *count -= 1);
    }
}

/// See [`Peer::watch`].
pub(super) struct Watching {
    _busy: Busy,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self._busy.0.watches.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The listening socket, and what is behind it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) tcp: TcpListener,
    pub(super) tls: Current,
    pub(super) routes: Routes,
    pub(super) counters: Arc<Counters>,
}

impl Listener {
    /// Serves until `stopped` says so, then ends connections in good order.
    pub(super) async fn serve(self, mut stopped: watch::Receiver<bool>) {
        let handshakes = Arc::new(Places::new(MAX_HANDSHAKES, MAX_HANDSHAKES_PER_SOURCE));
        let connections = Arc::new(Places::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE));
        let mut complained: Option<Instant> = None;
        let mut tasks = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                _ = stopped.wait_for(|stopped| *stopped) => break,
                accepted = self.tcp.accept() => accepted,
                Some(_) = tasks.join_next() => continue,
            };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                // The peer's own doing passes; a lack of descriptors lasts.
                Err(error) => {
                    tracing::error!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let source = address.ip().to_canonical();
            let (Some(handshake), Some(connection)) =
                (handshakes.admit(source), connections.admit(source))
            else {
                self.counters
                    .refused_connections
                    .fetch_add(1, Ordering::Relaxed);
                if complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
                    complained = Some(Instant::now());
                    tracing::warn!(
                        peer = %address, handshakes = handshakes.taken(), connections = connections.taken(),
                        "too many connections or handshakes at once; refused"
                    );
                }
                continue;
            };
            // A replica that was never the leader has no certificate yet: whoever calls tries another one.
            let Some(tls) = self.tls.load_full() else {
                tracing::debug!(peer = %address, "this replica is not the leader; connection closed");
                continue;
            };
            tasks.spawn(connection_of(
                tcp,
                address,
                tls,
                self.routes.clone(),
                self.counters.clone(),
                (handshake, connection),
                stopped.clone(),
            ));
        }
        drop(self.tcp);
        while tasks.join_next().await.is_some() {}
    }
}

async fn connection_of(
    tcp: TcpStream,
    address: SocketAddr,
    tls: Arc<ServerConfig>,
    routes: Routes,
    counters: Arc<Counters>,
    (handshake, _connection): (Place, Place),
    stopped: watch::Receiver<bool>,
) {
    let shaken = match timeout(HANDSHAKE, shake_hands(tcp, tls)).await {
        Ok(shaken) => shaken,
        Err(_) => Err(format!("not finished within {HANDSHAKE:?}")),
    };
    drop(handshake);
    let tls = match shaken {
        Ok(tls) => tls,
        Err(why) => {
            counters.failed_handshakes.fetch_add(1, Ordering::Relaxed);
            // As probes do that only ask whether the port is open.
            if why == HUNG_UP {
                tracing::debug!(peer = %address, why, "TLS handshake failed");
            } else {
                tracing::info!(peer = %address, why, "TLS handshake failed");
            }
            return;
        }
    };
    let certificates = tls.get_ref().1.peer_certificates();
    let certificate =
        certificates.and_then(|chain| chain.first().map(|leaf| leaf.clone().into_owned()));
    let peer = Arc::new(Peer::new(address, certificate));
    converse(tls, peer, routes, counters, stopped).await;
}

async fn shake_hands(
    tcp: TcpStream,
    tls: Arc<ServerConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    tcp.set_nodelay(true).map_err(|error| error.to_string())?;
    let stream = TlsAcceptor::from(tls).accept(tcp).await.map_err(|error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        match inner {
            Some(error) => explain(error),
            None if error.kind() == ErrorKind::UnexpectedEof => HUNG_UP.to_owned(),
            None => error.to_string(),
        }
    })?;
    // Clients of old say nothing, and mean HTTP/2 (gRPC over HTTP/2 knows nothing else).
    match stream.get_ref().1.alpn_protocol() {
        None | Some(b"h2") => Ok(stream),
        Some(_) => Err("the peer does not speak HTTP/2".into()),
    }
}

async fn converse(
    tls: TlsStream<TcpStream>,
    peer: Arc<Peer>,
    routes: Routes,
    counters: Arc<Counters>,
    mut stopped: watch::Receiver<bool>,
) {
    let service = Guarded {
        peer: peer.clone(),
        routes,
        counters,
    };
    let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE);
    let connection = builder.serve_connection(TokioIo::new(tls), TowerToHyperService::new(service));
    tokio::pin!(connection);
    tokio::select! {
        outcome = connection.as_mut() => {
            if let Err(error) = outcome {
                tracing::debug!(peer = %peer.address, %error, "connection ended");
            }
            return;
        }
        () = peer.idle(FIRST_REQUEST, IDLE) => {}
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(GRACE, connection).await;
}

/// Gives each request its peer and its deadline, and sees when the connection is in use.
#[derive(Clone)]
struct Guarded {
    peer: Arc<Peer>,
    routes: Routes,
    counters: Arc<Counters>,
}

impl<B> Service<http::Request<B>> for Guarded
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError>,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<http::Request<B>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let busy = self.peer.busy();
        let path = request.uri().path().chars().take(128).collect::<String>();
        request.extensions_mut().insert(self.peer.clone());
        let answer = self.routes.call(request);
        let (peer, counters) = (self.peer.clone(), self.counters.clone());
        Box::pin(async move {
            let answer = timeout(REQUEST, answer).await;
            drop(busy);
            let refused = |kind: Kind, why: &str| {
                counters.refused(kind);
                tracing::warn!(peer = %peer.address, %path, kind = kind.name(), why, "request refused");
            };
            Ok(match answer {
                // tonic's word for a message that is larger than what is read.
                Ok(Ok(answer)) if code(&answer) == Some(Code::OutOfRange) => {
                    let why = "the request is larger than what is read here";
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

/// Of an answer that is nothing but a refusal.
fn code(answer: &http::Response<Body>) -> Option<Code> {
    let status = answer.headers().get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Arc<Peer> {
        Arc::new(Peer::new("127.0.0.1:1".parse().unwrap(), None))
    }

    #[test]
    fn a_connection_has_few_watches() {
        let peer = peer();
        let mut watches: Vec<_> = (0..MAX_WATCHES).map(|_| peer.watch().unwrap()).collect();
        assert!(peer.watch().is_none());
        watches.pop();
        assert!(peer.watch().is_some());
        drop(watches);
        assert_eq!(peer.watches.load(Ordering::Relaxed), 0);
        assert_eq!(*peer.requests.borrow(), 0);
    }

    #[tokio::test]
    async fn a_connection_is_idle_only_without_requests() {
        const SOON: Duration = Duration::from_millis(1);
        const NEVER: Duration = Duration::from_secs(1_000_000);
        let peer = peer();
        peer.idle(SOON, NEVER).await;
        let (request, watch) = (peer.busy(), peer.watch());
        let idle = peer.idle(NEVER, SOON);
        tokio::pin!(idle);
        drop(request);
        assert!(
            timeout(20 * SOON, idle.as_mut()).await.is_err(),
            "a watch is there"
        );
        drop(watch);
        idle.await;
    }
}
