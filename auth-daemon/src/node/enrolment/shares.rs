//! Reports which pods exceed their shares of the kernel's maps, so that their connections are refused, and whether the
//! node itself does.

use std::{collections::HashMap, time::Instant};

use auth_common::SHARE;
use auth_datapath::Kernel;

use super::Serving;
use crate::observe::line_limit::LineLimit;

/// What the log has said of the pods and the node.
#[derive(Debug, Default)]
pub(super) struct ExceededShares {
    /// By the cookie of their netns.
    pods: HashMap<u64, Exceeded>,
    /// The node's own connections to pods.
    node: Refused,
}

#[derive(Debug, Default)]
struct Exceeded {
    connects: Refused,
    deliveries: Refused,
    events: Refused,
}

/// What was refused or left out since the pod was enrolled.
#[derive(Debug, Default)]
struct Refused {
    count: u64,
    limit: LineLimit,
}

impl ExceededShares {
    /// Reads the counts of the node and the pods that are served, and warns of those that have grown.
    pub(super) fn check(&mut self, kernel: &Kernel, serving: &HashMap<u64, Serving>) {
        self.check_node(kernel);
        self.pods.retain(|cookie, _| serving.contains_key(cookie));
        for (cookie, serving) in serving {
            let Some(share) = kernel.shares.of(*cookie) else {
                continue;
            };
            let pod = &serving.pod.workload.name;
            let exceeded = self.pods.entry(*cookie).or_default();
            if let Some(refused) = exceeded.connects.note(share.connects.refused) {
                tracing::warn!(
                    %pod, refused, limit = SHARE,
                    "connects refused: the pod has as many connections under way as its share; do the servers that it dials \
                     accept them?"
                );
            }
            if let Some(refused) = exceeded.deliveries.note(share.deliveries.refused) {
                tracing::warn!(
                    %pod, refused, limit = SHARE,
                    "deliveries refused: as many connections as the pod's share wait for apps to accept them"
                );
            }
            if let Some(lost) = exceeded.events.note(kernel.shares.lost_events(*cookie)) {
                tracing::warn!(
                    %pod, lost,
                    "access log lines left out: the pod's connections to pods of this node close faster than they can be logged"
                );
            }
        }
    }

    fn check_node(&mut self, kernel: &Kernel) {
        let Some(share) = kernel.shares.of(kernel.node_cookie()) else {
            return;
        };
        if let Some(refused) = self.node.note(share.deliveries.refused) {
            tracing::warn!(
                refused,
                limit = SHARE,
                "connections of the node to pods refused, which may be probes by the kubelet: as many as the node's share wait \
                 for pods to accept them"
            );
        }
    }

    /// Number of connections of the pod whose netns has `cookie` that were refused.
    pub(super) fn of(&self, cookie: u64) -> u64 {
        self.pods.get(&cookie).map_or(0, |exceeded| {
            exceeded.connects.count + exceeded.deliveries.count
        })
    }
}

impl Refused {
    /// Takes note of the count. Returns how much it has grown since the last warning, if it is time for one.
    fn note(&mut self, count: u64) -> Option<u64> {
        let more = count.saturating_sub(self.count);
        self.count = count;
        self.limit.note(more, 1, Instant::now())
    }
}
