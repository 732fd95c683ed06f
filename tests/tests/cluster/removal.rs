//! What is left when all of it is deleted: nothing.

use mesh_tests::{Result, eventually_ok};
use serde_json::Value;

use crate::stage::{APPS, NODES, PATIENCE, Stage, ensure, name, overlay};
use crate::traces::attached_to_node;
use crate::traffic::{MARKER, who};

/// What the daemon makes in a pod's network namespace.
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
                format!("{what} is not in {} in the first place", name(pod))
            })?;
        }
    }

    stage.kubectl(&format!("delete -k {}", overlay()))?;
    for node in NODES {
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
        })?;
    }
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
        "they do not talk plainly".to_owned()
    })
}
