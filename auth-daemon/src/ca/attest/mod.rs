//! Who asks for a certificate, and what it may have.

pub mod certificate;
mod file;
pub mod jwks;
mod keys;
pub mod kubernetes;
pub mod static_token;

use std::{fmt, future::Future, pin::Pin};

use rustls::pki_types::CertificateDer;

use crate::mesh::Identity;

/// What a caller shows. Nothing in it is believed yet, but that the caller holds the key of `certificate`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credentials<'a> {
    /// The token of `authorization: Bearer …`.
    pub bearer: Option<&'a str>,
    /// The client certificate of the TLS connection: it holds to the CA's own roots, and is within its time.
    pub certificate: Option<&'a CertificateDer<'static>>,
}

/// An attested caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A node's daemon: it may ask for the pods of its node.
    Node {
        /// The node's name.
        node: String,
    },
    /// A pod, or who holds a pod's certificate: it may ask for itself.
    Workload {
        /// Who it is.
        identity: Identity,
        /// The node where it has to be running, where that is known.
        node: Option<String>,
    },
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { node } => write!(f, "node {node}"),
            Self::Workload {
                identity,
                node: None,
            } => write!(f, "{identity}"),
            Self::Workload {
                identity,
                node: Some(node),
            } => write!(f, "{identity} on node {node}"),
        }
    }
}

/// Why a caller is not believed. The text is for the log and for the caller: it holds no part of a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unattested(pub String);

/// What [`Attestor::attest`] returns: `None` where the credentials are none of this attestor's kind.
pub type Attestation<'a> =
    Pin<Box<dyn Future<Output = Option<Result<Caller, Unattested>>> + Send + 'a>>;

/// One way to know a caller.
pub trait Attestor: Send + Sync + std::fmt::Debug {
    /// Says who shows `credentials`.
    fn attest<'a>(&'a self, credentials: Credentials<'a>) -> Attestation<'a>;
}
