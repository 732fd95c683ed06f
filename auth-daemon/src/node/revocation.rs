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
    apply(trust, || {
        let snapshot = node.registry.snapshot();
        node.connections.cut(|direction, details| {
            check(&snapshot, trust, direction, details)
                .err()
                .map(|untrusted| untrusted.to_string())
        });
        node.same_node.revise(&node);
        node.same_node.end_forbidden(&node);
    })
    .await;
}

/// Calls `revise` now, for changes from before, and after each change of `trust`, as long as that is there.
async fn apply(trust: &TrustStore, mut revise: impl FnMut()) {
    let mut changes = trust.changes();
    loop {
        revise();
        if changes.changed().await.is_err() {
            return;
        }
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

#[cfg(test)]
mod tests {
    use std::{cell::Cell, pin::pin};

    use auth_tunnel::tls::trust::{ForeignBundles, Trust, TrustBundle};
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn no_change_of_trust_is_missed() {
        let trust = TrustStore::new(Trust::fixed(TrustBundle::of_roots(
            auth_mesh::TrustDomain::default(),
            vec![],
        )));
        let revised = Cell::new(0);
        let change = || trust.publish_foreign(ForeignBundles::default());
        let mut applied = pin!(apply(&trust, || revised.set(revised.get() + 1)));
        // Before the task runs for the first time.
        change();
        for (what, expected) in [("missed", 1), ("nothing has changed", 1)] {
            assert_eq!(applied.as_mut().now_or_never(), None);
            assert_eq!(revised.get(), expected, "{what}");
        }
        change();
        assert_eq!(applied.as_mut().now_or_never(), None);
        assert_eq!(revised.get(), 2);
    }
}
