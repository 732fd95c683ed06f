//! A node daemon that gives every Kubernetes pod mutual TLS without a sidecar.
//!
//! `docs/ARCHITECTURE.md` shows how the modules fit; `proxy::outbound` and `proxy::inbound` are the way of a
//! connection, top to bottom.

pub mod admin;
mod answers;
mod backoff;
pub mod ca;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod discovery;
mod http;
pub mod issuer;
pub mod kubernetes;
pub mod mesh;
mod places;
pub mod policy;
pub mod proxy;
pub mod tunnel;
