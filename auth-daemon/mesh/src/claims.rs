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

    /// Reports whether this is a terminating pod, which yields the address to a new owner.
    fn yields(&self) -> bool {
        matches!(self, Self::Pod(pod) if pod.terminating)
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

    /// Returns the owner of the address, or `None` if the address is disputed. Claims from outside the mesh dispute
    /// nothing.
    pub(super) fn owner(&self) -> Option<&Claim> {
        match self {
            Self::One(claim) => Some(claim),
            Self::Several(claims) => match self.meshed().count() {
                // Which one is of no consequence, but it must not depend on the order in which they became known.
                0 => claims
                    .iter()
                    .min_by_key(|claim| (claim.claimant(), claim.name())),
                1 => self.meshed().next(),
                _ => {
                    let mut staying = self.meshed().filter(|claim| !claim.yields());
                    staying.next().filter(|_| staying.next().is_none())
                }
            },
        }
    }

    /// Returns the mesh pod that owns the address, regardless of claims by services, or `None` if no mesh pod claims it.
    pub(super) fn pod(&self) -> Option<Result<&Arc<Workload>, Disputed>> {
        let pods = || {
            self.all().iter().filter_map(|claim| match claim {
                Claim::Pod(pod) => Some(pod),
                _ => None,
            })
        };
        let first = pods().next()?;
        if pods().count() == 1 {
            return Some(Ok(first));
        }
        let mut staying = pods().filter(|pod| !pod.terminating);
        let one = staying.next().filter(|_| staying.next().is_none());
        Some(one.ok_or(Disputed))
    }

    pub(super) fn kind(&self) -> AddressKind {
        self.owner().map_or(AddressKind::Pod, Claim::kind)
    }
}

/// Compares claims by pointer, not by value, to find what changed between two snapshots.
impl PartialEq for Claims {
    fn eq(&self, other: &Self) -> bool {
        let (one, other) = (self.all(), other.all());
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.is_same(other))
    }
}
