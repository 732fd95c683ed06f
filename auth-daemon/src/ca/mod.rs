//! The cluster CA: who signs workload certificates.

mod active;
pub mod attest;
pub mod authority;
pub mod client;
mod counters;
pub mod csr;
mod der;
pub mod distribution;
pub mod embedded;
mod files;
pub mod leader;
mod link;
mod listener;
mod live;
mod operator;
pub mod pem;
pub mod placement;
mod plugged;
pub mod proto;
pub mod revocation;
pub mod roots;
mod rotation;
mod schedule;
pub mod server;
mod serving;
mod settings;
mod signer;
mod state;
pub mod store;
mod watch;

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use rustls::pki_types::CertificateDer;

use crate::{mesh::Identity, tunnel::trust::TrustStore};

/// Signs the certificates of this node's workloads: a key in a folder now, a server of the trust domain elsewhere.
pub trait Issuer: Send + Sync + fmt::Debug {
    /// Signs `csr` (PKCS #10, DER) for `identity`. The key in it is all that is taken from the CSR.
    fn issue<'a>(&'a self, identity: &'a Identity, csr: &'a [u8]) -> IssueFuture<'a>;

    /// Whom to believe, kept up to date for as long as the issuer lives.
    fn trust(&self) -> &Arc<TrustStore>;
}

/// What [`Issuer::issue`] returns.
pub type IssueFuture<'a> = Pin<Box<dyn Future<Output = Result<Issued, IssueError>> + Send + 'a>>;

/// A signed certificate with what leads from it towards a root.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
}

/// Why no certificate was issued.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct IssueError(pub String);

/// How much earlier than now a certificate begins: clocks of nodes differ a little.
pub const BACKDATE: Duration = Duration::from_secs(60);
