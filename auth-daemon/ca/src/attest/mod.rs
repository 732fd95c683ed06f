//! Attestation: who asks for a certificate.

pub mod certificate;
mod fetch;
pub mod jwks;
mod keys;
pub mod kubernetes;
pub mod static_token;

use std::{fmt, future::Future, pin::Pin};

use rustls::pki_types::CertificateDer;

use auth_mesh::Identity;

/// What a caller presents. Nothing is verified yet, except that the caller holds the key of `certificate`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credentials<'a> {
    /// The token of `authorization: Bearer …`.
    pub bearer: Option<&'a str>,
    /// The client certificate of the TLS connection: it chained to the CA's roots, and was valid then.
    pub certificate: Option<&'a CertificateDer<'static>>,
}

/// An attested caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A node's daemon, which asks for the pods of its node.
    Node {
        /// The node's name.
        node: String,
    },
    /// A pod, or the holder of a pod's certificate, which asks for itself.
    Workload {
        /// Its identity.
        identity: Identity,
        /// The node where it must be running.
        node: String,
    },
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { node } => write!(f, "node {node}"),
            Self::Workload { identity, node } => write!(f, "{identity} on node {node}"),
        }
    }
}

/// Why a caller is not accepted. The log and the caller get the text, so it contains no part of a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unattested(pub String);

/// The result of [`Attestor::attest`]: `None` if the credentials are of another kind.
pub type Attestation<'a> =
    Pin<Box<dyn Future<Output = Option<Result<Caller, Unattested>>> + Send + 'a>>;

impl Caller {
    /// The node that the caller is, or runs on.
    pub fn node(&self) -> &str {
        match self {
            Self::Node { node } | Self::Workload { node, .. } => node,
        }
    }
}

/// One way to identify a caller.
pub trait Attestor: Send + Sync + std::fmt::Debug {
    /// Identifies the caller that presents `credentials`.
    fn attest<'a>(&'a self, credentials: Credentials<'a>) -> Attestation<'a>;
}
