//! Where this node's certificates come from: the CA's client, and the certificates that it keeps current.

mod access;
mod app;
mod certificates;
mod client;
mod health;
mod jwt;
mod keeper;
mod link;
mod machine;
mod renewal;
mod trust_watch;

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use rustls::pki_types::CertificateDer;
use tonic::Code;

pub use access::{Access, Bearer, Stream};
pub use app::AppCertificate;
pub use certificates::{Certificate, Certificates, Current};
pub use client::{CaClient, UnusableServer};
pub use health::{CaHealth, CaStatus};
pub use link::{Link, ServerNames};
pub(crate) use link::{bearer, explain_status, roots, roots_in, token_in};

use auth_jwt::Audience;
use auth_mesh::Identity;
use auth_tunnel::tls::trust::TrustStore;

/// Signs the certificates of this node's workloads.
pub trait Issuer: Send + Sync + fmt::Debug {
    /// Signs `csr` (PKCS #10, DER) for `identity`, for the issuer's usual lifetime. Only its key is used.
    fn issue<'a>(&'a self, identity: &'a Identity, csr: &'a [u8]) -> IssueFuture<'a> {
        self.issue_for(identity, csr, Duration::MAX)
    }

    /// The same for a shorter lifetime, or the usual one if `lifetime` is longer.
    fn issue_for<'a>(
        &'a self,
        identity: &'a Identity,
        csr: &'a [u8],
        lifetime: Duration,
    ) -> IssueFuture<'a>;

    /// Requests a JWT-SVID that proves `identity` to `audience`, in compact form. Only the CA's server issues them.
    fn issue_jwt<'a>(
        &'a self,
        _identity: &'a Identity,
        _audience: &'a Audience,
    ) -> IssueFuture<'a, String> {
        Box::pin(async { Err(IssueError::unsupported()) })
    }

    /// The trust bundle, kept up to date for as long as the issuer exists.
    fn trust(&self) -> &Arc<TrustStore>;

    /// Where the issuer records whether the CA answers, if it has a connection to one.
    fn health(&self) -> Option<&Arc<CaHealth>> {
        None
    }
}

/// The result of a request to an [`Issuer`].
pub type IssueFuture<'a, T = Issued> =
    Pin<Box<dyn Future<Output = Result<T, IssueError>> + Send + 'a>>;

/// A signed certificate with its intermediates.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
}

/// Why no certificate or token was issued.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{why}")]
pub struct IssueError {
    /// The reason, for people.
    pub why: String,
    /// How long the CA asks its caller to wait before the next request.
    pub retry_after: Option<Duration>,
    /// The code of the CA's answer. [`Code::Unavailable`] if there was no usable answer.
    pub code: Code,
}

impl IssueError {
    fn unsupported() -> Self {
        let why = "the mesh's CA issues no JWT-SVIDs: this version of `auth-daemon ca` does; istiod, a CA in a directory and \
                   earlier versions do not";
        Self {
            code: Code::Unimplemented,
            ..Self::from(why.to_owned())
        }
    }
}

impl From<String> for IssueError {
    fn from(why: String) -> Self {
        Self {
            why,
            retry_after: None,
            code: Code::Unavailable,
        }
    }
}
