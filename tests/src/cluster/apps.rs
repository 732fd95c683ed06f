//! Manifests of the apps that run on a cluster: servers and clients of busybox and curl.

use serde_json::{Value, json};

use super::TOOLS;
use super::meshed::APPS;
use crate::kubernetes;

/// A string in every answer, and in nothing else on the wire.
pub const MARKER: &str = "marker-6b1d0c52";
/// The apps' port.
pub const PORT: u16 = 8080;

/// A web server of busybox: `/cgi-bin/who` answers with the caller's address, `/cgi-bin/tick` never ends.
fn server_script() -> String {
    format!(
        r#"mkdir -p /tmp/www/cgi-bin && cd /tmp/www/cgi-bin
cat >who <<'END'
#!/bin/sh
# An IPv4 address is shown as IPv4-mapped, and any address in brackets.
caller=${{REMOTE_ADDR#"["}}; caller=${{caller%"]"}}
printf 'Content-Type: text/plain\r\n\r\n{MARKER} %s asked %s\n' "${{caller#::ffff:}}" "$(hostname)"
END
cat >tick <<'END'
#!/bin/sh
printf 'Content-Type: text/plain\r\n\r\n'
while printf 'tick\n'; do sleep 0.2; done
END
chmod +x who tick
exec httpd -f -p '[::]:{PORT}' -h /tmp/www"#
    )
}

/// The spec of a pod with that server.
pub fn server_pod(account: &str, node: Option<&str>) -> Value {
    let mut server = container(&server_script());
    // The container restarts after 12 seconds of probes that are refused, and after a minute of probes without an answer: a
    // busy machine may give none for some seconds.
    let probe = json!({
        "httpGet": {"path": "/cgi-bin/who", "port": PORT},
        "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 12,
    });
    server["ports"] = json!([{"name": "http", "containerPort": PORT}]);
    server["readinessProbe"] = probe.clone();
    server["livenessProbe"] = probe;
    // Callers must learn of its end before it stops listening, on a busy machine too.
    server["lifecycle"] = json!({"preStop": {"exec": {"command": ["sleep", "8"]}}});
    let mut spec = json!({
        "serviceAccountName": account, "terminationGracePeriodSeconds": 10, "containers": [server],
    });
    if let Some(node) = node {
        spec["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    }
    spec
}

/// A Deployment of that server, its service account, and a service of its name on port 80.
pub fn server(name: &str, node: Option<&str>, replicas: u32) -> [Value; 3] {
    let labels = json!({"app": name});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": APPS},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": server_pod(name, node)},
        },
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": APPS},
        "spec": {
            "selector": labels, "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"port": 80, "targetPort": "http"}],
        },
    });
    [account(name), deployment, service]
}

/// A container that runs a script of the shell, with busybox and curl.
pub fn container(script: &str) -> Value {
    json!({
        "name": "app", "image": TOOLS, "imagePullPolicy": "Never",
        "command": ["sh", "-c", script],
    })
}

/// A service account.
pub fn account(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": APPS},
        // Nothing in the apps talks to the API server.
        "automountServiceAccountToken": false,
    })
}

/// A pod on a node that only waits for `kubectl exec`.
pub fn idle_pod(name: &str, node: &str, account: &str) -> Value {
    pod_running(name, node, account, "while :; do sleep 3600; done")
}

/// A pod on a node that runs a script of the shell.
pub fn pod_running(name: &str, node: &str, account: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": APPS, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "serviceAccountName": account,
            "terminationGracePeriodSeconds": 0,
            "containers": [container(script)],
        },
    })
}

/// A role, and its binding to a service account of the apps, whose name both have: in a namespace, or everywhere.
pub fn role(namespace: Option<&str>, account: &str, rules: &Value) -> [Value; 2] {
    kubernetes::role(namespace, account, (APPS, account), rules)
}
