//! Services with their endpoints resolved.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    ptr,
    sync::Arc,
};

use super::{
    Identity, ObjectName, Port, Service, Slice, SliceEndpoint, Snapshot, Unreachable, Waypoint,
    Workload, claims::Claims, snapshot::ServiceState,
};

/// Maximum number of endpoints that a service gets from slices, over all its ports. The limit keeps a user who may
/// write slices from exhausting the memory of all nodes.
pub(super) const MAX_SLICED: usize = 10_000;

/// Maximum number of ports of a service that gets its endpoints from slices: as many as a slice may have. Connections
/// to further ports are refused.
const MAX_SLICED_PORTS: usize = 100;

/// A service, resolved for one of its addresses.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) name: Arc<ObjectName>,
    pub(super) ports: HashMap<u16, ServicePort>,
    pub(super) waypoint: Option<Arc<Waypoint>>,
    pub(super) sticky: bool,
    pub(super) local: bool,
}

#[derive(Debug)]
pub(super) struct ServicePort {
    pub(super) endpoints: Arc<[Endpoint]>,
    pub(super) identities: Arc<BTreeSet<Identity>>,
}

/// Where a connection to a mesh address may go.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The service that was dialled. `None` if a pod was dialled by its own address.
    pub service: Option<Arc<ObjectName>>,
    /// Endpoints that may be used. The identity of each may run the service.
    pub endpoints: Arc<[Endpoint]>,
    /// Identities that may answer (secure naming).
    pub identities: Arc<BTreeSet<Identity>>,
    /// The waypoint that the connection goes through instead of straight to an endpoint.
    pub waypoint: Option<Arc<Waypoint>>,
    /// The pod's or service's own address and port, if it was dialled where it is exposed instead: at a port of a node, or
    /// at an address of a load balancer. This is what the waypoint knows.
    pub own_address: Option<SocketAddr>,
    /// Whether a client keeps the same endpoint.
    pub sticky: bool,
    /// Whether only endpoints on the client's node are used.
    pub local: bool,
}

impl Destination {
    /// Returns the destination for a connection to an address outside the mesh.
    pub fn outside(address: SocketAddr) -> Self {
        Self::at(address, None, false)
    }

    /// Returns the destination for a connection to `address` itself, which is `pod`'s, or not a known pod's.
    pub(super) fn at(address: SocketAddr, pod: Option<&Arc<Workload>>, meshed: bool) -> Self {
        let identity = pod.filter(|_| meshed).map(|pod| pod.identity.clone());
        Self {
            service: None,
            endpoints: Arc::new([Endpoint {
                workload: pod.cloned(),
                address,
                meshed,
                foreign: false,
                node: None,
            }]),
            identities: Arc::new(identity.into_iter().collect()),
            waypoint: pod.and_then(|pod| pod.waypoint.clone()),
            own_address: None,
            sticky: false,
            local: false,
        }
    }

    /// Returns the identities that may answer, as text for an error.
    pub fn allowed(&self) -> String {
        let allowed: Vec<_> = self.identities.iter().map(Identity::as_str).collect();
        allowed.join(" or ")
    }
}

/// A server behind a destination.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The pod. `None` if an endpoint slice lists an address that no known pod has.
    pub workload: Option<Arc<Workload>>,
    /// The pod's address, of the dialled family, and the port of the app itself.
    pub address: SocketAddr,
    /// Whether the endpoint is in the mesh. A service may have endpoints that are not.
    pub meshed: bool,
    /// Whether the endpoint is of another trust domain: no known pod has the address, and the service's pinned identities name
    /// another trust domain. It proves its identity in the tunnel, and is never reached without.
    pub foreign: bool,
    /// The node of the endpoint, according to an endpoint slice.
    pub node: Option<Arc<str>>,
}

impl Endpoint {
    /// Reports whether the endpoint runs on `node`.
    pub fn is_on(&self, node: &str) -> bool {
        match &self.workload {
            Some(pod) => pod.node == node,
            None => self.node.as_deref() == Some(node),
        }
    }
}

/// A pod that a service selects, and whether the pod is in the mesh.
pub(super) type Selected<'a> = (&'a Arc<Workload>, bool);

/// An endpoint of a slice, with the slice's ports and the pod at the endpoint's address.
pub(super) struct Sliced<'a> {
    pub(super) endpoint: &'a SliceEndpoint,
    pub(super) ports: &'a [(String, u16)],
    pub(super) server: Server<'a>,
}

/// What is at the address of a slice's endpoint.
#[derive(Clone, Copy)]
pub(super) enum Server<'a> {
    Pod(Selected<'a>),
    /// More than one mesh pod claims the address.
    Disputed,
    /// No known pod.
    Outside,
}

/// The backends of a service.
pub(super) enum Backends<'a> {
    Pods(Vec<Selected<'a>>),
    Slices(Vec<Sliced<'a>>),
}

impl Backends<'_> {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Pods(pods) => pods.is_empty(),
            Self::Slices(endpoints) => endpoints.is_empty(),
        }
    }

    /// Reports whether any backend is in the mesh.
    pub(super) fn any_meshed(&self) -> bool {
        match self {
            Self::Pods(pods) => pods.iter().any(|(_, meshed)| *meshed),
            Self::Slices(endpoints) => endpoints
                .iter()
                .any(|sliced| matches!(sliced.server, Server::Pod((_, true)) | Server::Disputed)),
        }
    }

    /// Returns the backends that have `port`, ordered by address for slices and by name for pods.
    fn on(
        &self,
        service: &Service,
        port: &Port,
        family: IpAddr,
        room: &mut Option<usize>,
    ) -> Vec<Candidate> {
        // Otherwise a node could receive a part of what is meant for pods of other nodes, in plaintext.
        let needs_identity = self.any_meshed();
        let may_serve = |pod: &Workload| !(pod.finished || needs_identity && pod.without_identity);
        match self {
            Self::Pods(pods) => pods
                .iter()
                .filter(|(pod, _)| may_serve(pod))
                .filter_map(|(pod, meshed)| {
                    let ip = pod.address_like(family)?;
                    Some(Candidate {
                        endpoint: Endpoint {
                            workload: Some(Arc::clone(pod)),
                            address: SocketAddr::new(ip, port.target.on(pod)?),
                            meshed: *meshed,
                            foreign: false,
                            node: None,
                        },
                        ready: service.publish_not_ready || (pod.ready && !pod.terminating),
                        // Terminating pods still serve if there are no others (Kubernetes 1.28).
                        serves_last: pod.ready,
                    })
                })
                .collect(),
            Self::Slices(endpoints) => {
                // An endpoint may be in two slices while it moves from one to the other.
                let mut found: BTreeMap<SocketAddr, Candidate> = BTreeMap::new();
                // Numbers of the ports of that name in the current slice. Looked up once per slice, because its
                // endpoints are adjacent.
                let (mut of, mut numbers): (&[_], Vec<u16>) = (&[], Vec::new());
                for Sliced {
                    endpoint,
                    ports,
                    server,
                } in endpoints
                {
                    let (workload, meshed) = match server {
                        Server::Pod((pod, _)) if !may_serve(pod) => continue,
                        Server::Pod((pod, meshed)) => (Some(*pod), *meshed),
                        Server::Outside => (None, false),
                        Server::Disputed => continue,
                    };
                    if endpoint.address.is_ipv4() != family.is_ipv4() {
                        continue;
                    }
                    if !ptr::eq(of, *ports) {
                        of = ports;
                        let same = ports.iter().filter(|(name, _)| *name == port.name);
                        numbers = same.map(|(_, number)| *number).collect();
                    }
                    for number in &numbers {
                        let address = SocketAddr::new(endpoint.address, *number);
                        let ready = service.publish_not_ready || endpoint.ready;
                        if let Some(known) = found.get_mut(&address) {
                            known.ready |= ready;
                            known.serves_last |= endpoint.serves_last;
                            continue;
                        }
                        *room = room.and_then(|left| left.checked_sub(1));
                        if room.is_none() {
                            return found.into_values().collect();
                        }
                        let endpoint = Candidate {
                            endpoint: Endpoint {
                                workload: workload.cloned(),
                                address,
                                meshed,
                                foreign: service.federated && matches!(server, Server::Outside),
                                node: endpoint.node.clone(),
                            },
                            ready,
                            serves_last: endpoint.serves_last,
                        };
                        found.insert(address, endpoint);
                    }
                }
                found.into_values().collect()
            }
        }
    }
}

impl Snapshot {
    /// Returns the backends of a service, of which `slices` are all slices.
    pub(super) fn backends<'a>(
        &'a self,
        state: &'a ServiceState,
        slices: &'a [Arc<Slice>],
    ) -> Backends<'a> {
        if !state.service.selector.is_empty() {
            let pods = state.selected.values();
            return Backends::Pods(pods.map(|pod| (pod, self.is_member(pod))).collect());
        }
        let endpoints = slices.iter().flat_map(|slice| {
            slice.endpoints.iter().map(|endpoint| Sliced {
                endpoint,
                ports: &slice.ports,
                server: self.server_at(endpoint),
            })
        });
        Backends::Slices(endpoints.collect())
    }

    /// Finds what is at the address of a slice's endpoint. The owner of the address takes precedence: a slice can
    /// neither remove a pod from the mesh nor give it the identity of another.
    fn server_at(&self, endpoint: &SliceEndpoint) -> Server<'_> {
        let claims = self.addresses.get(&endpoint.address);
        match claims.and_then(Claims::pod) {
            Some(Ok(pod)) => return Server::Pod((pod, true)),
            Some(Err(_)) => return Server::Disputed,
            None => {}
        }
        let named = endpoint.pod.as_ref();
        match named.and_then(|name| self.any_pod(name)) {
            Some(pod) => Server::Pod((pod, self.is_member(pod))),
            None => Server::Outside,
        }
    }
}

struct Candidate {
    endpoint: Endpoint,
    ready: bool,
    /// Whether the endpoint is used if none is ready.
    serves_last: bool,
}

/// The service of the same name and namespace in a remote cluster, and its backends there.
pub(super) type Remote<'a> = (&'a Service, Backends<'a>);

impl Resolved {
    /// Returns where a connection to `port` may go.
    pub(super) fn destination(&self, port: u16) -> Result<Destination, Unreachable> {
        let name = || self.name.clone();
        let found = self.ports.get(&port);
        let found = found.ok_or_else(|| Unreachable::NoPort(name(), port))?;
        // The waypoint itself decides where the connection goes.
        if found.endpoints.is_empty() && self.waypoint.is_none() {
            return Err(Unreachable::NoEndpoint(name(), port));
        }
        Ok(Destination {
            service: Some(name()),
            endpoints: found.endpoints.clone(),
            identities: found.identities.clone(),
            waypoint: self.waypoint.clone(),
            own_address: None,
            sticky: self.sticky,
            local: self.local,
        })
    }

    /// Resolves `service` with `backends` for `address`. Endpoints of remote clusters are pods of the mesh alone, and are used
    /// if this cluster has none that is ready. Each endpoint from a slice takes one from `room`. If there is no room left,
    /// `room` becomes `None` and further endpoints are left out.
    pub(super) fn new(
        service: &Service,
        backends: &Backends<'_>,
        remote: &[Remote<'_>],
        address: IpAddr,
        room: &mut Option<usize>,
    ) -> Self {
        let most = match backends {
            Backends::Pods(_) => usize::MAX,
            Backends::Slices(_) => MAX_SLICED_PORTS,
        };
        let ports = service
            .ports
            .iter()
            .take(most)
            .map(|port| {
                let mut own = backends.on(service, port, address, room);
                own.retain(|candidate| service.may_be_run_by(&candidate.endpoint));
                let mut theirs = Vec::new();
                for (there, backends) in remote {
                    // Their pods may have the port under another number.
                    let same = there.ports.iter().find(|other| other.name == port.name);
                    let found = same.map(|same| backends.on(there, same, address, room));
                    theirs.extend(found.into_iter().flatten().filter(|candidate| {
                        let endpoint = &candidate.endpoint;
                        let may_run = |of: &Service| of.may_be_run_by(endpoint);
                        endpoint.meshed && may_run(there) && may_run(service)
                    }));
                }
                let endpoints = preferred(&own, &theirs);
                let identities = service.pinned_identities.clone().unwrap_or_else(|| {
                    let meshed = endpoints.iter().filter(|endpoint| endpoint.meshed);
                    let pods = meshed.filter_map(|endpoint| endpoint.workload.as_ref());
                    pods.map(|pod| pod.identity.clone()).collect()
                });
                let resolved = ServicePort {
                    endpoints,
                    identities: Arc::new(identities),
                };
                (port.port, resolved)
            })
            .collect();
        Self {
            name: Arc::new(service.name.clone()),
            ports,
            waypoint: service.waypoint.clone(),
            sticky: service.sticky,
            local: service.local,
        }
    }
}

impl Service {
    /// Reports whether `endpoint` may run the service. If identities are pinned, an endpoint outside the mesh may not, because
    /// it cannot prove its own, unless it is of a trust domain that the service names.
    fn may_be_run_by(&self, endpoint: &Endpoint) -> bool {
        let pinned = self.pinned_identities.as_ref();
        pinned.is_none_or(|pinned| {
            let pod = endpoint.workload.as_ref();
            let is_pinned = |pod: &Arc<Workload>| pinned.contains(&pod.identity);
            endpoint.foreign || endpoint.meshed && pod.is_some_and(is_pinned)
        })
    }
}

/// Returns the endpoints that a connection may use: the ready ones of this cluster, else those of remote clusters, else the ones
/// that serve last.
fn preferred(own: &[Candidate], theirs: &[Candidate]) -> Arc<[Endpoint]> {
    let of = |candidates: &[Candidate], may_serve: fn(&Candidate) -> bool| {
        let serving = candidates.iter().filter(|candidate| may_serve(candidate));
        let endpoints: Arc<[_]> = serving
            .map(|candidate| candidate.endpoint.clone())
            .collect();
        (!endpoints.is_empty()).then_some(endpoints)
    };
    of(own, |candidate| candidate.ready)
        .or_else(|| of(theirs, |candidate| candidate.ready))
        .or_else(|| of(own, |candidate| candidate.serves_last))
        .or_else(|| of(theirs, |candidate| candidate.serves_last))
        .unwrap_or_default()
}
