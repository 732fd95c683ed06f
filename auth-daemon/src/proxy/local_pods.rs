//! The enrolled pods of this node, as they are to each other, and whether one may talk to another.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::rules::{ByPod, Refused};
use crate::proxy::caller::{Denied, admit_source, check_revoked_node};
use auth_mesh::{Destination, Identity, Snapshot, policy::Connection};
use auth_tunnel::tls::trust::{Revocations, Revoked};

/// An enrolled pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalPod {
    /// Of its namespace.
    pub(crate) cookie: u64,
    /// As which it is served.
    pub(crate) identity: Identity,
    /// Its addresses, the one that it speaks from first in each family.
    pub(crate) addresses: Vec<IpAddr>,
}

impl LocalPod {
    /// Its address of the family of `address`.
    pub(crate) fn address_like(&self, address: IpAddr) -> Option<IpAddr> {
        self.addresses
            .iter()
            .find(|own| own.is_ipv4() == address.is_ipv4())
            .copied()
    }
}

/// The enrolled pods of this node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LocalPods {
    pub(crate) by_cookie: HashMap<u64, Arc<LocalPod>>,
    pub(crate) by_address: HashMap<IpAddr, Arc<LocalPod>>,
}

/// Why a pod may not talk to another of its node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Forbidden {
    #[error("secure naming: it is {}, but may only be {allowed}", server.identity)]
    Naming {
        server: Arc<LocalPod>,
        allowed: String,
    },
    #[error(transparent)]
    Client(#[from] Denied),
    #[error(transparent)]
    Revoked(#[from] Revoked),
    #[error(transparent)]
    Policy(#[from] Refused),
}

/// Whether `client` may talk to `server` when it dials what `destination` is of: the same that both ends of a tunnel ask.
/// `source` is the address that it is to speak from, `claimed` the one that its app speaks from.
pub(crate) fn permit(
    snapshot: &Snapshot,
    revoked: &Revocations,
    client: &LocalPod,
    source: IpAddr,
    claimed: IpAddr,
    destination: &Destination,
    server: &Arc<LocalPod>,
) -> Result<(), Forbidden> {
    for identity in [&client.identity, &server.identity] {
        revoked.check_identity(identity)?;
    }
    check_revoked_node(snapshot, revoked, source)?;
    if !destination.identities.contains(&server.identity) {
        return Err(Forbidden::Naming {
            server: server.clone(),
            allowed: destination.allowed(),
        });
    }
    Ok(admit_source(snapshot, &client.identity, source, claimed)?)
}

/// Whether the server's policies say nothing against it.
pub(crate) fn allows(
    rules: &ByPod,
    client: &Identity,
    source: IpAddr,
    server_cookie: u64,
    destination: SocketAddr,
) -> bool {
    let connection = Connection {
        client: Some(client),
        source,
        destination,
    };
    let verdict = rules.verdict(server_cookie, &connection);
    // What is to be told of each connection is the daemon's to tell.
    verdict.is_ok_and(|verdict| {
        verdict.allowed() && verdict.audits.is_empty() && verdict.dry_run.is_none()
    })
}
