//! Steps about pods that start without the scheduler, and about what keeps the scheduler from a node without a daemon.

use std::fs;

use mesh_tests::{Context, Result, TokenOptions, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{
    APPS, NODES, PATIENCE, SYSTEM, Stage, TAINT, address, ensure, is_ready, pod_running,
    pods_are_gone,
};
use crate::starts::starts;
use crate::traffic::{MARKER, PORT, server_pod, who};

/// Whether a node has the taint.
fn is_tainted(stage: &Stage, node: &str) -> Result<bool> {
    let node = stage.get(&format!("node {node}"))?;
    let taints = node["spec"]["taints"].as_array();
    Ok(taints
        .into_iter()
        .flatten()
        .any(|taint| taint["key"] == TAINT))
}

fn becomes_tainted(stage: &Stage, node: &str, expected: bool) -> Result<()> {
    eventually_ok(PATIENCE, "a change of the taint", || {
        let found = is_tainted(stage, node)?;
        ensure(found == expected, || format!("{node} is tainted: {found}"))
    })
}

/// All nodes had the taint before the chart was installed. Then node2 has no daemon for a while.
pub(crate) fn pods_wait_for_the_daemon(stage: &Stage) -> Result<()> {
    for node in NODES {
        becomes_tainted(stage, node, false)?;
    }
    only_the_own_taint(stage)?;
    // Daemons only run on nodes with this label.
    let label = |os: &str| {
        stage.kubectl(&format!(
            "label node node2 kubernetes.io/os={os} --overwrite"
        ))
    };
    label("none")?;
    becomes_tainted(stage, "node2", true)?;
    let url = who(stage, "web-1")?;
    let script = format!("curl -sSf --max-time 15 {url} && exec sleep 3600");
    stage.apply(&[pod_running("waiting", "node2", "client", &script)])?;
    eventually_ok(PATIENCE, "the scheduler's refusal", || {
        let pod = stage.get(&format!("pod -n {APPS} waiting"))?;
        let status = pod["status"].to_string();
        ensure(status.contains("untolerated taint"), || status.clone())
    })?;
    label("linux")?;
    becomes_tainted(stage, "node2", false)?;
    eventually_ok(PATIENCE, "an answer", || {
        let log = stage.kubectl(&format!("logs -n {APPS} waiting"))?;
        ensure(log.contains(MARKER), || log.clone())
    })?;
    stage
        .kubectl(&format!("delete pod -n {APPS} waiting --now --wait=false"))
        .map(drop)
}

/// With its token, the daemon of node1 can change nothing but that taint, and only on its own node.
fn only_the_own_taint(stage: &Stage) -> Result<()> {
    let daemon = stage.daemon_on("node1")?;
    let options = TokenOptions {
        pod: Some(&daemon),
        ..TokenOptions::default()
    };
    let token = stage.cluster.api().token(SYSTEM, "auth-daemon", &options)?;
    let server = stage.cluster.api().address();
    let patch = |node: &str, change: Value| {
        let outside = stage.cluster.mesh().outside();
        let curl = outside.run(
            "curl",
            [
                "-sSk",
                "--max-time",
                "15",
                "-X",
                "PATCH",
                "-H",
                "Content-Type: application/merge-patch+json",
                "-H",
                &format!("Authorization: Bearer {token}"),
                "-d",
                &change.to_string(),
                &format!("https://{server}/api/v1/nodes/{node}?dryRun=All"),
            ],
        );
        let answer: Value = serde_json::from_str(&curl?.ok()?.stdout)?;
        Ok::<_, mesh_tests::Error>(answer)
    };
    let taints = |key: &str| json!({"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}});
    let accepted = patch("node1", taints(TAINT))?;
    ensure(accepted["kind"] == "Node", || accepted.to_string())?;
    let label = json!({"metadata": {"labels": {"a": "b"}}});
    let annotation = json!({"metadata": {"annotations": {"auth-daemon.io/tunnel": "disabled"}}});
    let cordon = json!({"spec": {"unschedulable": true}});
    for (node, change, reason) in [
        ("node2", taints(TAINT), "its own node"),
        ("node1", taints("other"), "the taint"),
        ("node1", label, "the taint"),
        ("node1", annotation, "the taint"),
        ("node1", cordon, "the taint"),
    ] {
        let refused = patch(node, change.clone())?;
        let message = refused["message"].as_str().unwrap_or_default();
        ensure(
            message.contains("a daemon may only change") && message.contains(reason),
            || format!("{node}, {change}: {refused}"),
        )?;
    }
    Ok(())
}

/// The kubelet of node2 starts a pod from a file. Nothing proves its identity.
pub(crate) fn static_pod_starts(stage: &Stage) -> Result<()> {
    let mut spec = server_pod("default", None);
    let fields = spec.as_object_mut().context("no object")?;
    fields.remove("serviceAccountName");
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "static", "namespace": APPS, "labels": {"app": "static"}}, "spec": spec,
    });
    let node = stage.cluster.node("node2");
    let file = node.static_pods().join("static.json");
    fs::write(&file, manifest.to_string())?;
    // Probes reach it from its node, and all callers reach it in plaintext.
    let pod = eventually_ok(PATIENCE, "a ready static pod", || {
        let pod = stage.get(&format!("pod -n {APPS} static-node2"))?;
        ensure(is_ready(&pod), || pod["status"].to_string())?;
        Ok(pod)
    })?;
    let capture = stage.cluster.wire().capture()?;
    let url = format!("http://{}:{PORT}/cgi-bin/who", address(&pod));
    // The other node's daemon may not know it yet.
    eventually_ok(PATIENCE, "an answer", || stage.curl("client-1", &url))?;
    ensure(capture.stop()?.contains(MARKER.as_bytes()), || {
        "a static pod has an identity".to_owned()
    })?;
    // The runtime did not wait for the daemon until the deadline.
    let hash = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str();
    let starts = starts(node)?;
    let start = starts.get(hash.context("no hash")?);
    let took = start.context("no start of it in the runtime's log")?.took();
    println!("    its sandbox started in {took:.0} ms");
    fs::remove_file(&file)?;
    pods_are_gone(stage, APPS, "app=static")
}
