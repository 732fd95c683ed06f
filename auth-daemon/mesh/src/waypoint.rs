//! Waypoints: proxies of an Istio mesh that all traffic of a workload or service goes through.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use super::{
    Destination, Endpoint, ObjectName, Snapshot,
    claims::Claim,
    resolved::{MAX_SLICED, Resolved},
};

/// The proxy that all connections to a workload or service go through, by HBONE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waypoint {
    /// Where it is.
    pub at: WaypointAt,
    /// Its port for HBONE.
    pub port: u16,
}

/// Where a waypoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaypointAt {
    /// Behind an address of a service or pod.
    Address(IpAddr),
    /// Behind a service.
    Service(ObjectName),
    /// Nowhere that can be reached, for this reason. Connections must not go around it.
    Unusable(String),
}

/// Why a waypoint cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoWaypoint {
    /// No object has its name or address.
    #[error(
        "no known service or pod is waypoint {0}; see the Gateway of that name, or remove istio.io/use-waypoint"
    )]
    Unknown(Waypoint),
    /// More than one pod or service claims its address.
    #[error(
        "the address of waypoint {0} is claimed by more than one pod or service; fix the objects that claim it"
    )]
    Disputed(Waypoint),
    /// What is said about it cannot be used.
    #[error("istiod describes it in a way that cannot be used: {0}")]
    Unusable(Waypoint),
    /// Its service does not have the port for HBONE.
    #[error("the service of waypoint {0} has no port {port}", port = .0.port)]
    NoPort(Waypoint),
    /// None of its pods is known and ready.
    #[error("waypoint {0} has no ready pod; see its Deployment")]
    NotReady(Waypoint),
}

impl fmt::Display for Waypoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            WaypointAt::Address(address) => write!(f, "{address}"),
            WaypointAt::Service(service) => write!(f, "{service}"),
            WaypointAt::Unusable(reason) => f.write_str(reason),
        }
    }
}

impl Snapshot {
    /// Returns the ready pods of `waypoint` at their ports for HBONE, and their identities. They are usually outside the mesh,
    /// because a waypoint speaks HBONE itself. Addresses of the same family as `like` are preferred.
    pub fn waypoint(&self, waypoint: &Waypoint, like: IpAddr) -> Result<Destination, NoWaypoint> {
        let unknown = || NoWaypoint::Unknown(waypoint.clone());
        let name: &ObjectName = match &waypoint.at {
            WaypointAt::Service(name) => name,
            WaypointAt::Unusable(_) => return Err(NoWaypoint::Unusable(waypoint.clone())),
            WaypointAt::Address(address) => {
                let claims = self.addresses.get(address).ok_or_else(unknown)?;
                match claims.owner() {
                    Some(Claim::Service(service)) => &service.name,
                    Some(Claim::OutsideService(service)) => &service.name,
                    Some(Claim::Pod(pod) | Claim::OutsidePod(pod)) => {
                        let address = SocketAddr::new(*address, waypoint.port);
                        let found = Destination::at(address, Some(pod), true);
                        return match pod.ready && !pod.finished {
                            true => Ok(proxy(found)),
                            false => Err(NoWaypoint::NotReady(waypoint.clone())),
                        };
                    }
                    None => return Err(NoWaypoint::Disputed(waypoint.clone())),
                }
            }
        };
        let state = self.namespaces.get(&name.namespace);
        let state = state.and_then(|namespace| namespace.services.get(&name.name));
        let state = state.ok_or_else(unknown)?;
        let slices: Vec<_> = self.slices_of(name).cloned().collect();
        let backends = self.backends(state, &slices);
        let other: IpAddr = match like {
            IpAddr::V4(_) => Ipv6Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED.into(),
        };
        let mut found = Err(NoWaypoint::NotReady(waypoint.clone()));
        for family in [like, other] {
            let mut room = Some(MAX_SLICED);
            let resolved = Resolved::new(&state.service, &backends, &[], family, &mut room);
            let Some(port) = resolved.ports.get(&waypoint.port) else {
                return Err(NoWaypoint::NoPort(waypoint.clone()));
            };
            // Only what is known can prove its identity.
            let known = |endpoint: &&Endpoint| endpoint.workload.is_some();
            let endpoints: Arc<[_]> = port.endpoints.iter().filter(known).cloned().collect();
            if !endpoints.is_empty() {
                found = Ok(proxy(Destination {
                    service: Some(resolved.name),
                    endpoints,
                    identities: Arc::default(),
                    waypoint: None,
                    own_address: None,
                    sticky: resolved.sticky,
                    local: resolved.local,
                }));
                break;
            }
        }
        found
    }
}

/// Returns the destination with the identities of all its pods, whether or not they are in the mesh.
fn proxy(found: Destination) -> Destination {
    let pods = found.endpoints.iter();
    let pods = pods.filter_map(|endpoint| endpoint.workload.as_ref());
    let identities = pods.map(|pod| pod.identity.clone()).collect();
    Destination {
        identities: Arc::new(identities),
        waypoint: None,
        ..found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        AddressKind, Edit, Identity, Membership, Port, Service, Slice, SliceEndpoint, TargetPort,
        Workload,
    };

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    /// A waypoint's pod, which is outside the mesh.
    fn pod(pod: &str, address: &str, ready: bool) -> Workload {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{pod}");
        Workload {
            addresses: vec![address.parse().unwrap(), "fd00::9".parse().unwrap()],
            node: "b".into(),
            ready,
            membership: Some(Membership::Disabled),
            ..Workload::new(name(pod), identity.parse().unwrap())
        }
    }

    fn slice(slice: &str, endpoints: &[&str], ready: bool) -> Slice {
        let endpoints = endpoints.iter().map(|address| SliceEndpoint {
            address: address.parse().unwrap(),
            pod: Some(name(slice)),
            node: None,
            ready,
            serves_last: false,
        });
        Slice {
            name: name(slice),
            service: "proxy".into(),
            ports: vec![("15008".into(), 15009)],
            endpoints: endpoints.collect(),
            mesh_only: false,
        }
    }

    /// A waypoint with the service `shop/proxy`, and what else `change` makes.
    fn known(change: impl FnOnce(&mut Edit)) -> Snapshot {
        let mut edit = Edit::from(Snapshot::default());
        edit.service(Service {
            addresses: vec!["10.96.0.9".parse().unwrap()],
            ports: vec![Port {
                name: "15008".into(),
                port: 15008,
                target: TargetPort::Number(15008),
            }],
            ..Service::new(name("proxy"))
        });
        change(&mut edit);
        edit.finish()
    }

    fn ready(edit: &mut Edit) {
        edit.pod(pod("proxy-1", "10.1.0.9", true));
        edit.slice(slice("proxy-1", &["10.1.0.9", "fd00::9"], true));
    }

    fn at(at: WaypointAt) -> Waypoint {
        Waypoint { at, port: 15008 }
    }

    fn by_name() -> Waypoint {
        at(WaypointAt::Service(name("proxy")))
    }

    fn by_address(address: &str) -> Waypoint {
        at(WaypointAt::Address(address.parse().unwrap()))
    }

    fn found(snapshot: &Snapshot, waypoint: &Waypoint, like: &str) -> Result<String, NoWaypoint> {
        let found = snapshot.waypoint(waypoint, like.parse().unwrap())?;
        let [endpoint] = &*found.endpoints else {
            panic!("{found:?}");
        };
        let accounts: Vec<_> = found
            .identities
            .iter()
            .map(Identity::service_account)
            .collect();
        Ok(format!("{} {}", endpoint.address, accounts.join(" ")))
    }

    #[test]
    fn is_found_by_its_services_name_or_address_or_its_pods_address() {
        let snapshot = known(ready);
        for (waypoint, like, expected) in [
            (by_name(), "10.96.0.1", "10.1.0.9:15009 proxy-1"),
            (by_name(), "fd96::1", "[fd00::9]:15009 proxy-1"),
            (
                by_address("10.96.0.9"),
                "10.96.0.1",
                "10.1.0.9:15009 proxy-1",
            ),
            // The pod is dialled at the port that the waypoint names.
            (
                by_address("10.1.0.9"),
                "10.96.0.1",
                "10.1.0.9:15008 proxy-1",
            ),
        ] {
            let found = found(&snapshot, &waypoint, like);
            assert_eq!(found.as_deref(), Ok(expected), "{waypoint} {like}");
        }
        let only_ipv4 = known(|edit| {
            edit.pod(pod("proxy-1", "10.1.0.9", true));
            edit.slice(slice("proxy-1", &["10.1.0.9"], true));
        });
        let other_family = found(&only_ipv4, &by_name(), "fd96::1");
        assert_eq!(other_family.as_deref(), Ok("10.1.0.9:15009 proxy-1"));
    }

    #[test]
    fn is_none_if_it_is_unknown_unready_or_disputed() {
        let without = known(|_| ());
        let unready = known(|edit| {
            edit.pod(pod("proxy-1", "10.1.0.9", false));
            edit.slice(slice("proxy-1", &["10.1.0.9"], false));
        });
        let without_pod = known(|edit| edit.slice(slice("proxy-1", &["10.1.0.9"], true)));
        let disputed = known(|edit| {
            for name in ["proxy-1", "other"] {
                let membership = Some(Membership::Enabled);
                edit.pod(Workload {
                    membership,
                    ..pod(name, "10.1.0.9", true)
                });
            }
        });
        let other = at(WaypointAt::Service(name("other")));
        let unusable = at(WaypointAt::Unusable("it is in another network".into()));
        let other_port = Waypoint {
            port: 80,
            ..by_name()
        };
        let ready = known(ready);
        for (snapshot, waypoint, expected) in [
            (
                &ready,
                &other,
                NoWaypoint::Unknown as fn(Waypoint) -> NoWaypoint,
            ),
            (&ready, &by_address("10.1.0.7"), NoWaypoint::Unknown),
            (&ready, &other_port, NoWaypoint::NoPort),
            (&ready, &unusable, NoWaypoint::Unusable),
            (&without, &by_name(), NoWaypoint::NotReady),
            (&unready, &by_name(), NoWaypoint::NotReady),
            (&unready, &by_address("10.1.0.9"), NoWaypoint::NotReady),
            (&without_pod, &by_name(), NoWaypoint::NotReady),
            (&disputed, &by_address("10.1.0.9"), NoWaypoint::Disputed),
        ] {
            let found = found(snapshot, waypoint, "10.96.0.1");
            assert_eq!(found, Err(expected(waypoint.clone())), "{waypoint}");
        }
    }

    #[test]
    fn an_address_that_a_pod_of_the_mesh_has_is_that_pod_whatever_the_slice_says() {
        let snapshot = known(|edit| {
            ready(edit);
            edit.pod(Workload {
                membership: Some(Membership::Enabled),
                ..pod("owner", "10.1.0.9", true)
            });
        });
        let found = found(&snapshot, &by_name(), "10.96.0.1");
        assert_eq!(found.as_deref(), Ok("10.1.0.9:15009 owner"));
    }

    #[test]
    fn what_is_behind_it_is_captured_even_without_an_endpoint_and_outside_the_mesh() {
        let snapshot = known(|edit| {
            edit.pod(Workload {
                waypoint: Some(Arc::new(by_name())),
                ..pod("web", "10.1.0.1", true)
            });
            edit.service(Service {
                addresses: vec!["10.96.0.7".parse().unwrap()],
                ports: vec![Port {
                    name: "80".into(),
                    port: 80,
                    target: TargetPort::Number(80),
                }],
                waypoint: Some(Arc::new(by_name())),
                ..Service::new(name("external"))
            });
        });
        for (address, kind) in [
            ("10.1.0.1:80", AddressKind::Pod),
            ("10.96.0.7:80", AddressKind::Service),
        ] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(snapshot.kind(address.ip()), Some(kind), "{address}");
            let found = snapshot.resolve(address).unwrap();
            assert_eq!(found.waypoint.as_deref(), Some(&by_name()), "{address}");
        }
    }
}
