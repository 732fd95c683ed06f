//! Certificates and the identities in them, and the CA that issues them.

#[path = "../common/mod.rs"]
mod common;

mod ca_outages;
mod ca_revocation;
mod ca_rotation;
mod certificates;
mod clock;
mod connect;
mod federation;
mod naming;
mod renewal;
mod spire;
mod workload_api;
mod workload_api_socket;
