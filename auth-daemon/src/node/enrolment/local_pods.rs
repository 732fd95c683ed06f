//! Publishes the pods of this node to the proxy, and whether their links are private.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use auth_datapath::PodLinks;

use super::{Enrolment, Serving};
use crate::{
    config::SameNode,
    proxy::{
        Pod,
        local_pods::{LocalPod, LocalPods},
    },
};

impl Enrolment {
    /// Publishes the pods that are served. Connections between them that are no longer allowed end.
    pub(super) fn publish_local_pods(&mut self) {
        let pods = self.serving.values().map(|serving| serving.pod.clone());
        let pods: Vec<_> = pods.collect();
        let local_pods = of(&pods, &self.owners, &mut self.pod_links);
        self.node.same_node.settle(&self.node, local_pods, pods);
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

/// What the proxy needs to know of `pods`. `owners` are the cookies of those that own an address.
pub(super) fn of(
    pods: &[Arc<Pod>],
    owners: &HashMap<IpAddr, u64>,
    pod_links: &mut PodLinks,
) -> LocalPods {
    let cookies: HashSet<u64> = pods.iter().map(|pod| pod.enrolled.netns.cookie()).collect();
    pod_links.refresh(|cookie| cookies.contains(&cookie));
    let by_cookie: HashMap<_, _> = pods
        .iter()
        .map(|pod| {
            let enrolled = &pod.enrolled;
            let local_pod = LocalPod {
                cookie: enrolled.netns.cookie(),
                identity: pod.workload.identity.clone(),
                addresses: enrolled.addresses().to_vec(),
                has_private_link: pod_links.is_private(&enrolled.netns, enrolled.addresses()),
            };
            (local_pod.cookie, Arc::new(local_pod))
        })
        .collect();
    let links = by_cookie
        .keys()
        .map(|cookie| (*cookie, pod_links.indices(*cookie)))
        .collect();
    let by_address = owners
        .iter()
        .filter_map(|(address, cookie)| Some((*address, by_cookie.get(cookie)?.clone())))
        .collect();
    LocalPods {
        by_cookie,
        by_address,
        links,
    }
}
