//! The page's data: which daemons there are, what this one's node sees, and what it knows of the mesh.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use axum::{
    Json,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};

use super::{Unobserved, known, observed};
use crate::{
    observe::{
        flows::{Page, format_time},
        pairs,
    },
    proxy::Node,
};
use auth_mesh::{
    ObjectName, Snapshot,
    policy::{selecting::Selecting, suggest::workload_name},
};

/// The most workloads, and the most Services, in an answer.
const MAX_OBJECTS: usize = 4096;
/// The most pods and nodes of a workload that are named.
const MAX_NAMED: usize = 20;

/// The daemons that the page asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nodes {
    /// Those that can be reached.
    pub(crate) nodes: Vec<Reachable>,
    /// Nodes that cannot.
    pub(crate) missing: Vec<Missing>,
    /// How long the page waits between two questions to the same daemon, in milliseconds.
    pub(crate) pause: u64,
}

/// A daemon, and the segments of the path under which the page finds its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reachable {
    pub(crate) name: String,
    pub(crate) at: Vec<String>,
}

/// A node whose daemon cannot be reached, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Missing {
    pub(crate) node: String,
    pub(crate) reason: String,
}

/// What a node has seen since the page asked last.
#[derive(Debug, Serialize)]
pub(super) struct Live {
    /// The daemon's time, in the format of RFC 3339.
    time: String,
    /// Connections that ended.
    flows: Page,
    /// The pairs that have changed.
    pairs: pairs::Answer,
}

/// The workloads and Services of the mesh.
#[derive(Debug, Serialize)]
pub(super) struct Mesh {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    /// Workloads and Services that the answer does not have, because there are too many.
    left_out: usize,
}

/// Pods that have their name in common, without what is generated.
#[derive(Debug, Serialize)]
struct Workload {
    namespace: String,
    name: String,
    identities: BTreeSet<String>,
    /// Some of its pods, by name.
    pods: Vec<String>,
    pod_count: usize,
    /// Some of the nodes that they run on.
    nodes: BTreeSet<String>,
    /// The Services that select its first pod.
    services: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Service {
    namespace: String,
    name: String,
    ports: Vec<u16>,
}

/// Names the only daemon that this one's page asks: itself.
pub(super) async fn nodes(State(node): State<Arc<Node>>) -> Json<Nodes> {
    Json(Nodes {
        nodes: vec![Reachable {
            name: node.config.node_name.clone(),
            at: Vec::new(),
        }],
        missing: Vec::new(),
        pause: 500,
    })
}

/// Returns the connections that ended as number `after` or later, and the pairs that changed at the time `since` or later.
pub(super) async fn live(
    State(node): State<Arc<Node>>,
    Path((after, since)): Path<(u64, String)>,
) -> Result<Json<Live>, Unobserved> {
    let name = &node.config.node_name;
    let connections = observed(&node)?;
    connections.settle_pairs();
    let mut pairs = connections.pairs.answer(name, node.with_unseen_callers());
    // Times in this format sort as text.
    pairs.pairs.retain(|pair| pair.last >= since);
    Ok(Json(Live {
        time: format_time(SystemTime::now()),
        flows: connections.flows.after(after, name),
        pairs,
    }))
}

/// Returns the workloads and Services of the mesh.
pub(super) async fn mesh(State(node): State<Arc<Node>>) -> Json<Mesh> {
    Json(Mesh::new(&node.registry.snapshot()))
}

/// Says which policies select a pod, and which Services it may reach.
pub(super) async fn policies_of(
    State(node): State<Arc<Node>>,
    Path((namespace, name)): Path<(String, String)>,
) -> Json<Result<Selecting, String>> {
    let answer = known(&node).selecting(&ObjectName { namespace, name });
    Json(answer.map_err(|error| format!("{error:#}")))
}

impl Mesh {
    fn new(snapshot: &Snapshot) -> Self {
        let mut workloads: BTreeMap<_, Workload> = BTreeMap::new();
        let mut services_in: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for service in snapshot.services() {
            let namespace = service.name.namespace.as_str();
            services_in.entry(namespace).or_default().push(service);
        }
        let mut left_out = 0;
        for pod in snapshot.workloads().filter(|pod| !pod.finished) {
            let name = workload_name(pod).to_owned();
            let key = (pod.name.namespace.clone(), name.clone());
            if !workloads.contains_key(&key) && workloads.len() == MAX_OBJECTS {
                left_out += 1;
                continue;
            }
            let workload = workloads.entry(key).or_insert_with(|| Workload {
                namespace: pod.name.namespace.clone(),
                name,
                identities: BTreeSet::new(),
                pods: Vec::new(),
                pod_count: 0,
                nodes: BTreeSet::new(),
                services: (services_in
                    .get(pod.name.namespace.as_str())
                    .into_iter()
                    .flatten())
                .filter(|service| service.selects(pod))
                .map(|service| service.name.name.clone())
                .take(MAX_NAMED)
                .collect(),
            });
            workload.pod_count += 1;
            if workload.pods.len() < MAX_NAMED {
                workload.pods.push(pod.name.name.clone());
            }
            if workload.nodes.len() < MAX_NAMED {
                workload.nodes.insert(pod.node.clone());
            }
            if workload.identities.len() < MAX_NAMED {
                workload.identities.insert(pod.identity.to_string());
            }
        }
        let services = snapshot.services().map(|service| Service {
            namespace: service.name.namespace.clone(),
            name: service.name.name.clone(),
            ports: service.ports.iter().map(|port| port.port).collect(),
        });
        let services: Vec<_> = services.take(MAX_OBJECTS).collect();
        left_out += snapshot.services().count() - services.len();
        Self {
            workloads: workloads.into_values().collect(),
            services,
            left_out,
        }
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::{Inventory, Service as MeshService, Workload as Pod};

    use super::*;

    #[test]
    fn pods_of_a_workload_are_one() {
        let name = |name: &str| ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        };
        let mut inventory = Inventory::default();
        for (pod, node, hash) in [
            ("web-5d-x1", "a", Some("5d")),
            ("web-5d-x2", "b", Some("5d")),
            ("<script>", "b", None),
        ] {
            let account = format!("spiffe://cluster.local/ns/shop/sa/{node}");
            let mut one = Pod::new(name(pod), account.parse().unwrap());
            one.node = node.into();
            if let Some(hash) = hash {
                let labels = [("app", "web"), ("pod-template-hash", hash)];
                one.labels = labels.map(|(key, value)| (key.into(), value.into())).into();
            }
            inventory.workloads.push(one);
        }
        let mut service = MeshService::new(name("web-svc"));
        service.selector.insert("app".into(), "web".into());
        inventory.services.push(service);
        let mesh = Mesh::new(&Snapshot::new(inventory));
        assert_eq!((mesh.services.len(), mesh.left_out), (1, 0));
        let [script, web] = &mesh.workloads[..] else {
            panic!("{mesh:?}");
        };
        assert_eq!((script.name.as_str(), script.pod_count), ("<script>", 1));
        assert!(script.services.is_empty());
        assert_eq!((web.name.as_str(), web.pod_count), ("web", 2));
        assert_eq!(web.services, ["web-svc"]);
        assert_eq!((web.nodes.len(), web.identities.len()), (2, 2));
    }
}
