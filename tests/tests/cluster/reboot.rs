//! The step about a node that reboots.

use std::collections::BTreeMap;

use mesh_tests::{Context, Result, Status, eventually_ok};
use serde_json::Value;

use crate::churn::Footprint;
use crate::load::Load;
use crate::stage::{APPS, DAEMON, PATIENCE, SYSTEM, Stage, ensure, is_ready, name, status_of};
use crate::traffic::{MARKER, who};

const NODE: &str = "node2";

/// Everything on node2 ends at once, and the node starts again with new cgroups and namespaces. Its pods are the same objects,
/// with new sandboxes and other addresses, some of which other pods had before.
pub(crate) fn node_comes_back(stage: &Stage) -> Result<()> {
    let before = Footprint::at_rest(stage, "node1")?;
    let old = containers(stage)?;
    let load = Load::start(stage, "load-rebooted", "node1", &who(stage, "web-2")?)?;
    let capture = stage.cluster.wire().capture()?;
    stage.cluster.reboot(NODE)?;
    // Until the kubelet reports, the API has the state from before.
    eventually_ok(PATIENCE, "new containers of all pods of the node", || {
        let new = containers(stage)?;
        let stale: Vec<&String> = old
            .iter()
            .filter(|(pod, container)| new.get(*pod).is_none_or(|new| new == *container))
            .map(|(pod, _)| pod)
            .collect();
        ensure(stale.is_empty(), || format!("{stale:?}"))
    })?;
    load.goes_on(stage, 20)?;
    for (client, web) in [("client-2", "web-1"), ("client-1", "web-2")] {
        // A container may be ready before the daemon has enrolled its pod.
        eventually_ok(PATIENCE, "an answer", || {
            let answer = stage.curl(client, &who(stage, web)?)?;
            ensure(answer.contains(MARKER), || answer.clone())
        })?;
    }
    load.end(stage)?;
    ensure(!capture.stop()?.contains(MARKER.as_bytes()), || {
        "plaintext on the wire".to_owned()
    })?;
    only_its_pods(stage)?;
    eventually_ok(
        PATIENCE,
        "node1's daemon to hold no more than before",
        || {
            let after = Footprint::of(stage, "node1")?;
            ensure(after.is_within(&before), || {
                format!("{after:?} after {before:?}")
            })
        },
    )
}

/// The node's pods of the apps.
fn apps(stage: &Stage) -> Result<Vec<Value>> {
    // Another step may not have deleted that pod yet, or is left out.
    let others = "-l app!=evicted";
    let list = stage.get(&format!(
        "pods -n {APPS} {others} --field-selector spec.nodeName={NODE}"
    ))?;
    Ok(list["items"].as_array().context("no list")?.clone())
}

/// The container of each ready pod of the node, by the pod's name.
fn containers(stage: &Stage) -> Result<BTreeMap<String, String>> {
    let (apps, daemons) = (apps(stage)?, stage.pods(SYSTEM, DAEMON)?);
    let pods = apps.iter().chain(&daemons);
    let ready = pods.filter(|pod| pod["spec"]["nodeName"] == NODE && is_ready(pod));
    Ok(ready
        .map(|pod| {
            let id = &pod["status"]["containerStatuses"][0]["containerID"];
            (
                name(pod).to_owned(),
                id.as_str().unwrap_or_default().to_owned(),
            )
        })
        .collect())
}

/// The node's daemon serves the pods that run there, and has nothing of those before the reboot.
fn only_its_pods(stage: &Stage) -> Result<()> {
    eventually_ok(PATIENCE, "the status of the node's pods", || {
        let status: Status = serde_json::from_value(status_of(stage, NODE)?)?;
        let apps = apps(stage)?;
        let mut expected: Vec<(String, Vec<String>)> = apps.iter().map(in_the_api).collect();
        let mut served: Vec<(String, Vec<String>)> = status
            .pods
            .iter()
            .filter(|pod| pod.enrolled)
            .map(|pod| {
                let addresses = pod.addresses.iter().map(ToString::to_string);
                (pod.pod.clone(), addresses.collect())
            })
            .collect();
        expected.sort();
        served.sort();
        let pods = status.pods.len();
        let in_kernel = status.kernel.pods;
        ensure(
            served == expected && pods == expected.len() && in_kernel == pods as u64,
            || format!("{:?} of {pods}, {expected:?} in the API", status.pods),
        )
    })
}

/// A pod's `namespace/name` and its addresses.
fn in_the_api(pod: &Value) -> (String, Vec<String>) {
    let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
    let addresses = addresses.filter_map(|one| one["ip"].as_str());
    (
        format!("{APPS}/{}", name(pod)),
        addresses.map(str::to_owned).collect(),
    )
}
