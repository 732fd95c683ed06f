//! Services as the mesh sees them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{Identity, ObjectName, Workload};

/// A Kubernetes Service with virtual addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// Virtual addresses; IPv4 addresses are never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<Port>,
    /// Labels that a pod must have to be an endpoint. Empty: endpoint slices say who is.
    pub selector: BTreeMap<String, String>,
    /// The only identities that may run it, where an annotation pins them.
    pub pinned_identities: Option<BTreeSet<Identity>>,
    /// Whether pods that are not ready are endpoints all the same.
    pub publish_not_ready: bool,
    /// Whether a client always gets the same endpoint, as long as that is there (`sessionAffinity: ClientIP`).
    pub sticky: bool,
    /// Whether only endpoints on the client's node count (`internalTrafficPolicy: Local`).
    pub local: bool,
}

/// A TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name, by which endpoint slices know it. Empty where the service has this one alone.
    pub name: String,
    /// Port of the virtual address.
    pub port: u16,
    /// Port of the endpoints.
    pub target: TargetPort,
}

/// How a service's port names the port of its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// The same on each endpoint.
    Number(u16),
    /// By the name that each pod's containers give it.
    Name(String),
}

impl Service {
    /// A service without addresses, ports and pods.
    pub fn new(name: ObjectName) -> Self {
        Self {
            name,
            addresses: Vec::new(),
            ports: Vec::new(),
            selector: BTreeMap::new(),
            pinned_identities: None,
            publish_not_ready: false,
            sticky: false,
            local: false,
        }
    }

    /// Whether `pod` is one of those this service stands for, ready or not.
    pub fn selects(&self, pod: &Workload) -> bool {
        !self.selector.is_empty()
            && self.name.namespace == pod.name.namespace
            && self
                .selector
                .iter()
                .all(|(key, value)| pod.labels.get(key) == Some(value))
    }
}

impl TargetPort {
    /// The port on `pod`, if `pod` has it.
    pub fn on(&self, pod: &Workload) -> Option<u16> {
        match self {
            Self::Number(port) => Some(*port),
            Self::Name(name) => pod.named_ports.get(name).copied(),
        }
    }
}
