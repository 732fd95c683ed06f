//! The client's side of a connection.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use h2::{
    Reason,
    client::{self, SendRequest},
};
use http::{Method, Request, StatusCode, Uri, Version, uri::Authority};
use rustls::{ClientConfig, NamedGroup, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    MAX_FRAME, MAX_HEADERS, MAX_STREAMS_OPENED, STREAM_WINDOW, Stream, keep_alive::KeepAlive, tls,
};
use crate::{HandshakeError, handshake::key_exchange, tls::svid::Svid};
use auth_mesh::TrustDomain;

/// A connection to a server, after its handshake. Clones share the connection, which ends in order once all of them, and
/// their streams, are dropped.
#[derive(Clone, Debug)]
pub struct Client {
    requests: SendRequest<Bytes>,
    peer: Arc<Svid>,
    key_exchange: Option<NamedGroup>,
    ended: Arc<AtomicBool>,
}

/// Why a server did not open a stream.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It answered with an error.
    #[error("{}", refused_because(*.0))]
    Refused(StatusCode),
    /// It reset the stream.
    #[error("its node reset the stream: {0}")]
    Reset(Reason),
    /// The connection broke, or the server closes it. The server has not processed the request.
    #[error("the HBONE connection broke: {0}")]
    Broken(h2::Error),
}

/// Connects to a server on `tcp`. Drop the future to give up. The connection may hold up to `window` unread bytes.
///
/// The second value drives the connection, and must run until it returns.
pub async fn connect(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
    trust_domain: &TrustDomain,
    window: u32,
) -> Result<(Client, impl Future<Output = ()> + Send + use<>), HandshakeError> {
    let server = tcp.peer_addr()?.ip();
    let tls = shake_hands(tcp, server, config).await?;
    // From here on, frames signal the end. A RST could overtake them.
    socket2::SockRef::from(tls.get_ref().0).set_linger(None)?;
    begin(tls, trust_domain, window).await
}

/// The same over any `stream` that leads to the server, whose address is `server`.
pub async fn connect_over<S>(
    stream: S,
    server: IpAddr,
    config: Arc<ClientConfig>,
    trust_domain: &TrustDomain,
    window: u32,
) -> Result<(Client, impl Future<Output = ()> + Send + use<S>), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let tls = shake_hands(stream, server, config).await?;
    begin(tls, trust_domain, window).await
}

/// The TLS handshake. The address is not what is verified: the caller checks the identity.
async fn shake_hands<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    server: IpAddr,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<S>, HandshakeError> {
    TlsConnector::from(config)
        .connect(ServerName::IpAddress(server.into()), stream)
        .await
        .map_err(tls::explain)
}

async fn begin<S>(
    tls: TlsStream<S>,
    trust_domain: &TrustDomain,
    window: u32,
) -> Result<(Client, impl Future<Output = ()> + Send + use<S>), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let peer = tls::peer(tls.get_ref().1, trust_domain)?;
    let key_exchange = key_exchange(tls.get_ref().1);
    let (requests, mut connection) = client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(window)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .initial_max_send_streams(MAX_STREAMS_OPENED)
        .max_concurrent_streams(0)
        .enable_push(false)
        .handshake(tls)
        .await
        .map_err(io::Error::other)?;
    let ended = Arc::new(AtomicBool::new(false));
    let client = Client {
        requests,
        peer,
        key_exchange,
        ended: ended.clone(),
    };
    let mut keep_alive = KeepAlive::new(connection.ping_pong());
    let driver = async move {
        tokio::select! {
            // How it ended shows in its streams.
            _ = connection => {}
            () = keep_alive.lost() => {}
        }
        ended.store(true, Ordering::Relaxed);
    };
    Ok((client, driver))
}

impl Client {
    /// Identity and certificate of the server.
    pub fn peer(&self) -> &Arc<Svid> {
        &self.peer
    }

    /// The key exchange of the handshake.
    pub fn key_exchange(&self) -> Option<NamedGroup> {
        self.key_exchange
    }

    /// Maximum number of streams on the connection.
    pub(super) fn room(&self) -> usize {
        MAX_STREAMS_OPENED.min(self.requests.current_max_send_streams())
    }

    /// Whether the connection has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Opens a stream to `destination`, and waits for the server's answer. No app bytes are sent before.
    pub async fn open(&self, destination: SocketAddr) -> Result<Stream, OpenError> {
        let mut requests = self.requests.clone().ready().await.map_err(broke)?;
        let (answer, send) = requests
            .send_request(connect_to(destination), false)
            .map_err(broke)?;
        let answer = answer.await.map_err(broke)?;
        match answer.status() {
            StatusCode::OK => Ok(Stream {
                send,
                receive: answer.into_body(),
            }),
            status => Err(OpenError::Refused(status)),
        }
    }
}

fn connect_to(destination: SocketAddr) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = Version::HTTP_2;
    // An address and a port are always a valid authority.
    if let Ok(authority) = destination.to_string().parse::<Authority>() {
        *request.uri_mut() = Uri::from(authority);
    }
    request
}

fn broke(error: h2::Error) -> OpenError {
    match error.reason() {
        Some(reason) if error.is_reset() && reason != Reason::REFUSED_STREAM => {
            OpenError::Reset(reason)
        }
        _ => OpenError::Broken(error),
    }
}

fn refused_because(status: StatusCode) -> String {
    let why = match status {
        StatusCode::BAD_REQUEST => "its node does not serve that address and port",
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "its node forbids it",
        StatusCode::SERVICE_UNAVAILABLE => "its app refuses the connection, or does not answer",
        _ => "its node refuses it",
    };
    format!("{why} ({})", status.as_u16())
}
