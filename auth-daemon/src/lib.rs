//! A node daemon that gives every Kubernetes pod mutual TLS without a sidecar.
//!
//! `docs/ARCHITECTURE.md` shows how the modules fit; `proxy::outbound` and `proxy::inbound` are the way of a
//! connection, top to bottom.

pub mod admin;
pub mod cli;
pub mod config;
pub mod discovery;
pub mod federation;
pub mod issuer;
pub mod node;
pub mod observe;
pub mod proxy;
