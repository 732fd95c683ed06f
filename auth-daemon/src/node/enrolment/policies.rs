//! Applies policies to the served pods, and ends the connections that a change denies.

use std::{net::SocketAddr, sync::Arc};

use auth_common::{Inbound, MeshKind};

use super::{Enrolment, Serving, ended::Pods};
use crate::proxy::Pod;
use crate::proxy::rules::{self, ByPod};
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
    pub(super) fn end_denied(&self, snapshot: &Snapshot, before: &ByPod) {
        let node = &self.node;
        node.same_node.revise(node);
        node.same_node.end_forbidden(node, &[]);
        let (rules, local_pods) = (node.rules.current(), node.same_node.local_pods());
        let cookie = |address: SocketAddr| {
            let local_pod = local_pods.by_address.get(&address.ip());
            local_pod.map(|local_pod| local_pod.cookie)
        };
        node.connections
            .cut(|direction, details| rules.forbid(direction, details, cookie));
        for Serving { pod, .. } in self.serving.values() {
            let cookie = pod.enrolled.netns.cookie();
            let took = |rules: &ByPod| {
                let policy = rules.of(cookie);
                policy.is_ok_and(|policy| rules::inbound(policy) == Inbound::Permissive)
            };
            if took(before) && !took(&rules) {
                self.end_plaintext(snapshot, pod, &rules);
            }
        }
    }

    /// Ends the connections to `pod` from outside the mesh that the kernel passed through and that are now denied.
    fn end_plaintext(&self, snapshot: &Snapshot, pod: &Pod, rules: &ByPod) {
        let own = pod.enrolled.addresses();
        let ended = pod.enrolled.end_accepted(|local, peer| {
            let ip = peer.ip();
            // All others came through the daemon, or are the node's and the pod's own.
            let passed = own.contains(&local.ip())
                && !own.contains(&ip)
                && matches!(
                    self.caller_kind(snapshot, ip),
                    None | Some(MeshKind::Outside | MeshKind::Exposed | MeshKind::ServiceNetwork)
                );
            let connection = Connection {
                client: None,
                source: ip,
                destination: local,
            };
            let verdict = rules.verdict(pod.enrolled.netns.cookie(), &connection);
            passed && !verdict.is_ok_and(|verdict| verdict.allowed())
        });
        let pod = &pod.workload.name;
        match ended {
            Ok(0) => {}
            Ok(connections) => {
                tracing::info!(%pod, connections, "ended plaintext that policies are against now");
            }
            Err(error) => {
                tracing::error!(%pod, %error, "cannot end plaintext that policies are against now");
            }
        }
    }
}
