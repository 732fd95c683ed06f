//! HBONE, the protocol of Istio's ambient mesh: between two daemons, with other programs that speak it, and with peers that
//! abuse HTTP/2.

#[path = "../common/mod.rs"]
mod common;

mod between_daemons;
mod endings;
mod envoy;
mod hostile;
mod http2;
mod python;
mod server;
mod ztunnel;
