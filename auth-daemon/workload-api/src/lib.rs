//! The SPIFFE Workload API, by which a workload gets SVIDs of its own, and what verifies those of others. Knows
//! no pods: the caller of [`serve`] decides who can reach the listener, and attests who else is connected.
//!
//! The code in `src/generated` is committed, so that a build needs no protobuf compiler. `tests/generated.rs` checks that it
//! belongs to the file in `proto`.

#![forbid(unsafe_code)]

mod jwt;
mod path_authority;
mod server;
mod service;

/// The protocol.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
#[rustfmt::skip]
#[path = "generated/_.rs"]
pub mod api;

pub use jwt::JwtIssuer;
pub use server::{Attested, refuse, serve};
pub use service::{Served, X509Svid};
