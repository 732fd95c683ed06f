//! The handshakes of connections to pods: how many are in progress, and whose comes next.
//!
//! Whoever can reach a pod can begin handshakes with it, and each costs about a millisecond of a worker's time. So each
//! source has a share of the handshakes in progress, and on each worker, the steps of handshakes that are ready run in
//! rotation by source, across all pods: a source waits for one step of each other source, however many another one has.

use std::{net::IpAddr, sync::Arc};

use auth_mesh::Snapshot;
use auth_support::{
    connection_limit::{ConnectionPermit, source_of},
    fair_queue::FairQueue,
};

/// Maximum number of a pod's inbound connections that are in their handshake at once.
pub(super) const MAX: usize = 8192;
/// Maximum number of such connections from one source. A client pod that loses all its tunnels to a pod makes up to that many
/// at once.
pub(super) const MAX_PER_SOURCE: usize = 1024;

/// Where a connection to a pod comes from, as far as its TCP handshake proves it. Daemons dial tunnels from their pods' own
/// addresses, so pods of one node are different sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source(IpAddr);

impl Source {
    /// The source of connections from `address`: the address itself if a known object has it, else as [`source_of`] says.
    pub(crate) fn of(address: IpAddr, snapshot: &Snapshot) -> Self {
        Self::new(address, || snapshot.kind(address).is_some())
    }

    fn new(address: IpAddr, is_known: impl FnOnce() -> bool) -> Self {
        match address {
            IpAddr::V6(_) if !is_known() => Self(source_of(address)),
            address => Self(address),
        }
    }

    /// The address by which limits count.
    pub(crate) fn address(self) -> IpAddr {
        self.0
    }
}

/// A worker's turns for steps of handshakes: one at a time, because it is one thread.
pub(crate) type Turns = Arc<FairQueue<Source>>;

pub(crate) fn turns_of_worker() -> Turns {
    FairQueue::new(1, 1)
}

/// The place of an inbound connection among the handshakes of its pod and of its worker, until its first CONNECT.
pub(crate) struct Place {
    pub(crate) source: Source,
    pub(crate) turns: Turns,
    pub(crate) _permit: ConnectionPermit,
}

impl Place {
    /// Runs `handshake` in the turns of its source: each of its polls computes a step.
    pub(crate) async fn in_turns<F: Future>(&self, handshake: F) -> F::Output {
        let source = self.source;
        self.turns.clone().run(move || source, handshake).await
    }
}

#[cfg(test)]
impl<T: Into<IpAddr>> From<T> for Source {
    fn from(address: T) -> Self {
        Self(address.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_ipv6_addresses_of_a_network_are_one_source() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let unknown = |text| Source::new(address(text), || false);
        let known = |text| Source::new(address(text), || true);
        assert_eq!(unknown("2001:db8:0:1::5"), unknown("2001:db8:0:1:ffff::6"));
        assert_ne!(unknown("2001:db8:0:1::5"), unknown("2001:db8:0:2::5"));
        assert_ne!(known("2001:db8:0:1::5"), unknown("2001:db8:0:1::6"));
        assert_ne!(known("2001:db8:0:1::5"), known("2001:db8:0:1::6"));
        assert_ne!(unknown("10.0.0.1"), unknown("10.0.0.2"));
    }
}
