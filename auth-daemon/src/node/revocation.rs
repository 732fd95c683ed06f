//! Applies changes of trust to open connections.

use std::sync::Arc;

use crate::proxy::caller::check_revoked_node;
use crate::{
    observe::{access_log::Direction, connections::Details},
    proxy::Node,
};
use auth_mesh::Snapshot;
use auth_tunnel::tls::trust::{TrustStore, Untrusted};

/// Cuts open connections whose client or server the CA revokes, or is of a trust domain that is not trusted any more.
pub(super) async fn keep(node: Arc<Node>) {
    let trust = node.certificates.trust();
    let mut changes = trust.changes();
    // The sender lives as long as the node.
    while changes.changed().await.is_ok() {
        let snapshot = node.registry.snapshot();
        node.connections.cut(|direction, details| {
            check(&snapshot, trust, direction, details)
                .err()
                .map(|untrusted| untrusted.to_string())
        });
        node.same_node.revise(&node);
        node.same_node.end_forbidden(&node, &[]);
    }
}

/// Repeats, for an open connection, the checks of a new one that depend on trust.
fn check(
    snapshot: &Snapshot,
    trust: &TrustStore,
    direction: Direction,
    details: &Details,
) -> Result<(), Untrusted> {
    if let Some(peer) = &details.peer {
        trust.check(peer)?;
    }
    let revoked = &trust.current().revoked;
    for identity in [&details.client_identity, &details.server_identity] {
        identity
            .as_ref()
            .map_or(Ok(()), |identity| revoked.check_identity(identity))?;
    }
    let address = match direction {
        Direction::Outbound => details.endpoint,
        Direction::Inbound => Some(details.client),
    };
    let checked = address.map_or(Ok(()), |address| {
        check_revoked_node(snapshot, revoked, address.ip())
    });
    Ok(checked?)
}
