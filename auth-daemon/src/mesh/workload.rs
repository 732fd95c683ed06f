//! Pods as the mesh sees them.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf};

use super::Identity;

/// A namespaced object's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: String,
    /// Name within the namespace.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.uid`: a pod made anew under the same name is another pod. Empty where the source has none.
    pub uid: String,
    /// Who it is.
    pub identity: Identity,
    /// Its addresses, most preferred first; IPv4 addresses are never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// The node that runs it.
    pub node: String,
    /// Whether services may send it new connections.
    pub ready: bool,
    /// `metadata.labels`, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Ports that its containers name.
    pub named_ports: BTreeMap<String, u16>,
    /// Where its network namespace is to be found, if the source says so.
    pub netns: Option<PathBuf>,
}
