//! Keeps the kernel informed of the cgroups that contain all pods, by which it distinguishes the node's own processes
//! from its pods.

use std::time::{Duration, Instant};

use crate::proxy::Node;

/// Interval at which the cgroups are searched for. The kubelet creates them once, when it starts.
const INTERVAL: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct PodRoots {
    searched: Option<Instant>,
    is_reported: bool,
}

impl PodRoots {
    /// Searches for the cgroups, if it is time to.
    pub(super) fn keep(&mut self, node: &Node) {
        if self.searched.is_some_and(|at| at.elapsed() < INTERVAL) {
            return;
        }
        self.searched = Some(Instant::now());
        let problem = match node.kernel.find_pod_roots() {
            // Without a kubelet there are no pods in the node's own netns.
            Ok(found) if found || node.config.discovery.own_namespace().is_none() => {
                self.is_reported = false;
                return;
            }
            Ok(_) => "there is no cgroup of version 2 named kubepods or kubepods.slice".to_owned(),
            Err(error) => error.to_string(),
        };
        if !std::mem::replace(&mut self.is_reported, true) {
            tracing::warn!(
                "cannot tell pods from the node's processes by their cgroups: {problem}; STRICT pods of this node accept \
                 plaintext from pods in the node's own network (hostNetwork), and new pods are open until they are \
                 enrolled. Let the kubelet use cgroup v2"
            );
        }
    }
}
