//! The enrolled pods of this node, and whether one may connect to another.

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
    /// Netns cookie.
    pub(crate) cookie: u64,
    /// The identity that the pod is served with.
    pub(crate) identity: Identity,
    /// The pod's addresses. In each family, its source address comes first.
    pub(crate) addresses: Vec<IpAddr>,
    /// Whether nobody but the node and the pod is on the pod's link. Otherwise another pod may take its address there, so its
    /// connections with pods of the node use the tunnel.
    pub(crate) has_private_link: bool,
}

impl LocalPod {
    /// Returns the pod's address of the same family as `address`.
    pub(crate) fn address_like(&self, address: IpAddr) -> Option<IpAddr> {
        self.addresses
            .iter()
            .find(|own| own.is_ipv4() == address.is_ipv4())
            .copied()
    }

    /// Why the pod's connections without TLS end, if its link is not private any more.
    pub(super) fn shared_link(&self) -> Option<String> {
        (!self.has_private_link).then(|| {
            format!(
                "the link of {} is not private any more: others could take the pod's address; new connections use TLS",
                self.identity
            )
        })
    }
}

/// The enrolled pods of this node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct LocalPods {
    pub(crate) by_cookie: HashMap<u64, Arc<LocalPod>>,
    pub(crate) by_address: HashMap<IpAddr, Arc<LocalPod>>,
    /// The indices of the node's ends of each pod's links, by cookie.
    pub(crate) links: HashMap<u64, Vec<u32>>,
}

impl LocalPods {
    /// Whether all of them have private links.
    pub(crate) fn have_private_links(&self) -> bool {
        let mut pods = self.by_cookie.values();
        pods.all(|pod| pod.has_private_link)
    }

    /// Whether any of them had a private link `before`, and has none now.
    pub(crate) fn have_lost_links(&self, before: &Self) -> bool {
        let mut shared = self.by_cookie.values().filter(|pod| !pod.has_private_link);
        shared.any(|pod| {
            let before = before.by_cookie.get(&pod.cookie);
            before.is_some_and(|before| before.has_private_link)
        })
    }
}

/// Reason for which a pod may not connect to another pod of its node.
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

/// Checks whether `client` may connect to `server` when it dials `destination`: the same checks as both ends of a
/// tunnel make. `source` is the source address of the connection, `claimed` the address that the client's app uses.
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

/// Whether the server's policies allow the connection without further action.
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
    // Only the daemon can report audits and dry-run results for each connection.
    verdict.is_ok_and(|verdict| {
        verdict.allowed() && verdict.audits.is_empty() && verdict.dry_run.is_none()
    })
}
