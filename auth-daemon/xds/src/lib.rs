//! A client's side of istiod's API: delta ADS with Istio's workload API, and its resources in the model of the mesh. No I/O,
//! no clock.
//!
//! [`Session`] speaks the protocol: from responses to answers and [`Change`]s. [`State`] applies the changes, together with
//! what the API server says of the node's own pods, and makes snapshots.
//!
//! The code in `src/generated` is committed, so that a build needs no protobuf compiler. `tests/generated.rs` checks that it
//! belongs to the files in `proto`.

#![forbid(unsafe_code)]

mod authorization;
mod demand;
mod read;
mod service;
mod session;
mod state;
mod workload;

/// The aggregated discovery service.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
#[rustfmt::skip]
#[path = "generated/envoy.service.discovery.v3.rs"]
pub mod discovery;

/// Workloads and services.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
#[rustfmt::skip]
#[path = "generated/istio.workload.rs"]
pub mod workload_api;

/// Policies.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
#[rustfmt::skip]
#[path = "generated/istio.security.rs"]
pub mod security_api;

pub use demand::Answer;
pub use read::Mesh;
pub use session::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Caller, Change, Session, Taken};
pub use state::State;
pub use workload::FoundWorkload;
