//! A daemon's status, from `/status` on its admin port.

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde_json::Value;

/// A daemon's status.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the daemon documents its status")]
pub struct Status {
    pub node: String,
    pub trust_domain: String,
    pub mode: String,
    pub ready: bool,
    pub pods: Vec<PodStatus>,
    pub certificates: Vec<CertificateStatus>,
    pub connections: Vec<ConnectionStatus>,
    pub kernel: KernelStatus,
    pub pool: PoolStatus,
}

/// A pod of the daemon's node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the daemon documents its status")]
pub struct PodStatus {
    /// `namespace/name`.
    pub pod: String,
    pub identity: String,
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    #[serde(default)]
    pub netns: Option<String>,
    #[serde(default)]
    pub found_by: Option<String>,
    pub enrolled: bool,
    #[serde(default)]
    pub reason: Option<String>,
    #[serde(default)]
    pub tampered: Option<String>,
}

/// A certificate that the daemon holds.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the daemon documents its status")]
pub struct CertificateStatus {
    pub identity: String,
    /// Empty if there is none.
    #[serde(deserialize_with = "null_as_empty")]
    pub serial: String,
    pub not_before: Value,
    pub not_after: Value,
}

fn null_as_empty<'de, D: serde::Deserializer<'de>>(value: D) -> Result<String, D::Error> {
    Option::deserialize(value).map(Option::unwrap_or_default)
}

/// A connection that the daemon carries.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the daemon documents its status")]
pub struct ConnectionStatus {
    pub direction: String,
    pub client: SocketAddr,
    pub destination: SocketAddr,
    #[serde(default)]
    pub service: Option<String>,
    #[serde(default)]
    pub client_identity: Option<String>,
    #[serde(default)]
    pub server_identity: Option<String>,
    pub bytes_to_server: u64,
    pub bytes_to_client: u64,
    pub seconds: f64,
}

/// The number of entries in the daemon's maps in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the daemon documents its status")]
pub struct KernelStatus {
    pub mesh_addresses: u64,
    pub originals: u64,
    pub pods: u64,
}

/// Idle tunnels, which wait for another connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[expect(missing_docs, reason = "the daemon documents its status")]
pub struct PoolStatus {
    pub idle: u64,
}
