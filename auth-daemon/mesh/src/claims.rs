//! Whose an address is, when several say that it is theirs.

use std::sync::Arc;

use super::{ObjectName, Workload, resolved::Resolved};

/// Who says that an address is its own.
#[derive(Clone, Debug)]
pub(super) enum Claim {
    Pod(Arc<Workload>),
    Service(Arc<Resolved>),
}

/// All who say that of one address.
#[derive(Clone, Debug)]
pub(super) enum Claims {
    One(Claim),
    Several(Arc<[Claim]>),
}

/// More than one pod says that an address is its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disputed;

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressKind {
    /// A pod's. Those in dispute are: what is captured and then cannot be served is refused.
    Pod,
    /// A service's.
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

    /// A pod that is going gives way to one that has got its address.
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

    /// Whose the address is. `None`: it is in dispute.
    pub(super) fn owner(&self) -> Option<&Claim> {
        match self {
            Self::One(claim) => Some(claim),
            Self::Several(claims) => {
                let mut claims = claims.iter().filter(|claim| !claim.yields());
                claims.next().filter(|_| claims.next().is_none())
            }
        }
    }

    /// The pod whose the address is, whatever services say of it. `None`: it is no pod's.
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

/// Whether they are the same, not only alike: for telling one snapshot from the next.
impl PartialEq for Claims {
    fn eq(&self, other: &Self) -> bool {
        let (one, other) = (self.all(), other.all());
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.is_same(other))
    }
}
