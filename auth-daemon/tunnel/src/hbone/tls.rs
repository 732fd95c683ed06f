//! The TLS handshake. Unlike our own framing, HTTP/2 leaves the records to rustls.

use std::io;

use rustls::{CommonState, Error};

use super::ALPN;
use crate::{
    HandshakeError,
    tls::{check_not_expired, svid::Svid},
};

/// Checks the protocol, and returns the certificate that the peer has presented.
pub(super) fn peer(session: &CommonState, trust_domain: &str) -> Result<Svid, HandshakeError> {
    if session.alpn_protocol() != Some(ALPN) {
        return Err(HandshakeError::NotHbone);
    }
    let leaf = session
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(Error::NoCertificatesPresented)?;
    let peer =
        Svid::parse(leaf, trust_domain).map_err(|error| Error::General(error.to_string()))?;
    check_not_expired(peer.not_after)?;
    Ok(peer)
}

/// The TLS error inside `error`, or `error` itself.
pub(super) fn explain(error: io::Error) -> HandshakeError {
    match error.downcast::<Error>() {
        Ok(error) => error.into(),
        Err(error) => error.into(),
    }
}
