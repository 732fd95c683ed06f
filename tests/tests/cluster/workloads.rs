//! Steps about kinds of pods, and about what an administrator does to them.

use std::net::Ipv4Addr;

use mesh_tests::{Context, Result, Status, TOOLS, eventually_ok, slowdown};
use serde_json::{Value, json};

use crate::load::Load;
use crate::stage::{
    APPS, CA, PATIENCE, SYSTEM, Stage, address, container, ensure, idle_pod, is_ready, pod_running,
    status_of,
};
use crate::traffic::{MARKER, PORT, identity, log_has, server, who};

/// A container of this name that makes one request.
fn asking(name: &str, url: &str, then: &str) -> Value {
    let mut asking = container(&format!("curl -sSf --max-time 15 {url} && {then}"));
    asking["name"] = json!(name);
    asking
}

/// A pod with a native sidecar, which gets an ephemeral container, and a Job: the request of each container is
/// tunnelled.
pub(crate) fn containers_of_every_kind(stage: &Stage) -> Result<()> {
    let url = who(stage, "web-2")?;
    let mut pod = idle_pod("kinds", "node1", "client");
    let mut sidecar = asking("sidecar", &url, "exec sleep 3600");
    sidecar["restartPolicy"] = json!("Always");
    pod["spec"]["initContainers"] = json!([sidecar]);
    pod["spec"]["containers"][0] = asking("app", &url, "exec sleep 3600");
    let mut once = idle_pod("", "node1", "client")["spec"].take();
    // The runtime holds a pod for a second at most, and a slow machine may take longer to enrol it.
    once["restartPolicy"] = json!("OnFailure");
    once["containers"][0] = asking("once", &url, "exit 0");
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once", "namespace": APPS},
        "spec": {"template": {"metadata": {"labels": {"app": "once"}}, "spec": once}},
    });
    let capture = stage.cluster.wire().capture()?;
    stage.apply(&[pod, job])?;
    stage.becomes("pod/kinds", "Ready")?;
    stage.becomes("job/once", "Complete")?;
    let debug = [
        "debug",
        "-n",
        APPS,
        "pod/kinds",
        "--image",
        TOOLS,
        "--image-pull-policy=Never",
        "--profile=general",
        "--container=ephemeral",
        "--",
        "curl",
        "-sSf",
        "--max-time",
        "15",
        &url,
    ];
    stage.cluster.kubectl(debug)?.ok()?;
    for (pod, container) in [
        ("kinds", "sidecar"),
        ("kinds", "app"),
        ("kinds", "ephemeral"),
        ("job/once", "once"),
    ] {
        eventually_ok(PATIENCE, "an answer", || {
            let log = stage.kubectl(&format!("logs -n {APPS} {pod} -c {container}"))?;
            ensure(log.contains(MARKER), || {
                format!("{pod}, {container}: {log:?}")
            })
        })?;
    }
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    for label in ["app=kinds", "app=once"] {
        let client = format!("{}:", address(&stage.pod(APPS, label)?));
        log_has(stage, "node1", |line| {
            let from = line["client"].as_str().unwrap_or_default();
            from.starts_with(&client)
                && line["path"] == "tunnel"
                && line["server_identity"] == identity("web-2")
                && line["result"] == "ok"
        })?;
    }
    stage
        .kubectl(&format!(
            "delete -n {APPS} pod/kinds job/once --now --wait=false"
        ))
        .map(drop)
}

/// A pod that writes more to a volume than it may.
pub(crate) fn evicted_pod() -> Value {
    let script = "head -c 4194304 /dev/zero >/data/much; exec sleep 3600";
    let mut pod = pod_running("evicted", "node2", "client", script);
    pod["spec"]["volumes"] = json!([{"name": "data", "emptyDir": {"sizeLimit": "1Mi"}}]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
    pod
}

/// The object of a pod that the kubelet has evicted stays. Its netns is gone, and the daemon has released it.
pub(crate) fn evicted_pod_is_released(stage: &Stage) -> Result<()> {
    eventually_ok(PATIENCE, "an eviction", || {
        let pod = stage.get(&format!("pod -n {APPS} evicted"))?;
        ensure(pod["status"]["reason"] == "Evicted", || {
            pod["status"].to_string()
        })
    })?;
    eventually_ok(PATIENCE, "its release", || {
        let status: Status = serde_json::from_value(status_of(stage, "node2")?)?;
        let pods: Vec<&str> = status.pods.iter().map(|pod| pod.pod.as_str()).collect();
        let evicted = format!("{APPS}/evicted");
        ensure(!pods.contains(&evicted.as_str()), || format!("{pods:?}"))
    })?;
    stage
        .kubectl(&format!("delete pod -n {APPS} evicted --now"))
        .map(drop)
}

/// `exec` and `logs` are in most steps. `port-forward` connects to the app from inside the pod.
pub(crate) fn port_forward(stage: &Stage) -> Result<()> {
    let command = format!("port-forward -n {APPS} deployment/web-2 :{PORT}");
    let forward = stage.cluster.start_kubectl(command.split(' '))?;
    let port: u16 = eventually_ok(PATIENCE, "the local port", || {
        let stdout = forward.stdout();
        let port = stdout.lines().find_map(|line| {
            line.strip_prefix("Forwarding from 127.0.0.1:")?
                .split(' ')
                .next()
        });
        Ok(port.with_context(|| stdout.clone())?.parse()?)
    })?;
    let url = format!("http://{}:{port}/cgi-bin/who", Ipv4Addr::LOCALHOST);
    let outside = stage.cluster.mesh().outside();
    let answer = outside
        .run("curl", ["-sSf", "--max-time", "15", &url])?
        .ok()?
        .stdout;
    ensure(answer.contains(MARKER), || answer.clone())
}

/// Drains node2 under load: it evicts pods of an app and of the CA, which move to node1.
pub(crate) fn node_is_drained(stage: &Stage) -> Result<()> {
    stage.apply(&server("drained", None, 2))?;
    stage.rolled_out(APPS, "deployment/drained")?;
    let load = Load::start(stage, "load-drained", "node1", &who(stage, "drained")?)?;
    let start = load.mark(stage)?;
    // Pods that cannot run elsewhere stay.
    stage
        .cluster
        .kubectl([
            "drain",
            "node2",
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--pod-selector=app notin (client-2,web-2)",
            &format!("--timeout={}s", (PATIENCE * slowdown()).as_secs()),
        ])?
        .ok()?;
    // The controllers may not have replaced all evicted pods yet, nor written so into a Deployment's status.
    for (namespace, label) in [(APPS, "app=drained"), (SYSTEM, CA)] {
        eventually_ok(PATIENCE, "the pods on the other node", || {
            let pods = stage.pods(namespace, label)?;
            let moved = |pod: &Value| pod["spec"]["nodeName"] == "node1" && is_ready(pod);
            ensure(pods.len() == 2 && pods.iter().all(moved), || {
                let status = pods.iter().map(|pod| pod["status"].to_string());
                format!("{label}: {:?}", status.collect::<Vec<_>>())
            })
        })?;
    }
    load.goes_on(stage, 20)?;
    let lost = load.failures(stage, start)?;
    // Requests are sequential, so the end of a pod can cut only one.
    ensure(lost.len() <= 2, || format!("{lost:?}"))?;
    println!(
        "    {} requests, {} cut",
        load.mark(stage)? - start,
        lost.len()
    );
    // Pods that stay on a cordoned node are served as before, once its daemon knows the new endpoints.
    eventually_ok(PATIENCE, "an answer on the drained node", || {
        let answer = stage.curl("client-2", &who(stage, "drained")?)?;
        ensure(answer.contains(MARKER), || answer.clone())
    })?;
    stage.kubectl("uncordon node2")?;
    load.end(stage)?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} deployment/drained service/drained serviceaccount/drained --wait=false"
        ))
        .map(drop)
}
