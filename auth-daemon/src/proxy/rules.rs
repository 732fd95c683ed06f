//! Who may call the pods of this node: the policies in force, as they come down to each of them, and what they say of a
//! connection.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use auth_common::Inbound;

use crate::observe::{
    access_log::{Direction, Path},
    connections::{Details, Guard},
};
use auth_mesh::policy::{Connection, Verdict, WorkloadPolicy};

/// The policies of this node's pods, by the cookies of their namespaces.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    current: ArcSwap<ByPod>,
}

/// At one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct ByPod(HashMap<u64, Arc<WorkloadPolicy>>);

/// Why a connection may not be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(super) String);

impl Rules {
    /// Those in force.
    pub(crate) fn current(&self) -> Arc<ByPod> {
        self.current.load_full()
    }

    /// These are in force now. Returns those before, if they were others.
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

    /// A pod that is about to be served has these.
    pub(crate) fn add(&self, cookie: u64, policy: Arc<WorkloadPolicy>) {
        let mut rules = self.current.load().0.clone();
        rules.insert(cookie, policy);
        self.current.store(Arc::new(ByPod(rules)));
    }

    /// Asks whether `connection` to the pod of `cookie` may be, and notes in the log what policies have to say of it.
    /// Asked when the connection is among the live ones: what changes from here on cuts it.
    pub(crate) fn judge(
        &self,
        cookie: u64,
        connection: &Connection<'_>,
        access: &Guard<'_>,
    ) -> Result<(), Refused> {
        let rules = self.current.load();
        let verdict = rules.verdict(cookie, connection)?;
        if let Some(told) = told(&verdict) {
            access.learn(|details| details.policy = Some(told));
        }
        if verdict.allowed() {
            return Ok(());
        }
        access.count_denied(&verdict.decision);
        Err(Refused(verdict.decision.to_string()))
    }
}

impl FromIterator<(u64, Arc<WorkloadPolicy>)> for ByPod {
    fn from_iter<I: IntoIterator<Item = (u64, Arc<WorkloadPolicy>)>>(rules: I) -> Self {
        Self(rules.into_iter().collect())
    }
}

impl ByPod {
    /// What the policies of a pod say.
    pub(crate) fn verdict(
        &self,
        cookie: u64,
        connection: &Connection<'_>,
    ) -> Result<Verdict, Refused> {
        let policy = self.of(cookie)?;
        Ok(policy.evaluate(connection))
    }

    /// Whether no policy can deny anybody who is known.
    pub(crate) fn is_unrestricted(&self) -> bool {
        self.0.values().all(|policy| policy.is_unrestricted())
    }

    /// The policies of a pod.
    pub(crate) fn of(&self, cookie: u64) -> Result<&Arc<WorkloadPolicy>, Refused> {
        let policy = self.0.get(&cookie);
        policy.ok_or_else(|| Refused("the pod has left this node, or the mesh".into()))
    }

    /// Why a live connection may not go on, if so: the same that was asked before it began. `cookie` tells whose an
    /// address is.
    pub(crate) fn forbid(
        &self,
        direction: Direction,
        details: &Details,
        cookie: impl Fn(SocketAddr) -> Option<u64>,
    ) -> Option<String> {
        let destination = details.endpoint?;
        let client = details.client_identity.as_ref();
        let client = match (direction, details.path) {
            // Of what goes elsewhere, and of a pod that talks to itself, nobody here is asked.
            (Direction::Outbound, Path::Tunnel | Path::Plaintext) | (_, Path::Itself) => {
                return None;
            }
            (Direction::Inbound, Path::Plaintext) => None,
            // Still in its handshake: it will be asked.
            (_, Path::Tunnel | Path::SameNode) => Some(client?),
        };
        let connection = Connection {
            client,
            source: details.client.ip(),
            destination,
        };
        match self.verdict(cookie(destination)?, &connection) {
            Ok(verdict) if verdict.allowed() => None,
            Ok(verdict) => Some(verdict.decision.to_string()),
            Err(refused) => Some(refused.to_string()),
        }
    }
}

/// What a pod's callers meet in the kernel: where every one of them may come in plaintext, they need not come by the daemon.
pub(crate) fn inbound(policy: &WorkloadPolicy) -> Inbound {
    let mut modes = policy.port_modes().values().chain([policy.default_mode()]);
    if policy.is_unrestricted() && modes.all(|peer| peer.mode.takes_plaintext()) {
        Inbound::Permissive
    } else {
        Inbound::Strict
    }
}

/// For the log: the policies that had a part in a verdict.
fn told(verdict: &Verdict) -> Option<String> {
    let mut told: Vec<_> = verdict
        .decision
        .policies()
        .next()
        .map(|_| verdict.decision.to_string())
        .into_iter()
        .collect();
    told.extend(verdict.audits.iter().map(|hit| format!("audited by {hit}")));
    told.extend(
        verdict
            .dry_run
            .iter()
            .map(|decision| format!("dry run: {decision}")),
    );
    (!told.is_empty()).then(|| told.join("; "))
}
