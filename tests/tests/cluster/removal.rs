//! The step that deletes everything.

use mesh_tests::{Context, Process, Result, eventually_ok};
use serde_json::Value;

use crate::stage::{APPS, NODES, PATIENCE, SYSTEM, Stage, ensure, name, overlay};
use crate::traces::attached_to_node;
use crate::traffic::{MARKER, who};

/// What the daemon creates in a pod's network namespace: a description, a command that shows it, and a sign of it.
const IN_PODS: [(&str, &str, &str); 3] = [
    ("a rule", "ip rule", "0x6d544c53"),
    ("a route", "ip route show table 15006", "local"),
    ("a sysctl", "cat /proc/sys/net/ipv4/tcp_fwmark_accept", "1"),
];

pub(crate) fn nothing_is_left(stage: &Stage) -> Result<()> {
    let pods = [
        stage.get(&format!("pod -n {APPS} client-1"))?,
        stage.get(&format!("pod -n {APPS} client-2"))?,
        stage.pod(APPS, "app=web-2")?,
    ];
    let found = |pod: &Value, command: &str, sign: &str| -> Result<bool> {
        Ok(stage.in_netns(pod, command)?.contains(sign))
    };
    for pod in &pods {
        for (what, command, sign) in IN_PODS {
            ensure(found(pod, command, sign)?, || {
                format!("{what} is missing in {} before the removal", name(pod))
            })?;
        }
    }

    // Logs disappear with their pods, so read them until then.
    let logs = NODES
        .into_iter()
        .map(|node| {
            let daemon = stage.daemon_on(node)?;
            let command = ["logs", "-n", SYSTEM, "--follow", "--tail=0", name(&daemon)];
            stage.cluster.start_kubectl(command)
        })
        .collect::<Result<Vec<Process>>>()?;
    stage.kubectl(&format!("delete -k {} --wait=false", overlay()))?;
    for (node, log) in NODES.into_iter().zip(&logs) {
        let node = stage.cluster.node(node);
        eventually_ok(PATIENCE, "a node without the daemon's traces", || {
            let pins = node.run(
                "find",
                ["/sys/fs/bpf", "-mindepth", "1", "-name", "auth-daemon*"],
            )?;
            let pins = pins.ok()?.stdout;
            ensure(pins.is_empty(), || pins.clone())?;
            let attached = attached_to_node(node.node());
            ensure(attached.values().all(|count| *count == 0), || {
                format!("{attached:?}")
            })
        })
        .with_context(|| log.stdout())?;
    }
    stage.kubectl(&format!(
        "wait --for=delete namespace/{SYSTEM} --timeout={}s",
        PATIENCE.as_secs()
    ))?;
    for pod in &pods {
        for (what, command, sign) in IN_PODS {
            ensure(!found(pod, command, sign)?, || {
                format!("{what} is left in {}", name(pod))
            })?;
        }
    }

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
