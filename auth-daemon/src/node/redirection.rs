//! Tells an Istio mesh which pods accept HBONE here, by the annotation that Istio's own node agent would write. istiod passes it
//! on to the pods' peers.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::proxy::Node;
use auth_mesh::{ObjectName, Snapshot, Workload};

/// The annotation of a pod whose connections a node proxy takes.
const REDIRECTION: (&str, &str) = ("ambient.istio.io/redirection", "enabled");
/// How often the enrolled pods are compared with those that have the annotation.
const INTERVAL: Duration = Duration::from_millis(500);
/// One request.
const DEADLINE: Duration = Duration::from_secs(10);

/// Annotates the enrolled pods of this node, and removes the annotation from those that have left the mesh, without
/// end. While no daemon runs, pods keep the annotation: their peers must not reach them in plaintext.
pub async fn announce(client: Client, node: Arc<Node>) {
    let mut announced: HashMap<ObjectName, String> = HashMap::new();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let snapshot = node.registry.snapshot();
        announced.retain(|name, uid| snapshot.any_pod(name).is_some_and(|pod| pod.uid == *uid));
        let new = enrolled(&node, &snapshot)
            .into_iter()
            .filter(|pod| announced.get(&pod.name) != Some(&pod.uid));
        let left = announced
            .iter()
            .filter(|(name, uid)| snapshot.is_excluded(name, uid));
        let changes: Vec<_> = new
            .map(|pod| (pod.name.clone(), pod.uid.clone(), true))
            .chain(left.map(|(name, uid)| (name.clone(), uid.clone(), false)))
            .collect();
        for (name, uid, is_served) in changes {
            if let Err(error) = annotate(&client, &name, &uid, is_served).await {
                tracing::warn!(
                    pod = %name, is_served, %error,
                    "cannot change the pod's annotation {}; until then, the mesh sees the pod's previous state; retrying",
                    REDIRECTION.0
                );
                // The API server may be unavailable: the next tick tries again.
                break;
            }
            if is_served {
                announced.insert(name, uid);
            } else {
                announced.remove(&name);
            }
        }
    }
}

/// Returns the pods of this node that are enrolled.
fn enrolled(node: &Node, snapshot: &Snapshot) -> Vec<Arc<Workload>> {
    let served: HashSet<String> = {
        let pods = node.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let enrolled = pods.iter().filter(|pod| pod.enrolled);
        enrolled.map(|pod| pod.pod.clone()).collect()
    };
    let pods = snapshot.on_node(&node.config.node_name);
    pods.filter(|pod| !pod.finished && served.contains(&pod.name.to_string()))
        .cloned()
        .collect()
}

/// Annotates a pod through its status, so that the daemon needs no right to change the pod itself, or removes the annotation.
async fn annotate(
    client: &Client,
    name: &ObjectName,
    uid: &str,
    is_served: bool,
) -> Result<(), String> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &name.namespace);
    let (key, value) = REDIRECTION;
    let value = is_served.then_some(value);
    // The UID makes the request fail if another pod has this name by now.
    let change = json!({"metadata": {"uid": uid, "annotations": {key: value}}});
    let (parameters, change) = (PatchParams::default(), Patch::Merge(change));
    let request = api.patch_status(&name.name, &parameters, &change);
    match timeout(DEADLINE, request).await {
        Ok(Ok(_)) => {
            tracing::info!(pod = %name, is_served, "pod's annotation {key} changed");
            Ok(())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {DEADLINE:?}")),
    }
}
