//! Ports at which services and pods are exposed on addresses that are not their own: ports of nodes (`NodePort`,
//! `hostPort`), addresses of load balancers and external addresses.
//!
//! Users may write external addresses as they like, so an exposed port claims nothing but this one port, and any claim of
//! a pod or service on the whole address outranks it. A port that several objects expose is refused.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{OrdMap, OrdSet, ordset::DiffItem};

use super::{
    Destination, Edit, ObjectName, Service, Snapshot, Unreachable, Workload,
    claims::{AddressKind, Claim, Claimant, Claims},
    snapshot::added,
};

/// Maximum number of external addresses of a service, times its ports. The limit keeps a user who may write services from
/// exhausting the memory of all nodes.
const MAX_EXTERNAL: usize = 1024;

/// An address and port at which an object is exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExposedAt {
    /// The address. `None` stands forevery address of every node.
    pub address: Option<IpAddr>,
    /// The TCP port.
    pub port: u16,
}

/// A port of a pod that is exposed on its node (`hostPort`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Addresses of the node.
    pub addresses: Vec<IpAddr>,
    /// The node's port.
    pub port: u16,
    /// The pod's port.
    pub target: u16,
}

/// What the exposed ports of a snapshot lead to.
#[derive(Clone, Debug, Default)]
pub(super) struct Exposed {
    claims: OrdMap<ExposedAt, OrdMap<(Claimant, ObjectName), Exposure>>,
    /// Those that an object of the mesh claims.
    captured: OrdSet<ExposedAt>,
    /// Those that an object of the mesh and another object claim.
    disputed: OrdSet<ExposedAt>,
    /// Services with more external addresses than the limit.
    crowded: OrdSet<ObjectName>,
}

/// A claim to an exposed port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Exposure {
    /// The service's port, or the pod's.
    target: u16,
    is_meshed: bool,
    /// Whether the object yields the port to another: a terminating pod.
    yields: bool,
}

impl Snapshot {
    /// Returns the ports at which objects of the mesh are exposed, sorted.
    pub fn exposed(&self) -> impl Iterator<Item = ExposedAt> {
        self.exposed.captured.iter().copied()
    }

    /// Returns the exposed ports that are new since `before`, with true, and those that are gone, with false. The cost
    /// depends on the number of changes.
    pub fn exposed_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (ExposedAt, bool)> {
        let changes = before.exposed.captured.diff(&self.exposed.captured);
        changes.map(|change| match change {
            DiffItem::Add(at) => (*at, true),
            DiffItem::Remove(at) => (*at, false),
        })
    }

    /// Reports whether an object of the mesh is exposed at a port of this very address.
    pub fn has_exposed_port(&self, address: IpAddr) -> bool {
        let at = |port| ExposedAt {
            address: Some(address),
            port,
        };
        let mut ports = self.exposed.captured.range(at(0)..=at(u16::MAX));
        ports.next().is_some()
    }

    /// Resolves a port at which an object is exposed. `None` if no object of the mesh is, or if a pod or service claims the
    /// whole address.
    pub(super) fn resolve_exposed(
        &self,
        dialled: SocketAddr,
    ) -> Option<Result<Destination, Unreachable>> {
        let ip = dialled.ip();
        if self
            .addresses
            .get(&ip)
            .is_some_and(|claims| self.outranks_ports(ip, claims))
        {
            return None;
        }
        let of = |address| {
            let at = ExposedAt {
                address,
                port: dialled.port(),
            };
            self.exposed.claims.get(&at).into_iter().flatten()
        };
        // A port of one node, and the same port of all nodes, may be claimed by different objects.
        let claims: Vec<_> = of(Some(ip)).chain(of(None)).collect();
        if !claims.iter().any(|(_, exposure)| exposure.is_meshed) {
            return None;
        }
        let ((claimant, name), exposure) = match owner(&claims) {
            Some(owner) => owner,
            None => {
                let who: BTreeSet<_> = claims.iter().map(|(who, _)| describe(who)).collect();
                let who: Vec<String> = who.into_iter().collect();
                return Some(Err(Unreachable::DisputedPort(dialled, who.join(" and "))));
            }
        };
        if !exposure.is_meshed {
            return None;
        }
        Some(match claimant {
            Claimant::Service => self.resolve_service(name, ip, exposure.target),
            Claimant::Pod => {
                let pod = self.any_pod(name)?;
                let address = SocketAddr::new(pod.address_like(ip)?, exposure.target);
                Ok(Destination {
                    own_address: Some(address),
                    ..Destination::at(address, Some(pod), true)
                })
            }
        })
    }

    /// Reports whether the claims on a whole address outrank its exposed ports. Pods in a node's own netns have the node's
    /// address, and do not.
    fn outranks_ports(&self, address: IpAddr, claims: &Claims) -> bool {
        let mut all = claims.all().iter();
        let is_host = |claim: &Claim| match claim {
            Claim::OutsidePod(pod) => pod.host_network || self.node_at(address).is_some(),
            _ => false,
        };
        claims.kind() != AddressKind::Outside || !all.all(is_host)
    }

    /// Resolves `port` of a service, dialled at an address of the family of `like`. The endpoints' node does not
    /// matter, because `internalTrafficPolicy` only applies to virtual addresses.
    fn resolve_service(
        &self,
        name: &ObjectName,
        like: IpAddr,
        port: u16,
    ) -> Result<Destination, Unreachable> {
        let namespace = self.namespaces.get(&name.namespace);
        let state = namespace.and_then(|namespace| namespace.services.get(&name.name));
        let addresses = state.map_or(&[][..], |state| &state.service.addresses);
        let none = || Unreachable::NoEndpoint(Arc::new(name.clone()), port);
        let same_family = addresses.iter().find(|ip| ip.is_ipv4() == like.is_ipv4());
        let address = *same_family.ok_or_else(none)?;
        let claims = self.addresses.get(&address);
        let mut claims = claims.map_or(&[][..], Claims::all).iter();
        let resolved = claims.find_map(|claim| match claim {
            Claim::Service(resolved) if *resolved.name == *name => Some(resolved),
            _ => None,
        });
        let resolved = resolved.ok_or_else(none)?;
        Ok(Destination {
            own_address: Some(SocketAddr::new(address, port)),
            local: false,
            ..resolved.destination(port)?
        })
    }

    /// Returns descriptions of the ports that are claimed by several objects, and of the services with too many.
    pub(super) fn exposed_errors(&self) -> impl Iterator<Item = String> {
        let disputed = self
            .exposed
            .disputed
            .iter()
            .map(|at| self.disputed_port(at));
        disputed.chain(self.exposed.crowded.iter().map(too_many_external_ports))
    }

    /// As [`Snapshot::exposed_errors`], without those of `before`.
    pub(super) fn exposed_errors_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = String> {
        let disputed = added(&before.exposed.disputed, &self.exposed.disputed);
        let crowded = added(&before.exposed.crowded, &self.exposed.crowded);
        disputed
            .map(|at| self.disputed_port(at))
            .chain(crowded.map(too_many_external_ports))
    }

    fn disputed_port(&self, at: &ExposedAt) -> String {
        let claims = self.exposed.claims.get(at).into_iter().flatten();
        let who: Vec<_> = claims.map(|(who, _)| describe(who)).collect();
        let who = who.join(" and by ");
        let port = match at.address {
            Some(address) => SocketAddr::new(address, at.port).to_string(),
            None => format!("port {} of the nodes", at.port),
        };
        format!("{port} is exposed by {who}: connections to it are refused")
    }
}

impl Edit {
    /// Claims the ports at which a service is exposed.
    pub(super) fn expose_service(&mut self, service: &Service, is_meshed: bool) {
        for (at, target) in exposed_ports(service) {
            let exposure = Exposure {
                target,
                is_meshed,
                yields: false,
            };
            self.expose(at, (Claimant::Service, service.name.clone()), exposure);
        }
        let crowded = &mut self.next.exposed.crowded;
        if service.external_addresses.len() * service.ports.len() > MAX_EXTERNAL {
            crowded.insert(service.name.clone());
        } else {
            crowded.remove(&service.name);
        }
    }

    /// Undoes [`Edit::expose_service`].
    pub(super) fn hide_service(&mut self, service: &Service) {
        for (at, _) in exposed_ports(service) {
            self.hide(at, &(Claimant::Service, service.name.clone()));
        }
        self.next.exposed.crowded.remove(&service.name);
    }

    /// Claims the ports at which a pod is exposed.
    pub(super) fn expose_pod(&mut self, pod: &Workload, is_meshed: bool) {
        for (at, target) in host_ports(pod) {
            let exposure = Exposure {
                target,
                is_meshed,
                yields: pod.terminating,
            };
            self.expose(at, (Claimant::Pod, pod.name.clone()), exposure);
        }
    }

    /// Undoes [`Edit::expose_pod`].
    pub(super) fn hide_pod(&mut self, pod: &Workload) {
        for (at, _) in host_ports(pod) {
            self.hide(at, &(Claimant::Pod, pod.name.clone()));
        }
    }

    fn expose(&mut self, at: ExposedAt, who: (Claimant, ObjectName), exposure: Exposure) {
        let exposed = &mut self.next.exposed;
        exposed.claims.entry(at).or_default().insert(who, exposure);
        exposed.settle(at);
    }

    fn hide(&mut self, at: ExposedAt, who: &(Claimant, ObjectName)) {
        let exposed = &mut self.next.exposed;
        if let Some(claims) = exposed.claims.get_mut(&at) {
            claims.remove(who);
            if claims.is_empty() {
                exposed.claims.remove(&at);
            }
            exposed.settle(at);
        }
    }
}

impl Exposed {
    /// Determines whether a port is captured and disputed.
    fn settle(&mut self, at: ExposedAt) {
        let claims: Vec<_> = self.claims.get(&at).into_iter().flatten().collect();
        let is_captured = claims.iter().any(|(_, exposure)| exposure.is_meshed);
        let is_disputed = is_captured && owner(&claims).is_none();
        for (set, contains) in [
            (&mut self.captured, is_captured),
            (&mut self.disputed, is_disputed),
        ] {
            if contains {
                set.insert(at);
            } else {
                set.remove(&at);
            }
        }
    }
}

type Claimed<'a> = (&'a (Claimant, ObjectName), &'a Exposure);

/// Returns the only object that claims a port, or the only one that does not yield it. `None` if there are more.
fn owner<'a>(claims: &[Claimed<'a>]) -> Option<Claimed<'a>> {
    let only = |mut claims: Box<dyn Iterator<Item = &Claimed<'a>> + '_>| {
        let first = claims.next()?;
        // The same object may claim a port of one node and of all.
        claims.all(|other| other.0 == first.0).then_some(*first)
    };
    only(Box::new(claims.iter()))
        .or_else(|| only(Box::new(claims.iter().filter(|(_, claim)| !claim.yields))))
}

/// Returns the ports at which a service is exposed, with its own ports.
fn exposed_ports(service: &Service) -> impl Iterator<Item = (ExposedAt, u16)> {
    let of_nodes = service.node_ports.iter().map(|(node_port, port)| {
        let at = ExposedAt {
            address: None,
            port: *node_port,
        };
        (at, *port)
    });
    let external = service.external_addresses.iter().flat_map(|address| {
        service.ports.iter().map(|port| {
            let at = ExposedAt {
                address: Some(*address),
                port: port.port,
            };
            (at, port.port)
        })
    });
    of_nodes.chain(external.take(MAX_EXTERNAL))
}

fn host_ports(pod: &Workload) -> impl Iterator<Item = (ExposedAt, u16)> {
    // A finished pod's ports may be another's by now.
    let host_ports = pod.host_ports.iter().filter(|_| !pod.finished);
    host_ports.flat_map(|host_port| {
        host_port.addresses.iter().map(|address| {
            let at = ExposedAt {
                address: Some(*address),
                port: host_port.port,
            };
            (at, host_port.target)
        })
    })
}

fn describe((claimant, name): &(Claimant, ObjectName)) -> String {
    match claimant {
        Claimant::Pod => format!("pod {name}"),
        Claimant::Service => format!("service {name}"),
    }
}

fn too_many_external_ports(service: &ObjectName) -> String {
    format!(
        "service {service} has more than {MAX_EXTERNAL} external addresses and ports: those beyond are not captured, and \
         servers in STRICT refuse connections to them"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Membership, Node, Port, TargetPort};

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "default".into(),
            name: name.into(),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn pod(pod: &str, address: &str) -> Workload {
        Workload {
            addresses: vec![ip(address)],
            node: "a".into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Workload::new(name(pod), "spiffe://c/ns/default/sa/web".parse().unwrap())
        }
    }

    fn service(service: &str, address: &str) -> Service {
        Service {
            addresses: vec![ip(address)],
            ports: vec![Port {
                name: String::new(),
                port: 80,
                target: TargetPort::Number(8080),
            }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            local: true,
            ..Service::new(name(service))
        }
    }

    /// Node a has 192.0.2.1; the service `web` has node port 30080, and the external address 198.51.100.1.
    fn snapshot(change: impl FnOnce(&mut Edit)) -> Snapshot {
        let mut edit = Edit::from(Snapshot::default());
        edit.node(Node {
            name: "a".into(),
            addresses: vec![ip("192.0.2.1")],
            ..Node::default()
        });
        edit.pod(pod("web-1", "10.1.0.1"));
        edit.service(Service {
            node_ports: vec![(30080, 80)],
            external_addresses: vec![ip("198.51.100.1")],
            ..service("web", "10.96.0.1")
        });
        change(&mut edit);
        edit.finish()
    }

    fn resolve(snapshot: &Snapshot, dialled: &str) -> Result<String, Unreachable> {
        let found = snapshot.resolve(dialled.parse().unwrap())?;
        assert!(!found.local, "internalTrafficPolicy");
        let service = found.service.map_or("-".into(), |name| name.name.clone());
        Ok(format!("{service} {}", found.endpoints[0].address))
    }

    #[test]
    fn an_exposed_port_leads_to_the_service() {
        let snapshot = snapshot(|_| {});
        for dialled in ["192.0.2.1:30080", "198.51.100.1:80"] {
            assert_eq!(resolve(&snapshot, dialled).unwrap(), "web 10.1.0.1:8080");
        }
        for dialled in ["198.51.100.1:81", "198.51.100.2:80"] {
            let unknown = resolve(&snapshot, dialled).unwrap_err();
            assert!(matches!(unknown, Unreachable::Unknown(_)), "{dialled}");
        }
        assert_eq!(
            resolve(&snapshot, "192.0.2.1:80").unwrap(),
            "- 192.0.2.1:80",
            "the node's own"
        );
        assert_eq!(snapshot.exposed().count(), 2);
        assert!(snapshot.has_exposed_port(ip("198.51.100.1")));
        assert!(!snapshot.has_exposed_port(ip("192.0.2.1")));
    }

    #[test]
    fn what_is_exposed_is_known_by_its_own_address() {
        let snapshot = snapshot(|edit| {
            edit.pod(Workload {
                host_ports: vec![HostPort {
                    addresses: vec![ip("192.0.2.1")],
                    port: 9000,
                    target: 8080,
                }],
                ..pod("agent", "10.1.0.2")
            });
        });
        for (dialled, expected) in [
            ("192.0.2.1:30080", Some("10.96.0.1:80")),
            ("198.51.100.1:80", Some("10.96.0.1:80")),
            ("192.0.2.1:9000", Some("10.1.0.2:8080")),
            ("10.96.0.1:80", None),
            ("10.1.0.2:8080", None),
        ] {
            let found = snapshot.resolve(dialled.parse().unwrap()).unwrap();
            let own = found.own_address.map(|own| own.to_string());
            assert_eq!(own.as_deref(), expected, "{dialled}");
        }
    }

    #[test]
    fn a_host_port_leads_to_the_pod() {
        let at = |addresses: &[&str]| HostPort {
            addresses: addresses.iter().map(|address| ip(address)).collect(),
            port: 9000,
            target: 8080,
        };
        let snapshot = snapshot(|edit| {
            edit.pod(Workload {
                host_ports: vec![at(&["192.0.2.1"])],
                ..pod("agent", "10.1.0.2")
            });
            // In the node's netns: it has the node's address, and claims none of the exposed ports.
            edit.pod(Workload {
                host_network: true,
                ..pod("proxy", "192.0.2.1")
            });
        });
        assert_eq!(
            resolve(&snapshot, "192.0.2.1:9000").unwrap(),
            "- 10.1.0.2:8080"
        );
        assert!(resolve(&snapshot, "192.0.2.1:30080").is_ok());
        assert!(matches!(
            resolve(&snapshot, "192.0.2.2:9000"),
            Err(Unreachable::Unknown(_))
        ));
    }

    #[test]
    fn a_port_that_several_objects_expose_is_refused_and_reported() {
        let thief = || Service {
            external_addresses: vec![ip("198.51.100.1"), ip("192.0.2.1")],
            ports: vec![
                Port {
                    name: "http".into(),
                    port: 80,
                    target: TargetPort::Number(1),
                },
                Port {
                    name: "node".into(),
                    port: 30080,
                    target: TargetPort::Number(1),
                },
            ],
            ..service("thief", "10.96.0.9")
        };
        let honest = snapshot(|_| {});
        let disputed = snapshot(|edit| edit.service(thief()));
        for dialled in ["192.0.2.1:30080", "198.51.100.1:80"] {
            let error = resolve(&disputed, dialled).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("service default/thief and service default/web"),
                "{error}"
            );
        }
        let errors: Vec<_> = disputed.errors_since(&honest).collect();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].starts_with("198.51.100.1:80 is exposed by service default/thief"));
        // A service outside the mesh takes nothing over either.
        let outside = snapshot(|edit| {
            edit.pod(Workload {
                membership: Some(Membership::Disabled),
                labels: [("app".to_owned(), "thief".to_owned())].into(),
                ..pod("thief", "10.1.0.9")
            });
            edit.service(Service {
                selector: [("app".to_owned(), "thief".to_owned())].into(),
                ..thief()
            });
        });
        assert!(resolve(&outside, "192.0.2.1:30080").is_err());
        assert_eq!(
            outside.exposed().count(),
            2,
            "what only objects outside the mesh expose is not captured"
        );
    }

    #[test]
    fn an_exposed_port_shadows_no_pod_and_no_service() {
        let snapshot = snapshot(|edit| {
            edit.pod(Workload {
                membership: Some(Membership::Disabled),
                ..pod("outside", "10.1.0.8")
            });
            edit.service(service("other", "10.96.0.2"));
            edit.service(Service {
                external_addresses: vec![ip("10.1.0.1"), ip("10.1.0.8"), ip("10.96.0.2")],
                ..service("thief", "10.96.0.9")
            });
        });
        let found = |dialled: &str| snapshot.resolve(dialled.parse().unwrap()).unwrap();
        assert_eq!(found("10.1.0.1:80").service, None);
        assert!(!found("10.1.0.8:80").endpoints[0].meshed);
        assert_eq!(found("10.96.0.2:80").service, Some(Arc::new(name("other"))));
    }
}
