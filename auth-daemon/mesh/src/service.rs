//! Services in the model of the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{Identity, ObjectName, Waypoint, Workload};

/// A Kubernetes Service with virtual addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// Virtual addresses. IPv4 addresses are never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<Port>,
    /// Ports at which all nodes expose the service (`nodePort`), with the port of the virtual address of each.
    pub node_ports: Vec<(u16, u16)>,
    /// Addresses of load balancers, and external addresses, at which the service's ports are exposed.
    pub external_addresses: Vec<IpAddr>,
    /// Labels that a pod must have to be an endpoint. If empty, endpoint slices list the endpoints.
    pub selector: BTreeMap<String, String>,
    /// The only identities that may run the service, if an annotation pins them.
    pub pinned_identities: Option<BTreeSet<Identity>>,
    /// Whether the pinned identities name another trust domain: an endpoint that is no known pod is then one of its
    /// workloads.
    pub federated: bool,
    /// Whether pods that are not ready are endpoints too.
    pub publish_not_ready: bool,
    /// The waypoint that connections to the service go through.
    pub waypoint: Option<Arc<Waypoint>>,
    /// Whether a client keeps the same endpoint while that endpoint exists (`sessionAffinity: ClientIP`).
    pub sticky: bool,
    /// Whether only endpoints on the client's node are used (`internalTrafficPolicy: Local`).
    pub local: bool,
}

/// A TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name by which endpoint slices refer to the port. May be empty if it is the only port of the service.
    pub name: String,
    /// Port of the virtual address.
    pub port: u16,
    /// Port of the endpoints.
    pub target: TargetPort,
}

/// How a service port refers to the port of its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// The same number on each endpoint.
    Number(u16),
    /// The name of a container port, which may have another number on each pod.
    Name(String),
}

impl Service {
    /// Creates a service without addresses, ports or pods.
    pub fn new(name: ObjectName) -> Self {
        Self {
            name,
            addresses: Vec::new(),
            ports: Vec::new(),
            node_ports: Vec::new(),
            external_addresses: Vec::new(),
            selector: BTreeMap::new(),
            pinned_identities: None,
            federated: false,
            publish_not_ready: false,
            waypoint: None,
            sticky: false,
            local: false,
        }
    }

    /// Reports whether the selector matches `pod`, ready or not.
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
    /// Returns the port number on `pod`, if `pod` has the port.
    pub fn on(&self, pod: &Workload) -> Option<u16> {
        match self {
            Self::Number(port) => Some(*port),
            Self::Name(name) => pod.named_ports.get(name).copied(),
        }
    }
}
