//! Remembers which nodes have, or once had, a ready daemon.

use std::sync::Arc;

use super::Enrolment;
use auth_mesh::Snapshot;

impl Enrolment {
    /// Writes to the kernel, whose maps survive this daemon, which nodes have got their first ready daemon, and forgets
    /// those whose tunnel an administrator has disabled. Called before [`Enrolment::tell_addresses`].
    pub(super) fn remember_daemons(&self, snapshot: &Arc<Snapshot>) {
        let nothing = Snapshot::default();
        let before = self.written.snapshot.as_ref();
        if before.is_some_and(|before| Arc::ptr_eq(before, snapshot)) {
            return;
        }
        let proven_nodes = &self.node.kernel.proven_nodes;
        for node in snapshot.disabled_nodes() {
            proven_nodes.remove(node);
        }
        for node in snapshot.proven_since(before.map_or(&nothing, |before| before)) {
            if let Err(error) = proven_nodes.add(node) {
                tracing::error!(
                    node, %error,
                    "node's daemon cannot be remembered; after a restart of this daemon, a daemon that is not ready there \
                     may be taken for none"
                );
            }
        }
    }
}
