//! The first moments of a connection to a pod: is it the tunnel, or plaintext? Decided by what the caller sends, all of
//! which stays in the socket.

use std::{io, os::fd::AsRawFd, time::Duration};

use nix::sys::socket::{MsgFlags, recv};
use tokio::{io::Interest, net::TcpStream, time::timeout};

use auth_tunnel::{
    ALPN,
    hello::{FirstBytes, PEEK_BYTES, classify},
};

/// PERMISSIVE: a caller that is silent for so long may wait for the server to speak first.
const SILENCE: Duration = Duration::from_secs(1);

/// What a caller turned out to speak.
pub(super) enum Detected {
    Tunnel,
    /// With the app's connection, where the app had to be asked.
    Plaintext(Option<TcpStream>),
}

/// STRICT: waits for as long as it takes the caller to show what it speaks.
pub(super) async fn strict(tcp: &TcpStream) -> io::Result<Detected> {
    match first_bytes(tcp).await? {
        FirstBytes::Tunnel => Ok(Detected::Tunnel),
        FirstBytes::Plaintext => Ok(Detected::Plaintext(None)),
        FirstBytes::Undecided => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "closed before it said what it speaks",
        )),
    }
}

/// PERMISSIVE: a caller that stays silent may wait for the server to speak first. Then the app is asked, by `dial`, and
/// whoever speaks first decides; a tunnel that was only slow is still one.
pub(super) async fn permissive<F>(tcp: &TcpStream, dial: impl FnOnce() -> F) -> io::Result<Detected>
where
    F: Future<Output = io::Result<TcpStream>>,
{
    if let Ok(opening) = timeout(SILENCE, first_bytes(tcp)).await {
        return Ok(match opening? {
            FirstBytes::Tunnel => Detected::Tunnel,
            FirstBytes::Plaintext | FirstBytes::Undecided => Detected::Plaintext(None),
        });
    }
    let app = dial().await?;
    tokio::select! {
        biased;
        opening = first_bytes(tcp) => Ok(match opening? {
            FirstBytes::Tunnel => Detected::Tunnel,
            FirstBytes::Plaintext | FirstBytes::Undecided => Detected::Plaintext(Some(app)),
        }),
        ready = app.readable() => {
            ready?;
            Ok(Detected::Plaintext(Some(app)))
        }
    }
}

/// What the caller's first bytes are; undecided, if it ends before that can be told.
async fn first_bytes(tcp: &TcpStream) -> io::Result<FirstBytes> {
    loop {
        let ready = tcp.ready(Interest::READABLE).await?;
        let peek = tcp.try_io(Interest::READABLE, || {
            let mut bytes = [0; PEEK_BYTES];
            let count = recv(tcp.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
            match classify(&bytes[..count], ALPN) {
                // More may come: wait for it as for the first byte.
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
