//! Utilities shared by several crates. They do not depend on the mesh, TLS or the eBPF programs.

pub mod backoff;
pub mod config;
pub mod connection_limit;
pub mod fair_queue;
pub mod files;
pub mod http_client;
pub mod http_server;
pub mod https_client;
pub mod log;
