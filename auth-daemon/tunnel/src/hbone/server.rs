//! The server's side of a connection.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    server::{self, SendResponse},
};
use http::{Method, Response, StatusCode};
use rustls::{NamedGroup, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    InvalidAuthority, MAX_ERRORS, MAX_FRAME, MAX_HEADERS, MAX_STREAMS_ACCEPTED, STREAM_WINDOW,
    Stream, keep_alive::KeepAlive, parse_authority, tls,
};
use crate::{HandshakeError, handshake::key_exchange, tls::svid::Svid};
use auth_mesh::TrustDomain;

/// A client's connection, after its handshake.
pub struct Server {
    connection: server::Connection<TlsStream<TcpStream>, Bytes>,
    keep_alive: KeepAlive,
    peer: Arc<Svid>,
    key_exchange: Option<NamedGroup>,
}

/// A CONNECT that has not been answered. Dropping it resets the stream.
#[derive(Debug)]
pub struct Request {
    destination: Result<SocketAddr, InvalidAuthority>,
    is_connect: bool,
    answer: SendResponse<Bytes>,
    receive: RecvStream,
}

/// Accepts a connection on `tcp`. Drop the future to give up. `window`, called once the client is authenticated, is the
/// number of unread bytes that the connection may hold.
pub async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    trust_domain: &TrustDomain,
    window: impl FnOnce() -> u32,
) -> Result<Server, HandshakeError> {
    let tls = TlsAcceptor::from(config)
        .accept(tcp)
        .await
        .map_err(tls::explain)?;
    let peer = tls::peer(tls.get_ref().1, trust_domain)?;
    let key_exchange = key_exchange(tls.get_ref().1);
    // From here on, frames signal the end. A RST could overtake them.
    socket2::SockRef::from(tls.get_ref().0).set_linger(None)?;
    let mut connection = server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(window())
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS_ACCEPTED)
        .max_local_error_reset_streams(Some(MAX_ERRORS))
        .handshake(tls)
        .await
        .map_err(io::Error::other)?;
    Ok(Server {
        keep_alive: KeepAlive::new(connection.ping_pong()),
        connection,
        peer,
        key_exchange,
    })
}

impl Server {
    /// Identity and certificate of the peer.
    pub fn peer(&self) -> &Arc<Svid> {
        &self.peer
    }

    /// The key exchange of the handshake.
    pub fn key_exchange(&self) -> Option<NamedGroup> {
        self.key_exchange
    }

    /// Waits for the next request, and meanwhile moves the bytes of all streams. Returns `None` once the connection has
    /// ended in order. Cancel-safe.
    pub async fn next(&mut self) -> Option<io::Result<Request>> {
        tokio::select! {
            accepted = self.connection.accept() => match accepted? {
                Ok((request, answer)) => Some(Ok(Request::new(request, answer))),
                Err(error) => Some(Err(io::Error::other(error))),
            },
            () = self.keep_alive.lost() => Some(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the peer does not answer PING",
            ))),
        }
    }

    /// Accepts no further stream (GOAWAY). Open streams continue.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }

    /// Resets all streams and ends the connection (GOAWAY), because the peer abuses it.
    pub fn calm(&mut self) {
        self.connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
    }
}

impl Request {
    fn new(request: http::Request<RecvStream>, answer: SendResponse<Bytes>) -> Self {
        let (head, receive) = request.into_parts();
        let authority = head.uri.authority();
        Self {
            destination: authority
                .ok_or(InvalidAuthority::Missing)
                .and_then(|authority| parse_authority(authority.as_str())),
            is_connect: head.method == Method::CONNECT,
            answer,
            receive,
        }
    }

    /// The address and port that the client asks for, or why it asks for none.
    pub fn destination(&self) -> Result<SocketAddr, String> {
        if !self.is_connect {
            return Err("the request is not a CONNECT".into());
        }
        self.destination.map_err(|error| error.to_string())
    }

    /// Polls for a reset by the client, which wants no answer any more.
    pub fn poll_abandoned(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.answer.poll_reset(context).map(drop)
    }

    /// Answers 200. The error is the client's reset, or that of the connection.
    pub fn accept(mut self) -> Result<Stream, h2::Error> {
        Ok(Stream {
            send: self.answer.send_response(Response::new(()), false)?,
            receive: self.receive,
        })
    }

    /// Answers with an error.
    pub fn refuse(mut self, status: StatusCode) {
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        // An error means that the client has gone.
        let _ = self.answer.send_response(answer, true);
    }

    /// Resets the stream; the client may try another connection (RFC 9113 §8.7).
    pub fn turn_away(mut self) {
        self.answer.send_reset(Reason::REFUSED_STREAM);
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}
