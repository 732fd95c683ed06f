//! One connection of a caller: it ends when it has been idle for too long, and reads as much as one turn allows.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use auth_support::connection_limit::ConnectionPermit;
use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep_until},
};
use tokio_rustls::server::TlsStream;

use crate::quotas::OverRate;

/// Bytes that are read from a connection in one turn: a few requests.
const READ_PER_TURN: usize = 4096;
/// Until the first request of a connection.
const FIRST_REQUEST: Duration = Duration::from_secs(30);
/// Between the requests of a connection.
const IDLE: Duration = Duration::from_secs(300);
/// Watches of one connection: each may hold one message that its caller is slow to read.
const MAX_WATCHES: usize = 4;

/// Where a connection comes from: the caller's node, or its address. All work for one source shares its turns.
#[derive(Debug)]
pub(crate) struct Source(Mutex<Arc<str>>);

impl Source {
    pub(crate) fn new(source: Arc<str>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(source)))
    }

    pub(crate) fn get(&self) -> Arc<str> {
        self.lock().clone()
    }

    pub(crate) fn set(&self, source: &str) {
        let mut current = self.lock();
        if **current != *source {
            *current = source.into();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arc<str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The caller of a connection, in the extensions of each request.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) source: Arc<Source>,
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
    pub(crate) fn new(
        address: SocketAddr,
        source: Arc<Source>,
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

impl Connection {
    /// A connection after its handshake.
    pub(crate) fn new(
        tls: TlsStream<TcpStream>,
        address: SocketAddr,
        source: Arc<Source>,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Arc<Peer> {
        let address = "127.0.0.1:1".parse().unwrap();
        Arc::new(Peer::new(address, Source::new("here".into()), None))
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
