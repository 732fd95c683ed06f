//! What the status says of remote clusters.

use serde::Serialize;

/// A remote cluster, as the daemon's status has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteStatus {
    /// Name of the cluster.
    pub name: String,
    /// Name of the Secret with its kubeconfig.
    pub secret: String,
    /// Trust domain of its pods.
    pub trust_domain: String,
    /// Number of its pods that are known.
    pub pods: usize,
    /// Number of its services that are known.
    pub services: usize,
    /// Why it cannot be read. What is known of it stays in force.
    pub error: Option<String>,
    /// Since when it cannot be read, as RFC 3339 has it.
    pub since: Option<String>,
}
