//! The TLS handshake. Unlike our own framing, HTTP/2 leaves the records to rustls.

use std::{io, sync::Arc};

use rustls::{CommonState, Error};

use super::ALPN;
use crate::{HandshakeError, handshake, tls::svid::Svid};
use auth_mesh::TrustDomain;

/// Checks the protocol, and returns the certificate that the peer has presented.
pub(super) fn peer(
    session: &CommonState,
    trust_domain: &TrustDomain,
) -> Result<Arc<Svid>, HandshakeError> {
    if session.alpn_protocol() != Some(ALPN) {
        return Err(HandshakeError::NotHbone);
    }
    Ok(handshake::peer(session, trust_domain)?)
}

/// The TLS error inside `error`, or `error` itself.
pub(super) fn explain(error: io::Error) -> HandshakeError {
    match error.downcast::<Error>() {
        Ok(error) => error.into(),
        Err(error) => error.into(),
    }
}
