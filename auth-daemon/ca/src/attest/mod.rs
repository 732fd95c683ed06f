//! Attestation: who asks for a certificate.

pub mod certificate;
mod fetch;
pub mod jwks;
mod keys;
pub mod kubernetes;
mod oidc;
pub mod people;
pub mod static_token;

use std::fmt;

use rustls::pki_types::CertificateDer;

use auth_mesh::{Identity, ObjectName};

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
    /// The holder of a token that belongs to no pod, who acts as a service account.
    Person {
        /// Who it is, and after which check: `oidc:NAME` for a name in a verified token, `kubernetes:NAME` for a user of the
        /// API server, `kubernetes-token:ID` for a service account token of which only the ID is known.
        person: String,
        /// What the holder may act as.
        identities: Vec<Identity>,
        /// Whose quotas its requests use up.
        counts_for: String,
    },
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { node } => write!(f, "node {node}"),
            Self::Workload { identity, node } => write!(f, "{identity} on node {node}"),
            Self::Person { person, .. } => write!(f, "person {person}"),
        }
    }
}

/// Why a caller is not accepted. The log and the caller get the text, so it contains no part of a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unattested(pub String);

impl Caller {
    /// The node that the caller is, or runs on. `None` for a person.
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Node { node } | Self::Workload { node, .. } => Some(node),
            Self::Person { .. } => None,
        }
    }

    /// Whose quotas its requests use up: those of its node, or of a person, whose name is never that of a node.
    pub fn counts_for(&self) -> &str {
        match self {
            Self::Node { node } | Self::Workload { node, .. } => node,
            Self::Person { counts_for, .. } => counts_for,
        }
    }
}

/// The service account whose user name at the API server is `user`, which is also the subject of its tokens.
fn service_account(user: &str) -> Option<ObjectName> {
    let (namespace, name) = user
        .strip_prefix("system:serviceaccount:")?
        .split_once(':')?;
    (!namespace.is_empty() && !name.is_empty()).then(|| ObjectName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

/// One way to identify a caller.
#[tonic::async_trait]
pub trait Attestor: Send + Sync {
    /// Identifies the caller that presents `credentials`. Returns `None` if they are of another kind.
    async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>>;

    /// Returns who `caller` is, if the holder of the key of `csr` (PKCS #10, DER) has proved more than the credentials do.
    async fn proved(&self, _caller: &Caller, _csr: &[u8]) -> Option<String> {
        None
    }
}
