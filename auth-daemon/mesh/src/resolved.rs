//! Services with their endpoints worked out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    ptr,
    sync::Arc,
};

use super::{Identity, ObjectName, Port, Service, SliceEndpoint, Workload};

/// Endpoints that a service gets from slices at most, over all its ports: who may write slices is not to fill the memory of
/// all nodes.
pub(super) const MAX_SLICED: usize = 10_000;

/// Ports that a service with slices has at most: as many as a slice. Others are refused.
const MAX_SLICED_PORTS: usize = 100;

/// A service as one of its addresses leads to it.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) name: ObjectName,
    pub(super) ports: HashMap<u16, ServicePort>,
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
    /// The service dialled; none when a pod was dialled by its own address.
    pub service: Option<ObjectName>,
    /// Endpoints that may be used, whose identity may run the service.
    pub endpoints: Arc<[Endpoint]>,
    /// The identities that may answer (secure naming).
    pub identities: Arc<BTreeSet<Identity>>,
    /// Whether a client always gets the same endpoint.
    pub sticky: bool,
    /// Whether only endpoints on the client's node count.
    pub local: bool,
}

impl Destination {
    /// The identities that may answer, for an error.
    pub fn allowed(&self) -> String {
        let allowed: Vec<_> = self.identities.iter().map(Identity::as_str).collect();
        allowed.join(" or ")
    }
}

/// A server behind a destination.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The pod. `None`: none that is known has the address, which an endpoint slice names.
    pub workload: Option<Arc<Workload>>,
    /// The pod's address, of the family that was dialled, and the app's own port.
    pub address: SocketAddr,
    /// Whether it is of the mesh: a service may have endpoints that are not.
    pub meshed: bool,
    /// The node that an endpoint slice says it is on.
    pub node: Option<Arc<str>>,
}

impl Endpoint {
    /// Whether it runs on `node`.
    pub fn is_on(&self, node: &str) -> bool {
        match &self.workload {
            Some(pod) => pod.node == node,
            None => self.node.as_deref() == Some(node),
        }
    }
}

/// A pod that a service selects, and whether it is of the mesh.
pub(super) type Selected<'a> = (&'a Arc<Workload>, bool);

/// An endpoint of a slice, with the slice's ports, and who is there.
pub(super) struct Sliced<'a> {
    pub(super) endpoint: &'a SliceEndpoint,
    pub(super) ports: &'a [(String, u16)],
    pub(super) server: Server<'a>,
}

/// Who is at an address.
#[derive(Clone, Copy)]
pub(super) enum Server<'a> {
    Pod(Selected<'a>),
    /// Pods of the mesh, and none of them for sure.
    Disputed,
    /// None of the pods that are known.
    Outside,
}

/// Who is behind a service.
pub(super) enum Backends<'a> {
    Pods(Vec<Selected<'a>>),
    Slices(Vec<Sliced<'a>>),
}

impl Backends<'_> {
    /// Whether any is of the mesh.
    pub(super) fn any_meshed(&self) -> bool {
        match self {
            Self::Pods(pods) => pods.iter().any(|(_, meshed)| *meshed),
            Self::Slices(endpoints) => endpoints
                .iter()
                .any(|sliced| matches!(sliced.server, Server::Pod((_, true)) | Server::Disputed)),
        }
    }

    /// Those that have `port`, in the order of their addresses, or of the pods' names.
    fn on(
        &self,
        service: &Service,
        port: &Port,
        family: IpAddr,
        room: &mut Option<usize>,
    ) -> Vec<Candidate> {
        match self {
            Self::Pods(pods) => pods
                .iter()
                .filter_map(|(pod, meshed)| {
                    let ip = pod.address_like(family)?;
                    Some(Candidate {
                        endpoint: Endpoint {
                            workload: Some(Arc::clone(pod)),
                            address: SocketAddr::new(ip, port.target.on(pod)?),
                            meshed: *meshed,
                            node: None,
                        },
                        ready: service.publish_not_ready || (pod.ready && !pod.terminating),
                        // Pods that are going still serve, where there are no others (Kubernetes 1.28).
                        serves_last: pod.ready,
                    })
                })
                .collect(),
            Self::Slices(endpoints) => {
                // The same endpoint may be in two slices while it moves from one to the other.
                let mut found: BTreeMap<SocketAddr, Candidate> = BTreeMap::new();
                // A slice's ports of that name: looked for once for all its endpoints, which come one after the other.
                let (mut of, mut numbers): (&[_], Vec<u16>) = (&[], Vec::new());
                for Sliced {
                    endpoint,
                    ports,
                    server,
                } in endpoints
                {
                    let (workload, meshed) = match server {
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
                        if let Some(known) = found.get_mut(&address) {
                            known.ready |= endpoint.ready;
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
                                node: endpoint.node.clone(),
                            },
                            ready: endpoint.ready,
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

struct Candidate {
    endpoint: Endpoint,
    ready: bool,
    /// Whether it counts where none is ready.
    serves_last: bool,
}

impl Resolved {
    /// `service`, with `backends` behind it, as `address` leads to it. Endpoints of slices take from `room`, and are left
    /// out when there is none, which is told by `None` from then on.
    pub(super) fn new(
        service: &Service,
        backends: &Backends<'_>,
        address: IpAddr,
        room: &mut Option<usize>,
    ) -> Self {
        // Who is not of the mesh cannot show who it is.
        let may_run = |endpoint: &Endpoint| {
            let pinned = service.pinned_identities.as_ref();
            pinned.is_none_or(|pinned| {
                let pod = endpoint.workload.as_ref();
                endpoint.meshed && pod.is_some_and(|pod| pinned.contains(&pod.identity))
            })
        };
        let most = match backends {
            Backends::Pods(_) => usize::MAX,
            Backends::Slices(_) => MAX_SLICED_PORTS,
        };
        let ports = service
            .ports
            .iter()
            .take(most)
            .map(|port| {
                let mut all = backends.on(service, port, address, room);
                all.retain(|candidate| may_run(&candidate.endpoint));
                let any_ready = all.iter().any(|candidate| candidate.ready);
                let endpoints: Arc<[Endpoint]> = all
                    .into_iter()
                    .filter(|candidate| match any_ready {
                        true => candidate.ready,
                        false => candidate.serves_last,
                    })
                    .map(|candidate| candidate.endpoint)
                    .collect();
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
            name: service.name.clone(),
            ports,
            sticky: service.sticky,
            local: service.local,
        }
    }
}
