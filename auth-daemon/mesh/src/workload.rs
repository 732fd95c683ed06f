//! Pods as the mesh sees them.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf};

use super::{Identity, Membership};

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

/// A pod, of the mesh or not.
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
    /// Whether it says that it can take connections.
    pub ready: bool,
    /// Whether it is being deleted: then it gets new connections only where there is no other pod, and an address that
    /// another pod says is its own is that one's.
    pub terminating: bool,
    /// Whether it has the node's network namespace: such a pod cannot be told from its node.
    pub host_network: bool,
    /// What it says of its membership. `None`: what its namespace says, or the mesh's default.
    pub membership: Option<Membership>,
    /// `metadata.labels`, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Ports that its containers name.
    pub named_ports: BTreeMap<String, u16>,
    /// Where its network namespace is to be found, if the source says so.
    pub netns: Option<PathBuf>,
}

impl Workload {
    /// A ready pod without an address, on no node yet.
    pub fn new(name: ObjectName, identity: Identity) -> Self {
        Self {
            name,
            uid: String::new(),
            identity,
            addresses: Vec::new(),
            node: String::new(),
            ready: true,
            terminating: false,
            host_network: false,
            membership: None,
            labels: BTreeMap::new(),
            named_ports: BTreeMap::new(),
            netns: None,
        }
    }

    /// Its address of the family of `like`.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter();
        addresses.find(|ip| ip.is_ipv4() == like.is_ipv4()).copied()
    }
}
