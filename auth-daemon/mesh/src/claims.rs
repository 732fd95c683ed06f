//! Ownership of an address that several pods or services claim.

use std::sync::Arc;

use super::{ObjectName, Service, Workload, resolved::Resolved};

/// A pod or service that claims an address.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    Pod(Arc<Workload>),
    Service(Arc<Resolved>),
    /// A pod outside the mesh. It owns the address only if no pod or service of the mesh claims it.
    OutsidePod(Arc<Workload>),
    /// A service outside the mesh. As [`Claim::OutsidePod`].
    OutsideService(Arc<Service>),
}

/// All claims to one address.
#[derive(Clone, Debug)]
pub(super) enum Claims {
    One(Claim),
    Several(Arc<[Claim]>),
}

/// More than one pod claims the address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disputed;

/// Kind of object that claims an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claimant {
    Pod,
    Service,
}

/// Kind of owner of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressKind {
    /// A pod. Also the kind of a disputed address, so that connections to it are captured and then refused.
    Pod,
    /// A service.
    Service,
    /// A known pod or service outside the mesh, or a node.
    Outside,
}

impl AddressKind {
    /// Reports whether the owner is in the mesh.
    pub fn is_meshed(self) -> bool {
        self != Self::Outside
    }
}

impl Claim {
    pub(super) fn name(&self) -> &ObjectName {
        match self {
            Self::Pod(pod) | Self::OutsidePod(pod) => &pod.name,
            Self::Service(service) => &service.name,
            Self::OutsideService(service) => &service.name,
        }
    }

    pub(super) fn is_of(&self, claimant: Claimant, name: &ObjectName) -> bool {
        self.claimant() == claimant && self.name() == name
    }

    pub(super) fn kind(&self) -> AddressKind {
        match self {
            Self::Pod(_) => AddressKind::Pod,
            Self::Service(_) => AddressKind::Service,
            Self::OutsidePod(_) | Self::OutsideService(_) => AddressKind::Outside,
        }
    }

    /// Describes the object, for messages.
    pub(super) fn describe(&self) -> String {
        let kind = match self.claimant() {
            Claimant::Pod => "pod",
            Claimant::Service => "service",
        };
        format!("{kind} {}", self.name())
    }

    fn claimant(&self) -> Claimant {
        match self {
            Self::Pod(_) | Self::OutsidePod(_) => Claimant::Pod,
            Self::Service(_) | Self::OutsideService(_) => Claimant::Service,
        }
    }

    /// Reports whether this is a terminating or finished pod, which yields the address to a new owner.
    fn yields(&self) -> bool {
        matches!(self, Self::Pod(pod) if pod.terminating || pod.finished)
    }

    fn is_of_finished(&self) -> bool {
        matches!(self, Self::Pod(pod) | Self::OutsidePod(pod) if pod.finished)
    }

    /// Reports whether this is a pod of a remote cluster.
    fn is_remote(&self) -> bool {
        self.name().cluster().is_some()
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pod(one), Self::Pod(other))
            | (Self::OutsidePod(one), Self::OutsidePod(other)) => Arc::ptr_eq(one, other),
            (Self::Service(one), Self::Service(other)) => Arc::ptr_eq(one, other),
            (Self::OutsideService(one), Self::OutsideService(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl Claims {
    pub(super) fn all(&self) -> &[Claim] {
        match self {
            Self::One(claim) => std::slice::from_ref(claim),
            Self::Several(claims) => claims,
        }
    }

    /// Returns the claims of the mesh's own pods and services.
    pub(super) fn meshed(&self) -> impl Iterator<Item = &Claim> {
        self.all().iter().filter(|claim| claim.kind().is_meshed())
    }

    /// Returns the owner of the address, or `None` if the address is disputed, or was that of several finished pods.
    /// Claims from outside the mesh dispute nothing.
    pub(super) fn owner(&self) -> Option<&Claim> {
        owner(self.all().iter())
    }

    /// Reports whether objects dispute the address. Finished pods dispute nothing: Kubernetes keeps their objects, and may
    /// have given the address to one after the other.
    pub(super) fn are_disputed(&self) -> bool {
        self.owner().is_none() && !self.all().iter().all(Claim::is_of_finished)
    }

    /// Reports whether the snapshot's own cluster has the address, and a remote cluster claims it, too.
    pub(super) fn are_overruled(&self) -> bool {
        let mut standing = self.all().iter().filter(|claim| !claim.is_of_finished());
        self.owner().is_some_and(|owner| !owner.is_remote()) && standing.any(Claim::is_remote)
    }

    /// Returns the mesh pod that owns the address, regardless of claims by services, or `None` if no mesh pod claims it.
    pub(super) fn pod(&self) -> Option<Result<&Arc<Workload>, Disputed>> {
        let pods = self
            .all()
            .iter()
            .filter(|claim| matches!(claim, Claim::Pod(_)));
        pods.clone().next()?;
        match owner(pods) {
            Some(Claim::Pod(pod)) => Some(Ok(pod)),
            _ => Some(Err(Disputed)),
        }
    }

    pub(super) fn kind(&self) -> AddressKind {
        match self.owner() {
            // Connections to a pod behind a waypoint are captured, whether or not the pod itself is in the mesh.
            Some(Claim::OutsidePod(pod)) if pod.waypoint.is_some() => AddressKind::Pod,
            owner => owner.map_or(AddressKind::Pod, Claim::kind),
        }
    }
}

/// Returns the owner among `claims`. Pods of remote clusters count only if the snapshot's own cluster has no claim, so
/// that no remote cluster takes an address from it. Finished pods count only if there is no other claim.
fn owner<'a>(claims: impl Iterator<Item = &'a Claim> + Clone) -> Option<&'a Claim> {
    let standing = claims.clone().filter(|claim| !claim.is_of_finished());
    let own = standing.clone().filter(|claim| !claim.is_remote());
    match (own.clone().next(), standing.clone().next()) {
        (Some(_), _) => owner_of_all(own),
        (None, Some(_)) => owner_of_all(standing),
        (None, None) => owner_of_all(claims),
    }
}

fn owner_of_all<'a>(claims: impl Iterator<Item = &'a Claim> + Clone) -> Option<&'a Claim> {
    let mut meshed = claims.clone().filter(|claim| claim.kind().is_meshed());
    match meshed.clone().count() {
        // Any of them will do, but the choice must not depend on the order in which they became known.
        0 => claims.min_by_key(|claim| (claim.claimant(), claim.name())),
        1 => meshed.next(),
        _ => {
            let mut staying = meshed.filter(|claim| !claim.yields());
            staying.next().filter(|_| staying.next().is_none())
        }
    }
}

/// Compares claims by pointer, not by value, to find what changed between two snapshots.
impl PartialEq for Claims {
    fn eq(&self, other: &Self) -> bool {
        let (one, other) = (self.all(), other.all());
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.is_same(other))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, SocketAddr},
        sync::Arc,
    };

    use crate::{
        AddressKind, Inventory, Membership, ObjectName, Port, Service, Snapshot, TargetPort,
        Unreachable, Workload,
    };

    const POD: &str = "10.1.0.1";
    const SERVICE: &str = "10.96.0.7";

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "default".into(),
            name: name.into(),
        }
    }

    fn pod(of: &str, finished: bool) -> Workload {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{of}");
        Workload {
            addresses: vec![POD.parse().unwrap()],
            node: "a".into(),
            finished,
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Workload::new(name(of), identity.parse().unwrap())
        }
    }

    fn service(address: &str) -> Service {
        Service {
            addresses: vec![address.parse().unwrap()],
            ports: vec![Port {
                name: String::new(),
                port: 80,
                target: TargetPort::Number(8080),
            }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..Service::new(name("web"))
        }
    }

    fn mesh(workloads: Vec<Workload>, services: Vec<Service>) -> Snapshot {
        Snapshot::new(Inventory {
            workloads,
            services,
        })
    }

    fn at(ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), 80)
    }

    #[test]
    fn a_finished_pod_keeps_its_address_until_another_claims_it() {
        let ip: IpAddr = POD.parse().unwrap();
        let alone = mesh(vec![pod("old", true)], vec![]);
        assert_eq!(alone.pod(ip).unwrap().name, name("old"));
        assert!(alone.resolve(at(POD)).unwrap().endpoints[0].meshed);
        let terminating = Workload {
            terminating: true,
            ..pod("new", false)
        };
        for new in [pod("new", false), terminating] {
            let reused = mesh(vec![pod("old", true), pod("older", true), new], vec![]);
            assert_eq!(reused.pod(ip).unwrap().name, name("new"));
            assert_eq!(reused.errors().count(), 0);
        }
        let outside = Workload {
            membership: Some(Membership::Disabled),
            ..pod("new", false)
        };
        let left = mesh(vec![pod("old", true), outside], vec![]);
        assert_eq!(left.kind(ip), Some(AddressKind::Outside));
        let to_service = mesh(vec![pod("old", true)], vec![service(POD)]);
        assert!(to_service.pod(ip).is_none(), "it is the service's");
        assert_eq!(to_service.errors().count(), 0);
    }

    #[test]
    fn an_address_of_finished_pods_alone_is_refused_without_a_dispute() {
        let gone = mesh(vec![pod("one", true), pod("two", true)], vec![]);
        let refused = gone.resolve(at(POD)).unwrap_err();
        assert_eq!(refused, Unreachable::Unknown(POD.parse().unwrap()));
        assert!(gone.kind(POD.parse().unwrap()).is_some(), "captured");
        assert_eq!(gone.errors().count(), 0);
    }

    #[test]
    fn a_finished_pod_serves_no_service_and_runs_nowhere() {
        let identity = pod("old", true).identity;
        let finished = mesh(vec![pod("old", true)], vec![service(SERVICE)]);
        let refused = finished.resolve(at(SERVICE)).unwrap_err();
        assert_eq!(refused, Unreachable::NoEndpoint(Arc::new(name("web")), 80));
        assert_eq!(finished.running("a", &identity).count(), 0);
        assert_eq!(finished.on_node("a").count(), 1);
        let running = mesh(vec![pod("old", false)], vec![service(SERVICE)]);
        assert!(running.resolve(at(SERVICE)).is_ok());
        assert_eq!(running.running("a", &identity).count(), 1);
    }
}
