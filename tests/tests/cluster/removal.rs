//! Steps that remove everything.

use mesh_tests::{Context, Process, Result, chart, eventually_ok};
use serde_json::Value;

use crate::stage::{APPS, DAEMON, NODES, PATIENCE, SYSTEM, Stage, daemons_are_ready, ensure, name};
use crate::traces::attached_to_node;
use crate::traffic::{MARKER, who};

/// What the daemon creates in a pod's network namespace: a description, a command that shows it, and a sign of it.
const IN_PODS: [(&str, &str, &str); 3] = [
    ("a rule", "ip rule", "0x6d544c53"),
    ("a route", "ip route show table 15006", "local"),
    ("a sysctl", "cat /proc/sys/net/ipv4/tcp_fwmark_accept", "1"),
];
/// Kinds of objects of which nothing may be left, besides those in the namespace.
const CLUSTER_WIDE: &str = "clusterroles,clusterrolebindings";

/// Pods on both nodes that are in the mesh.
fn pods(stage: &Stage) -> Result<[Value; 3]> {
    Ok([
        stage.get(&format!("pod -n {APPS} client-1"))?,
        stage.get(&format!("pod -n {APPS} client-2"))?,
        stage.pod(APPS, "app=web-2")?,
    ])
}

/// Waits until pods have all that the daemon creates in them, or nothing of it.
fn pods_have_traces(stage: &Stage, expected: bool) -> Result<()> {
    for pod in pods(stage)? {
        for (what, command, sign) in IN_PODS {
            eventually_ok(PATIENCE, "enrolment or release", || {
                let found = stage.in_netns(&pod, command)?.contains(sign);
                ensure(found == expected, || {
                    format!("{what} in {}: {found}", name(&pod))
                })
            })?;
        }
    }
    Ok(())
}

/// The logs of all daemons from now on. They disappear with their pods.
fn logs(stage: &Stage) -> Result<Vec<Process>> {
    let follow = |node: &str| {
        let daemon = eventually_ok(PATIENCE, "a ready daemon", || stage.daemon_on(node))?;
        let command = ["logs", "-n", SYSTEM, "--follow", "--tail=0", name(&daemon)];
        stage.cluster.start_kubectl(command)
    };
    NODES.into_iter().map(follow).collect()
}

/// Waits until no daemon has anything in the kernels of the nodes.
fn nodes_have_no_traces(stage: &Stage, logs: &[Process]) -> Result<()> {
    for (node, log) in NODES.into_iter().zip(logs) {
        let node = stage.cluster.node(node);
        eventually_ok(PATIENCE, "a node without the daemon's traces", || {
            let find = ["/sys/fs/bpf", "-mindepth", "1", "-name", "auth-daemon*"];
            let pins = node.run("find", find)?.ok()?.stdout;
            ensure(pins.is_empty(), || pins.clone())?;
            let attached = attached_to_node(node.node());
            ensure(attached.values().all(|count| *count == 0), || {
                format!("{attached:?}")
            })
        })
        .with_context(|| log.stdout())?;
    }
    pods_have_traces(stage, false)
}

fn pods_talk_plaintext(stage: &Stage) -> Result<()> {
    let capture = stage.cluster.wire().capture()?;
    for (client, web) in [
        ("client-1", "web-2"),
        ("client-2", "web-1"),
        ("client-1", "web-1"),
    ] {
        let answer = stage.curl(client, &who(stage, web)?)?;
        ensure(answer.contains(MARKER), || answer.clone())?;
    }
    let recording = capture.stop()?;
    ensure(recording.contains(MARKER.as_bytes()), || {
        "the traffic is not plaintext".to_owned()
    })
}

/// Objects of the chart that the API server still has, as `kubectl get --output name` prints them.
fn objects_left(stage: &Stage) -> Result<String> {
    let everything =
        "daemonsets,deployments,jobs,pods,services,configmaps,serviceaccounts,roles,rolebindings";
    let ours = "-l app.kubernetes.io/part-of=auth-daemon -o name";
    let in_namespace = stage.kubectl(&format!("get {everything} -n {SYSTEM} {ours}"))?;
    Ok(in_namespace + &stage.kubectl(&format!("get {CLUSTER_WIDE} {ours}"))?)
}

/// Daemons need their API rights until they have stopped. When helm returns, all have.
pub(crate) fn helm_uninstall(stage: &Stage) -> Result<()> {
    pods_have_traces(stage, true)?;
    let logs = logs(stage)?;
    stage.helm("uninstall", &[])?;
    let daemons = stage.get(&format!("pods -n {SYSTEM} -l {DAEMON}"))?;
    ensure(daemons["items"] == serde_json::json!([]), || {
        daemons.to_string()
    })?;
    nodes_have_no_traces(stage, &logs)?;
    eventually_ok(PATIENCE, "the end of the CA's pods", || {
        let left = objects_left(stage)?;
        ensure(left.is_empty(), || left.clone())
    })?;
    // The CA's keys are kept, so that its certificates are still trusted if it is installed again.
    stage.get(&format!("secret -n {SYSTEM} auth-daemon-ca"))?;
    pods_talk_plaintext(stage)
}

/// What clusters without Helm apply. Its daemons find no CA by name here, because the cluster has no DNS: pods are
/// enrolled, but have no certificates.
pub(crate) fn rendered_file(stage: &Stage) -> Result<()> {
    let file = chart::rendered_file().display().to_string();
    stage.kubectl(&format!("apply -f {file}"))?;
    stage.rolled_out(SYSTEM, "deployment/auth-ca")?;
    daemons_are_ready(stage)?;
    pods_have_traces(stage, true)?;
    let logs = logs(stage)?;
    // The first object of the file is the namespace. Daemons see that it is being deleted.
    stage.kubectl(&format!("delete -f {file}"))?;
    nodes_have_no_traces(stage, &logs)?;
    let left = stage.kubectl(&format!(
        "get {CLUSTER_WIDE} -l app.kubernetes.io/part-of=auth-daemon -o name"
    ))?;
    ensure(left.is_empty(), || left.clone())?;
    pods_talk_plaintext(stage)
}
