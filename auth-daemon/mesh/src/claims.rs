//! Ownership of an address that several pods or services claim.

use std::sync::Arc;

use super::{ObjectName, Workload, resolved::Resolved};

/// A pod or service that claims an address.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    Pod(Arc<Workload>),
    Service(Arc<Resolved>),
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

/// Kind of owner of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressKind {
    /// A pod. Also the kind of a disputed address, so that connections to it are captured and then refused.
    Pod,
    /// A service.
    Service,
}

impl Claim {
    pub(super) fn name(&self) -> &ObjectName {
        match self {
            Self::Pod(pod) => &pod.name,
            Self::Service(service) => &service.name,
        }
    }

    pub(super) fn is_of(&self, kind: AddressKind, name: &ObjectName) -> bool {
        self.kind() == kind && self.name() == name
    }

    pub(super) fn kind(&self) -> AddressKind {
        match self {
            Self::Pod(_) => AddressKind::Pod,
            Self::Service(_) => AddressKind::Service,
        }
    }

    /// Reports whether this is a terminating pod, which yields the address to a new owner.
    fn yields(&self) -> bool {
        matches!(self, Self::Pod(pod) if pod.terminating)
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pod(one), Self::Pod(other)) => Arc::ptr_eq(one, other),
            (Self::Service(one), Self::Service(other)) => Arc::ptr_eq(one, other),
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

    /// Returns the owner of the address, or `None` if the address is disputed.
    pub(super) fn owner(&self) -> Option<&Claim> {
        match self {
            Self::One(claim) => Some(claim),
            Self::Several(claims) => {
                let mut claims = claims.iter().filter(|claim| !claim.yields());
                claims.next().filter(|_| claims.next().is_none())
            }
        }
    }

    /// Returns the pod that owns the address, regardless of claims by services, or `None` if no pod claims it.
    pub(super) fn pod(&self) -> Option<Result<&Arc<Workload>, Disputed>> {
        let pods = || {
            self.all().iter().filter_map(|claim| match claim {
                Claim::Pod(pod) => Some(pod),
                Claim::Service(_) => None,
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
