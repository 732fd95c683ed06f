//! Connections of callers. Everything is limited before a caller is known: handshakes and connections, in total and for
//! each address, the time of a handshake, and idle time. All work on connections, from the handshake on, has turns by
//! source.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use auth_support::connection_limit::{ConnectionLimit, ConnectionPermit};
use auth_tunnel::tls::explain;
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, Sleep, sleep_until, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    audit,
    counters::Counters,
    fair_queue::FairQueue,
    quotas::{OverRate, Quotas},
    server_tls::CurrentTls,
};

/// From TCP to the end of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
const MAX_HANDSHAKES: usize = 1024;
const MAX_HANDSHAKES_PER_SOURCE: usize = 256;
const MAX_CONNECTIONS: usize = 16_384;
/// All pods of a node may call from one address.
const MAX_CONNECTIONS_PER_SOURCE: usize = 256;
/// Bytes that are read from a connection in one turn: a few requests.
const READ_PER_TURN: usize = 4096;
/// Until the first request of a connection.
const FIRST_REQUEST: Duration = Duration::from_secs(30);
/// Between the requests of a connection.
const IDLE: Duration = Duration::from_secs(300);
/// Watches of one connection: each may hold one message that its caller is slow to read.
const MAX_WATCHES: usize = 4;
const CLOSED: &str = "the peer closed the connection";
/// How often exhausted limits are logged, at most.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The caller of a connection, in the extensions of each request.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// What has its turns together.
    pub(crate) source: Arc<str>,
    /// The client certificate: it chains to the CA's roots, and the peer has its key.
    pub(crate) certificate: Option<CertificateDer<'static>>,
    watches: AtomicUsize,
    /// Requests and watches in progress.
    requests: AtomicUsize,
    /// When the last one ended.
    last_request: Mutex<Option<Instant>>,
    pub(crate) over_rate: OverRate,
}

impl Peer {
    fn new(
        address: SocketAddr,
        source: Arc<str>,
        certificate: Option<CertificateDer<'static>>,
    ) -> Self {
        Self {
            address,
            source,
            certificate,
            watches: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            last_request: Mutex::default(),
            over_rate: OverRate::default(),
        }
    }

    /// The connection is in use until the guard is dropped.
    pub(crate) fn request(self: &Arc<Self>) -> RequestGuard {
        self.requests.fetch_add(1, Ordering::SeqCst);
        RequestGuard(self.clone())
    }

    /// Another watch on this connection; `None` if there are too many.
    pub(crate) fn watch(self: &Arc<Self>) -> Option<WatchGuard> {
        let before = self.watches.fetch_add(1, Ordering::SeqCst);
        let guard = WatchGuard(self.request());
        (before < MAX_WATCHES).then_some(guard)
    }

    /// When the connection has been idle for too long; `None` while it is in use.
    fn idle_deadline(&self, connected: Instant) -> Option<Instant> {
        if self.requests.load(Ordering::SeqCst) > 0 {
            return None;
        }
        let last = self.last_request.lock();
        let last = *last.unwrap_or_else(PoisonError::into_inner);
        Some(last.map_or(connected + FIRST_REQUEST, |last| last + IDLE))
    }
}

/// See [`Peer::request`].
#[derive(Debug)]
pub(crate) struct RequestGuard(Arc<Peer>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let last = self.0.last_request.lock();
        *last.unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.0.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

/// See [`Peer::watch`].
#[derive(Debug)]
pub(crate) struct WatchGuard(RequestGuard);

impl Drop for WatchGuard {
    fn drop(&mut self) {
        self.0.0.watches.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A TLS connection of a caller. Reading from it fails when it has been idle for too long, and pauses when it has read
/// enough for one turn.
#[derive(Debug)]
pub(crate) struct Connection {
    tls: TlsStream<TcpStream>,
    pub(crate) peer: Arc<Peer>,
    connected: Instant,
    idle_check: Pin<Box<Sleep>>,
    /// Bytes read in this turn.
    read: usize,
    _permit: ConnectionPermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.idle_check.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            let next = match self.peer.idle_deadline(self.connected) {
                Some(deadline) if deadline <= now => {
                    return Poll::Ready(Err(ErrorKind::TimedOut.into()));
                }
                Some(deadline) => deadline,
                None => now + IDLE,
            };
            self.idle_check.as_mut().reset(next);
        }
        if self.read >= READ_PER_TURN {
            self.read = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let most = buffer.remaining().min(READ_PER_TURN - self.read);
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(most));
        let Poll::Ready(read) = Pin::new(&mut self.tls).poll_read(context, &mut part) else {
            self.read = 0;
            return Poll::Pending;
        };
        read?;
        let read = part.filled().len();
        buffer.advance(read);
        self.read += read;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}

/// How connections are served.
pub(crate) struct Serving<Source, Serve> {
    pub(crate) tls: CurrentTls,
    pub(crate) counters: Arc<Counters>,
    pub(crate) quotas: Arc<Quotas>,
    pub(crate) turns: Arc<FairQueue>,
    /// What has its turns together with an address.
    pub(crate) source: Source,
    /// Serves one connection after its TLS handshake, until it ends.
    pub(crate) serve: Serve,
}

impl<Source, Serve, Served> Serving<Source, Serve>
where
    Source: Fn(IpAddr) -> Arc<str>,
    Serve: Fn(Connection) -> Served + Clone + Send + 'static,
    Served: Future<Output = ()> + Send,
{
    /// Accepts connections from `tcp` until `stopped` is true, then gives those that are open `grace` to end.
    pub(crate) async fn accept(
        self,
        tcp: TcpListener,
        mut stopped: watch::Receiver<bool>,
        grace: Duration,
    ) {
        let handshakes = ConnectionLimit::new(MAX_HANDSHAKES, MAX_HANDSHAKES_PER_SOURCE);
        let connections = ConnectionLimit::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE);
        let (handshakes, connections) = (Arc::new(handshakes), Arc::new(connections));
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
                self.counters.refused_connections.inc();
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
            let (counters, quotas) = (self.counters.clone(), self.quotas.clone());
            let serve = self.serve.clone();
            let source = (self.source)(ip);
            let turns = self.turns.clone();
            tasks.spawn(turns.run(source.clone(), async move {
                let shaken = timeout(HANDSHAKE, handshake_with(stream, tls)).await;
                drop(handshake);
                let late = |_| Err(format!("not finished within {HANDSHAKE:?}"));
                match shaken.unwrap_or_else(late) {
                    Ok(tls) => serve(Connection::new(tls, address, source, connection)).await,
                    Err(why) => {
                        counters.failed_handshakes.inc();
                        // Probes only check whether the port is open.
                        if why == CLOSED {
                            tracing::debug!(peer = %address, why, "TLS handshake failed");
                        } else if quotas.report(&source) {
                            audit::refused(address, None, None, "handshake", &why);
                        }
                    }
                }
            }));
        }
        drop(tcp);
        let all_ended = async { while tasks.join_next().await.is_some() {} };
        let _ = timeout(grace, all_ended).await;
    }
}

impl Connection {
    fn new(
        tls: TlsStream<TcpStream>,
        address: SocketAddr,
        source: Arc<str>,
        permit: ConnectionPermit,
    ) -> Self {
        let chain = tls.get_ref().1.peer_certificates();
        let leaf = chain.and_then(<[_]>::first).cloned();
        let peer = Peer::new(address, source, leaf.map(CertificateDer::into_owned));
        let connected = Instant::now();
        Self {
            tls,
            peer: Arc::new(peer),
            connected,
            idle_check: Box::pin(sleep_until(connected + FIRST_REQUEST)),
            read: 0,
            _permit: permit,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Arc<Peer> {
        let address = "127.0.0.1:1".parse().unwrap();
        Arc::new(Peer::new(address, "here".into(), None))
    }

    #[test]
    fn limits_the_watches_of_a_connection() {
        let peer = peer();
        let mut watches: Vec<_> = (0..MAX_WATCHES).map(|_| peer.watch().unwrap()).collect();
        assert!(peer.watch().is_none());
        watches.pop();
        assert!(peer.watch().is_some());
        drop(watches);
        assert_eq!(peer.watches.load(Ordering::SeqCst), 0);
        assert_eq!(peer.requests.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_connection_is_idle_only_without_requests() {
        let (peer, connected) = (peer(), Instant::now());
        let first = peer.idle_deadline(connected);
        assert_eq!(first, Some(connected + FIRST_REQUEST));
        let (request, watch) = (peer.request(), peer.watch());
        drop(request);
        assert_eq!(peer.idle_deadline(connected), None, "a watch is open");
        drop(watch);
        let later = peer.idle_deadline(connected).unwrap();
        assert!(later >= connected + IDLE);
    }
}
