//! The known state of the mesh at one moment, with the lookups that a connection needs.
//!
//! Snapshots share unchanged parts, so that the cost of the next one depends on what changed, not on the size of the
//! cluster ([`Edit`]). A lookup takes a few steps through a B-tree. Readers load the current snapshot without a lock
//! and keep it for as long as they need a consistent view.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{HashMap, OrdMap, OrdSet, ordmap::DiffItem, ordset};

use super::{
    Destination, Edit, Identity, Membership, Memberships, MeshDefault, ObjectName, Service, Slice,
    Workload,
    claims::{AddressKind, Claim, Claims},
    cluster,
    exposed::Exposed,
    node::Cluster,
    resolved::MAX_SLICED,
};

/// What a discovery source knows, before indexing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Pods.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
}

/// The known state of the mesh, indexed.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) defaults: Arc<MeshDefault>,
    pub(super) namespaces: OrdMap<String, Namespace>,
    /// Pods that are assigned to a node, in the mesh or not.
    pub(super) nodes: HashMap<String, OrdMap<ObjectName, Arc<Workload>>>,
    pub(super) addresses: OrdMap<IpAddr, Claims>,
    pub(super) disputed: OrdSet<IpAddr>,
    /// Addresses of this cluster that a remote cluster claims, too.
    pub(super) overruled: OrdSet<IpAddr>,
    /// Slices, indexed by the address and pod of their endpoints, either of which may determine the pod at an endpoint.
    pub(super) slices: SlicesBy,
    /// Services with more endpoints in slices than the limit.
    pub(super) crowded: OrdSet<ObjectName>,
    /// Ready pods of the node daemon, with their nodes. `None` if they are not tracked, and every node is assumed to
    /// have one.
    pub(super) daemons: Option<Daemons>,
    /// Nodes that have, or once had, a ready daemon.
    pub(super) proven: OrdSet<String>,
    /// Nodes whose tunnel an administrator has disabled.
    pub(super) disabled: OrdSet<String>,
    pub(super) cluster: Cluster,
    pub(super) exposed: Exposed,
}

/// See [`Snapshot::daemons`].
#[derive(Clone, Debug, Default)]
pub(super) struct Daemons {
    pub(super) pods: HashMap<ObjectName, String>,
    /// Number of ready daemons on each node: more than one during a takeover.
    pub(super) nodes: HashMap<String, usize>,
}

/// See [`Snapshot::slices`].
#[derive(Clone, Debug, Default)]
pub(super) struct SlicesBy {
    pub(super) address: HashMap<IpAddr, OrdSet<ObjectName>>,
    pub(super) pod: HashMap<ObjectName, OrdSet<ObjectName>>,
}

/// The contents of a namespace.
#[derive(Clone, Debug, Default)]
pub(super) struct Namespace {
    pub(super) membership: Option<Membership>,
    /// By name.
    pub(super) pods: OrdMap<String, Arc<Workload>>,
    /// By name.
    pub(super) services: OrdMap<String, Arc<ServiceState>>,
    /// Services, by one label of their selectors.
    pub(super) by_label: HashMap<(String, String), OrdSet<String>>,
    /// By name.
    pub(super) slices: OrdMap<String, Arc<Slice>>,
    /// Slices, by their service.
    pub(super) by_service: HashMap<String, OrdSet<String>>,
}

/// A service, and the pods that its selector matches.
#[derive(Clone, Debug)]
pub(super) struct ServiceState {
    pub(super) service: Arc<Service>,
    /// The selected pods, by name.
    pub(super) selected: OrdMap<String, Arc<Workload>>,
}

/// Reason why an address cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// The address is not, or no longer, a mesh address.
    #[error("{0} is not (or no longer) the address of a pod or service of the mesh")]
    Unknown(IpAddr),
    /// More than one live pod or service claims the address.
    #[error("{0} is claimed by more than one pod or service; fix the objects that claim it")]
    Disputed(IpAddr),
    /// More than one object is exposed at the address and port.
    #[error("{0} is exposed by {1}; remove the port from all but one of them")]
    DisputedPort(SocketAddr, String),
    /// The service has no such TCP port.
    #[error("service {0} has no TCP port {1}")]
    NoPort(Arc<ObjectName>, u16),
    /// No pod of the service is ready, or none of the ready pods may run it.
    #[error("service {0} has no ready endpoint for port {1} that may run it")]
    NoEndpoint(Arc<ObjectName>, u16),
}

impl Unreachable {
    /// Returns the service that was dialled, if it is known.
    pub fn service(&self) -> Option<&Arc<ObjectName>> {
        match self {
            Self::NoPort(service, _) | Self::NoEndpoint(service, _) => Some(service),
            Self::Unknown(_) | Self::Disputed(_) | Self::DisputedPort(..) => None,
        }
    }
}

impl Snapshot {
    /// Indexes `inventory`. Every pod whose membership is not set is in the mesh.
    pub fn new(inventory: Inventory) -> Self {
        let mut edit = Edit::from(Self::default());
        for pod in inventory.workloads {
            edit.pod(pod);
        }
        for service in inventory.services {
            edit.service(service);
        }
        edit.finish()
    }

    /// Creates an empty snapshot whose pods are in the mesh according to `defaults`.
    pub fn with_defaults(defaults: MeshDefault) -> Self {
        Self {
            defaults: Arc::new(defaults),
            ..Self::default()
        }
    }

    /// Returns the mesh pods, by namespace and name.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        let pods = self.namespaces.values().flat_map(|ns| ns.pods.values());
        pods.filter(|pod| self.is_member(pod))
    }

    /// Returns the pods outside the mesh, by namespace and name, except those in the network namespace of their node.
    pub fn outside(&self) -> impl Iterator<Item = &Arc<Workload>> {
        let pods = self.namespaces.values().flat_map(|ns| ns.pods.values());
        pods.filter(|pod| !pod.host_network && !self.is_member(pod))
    }

    /// Returns what decides which pods are in the mesh, apart from the pods themselves.
    pub fn memberships(&self) -> Memberships {
        let namespaces = self.namespaces.iter();
        let set = namespaces.filter_map(|(name, of)| Some((name.clone(), of.membership?)));
        Memberships {
            namespaces: set.collect(),
            defaults: (*self.defaults).clone(),
        }
    }

    /// Returns the names of this cluster's namespaces whose label puts their pods into the mesh.
    pub fn enabled_namespaces(&self) -> impl Iterator<Item = &str> {
        let namespaces = self.namespaces.iter();
        namespaces
            .filter(|(name, namespace)| {
                namespace.membership == Some(Membership::Enabled) && !cluster::is_remote(name)
            })
            .map(|(name, _)| name.as_str())
    }

    /// Returns all services, by namespace and name, including those outside the mesh.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        let services = self.namespaces.values().flat_map(|ns| ns.services.values());
        services.map(|state| &state.service)
    }

    /// Returns the mesh pods on `node`, by namespace and name, including those without an address and those that have
    /// finished.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.all_on(node).filter(|pod| self.is_member(pod))
    }

    /// Returns the pods on `node`, by namespace and name, in the mesh or not.
    pub fn all_on(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.nodes.get(node).into_iter().flat_map(OrdMap::values)
    }

    /// Reports whether an object says that the pod `name` with this `uid` is not in the mesh.
    pub fn is_excluded(&self, name: &ObjectName, uid: &str) -> bool {
        let pod = self.any_pod(name).filter(|pod| pod.uid == uid);
        pod.is_some_and(|pod| !self.is_member(pod))
    }

    /// Returns the pods on `node` whose objects say that they are not in the mesh, without those in the node's own netns.
    pub fn excluded_on(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let pods = self.all_on(node);
        pods.filter(|pod| !pod.host_network && !self.is_member(pod))
    }

    /// Returns the mesh pod that owns `address`.
    pub fn pod(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        match self.addresses.get(&address)?.owner()? {
            Claim::Pod(pod) => Some(pod),
            _ => None,
        }
    }

    /// Returns the mesh pods with `identity` that run on `node`. A finished pod does not, even if it still has processes:
    /// its object may stay for days.
    pub fn running(&self, node: &str, identity: &Identity) -> impl Iterator<Item = &Arc<Workload>> {
        self.on_node(node)
            .filter(move |pod| pod.identity == *identity && !pod.finished)
    }

    /// Reports whether `node` has a ready daemon. Always true if daemons are not tracked.
    pub fn has_daemon(&self, node: &str) -> bool {
        let known = self.daemons.as_ref();
        known.is_none_or(|daemons| daemons.nodes.contains_key(node))
    }

    /// Reports whether it is known which nodes have a ready daemon.
    pub fn knows_daemons(&self) -> bool {
        self.daemons.is_some()
    }

    /// Reports whether `node` has, or once had, a ready daemon, as far as this discovery knows. From then on the node's
    /// pods are not reached in plaintext, unless an administrator disables the node's tunnel.
    pub fn had_daemon(&self, node: &str) -> bool {
        self.proven.contains(node)
    }

    /// Returns the nodes for which [`Snapshot::had_daemon`] has become true since `before`. The cost depends on the
    /// number of changes.
    pub fn proven_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a str> {
        added(&before.proven, &self.proven).map(String::as_str)
    }

    /// Returns the nodes whose tunnel an administrator has disabled.
    pub fn disabled_nodes(&self) -> impl Iterator<Item = &str> {
        self.disabled.iter().map(String::as_str)
    }

    /// Reports whether more than one pod or service claims `address`.
    pub fn is_disputed(&self, address: IpAddr) -> bool {
        self.disputed.contains(&address)
    }

    /// Returns the kind of `address`, if a known pod or service claims it, or a node has it.
    pub fn kind(&self, address: IpAddr) -> Option<AddressKind> {
        let claimed = self.addresses.get(&address).map(Claims::kind);
        claimed.or_else(|| self.node_at(address).map(|_| AddressKind::Outside))
    }

    /// Describes the object that owns `address`, or all that dispute it: "pod default/web". `None` if no known object
    /// claims the address.
    pub fn describe(&self, address: IpAddr) -> Option<String> {
        let claims = self.addresses.get(&address)?;
        Some(match claims.owner() {
            Some(owner) => owner.describe(),
            None => describe_all(claims.meshed(), " and "),
        })
    }

    /// Returns the addresses of known pods and services, in the mesh or not, with their kinds.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, AddressKind)> {
        let addresses = self.addresses.iter();
        addresses.map(|(address, claims)| (*address, claims.kind()))
    }

    /// Returns the addresses that are new since `before`, changed their kind, or are gone (`None`). The cost depends on
    /// the number of changes.
    pub fn addresses_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (IpAddr, Option<AddressKind>)> {
        let changes = before.addresses.diff(&self.addresses);
        changes.filter_map(|change| match change {
            DiffItem::Add(address, claims) => Some((*address, Some(claims.kind()))),
            DiffItem::Update { old, new } => {
                let kind = new.1.kind();
                (old.1.kind() != kind).then_some((*new.0, Some(kind)))
            }
            DiffItem::Remove(address, _) => Some((*address, None)),
        })
    }

    /// Returns descriptions of all conflicts. Each names the objects.
    pub fn errors(&self) -> impl Iterator<Item = String> {
        let disputed = self.disputed.iter().map(|address| self.error(*address));
        let crowded = self.crowded.iter().map(too_many_endpoints);
        let overruled = self
            .overruled
            .iter()
            .map(|address| self.overruled_at(*address));
        disputed
            .chain(overruled)
            .chain(crowded)
            .chain(self.exposed_errors())
    }

    /// Returns the conflicts that `before` did not have. The cost depends on the number of changes.
    pub fn errors_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = String> {
        let disputed = added(&before.disputed, &self.disputed).map(|address| self.error(*address));
        let overruled = added(&before.overruled, &self.overruled);
        let overruled = overruled.map(|address| self.overruled_at(*address));
        let crowded = added(&before.crowded, &self.crowded).map(too_many_endpoints);
        let exposed = self.exposed_errors_since(before);
        disputed.chain(overruled).chain(crowded).chain(exposed)
    }

    fn error(&self, address: IpAddr) -> String {
        let claims = self.addresses.get(&address);
        let who = claims.map_or_else(String::new, |claims| {
            describe_all(claims.meshed(), " and by ")
        });
        format!("address {address} is claimed by {who}: connections to it are refused")
    }

    fn overruled_at(&self, address: IpAddr) -> String {
        let claims = self.addresses.get(&address);
        let who = claims.map_or_else(String::new, |claims| describe_all(claims.all(), " and by "));
        format!(
            "address {address} is claimed by {who}: this cluster's own object has it, and the pod of the remote cluster is \
             not reached; clusters of one network need different pod networks"
        )
    }

    /// Resolves `address` to the endpoints that a connection may use and the identities that may answer. The address of a
    /// pod, service or node outside the mesh is its own only endpoint, and no identity answers there. A port at which a
    /// service or pod is exposed leads there, unless another object claims the whole address.
    pub fn resolve(&self, address: SocketAddr) -> Result<Destination, Unreachable> {
        let ip = address.ip();
        if let Some(exposed) = self.resolve_exposed(address) {
            return exposed;
        }
        let Some(claims) = self.addresses.get(&ip) else {
            return match self.node_at(ip) {
                Some(_) => Ok(Destination::at(address, None, false)),
                None => Err(Unreachable::Unknown(ip)),
            };
        };
        let no_owner = || match claims.are_disputed() {
            true => Unreachable::Disputed(ip),
            false => Unreachable::Unknown(ip),
        };
        match claims.owner().ok_or_else(no_owner)? {
            Claim::Pod(pod) => Ok(Destination::at(address, Some(pod), true)),
            Claim::OutsidePod(pod) => Ok(Destination::at(address, Some(pod), false)),
            Claim::OutsideService(service) => Ok(Destination {
                service: Some(Arc::new(service.name.clone())),
                ..Destination::at(address, None, false)
            }),
            Claim::Service(service) => service.destination(address.port()),
        }
    }

    /// Returns the slices of a service, by name.
    pub(super) fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &Arc<Slice>> {
        let namespace = self.namespaces.get(&service.namespace);
        namespace.into_iter().flat_map(move |namespace| {
            let names = namespace
                .by_service
                .get(&service.name)
                .into_iter()
                .flatten();
            names.filter_map(|name| namespace.slices.get(name))
        })
    }

    /// Returns the pod `name`, in the mesh or not.
    pub fn any_pod(&self, name: &ObjectName) -> Option<&Arc<Workload>> {
        self.namespaces.get(&name.namespace)?.pods.get(&name.name)
    }

    /// Reports whether `pod` is in the mesh.
    pub(super) fn is_member(&self, pod: &Workload) -> bool {
        let namespace = &pod.name.namespace;
        let membership = pod.membership.unwrap_or_else(|| self.default_of(namespace));
        !pod.host_network && membership == Membership::Enabled
    }

    /// Returns the membership of a pod in `namespace` that does not set its own.
    pub(super) fn default_of(&self, namespace: &str) -> Membership {
        let known = self.namespaces.get(namespace);
        self.defaults
            .of(namespace, known.and_then(|namespace| namespace.membership))
    }
}

/// Returns what `now` has and `before` did not. The cost depends on the number of changes.
pub(super) fn added<'a, T: Ord>(
    before: &'a OrdSet<T>,
    now: &'a OrdSet<T>,
) -> impl Iterator<Item = &'a T> {
    before.diff(now).filter_map(|change| match change {
        ordset::DiffItem::Add(item) => Some(item),
        ordset::DiffItem::Remove(_) => None,
    })
}

fn describe_all<'a>(claims: impl IntoIterator<Item = &'a Claim>, separator: &str) -> String {
    let all: Vec<_> = claims.into_iter().map(Claim::describe).collect();
    all.join(separator)
}

fn too_many_endpoints(service: &ObjectName) -> String {
    format!(
        "service {service} has more than {MAX_SLICED} endpoints in endpoint slices: those beyond are left out"
    )
}

#[cfg(test)]
mod tests;
