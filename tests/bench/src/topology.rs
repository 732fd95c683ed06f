//! The mesh of a benchmark: the names of its nodes and pods, and the ports of its servers.

pub(super) const NODE_A: &str = "node-a";
pub(super) const NODE_B: &str = "node-b";
/// The client, on node A. Like every pod, it has a service account with its own name.
pub(super) const CLIENT: &str = "client";
/// The server on node A.
pub(super) const NEAR: &str = "near";
/// The server on node B.
pub(super) const WEB: &str = "web";
pub(super) const NGINX_PORT: u16 = 8080;
pub(super) const IPERF3_PORT: u16 = 5201;
pub(super) const ECHO_PORT: u16 = 7000;
/// The ports of all servers.
pub(super) const PORTS: [u16; 3] = [NGINX_PORT, IPERF3_PORT, ECHO_PORT];
