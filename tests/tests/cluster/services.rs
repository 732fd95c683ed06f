//! Steps about kinds of services and of pods: NodePort, StatefulSet with a headless service, init containers.

use std::net::{IpAddr, Ipv4Addr};

use mesh_tests::{Result, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{APPS, PATIENCE, Stage, account, address, container, ensure, idle_pod};
use crate::traffic::{MARKER, PORT, has_refused_plaintext, log_has_tunnel, server_pod, who};

/// Requests from a host outside the mesh, over NodePorts of a server on node2.
pub(crate) fn node_ports(stage: &Stage) -> Result<()> {
    let service = |name: &str, policy: &str| {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": APPS},
            "spec": {
                "type": "NodePort", "externalTrafficPolicy": policy,
                "selector": {"app": "web-2"}, "ports": [{"port": 80, "targetPort": "http"}],
            },
        })
    };
    stage.apply(&[
        service("port-cluster", "Cluster"),
        service("port-local", "Local"),
    ])?;
    let request = |service: &str, node: &str| {
        let service = stage.get(&format!("service -n {APPS} {service}"))?;
        let url = format!(
            "http://{}:{}/cgi-bin/who",
            stage.cluster.node(node).node().ipv4(),
            service["spec"]["ports"][0]["nodePort"]
        );
        let curl = ["-sSf", "--max-time", "10", &url];
        let outside = stage.cluster.mesh().outside();
        Ok::<_, mesh_tests::Error>(outside.run("curl", curl)?.ok()?.stdout)
    };
    // Whether kube-proxy keeps the caller's address or translates it to a node's, plaintext from outside the mesh is refused.
    let node = |name: &str| IpAddr::from(stage.cluster.node(name).node().ipv4());
    let pod = stage.pod(APPS, "app=web-2")?;
    let address: Ipv4Addr = pod["status"]["podIP"]
        .as_str()
        .unwrap_or_default()
        .parse()?;
    let [a, b, c, _] = address.octets();
    // The node's address on the pods' bridge.
    let bridge = IpAddr::from([a, b, c, 1]);
    let outside = IpAddr::from(stage.cluster.mesh().outside_ipv4());
    for (service, at, callers) in [
        ("port-cluster", "node2", vec![node("node2"), bridge]),
        ("port-cluster", "node1", vec![node("node1")]),
        ("port-local", "node2", vec![outside]),
    ] {
        // kube-proxy may not know the port yet, which is refused too, but leaves no line.
        eventually_ok(PATIENCE, "a refusal by the pod", || {
            let answer = request(service, at);
            ensure(answer.is_err(), || format!("{service} at {at}: {answer:?}"))?;
            ensure(has_refused_plaintext(stage, "node2", &callers)?, || {
                format!("no line of a refusal of {callers:?}")
            })
        })?;
    }
    stage
        .kubectl(&format!("delete service -n {APPS} port-cluster port-local"))
        .map(drop)
}

/// A StatefulSet's pods are reached by their own addresses, also after one of them is created again.
pub(crate) fn stateful_set(stage: &Stage) -> Result<()> {
    let labels = json!({"app": "db"});
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": {"name": "db", "namespace": APPS},
        "spec": {
            "serviceName": "db", "replicas": 2, "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": server_pod("db", Some("node2"))},
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "db", "namespace": APPS},
        "spec": {
            "clusterIP": "None", "selector": labels, "ports": [{"port": PORT, "targetPort": "http"}],
        },
    });
    stage.apply(&[account("db"), service, set])?;
    stage.rolled_out(APPS, "statefulset/db")?;
    let reach = |pod: &str| -> Result<Value> {
        let state = stage.get(&format!("pod -n {APPS} {pod}"))?;
        let url = format!("http://{}:{PORT}/cgi-bin/who", address(&state));
        let answer = stage.curl("client-1", &url)?;
        ensure(answer.contains(&format!("asked {pod}")), || answer.clone())?;
        let endpoint = format!("{}:", address(&state));
        log_has_tunnel(stage, "node1", "client", "db", Some(&endpoint))?;
        Ok(state)
    };
    let first = reach("db-0")?;
    reach("db-1")?;
    stage.kubectl(&format!("delete pod -n {APPS} db-0 --now"))?;
    stage.rolled_out(APPS, "statefulset/db")?;
    let second = reach("db-0")?;
    assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
    stage
        .kubectl(&format!(
            "delete -n {APPS} statefulset/db service/db serviceaccount/db"
        ))
        .map(drop)
}

/// Pods whose init container makes one request, without a retry.
pub(crate) fn first_connects(stage: &Stage) -> Result<()> {
    let url = who(stage, "web-2")?;
    let names: Vec<String> = (1..=FIRST_CONNECTS).map(|n| format!("first-{n}")).collect();
    let pods: Vec<Value> = names
        .iter()
        .map(|name| {
            let mut pod = idle_pod(name, "node1", "client");
            let script = format!("exec curl -sSf --max-time 15 {url}");
            let mut first = container(&script);
            first["name"] = json!("first");
            pod["spec"]["initContainers"] = json!([first]);
            // A failed request fails the pod.
            pod["spec"]["restartPolicy"] = json!("Never");
            pod["metadata"]["labels"] = json!({"app": "first"});
            pod
        })
        .collect();
    let capture = stage.cluster.wire().capture()?;
    stage.apply(&pods)?;
    for name in &names {
        eventually_ok(PATIENCE, "an init container that is answered", || {
            let pod = stage.get(&format!("pod -n {APPS} {name}"))?;
            let phase = pod["status"]["phase"].as_str().unwrap_or_default();
            assert_ne!(phase, "Failed", "{name}: {}", pod["status"]);
            ensure(phase == "Running", || phase.to_owned())
        })?;
        let said = stage.kubectl(&format!("logs -n {APPS} {name} -c first"))?;
        ensure(said.contains(MARKER), || format!("{name}: {said}"))?;
    }
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    stage
        .kubectl(&format!("delete pods -n {APPS} -l app=first --now"))
        .map(drop)
}

const FIRST_CONNECTS: usize = 10;
