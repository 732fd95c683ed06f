//! Services with their endpoints worked out.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Identity, ObjectName, Service, Workload};

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
    /// The pod.
    pub workload: Arc<Workload>,
    /// The pod's address, of the family that was dialled, and the app's own port.
    pub address: SocketAddr,
    /// Whether it is of the mesh: a service may have pods that are not.
    pub meshed: bool,
}

/// A pod that a service selects, and whether it is of the mesh.
pub(super) type Selected<'a> = (&'a Arc<Workload>, bool);

impl Resolved {
    /// `service`, with `pods` behind it, as `address` leads to it.
    pub(super) fn new(service: &Service, pods: &[Selected<'_>], address: IpAddr) -> Self {
        // Who is not of the mesh cannot show who it is.
        let may_run = |(pod, meshed): &Selected<'_>| {
            let pinned = service.pinned_identities.as_ref();
            pinned.is_none_or(|pinned| *meshed && pinned.contains(&pod.identity))
        };
        let all: Vec<_> = pods.iter().filter(|pod| may_run(pod)).copied().collect();
        let usable =
            |(pod, _): &Selected<'_>| service.publish_not_ready || (pod.ready && !pod.terminating);
        // Pods that are going still serve, where there are no others (Kubernetes 1.28).
        let mut chosen: Vec<_> = all.iter().filter(|pod| usable(pod)).copied().collect();
        if chosen.is_empty() {
            chosen = all.into_iter().filter(|(pod, _)| pod.ready).collect();
        }
        let ports = service
            .ports
            .iter()
            .map(|port| {
                let endpoints: Arc<[Endpoint]> = chosen
                    .iter()
                    .filter_map(|(pod, meshed)| {
                        let ip = pod.address_like(address)?;
                        Some(Endpoint {
                            workload: Arc::clone(pod),
                            address: SocketAddr::new(ip, port.target.on(pod)?),
                            meshed: *meshed,
                        })
                    })
                    .collect();
                let identities = service.pinned_identities.clone().unwrap_or_else(|| {
                    let meshed = endpoints.iter().filter(|endpoint| endpoint.meshed);
                    meshed.map(|e| e.workload.identity.clone()).collect()
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
