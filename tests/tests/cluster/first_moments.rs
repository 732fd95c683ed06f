//! The step about a pod that starts while its node has no daemon.

use mesh_tests::{Cluster, Result, eventually_ok, slowdown};
use serde_json::json;

use crate::stage::{APPS, DAEMON, PATIENCE, SYSTEM, Stage, account, address, ensure};
use crate::traffic::{MARKER, PORT, server_pod, who};

/// The pod is closed to all but its node, and reaches nothing in the mesh. Once there is a daemon, it is reached through
/// tunnels, and only through them.
pub(crate) fn pod_without_a_daemon_is_closed(stage: &Stage) -> Result<()> {
    if !Cluster::pods_are_in_cgroup2() {
        println!(
            "SKIPPED pod_without_a_daemon_is_closed: this machine's kubelets use cgroup version 1, where nothing closes \
             a new pod"
        );
        return Ok(());
    }
    let daemons_on_node2 = |os: &str| {
        // Daemons only run on nodes with this label.
        stage.kubectl(&format!(
            "label node node2 kubernetes.io/os={os} --overwrite"
        ))
    };
    daemons_on_node2("none")?;
    eventually_ok(PATIENCE, "the end of the daemon", || {
        let pods = stage.kubectl(&format!(
            "get pods -n {SYSTEM} -l {DAEMON} --field-selector spec.nodeName=node2 -o name"
        ))?;
        ensure(pods.is_empty(), || pods.clone())
    })?;

    let mut spec = server_pod("early", None);
    // Bypasses the scheduler, which would make the pod wait for a daemon.
    spec["nodeName"] = json!("node2");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "early", "namespace": APPS, "labels": {"app": "early"}}, "spec": spec,
    });
    stage.apply(&[account("early"), pod])?;
    // By the kubelet's probes.
    stage.becomes("pod/early", "Ready")?;
    let early = address(&stage.get(&format!("pod -n {APPS} early"))?).to_owned();
    let url = format!("http://{early}:{PORT}/cgi-bin/who");

    let capture = stage.cluster.wire().capture()?;
    let outside = stage.cluster.mesh().outside();
    let node1 = stage.cluster.node("node1").node().place();
    // Longer than the time until the second SYN.
    let seconds = (3 * slowdown()).to_string();
    for caller in [outside, node1] {
        let curl = caller.run("curl", ["-sS", "--max-time", &seconds, &url])?;
        // 28: no answer until then. A refusal would be the daemon's.
        ensure(curl.status.code() == Some(28), || {
            format!(
                "{}: {:?} {}{}",
                caller.name(),
                curl.status,
                curl.stdout,
                curl.stderr
            )
        })?;
    }
    let from_mesh = stage.curl("client-1", &url);
    ensure(from_mesh.is_err(), || format!("client-1: {from_mesh:?}"))?;
    let to_mesh = stage.curl("early", &who(stage, "web-1")?);
    ensure(to_mesh.is_err(), || format!("to the mesh: {to_mesh:?}"))?;

    daemons_on_node2("linux")?;
    eventually_ok(PATIENCE, "an answer", || {
        let answer = stage.curl("client-1", &url)?;
        ensure(answer.contains(MARKER), || answer.clone())
    })?;
    let answer = stage.curl("early", &who(stage, "web-1")?)?;
    ensure(answer.contains(&early), || answer.clone())?;
    let plain = outside.run("curl", ["-sS", "--max-time", &seconds, &url])?;
    ensure(!plain.status.success(), || plain.stdout.clone())?;
    ensure(!capture.stop()?.contains(MARKER.as_bytes()), || {
        "plaintext on the wire".to_owned()
    })?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} pod/early serviceaccount/early --now --wait=false"
        ))
        .map(drop)
}
