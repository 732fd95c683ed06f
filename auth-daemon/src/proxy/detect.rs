//! Detects whether an inbound connection is a tunnel or plaintext, by the caller's first bytes. The bytes are only
//! peeked at and stay in the socket.

use std::{io, os::fd::AsRawFd, time::Duration};

use nix::sys::socket::{MsgFlags, recv};
use tokio::{io::Interest, net::TcpStream, time::timeout};

use auth_tunnel::{
    ALPN, hbone,
    hello::{FirstBytes, PEEK_BYTES, classify},
};

/// Time after which a silent caller of a PERMISSIVE pod is assumed to wait for the server to speak first.
const SILENCE: Duration = Duration::from_secs(1);

/// The protocol that a caller speaks.
pub(super) enum Detected {
    Tunnel,
    /// HBONE, on the port that is its own. On other ports, an app may speak `h2` itself.
    Hbone,
    /// Contains the connection to the app if detection had to open it.
    Plaintext(Option<TcpStream>),
}

/// Detection for the port of HBONE, where nothing is passed on in plaintext.
pub(super) async fn hbone(tcp: &TcpStream) -> io::Result<Detected> {
    match first_bytes(tcp, hbone::ALPN).await? {
        FirstBytes::Tunnel => Ok(Detected::Hbone),
        _ => strict(tcp).await,
    }
}

/// Detection for STRICT: waits without a limit until the first bytes identify the protocol.
pub(super) async fn strict(tcp: &TcpStream) -> io::Result<Detected> {
    match first_bytes(tcp, ALPN).await? {
        FirstBytes::Tunnel => Ok(Detected::Tunnel),
        FirstBytes::Plaintext => Ok(Detected::Plaintext(None)),
        FirstBytes::Undecided => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "closed before its protocol was known",
        )),
    }
}

/// Detection for PERMISSIVE. If the caller stays silent, it may wait for the server to speak first: `dial` then
/// connects to the app, and the side that speaks first decides. A tunnel that was only slow is still detected.
pub(super) async fn permissive<F>(tcp: &TcpStream, dial: impl FnOnce() -> F) -> io::Result<Detected>
where
    F: Future<Output = io::Result<TcpStream>>,
{
    if let Ok(opening) = timeout(SILENCE, first_bytes(tcp, ALPN)).await {
        return Ok(match opening? {
            FirstBytes::Tunnel => Detected::Tunnel,
            FirstBytes::Plaintext | FirstBytes::Undecided => Detected::Plaintext(None),
        });
    }
    let app = dial().await?;
    tokio::select! {
        biased;
        opening = first_bytes(tcp, ALPN) => Ok(match opening? {
            FirstBytes::Tunnel => Detected::Tunnel,
            FirstBytes::Plaintext | FirstBytes::Undecided => Detected::Plaintext(Some(app)),
        }),
        ready = app.readable() => {
            ready?;
            Ok(Detected::Plaintext(Some(app)))
        }
    }
}

/// Classifies the caller's first bytes: whether they start a tunnel with the protocol `alpn`. Undecided if the caller ends
/// before they can be classified.
async fn first_bytes(tcp: &TcpStream, alpn: &[u8]) -> io::Result<FirstBytes> {
    loop {
        let ready = tcp.ready(Interest::READABLE).await?;
        let peek = tcp.try_io(Interest::READABLE, || {
            let mut bytes = [0; PEEK_BYTES];
            let count = recv(tcp.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
            match classify(&bytes[..count], alpn) {
                // More bytes may follow: wait for them as for the first byte.
                FirstBytes::Undecided if !ready.is_read_closed() => {
                    Err(io::ErrorKind::WouldBlock.into())
                }
                opening => Ok(opening),
            }
        });
        match peek {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            decided => return decided,
        }
    }
}
