//! Small pieces that several crates share. Nothing here knows the mesh, TLS or the kernel programs.

pub mod backoff;
pub mod config;
pub mod connection_limit;
pub mod http_client;
pub mod http_server;
pub mod log;
