//! Applies policies to the served pods, and ends the connections that a change denies.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use auth_common::{Inbound, MeshKind};

use super::{Enrolment, Serving, ended::Pods};
use crate::proxy::{
    Node,
    rules::{self, ByPod},
};
use auth_datapath::Accepted;
use auth_mesh::{
    Snapshot, Workload,
    policy::{Connection, WorkloadPolicy},
};

impl Enrolment {
    /// Returns the effective policy of a pod.
    pub(super) fn rules_of(&self, workload: &Workload) -> Arc<WorkloadPolicy> {
        let policies = self.node.policies.current();
        policies.workload(&workload.name.namespace, &workload.labels)
    }

    /// Puts the policies in force for the served pods, by the pods' current labels. Returns the previous policies if
    /// anything changed.
    pub(super) fn settle_rules(&self, running: &Pods<'_>) -> Option<Arc<ByPod>> {
        let rules = self.serving.iter().map(|(cookie, serving)| {
            let workload = &serving.pod.workload;
            let now = running
                .get(&workload.name)
                .filter(|_| serving.ended.is_none());
            let workload = now.map_or(workload, |now| now);
            (*cookie, self.rules_of(workload))
        });
        self.node.rules.replace(rules.collect())
    }

    /// Ends the open connections that policies now deny.
    pub(super) fn end_denied(&mut self, before: &ByPod) {
        let node = &self.node;
        node.same_node.revise(node);
        node.same_node.end_forbidden(node);
        let rules = node.rules.current();
        let mut revision = rules.revise(before);
        node.connections
            .cut(|direction, details| revision.forbid(direction, details));
        for cookie in self.serving.keys() {
            if !rules.is_same(before, *cookie) {
                self.unchecked.entry(*cookie).or_default().sweeps = SWEEPS;
            }
        }
    }

    /// Ends the plaintext connections to unchecked pods that policies deny: those that the kernel passed to the app before
    /// the pod was enrolled, or while policies allowed it.
    pub(super) fn sweep(&mut self, snapshot: &Snapshot) {
        let mut unchecked = std::mem::take(&mut self.unchecked);
        let mut recorded = Recorded::default();
        let is_tick = std::mem::take(&mut self.is_tick);
        unchecked.retain(|cookie, unchecked| {
            // The first sweep is due at once, the others on ticks.
            if unchecked.sweeps < SWEEPS && !is_tick {
                return true;
            }
            let Some(serving) = self.serving.get(cookie) else {
                return false;
            };
            self.end_plaintext(snapshot, serving, *unchecked, &mut recorded);
            let is_done = self.end_forwarded(serving, &mut recorded);
            if is_done || unchecked.sweeps == SWEEPS {
                unchecked.sweeps = unchecked.sweeps.saturating_sub(1);
            }
            unchecked.is_new = false;
            unchecked.sweeps > 0
        });
        self.unchecked = unchecked;
    }

    fn end_plaintext(
        &self,
        snapshot: &Snapshot,
        serving: &Serving,
        unchecked: Unchecked,
        recorded: &mut Recorded,
    ) {
        let (node, enrolled) = (&self.node, &serving.pod.enrolled);
        let pod = &serving.pod.workload.name;
        let accepted = match enrolled.accepted(&node.kernel) {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(%pod, %error, "cannot list a pod's open connections; those in plaintext continue");
                return;
            }
        };
        let (rules, local_pods) = (node.rules.current(), node.same_node.local_pods());
        let mut reason = None;
        let denied: Vec<_> = accepted
            .into_iter()
            .filter(|connection| {
                let source = connection.peer.ip();
                if source.is_loopback() {
                    return false;
                }
                // As a new caller without TLS would be.
                let verdict = rules.verdict(
                    serving.cookie(),
                    &Connection {
                        client: None,
                        source,
                        destination: connection.local,
                    },
                );
                let denied = match verdict {
                    Ok(verdict) if verdict.allowed() => return false,
                    Ok(verdict) => verdict.decision.to_string(),
                    Err(refused) => refused.to_string(),
                };
                // Callers of the mesh reach the daemon's listener, unless the pod was not enrolled yet.
                let kind = self.caller_kind(snapshot, source);
                let may_be_passed = matches!(
                    kind,
                    None | Some(
                        MeshKind::Outside
                            | MeshKind::Exposed
                            | MeshKind::ServiceNetwork
                            | MeshKind::Asked
                    )
                );
                if connection.is_half_open && !unchecked.is_new && !may_be_passed {
                    return false;
                }
                let origin = local_pods.by_address.get(&source);
                let origin = origin.and_then(|pod| self.serving.get(&pod.cookie));
                if recorded.contains(node, origin, connection) {
                    return false;
                }
                reason.get_or_insert((connection.peer, denied));
                true
            })
            .collect();
        let Some((client, reason)) = reason else {
            return;
        };
        match enrolled.end(&denied) {
            Ok(0) => {}
            Ok(connections) => tracing::info!(
                %pod, connections, %client, reason,
                "plaintext connections ended: they were open before, and policies would not admit them now"
            ),
            Err(error) => tracing::error!(
                %pod, connections = denied.len(), %client, reason, %error,
                "cannot end plaintext connections that policies would not admit now; they continue until the app ends them. \
                 Does the kernel have CONFIG_INET_DIAG_DESTROY?"
            ),
        }
    }

    /// Ends the connections that a pod forwards to network namespaces nested in it, if it may not forward new ones. Returns
    /// whether that is done: it is not while the pod still forwards new ones.
    fn end_forwarded(&self, serving: &Serving, recorded: &mut Recorded) -> bool {
        let (rules, pod) = (self.node.rules.current(), &serving.pod.workload.name);
        let policy = rules.of(serving.cookie());
        if policy.map_or(Inbound::Strict, |policy| rules::inbound(policy)) != Inbound::Strict {
            return true;
        }
        let nested = match serving.pod.enrolled.forwarded() {
            Ok(Some(nested)) => Ok(nested),
            Ok(None) => return false,
            Err(error) => Err(error),
        };
        let ended = nested.and_then(|nested| {
            let mut ended = 0;
            for mut nested in nested {
                let all = &mut nested.connections;
                all.retain(|connection| !recorded.is_the_nodes(&self.node, connection.peer));
                ended += nested.end()?;
            }
            Ok(ended)
        });
        match ended {
            Ok(0) => {}
            Ok(connections) => tracing::info!(
                %pod, connections,
                "forwarded connections ended: they were open before, and the pod may not forward them now"
            ),
            Err(error) => tracing::error!(
                %pod, %error, "cannot end the connections that a pod forwards; those that are open continue"
            ),
        }
        true
    }
}

/// A pod whose open connections are to be checked.
#[derive(Clone, Copy)]
pub(super) struct Unchecked {
    /// Whether the pod was not enrolled before.
    pub(super) is_new: bool,
    /// Number of sweeps that are left.
    pub(super) sweeps: u8,
}

/// A second sweep finds what was on its way when the programs and modes changed.
const SWEEPS: u8 = 2;

impl Default for Unchecked {
    fn default() -> Self {
        Self {
            is_new: false,
            sweeps: SWEEPS,
        }
    }
}

/// The connections to pods that the kernel has recorded as the daemon's or the node's own, by the cookie of the netns that
/// they come from. `None`: the node's. Filled as needed.
#[derive(Default)]
struct Recorded(HashMap<Option<u64>, HashSet<(SocketAddr, SocketAddr)>>);

impl Recorded {
    fn contains(&mut self, node: &Node, origin: Option<&Serving>, connection: &Accepted) -> bool {
        self.of(node, origin)
            .contains(&(connection.peer, connection.local))
    }

    /// Whether one of the node's connections comes from `client`, whatever it leads to.
    fn is_the_nodes(&mut self, node: &Node, client: SocketAddr) -> bool {
        let mut of_node = self.of(node, None).iter();
        of_node.any(|(local, _)| *local == client)
    }

    fn of(&mut self, node: &Node, origin: Option<&Serving>) -> &HashSet<(SocketAddr, SocketAddr)> {
        self.0
            .entry(origin.map(Serving::cookie))
            .or_insert_with(|| {
                let netns = origin.map(|origin| &*origin.pod.enrolled.netns);
                node.kernel.recorded(netns).unwrap_or_else(|error| {
                    tracing::error!(%error, "cannot list the connections of the daemon and the node");
                    HashSet::new()
                })
            })
    }
}
