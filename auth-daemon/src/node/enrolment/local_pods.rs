//! Publishes the pods of this node to the proxy, and whether their links are private.

use std::{collections::HashMap, sync::Arc};

use super::{Enrolment, Serving};
use crate::{
    config::SameNode,
    proxy::local_pods::{LocalPod, LocalPods},
};

impl Enrolment {
    /// Publishes the pods that are served. Connections between them that are no longer allowed end.
    pub(super) fn publish_local_pods(&mut self) {
        let local_pods = self.local_pods();
        let pods = self.serving.values().map(|serving| serving.pod.clone());
        let pods = pods.collect();
        self.node.same_node.settle(&self.node, local_pods, pods);
    }

    fn local_pods(&mut self) -> LocalPods {
        let Self {
            serving,
            pod_links,
            owners,
            ..
        } = self;
        pod_links.refresh(|cookie| serving.contains_key(&cookie));
        let by_cookie: HashMap<_, _> = serving
            .values()
            .map(|serving| {
                let enrolled = &serving.pod.enrolled;
                let local_pod = LocalPod {
                    cookie: serving.cookie(),
                    identity: serving.pod.workload.identity.clone(),
                    addresses: enrolled.addresses().to_vec(),
                    has_private_link: pod_links.is_private(&enrolled.netns, enrolled.addresses()),
                };
                (local_pod.cookie, Arc::new(local_pod))
            })
            .collect();
        let by_address = owners
            .iter()
            .filter_map(|(address, cookie)| Some((*address, by_cookie.get(cookie)?.clone())))
            .collect();
        LocalPods {
            by_cookie,
            by_address,
        }
    }

    /// Why connections between the pod and others of this node use TLS although `sameNode` is `kernel`. Empty if they do not.
    pub(super) fn shared_link(&self, serving: &Serving) -> String {
        if self.node.config.same_node == SameNode::Tunnel {
            return String::new();
        }
        let shared = self.pod_links.why_shared(serving.cookie());
        shared.map_or_else(String::new, ToString::to_string)
    }
}
