//! The protocols between the CA and its clients: generated code, and what both sides share.
//!
//! The code in `src/generated` is committed, so that a build needs no protobuf compiler. `tests/generated.rs` checks that it
//! belongs to the files in `proto`.

#![forbid(unsafe_code)]

pub mod pem;

/// Istio's certificate service.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
#[rustfmt::skip]
#[path = "generated/istio.v1.auth.rs"]
pub mod istio;

/// This CA's own services: the trust bundle for daemons, and the operator's requests.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
#[rustfmt::skip]
#[path = "generated/auth_daemon.ca.v1.rs"]
pub mod auth;

/// The field in a request's metadata that names the SPIFFE ID of the pod a node asks for (Istio's
/// `security.ImpersonatedIdentity`).
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// What each join token begins with, so that the CA, and programs that search for leaked secrets, recognise one.
pub const JOIN_TOKEN_PREFIX: &str = "auth-daemon-join-";
