//! TLS handshakes on the wire: which started a session, and which resumed one.

use std::net::SocketAddr;

use mesh_tests::{App, Pod, Recording, Result, Stream, TIMEOUT};

/// The extension pre_shared_key (RFC 8446 §4.2.11).
const PRE_SHARED_KEY: u16 = 41;

/// One handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// Whether the client offered a session.
    pub(crate) offered: bool,
    /// Whether the server accepted it.
    pub(crate) resumed: bool,
    /// Bytes that the server has sent so far.
    pub(crate) from_server: usize,
    /// Bytes that the client has sent so far.
    pub(crate) from_client: usize,
}

/// The handshakes with a server, in the order of their SYNs. Streams without both hello messages are skipped.
pub(crate) fn handshakes(recording: &Recording, server: SocketAddr) -> Vec<Handshake> {
    let streams = recording.streams().into_iter();
    let streams = streams.filter(|stream| stream.server == server);
    streams.filter_map(|stream| handshake(&stream)).collect()
}

fn handshake(stream: &Stream) -> Option<Handshake> {
    Some(Handshake {
        offered: extensions(&stream.to_server, true)?.contains(&PRE_SHARED_KEY),
        resumed: extensions(&stream.to_client, false)?.contains(&PRE_SHARED_KEY),
        from_server: stream.to_client.len(),
        from_client: stream.to_server.len(),
    })
}

/// The types of the extensions of a hello in one record (RFC 8446 §4.1.2, §4.1.3).
fn extensions(bytes: &[u8], of_client: bool) -> Option<Vec<u16>> {
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let kind = if of_client { 1 } else { 2 };
    // Record header, type and length of the message, version, random.
    if bytes.first() != Some(&22) || bytes.get(5) != Some(&kind) {
        return None;
    }
    let rest = bytes.get(5 + 4 + 2 + 32..)?;
    let rest = rest.get(1 + usize::from(*rest.first()?)..)?;
    let rest = if of_client {
        let rest = rest.get(2 + number(rest.get(..2)?)..)?;
        rest.get(1 + usize::from(*rest.first()?)..)?
    } else {
        rest.get(3..)?
    };
    let mut rest = rest.get(2..2 + number(rest.get(..2)?))?;
    let mut types = Vec::new();
    while let (Some(kind), Some(length)) = (rest.get(..2), rest.get(2..4)) {
        types.push(number(kind) as u16);
        rest = rest.get(4 + number(length)..)?;
    }
    Some(types)
}

/// A connection that has exchanged data and stays open: it needs a tunnel of its own, and what the server sent with the
/// handshake has been read.
pub(crate) fn held(client: &Pod, to: SocketAddr) -> Result<App> {
    let mut app = client.app(&format!("chat --to {to} --interval 3600000"))?;
    app.event("round", TIMEOUT)?;
    Ok(app)
}
