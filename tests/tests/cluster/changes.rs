//! Labels on running pods, and mistakes.

use mesh_tests::{AUTH_DAEMON_IMAGE, Result, eventually_ok};
use serde_json::json;

use crate::stage::{APPS, PATIENCE, SYSTEM, Stage, address, ensure, idle_pod, name};
use crate::traffic::{MARKER, PORT, who};

/// Whether a request of `client-1` to `web-2` is readable between the nodes; an error where it is not answered.
fn talks_plainly(stage: &Stage) -> Result<bool> {
    let url = who(stage, "web-2")?;
    let capture = stage.cluster.wire().capture()?;
    stage.curl("client-1", &url)?;
    Ok(capture.stop()?.contains(MARKER.as_bytes()))
}

pub(crate) fn a_label_takes_out_and_in(stage: &Stage) -> Result<()> {
    let label = |what: &str, value: &str| {
        stage.kubectl(&format!(
            "label {what} auth-daemon.io/mesh{value} --overwrite"
        ))
    };
    let encrypted = || {
        eventually_ok(PATIENCE, "the mesh", || {
            ensure(!talks_plainly(stage)?, || "still in the clear".to_owned())
        })
    };
    encrypted()?;
    // One pod leaves: it still reaches the world, but not a pod of the mesh.
    let pod = format!("-n {APPS} pod client-1");
    label(&pod, "=disabled")?;
    let web = address(&stage.pod(APPS, "app=web-2")?).to_owned();
    let url = format!("http://{web}:{PORT}/cgi-bin/who");
    eventually_ok(PATIENCE, "a refusal", || {
        ensure(stage.curl("client-1", &url).is_err(), || {
            "still answered".to_owned()
        })
    })?;
    label(&pod, "-")?;
    encrypted()?;
    // All pods of the namespace leave: they talk plainly.
    let namespace = format!("namespace {APPS}");
    label(&namespace, "=disabled")?;
    eventually_ok(PATIENCE, "plain talk", || {
        ensure(talks_plainly(stage)?, || "still encrypted".to_owned())
    })?;
    label(&namespace, "-")?;
    encrypted()
}

/// A daemon's pod as deploy/ has it, but for what was taken out, beside the daemon that serves the node.
pub(crate) fn what_a_daemon_lacks_is_named(stage: &Stage) -> Result<()> {
    let daemons = stage.get(&format!("daemonset -n {SYSTEM} auth-daemon"))?;
    let mut spec = daemons["spec"]["template"]["spec"].clone();
    spec["hostPID"] = json!(false);
    spec["restartPolicy"] = json!("Never");
    spec["nodeSelector"] = json!({"kubernetes.io/hostname": "node1"});
    let capabilities = &mut spec["containers"][0]["securityContext"]["capabilities"];
    capabilities["add"] = json!(["BPF", "NET_BIND_SERVICE", "SYS_PTRACE"]);
    let lacking = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "lacking", "namespace": SYSTEM}, "spec": spec,
    });
    stage.apply(&[lacking])?;
    eventually_ok(
        PATIENCE,
        "the end of a daemon that could serve no pod",
        || {
            let pod = stage.get(&format!("pod -n {SYSTEM} lacking"))?;
            ensure(pod["status"]["phase"] == "Failed", || {
                format!("{}: {}", name(&pod), pod["status"])
            })
        },
    )?;
    let said = stage.kubectl(&format!("logs -n {SYSTEM} lacking"))?;
    for expected in ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "hostPID: true"] {
        ensure(said.contains(expected), || {
            format!("{expected:?} is not in: {said}")
        })?;
    }
    ensure(!said.contains("CAP_SYS_PTRACE"), || said.clone())?;
    stage
        .kubectl(&format!(
            "delete -n {SYSTEM} pod/lacking --now --wait=false"
        ))
        .map(drop)
}

pub(crate) fn mistakes_are_named(stage: &Stage) -> Result<()> {
    let mut odd = idle_pod("odd", "node1", "client");
    odd["metadata"]["labels"]["auth-daemon.io/mesh"] = json!("perhaps");
    let config = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "mistaken", "namespace": APPS},
        "data": {"config.yaml": "mode: STRICTISH\ndiscovery: {kubernetes: {}}\nca: {}\n"},
    });
    let mistaken = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "mistaken", "namespace": APPS},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{
                "name": "daemon", "image": AUTH_DAEMON_IMAGE, "imagePullPolicy": "Never",
                "args": ["run", "--config", "/etc/auth-daemon/config.yaml"],
                "env": [{"name": "POD_NAMESPACE", "value": APPS}],
                "volumeMounts": [{"name": "config", "mountPath": "/etc/auth-daemon"}],
            }],
            "volumes": [{"name": "config", "configMap": {"name": "mistaken"}}],
        },
    });
    stage.apply(&[odd, config, mistaken])?;
    eventually_ok(PATIENCE, "a line about the label", || {
        let log = stage.daemon_log("node1")?;
        let named = log.lines().any(|line| {
            ["Pod shop/odd", "auth-daemon.io/mesh", "perhaps"]
                .iter()
                .all(|word| line.contains(word))
        });
        ensure(named, || log.clone())
    })?;
    eventually_ok(
        PATIENCE,
        "the end of a daemon with a wrong configuration",
        || {
            let pod = stage.get(&format!("pod -n {APPS} mistaken"))?;
            ensure(pod["status"]["phase"] == "Failed", || {
                format!("{}: {}", name(&pod), pod["status"])
            })
        },
    )?;
    let said = stage.kubectl(&format!("logs -n {APPS} mistaken"))?;
    for expected in [
        "/etc/auth-daemon/config.yaml",
        "mode: \"STRICTISH\"",
        "ca: ",
    ] {
        ensure(said.contains(expected), || {
            format!("{expected:?} is not in: {said}")
        })?;
    }
    stage
        .kubectl(&format!(
            "delete -n {APPS} pod/odd pod/mistaken configmap/mistaken --now --wait=false"
        ))
        .map(drop)
}
