//! Steps about labels on running pods, and about configuration errors.

use mesh_tests::{AUTH_DAEMON_IMAGE, Result, chart, eventually_ok};
use serde_json::json;

use crate::stage::{APPS, PATIENCE, SYSTEM, Stage, address, ensure, idle_pod, name};
use crate::traffic::{MARKER, PORT, logged, who};

/// Whether a request of `client-1` to `web-2` is readable between the nodes. Fails if there is no answer.
fn is_plaintext(stage: &Stage) -> Result<bool> {
    let url = who(stage, "web-2")?;
    let capture = stage.cluster.wire().capture()?;
    stage.curl("client-1", &url)?;
    Ok(capture.stop()?.contains(MARKER.as_bytes()))
}

pub(crate) fn label_changes_membership(stage: &Stage) -> Result<()> {
    let label = |what: &str, value: &str| {
        stage.kubectl(&format!(
            "label {what} auth-daemon.io/mesh{value} --overwrite"
        ))
    };
    let encrypted = || {
        eventually_ok(PATIENCE, "the mesh", || {
            ensure(!is_plaintext(stage)?, || "still plaintext".to_owned())
        })
    };
    encrypted()?;
    // A pod outside the mesh does not reach a pod of the mesh in STRICT mode.
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
    // Two pods outside the mesh communicate in plaintext.
    let namespace = format!("namespace {APPS}");
    label(&namespace, "=disabled")?;
    eventually_ok(PATIENCE, "plaintext", || {
        ensure(is_plaintext(stage)?, || "still encrypted".to_owned())
    })?;
    label(&namespace, "-")?;
    encrypted()
}

/// Starts a daemon's pod as in the chart, without some of its rights, next to the daemon that serves the node.
pub(crate) fn daemon_reports_what_it_lacks(stage: &Stage) -> Result<()> {
    let daemons = stage.get(&format!("daemonset -n {SYSTEM} auth-daemon"))?;
    let mut spec = daemons["spec"]["template"]["spec"].clone();
    spec["hostPID"] = json!(false);
    spec["restartPolicy"] = json!("Never");
    spec["nodeSelector"] = json!({"kubernetes.io/hostname": "node1"});
    let capabilities = &mut spec["containers"][0]["securityContext"]["capabilities"];
    capabilities["add"] = json!(["NET_BIND_SERVICE", "SYS_NICE", "SYS_PTRACE"]);
    let lacking = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "lacking", "namespace": SYSTEM}, "spec": spec,
    });
    stage.apply(&[lacking])?;
    eventually_ok(PATIENCE, "the exit of a daemon that cannot serve", || {
        let pod = stage.get(&format!("pod -n {SYSTEM} lacking"))?;
        ensure(pod["status"]["phase"] == "Failed", || {
            format!("{}: {}", name(&pod), pod["status"])
        })
    })?;
    let stdout = stage.kubectl(&format!("logs -n {SYSTEM} lacking"))?;
    for expected in ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "hostPID: true"] {
        ensure(stdout.contains(expected), || {
            format!("{expected:?} is not in: {stdout}")
        })?;
    }
    ensure(!stdout.contains("CAP_SYS_PTRACE"), || stdout.clone())?;
    stage
        .kubectl(&format!(
            "delete -n {SYSTEM} pod/lacking --now --wait=false"
        ))
        .map(drop)
}

/// The CRDs of policies appear, then a policy that denies, which is deleted again.
pub(crate) fn policies_take_effect(stage: &Stage) -> Result<()> {
    let crds = chart::folder().join("crds");
    stage.kubectl(&format!("apply -f {}", crds.display()))?;
    let deny = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody", "namespace": APPS},
        "spec": {"selector": {"matchLabels": {"app": "web-2"}}},
    });
    // The API server serves a new kind a moment after it has its definition.
    eventually_ok(PATIENCE, "the new kind", || {
        stage.apply(std::slice::from_ref(&deny))
    })?;
    let url = who(stage, "web-2")?;
    // Again until there is a line: a request that was open when the policy came into force was reset, and not refused.
    eventually_ok(PATIENCE, "a refusal", || {
        ensure(stage.curl("client-1", &url).is_err(), || {
            "still answered".to_owned()
        })?;
        logged(stage, "node2", |line| {
            let reason = line["reason"].as_str().unwrap_or_default();
            line["result"] == "refused" && reason.contains("AuthorizationPolicy shop/nobody")
        })
    })?;
    ensure(stage.curl("client-1", &url).is_err(), || {
        "answered again".to_owned()
    })?;
    stage.kubectl(&format!("delete authorizationpolicy -n {APPS} nobody"))?;
    eventually_ok(PATIENCE, "an answer", || stage.curl("client-1", &url)).map(drop)
}

pub(crate) fn mistakes_are_reported(stage: &Stage) -> Result<()> {
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
        "the exit of a daemon with a wrong configuration",
        || {
            let pod = stage.get(&format!("pod -n {APPS} mistaken"))?;
            ensure(pod["status"]["phase"] == "Failed", || {
                format!("{}: {}", name(&pod), pod["status"])
            })
        },
    )?;
    let stdout = stage.kubectl(&format!("logs -n {APPS} mistaken"))?;
    for expected in [
        "/etc/auth-daemon/config.yaml",
        "mode: \"STRICTISH\"",
        "ca: ",
    ] {
        ensure(stdout.contains(expected), || {
            format!("{expected:?} is not in: {stdout}")
        })?;
    }
    stage
        .kubectl(&format!(
            "delete -n {APPS} pod/odd pod/mistaken configmap/mistaken --now --wait=false"
        ))
        .map(drop)
}
