//! The CA's protocols, as `proto/` has them.

#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]

/// Istio's certificate service.
pub mod istio {
    tonic::include_proto!("istio.v1.auth");
}

/// What this CA says beyond it.
pub mod auth {
    tonic::include_proto!("auth_daemon.ca.v1");
}
