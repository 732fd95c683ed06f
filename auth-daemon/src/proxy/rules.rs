//! Effective policies of each pod on this node, and their verdict on a connection.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use auth_common::Inbound;

use crate::observe::{
    access_log::{Direction, Path},
    connections::{Details, Guard},
};
use auth_mesh::{
    Identity,
    policy::{Connection, Verdict, WorkloadPolicy},
};

/// The policies of this node's pods, by netns cookie.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    current: ArcSwap<ByPod>,
}

/// A snapshot of [`Rules`].
#[derive(Clone, Debug, Default)]
pub(crate) struct ByPod(HashMap<u64, Arc<WorkloadPolicy>>);

/// Reason for which policies deny a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(super) String);

impl Rules {
    /// Returns the policies in force.
    pub(crate) fn current(&self) -> Arc<ByPod> {
        self.current.load_full()
    }

    /// Puts `rules` in force. Returns the previous policies if they differ.
    pub(crate) fn replace(&self, ByPod(rules): ByPod) -> Option<Arc<ByPod>> {
        let before = self.current();
        let is_same = before.0.len() == rules.len()
            && rules.iter().all(|(cookie, policy)| {
                let known = before.0.get(cookie);
                known.is_some_and(|known| Arc::ptr_eq(known, policy))
            });
        if is_same {
            return None;
        }
        self.current.store(Arc::new(ByPod(rules)));
        Some(before)
    }

    /// Adds the policy of a pod that is about to be served.
    pub(crate) fn add(&self, cookie: u64, policy: Arc<WorkloadPolicy>) {
        let mut rules = self.current.load().0.clone();
        rules.insert(cookie, policy);
        self.current.store(Arc::new(ByPod(rules)));
    }

    /// Checks whether the policies of the pod with netns `cookie` allow `connection`, and records their verdict for the
    /// access log. Called when the connection is already registered, so that a later policy change cuts it.
    pub(crate) fn judge(
        &self,
        cookie: u64,
        connection: &Connection<'_>,
        access: &Guard<'_>,
    ) -> Result<(), Refused> {
        let rules = self.current.load();
        let verdict = rules.verdict(cookie, connection)?;
        access.judged(&verdict);
        match verdict.allowed() {
            true => Ok(()),
            false => Err(Refused(verdict.decision.to_string())),
        }
    }
}

impl FromIterator<(u64, Arc<WorkloadPolicy>)> for ByPod {
    fn from_iter<I: IntoIterator<Item = (u64, Arc<WorkloadPolicy>)>>(rules: I) -> Self {
        Self(rules.into_iter().collect())
    }
}

impl ByPod {
    /// Returns the verdict of a pod's policies on a connection.
    pub(crate) fn verdict(
        &self,
        cookie: u64,
        connection: &Connection<'_>,
    ) -> Result<Verdict, Refused> {
        let policy = self.of(cookie)?;
        Ok(policy.evaluate(connection))
    }

    /// Whether no policy can deny an authenticated client.
    pub(crate) fn is_unrestricted(&self) -> bool {
        self.0.values().all(|policy| policy.is_unrestricted())
    }

    /// Reports whether a pod has the same policies in `other`.
    pub(crate) fn is_same(&self, other: &Self, cookie: u64) -> bool {
        match (self.0.get(&cookie), other.0.get(&cookie)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        }
    }

    /// Returns the policies of a pod.
    pub(crate) fn of(&self, cookie: u64) -> Result<&Arc<WorkloadPolicy>, Refused> {
        let policy = self.0.get(&cookie);
        policy.ok_or_else(|| Refused("the pod has left this node, or the mesh".into()))
    }

    /// Begins to judge open connections again, now that these policies have replaced `before`.
    pub(crate) fn revise<'a>(&'a self, before: &'a Self) -> Revision<'a> {
        Revision {
            rules: self,
            before,
            judged: HashMap::new(),
        }
    }
}

/// Judges open connections again, those of each client to each destination once, and only if the destination's policies have
/// changed. So a change costs no more for a pod with thousands of connections.
pub(crate) struct Revision<'a> {
    rules: &'a ByPod,
    before: &'a ByPod,
    /// Why connections may not continue, by the cookie of the server's netns and by what policies are asked.
    judged: HashMap<(u64, Option<Identity>, IpAddr, SocketAddr), Option<String>>,
}

impl Revision<'_> {
    /// Returns why an open connection may not continue, or `None` if it may: the same check as before it began.
    pub(crate) fn forbid(&mut self, direction: Direction, details: &Details) -> Option<String> {
        let (destination, server) = (details.endpoint?, details.server_netns?);
        let client = details.client_identity.as_ref();
        let client = match (direction, details.path) {
            // The server's node checks tunnels and plaintext that leave this node. A pod may always reach itself.
            (Direction::Outbound, Path::Tunnel | Path::Hbone | Path::Plaintext)
            | (_, Path::Itself) => {
                return None;
            }
            (Direction::Inbound, Path::Plaintext) => None,
            // Without a client identity the handshake is not complete; the connection is checked after it.
            (_, Path::Tunnel | Path::Hbone | Path::SameNode) => Some(client?),
        };
        let source = details.client.ip();
        if self.rules.is_same(self.before, server) {
            return None;
        }
        let judge = || {
            let connection = Connection {
                client,
                source,
                destination,
            };
            match self.rules.verdict(server, &connection) {
                Ok(verdict) if verdict.allowed() => None,
                Ok(verdict) => Some(verdict.decision.to_string()),
                Err(refused) => Some(refused.to_string()),
            }
        };
        let asked = (server, client.cloned(), source, destination);
        self.judged.entry(asked).or_insert_with(judge).clone()
    }
}

/// Returns what the kernel does with a pod's callers. If all ports accept plaintext from every caller, plaintext
/// connections need not pass through the daemon.
pub(crate) fn inbound(policy: &WorkloadPolicy) -> Inbound {
    let mut modes = policy.port_modes().values().chain([policy.default_mode()]);
    if policy.is_unrestricted() && modes.all(|peer| peer.mode.takes_plaintext()) {
        Inbound::Permissive
    } else {
        Inbound::Strict
    }
}
