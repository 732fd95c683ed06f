//! The daemon of the server's node is not ready for a while, as a real API server reports it.

use mesh_tests::{
    Daemon, DaemonOptions, Kubernetes, Mesh, Nginx, TIMEOUT, eventually, eventually_ok,
};
use serde_json::{Value, json};

use crate::common::by_uid::publish;
use crate::common::lifecycle_pair::{MARKER, pair};

const SYSTEM: &str = "auth-system";
const DAEMON: &str = "/api/v1/namespaces/auth-system/pods/daemon-b";

/// Says that the daemon of node b is ready, or not. It does not exist: node b speaks plaintext alone.
fn say_ready(api: &Kubernetes, is_ready: bool) {
    let ready = if is_ready { "True" } else { "False" };
    let status = json!({"status": {"conditions": [{"type": "Ready", "status": ready}]}});
    api.merge(&format!("{DAEMON}/status"), &status).unwrap();
}

fn ask(mesh: &Mesh) -> Result<String, String> {
    let url = format!("http://{}/", mesh.pod("web").at(8080));
    let curl = ["-sS", "-m", "10", "--noproxy", "*", &url];
    let finished = mesh.pod("client").run("curl", curl).unwrap();
    match finished.code() {
        Some(0) => Ok(finished.stdout),
        _ => Err(finished.stderr),
    }
}

/// Waits until a request is refused because node b had a daemon before.
fn wait_for_refusal(mesh: &Mesh, daemon: &Daemon) -> Value {
    let start = daemon.log_position();
    eventually(TIMEOUT, "the refusal", || {
        assert_ne!(ask(mesh).as_deref(), Ok(MARKER), "answered in plaintext");
        let mut lines = daemon.access_log_after(start).into_iter();
        lines.find(|line| {
            line["reason"]
                .as_str()
                .unwrap()
                .contains("there was one before")
        })
    })
    .unwrap()
}

#[test]
fn a_flap_of_the_servers_daemon_is_no_reason_for_plaintext() {
    if let Some(why) = Kubernetes::missing() {
        println!("SKIPPED a_flap_of_the_servers_daemon_is_no_reason_for_plaintext: {why}");
        return;
    }
    let mesh = pair();
    let _nginx = Nginx::start(&mesh.pod("web"), 8080, MARKER).unwrap();
    let api = mesh.start_api_server().unwrap();
    api.namespace(SYSTEM).unwrap();
    for (namespace, account) in [
        ("default", "client"),
        ("default", "web"),
        (SYSTEM, "auth-daemon"),
    ] {
        api.service_account(namespace, account).unwrap();
    }
    let _processes = ["client", "web"].map(|pod| publish(&api, &mesh.pod(pod)));
    api.pod(SYSTEM, "daemon-b", "auth-daemon", "b", "172.31.0.12")
        .unwrap();
    say_ready(&api, false);
    let labels = json!({"metadata": {"labels": {"app.kubernetes.io/name": "auth-daemon"}}});
    api.merge(DAEMON, &labels).unwrap();
    let options = DaemonOptions::default()
        .permissive()
        .setting("discovery", json!({"kubernetes": {}}))
        .environment("KUBECONFIG", &api.kubeconfig().display().to_string())
        .environment("POD_NAMESPACE", SYSTEM);
    let node = mesh.node("a");
    let start = || {
        let daemon = node.start_daemon_with(options.clone()).unwrap();
        daemon.wait_enrolled(&["default/client"]).unwrap();
        daemon
    };
    let a = start();
    // The manifest names the netns, too, which counts for nothing here.
    a.wait_for_log("the warning", TIMEOUT, |line| {
        let message = line["message"].as_str().unwrap_or_default();
        message.starts_with("annotation auth-daemon.io/netns ignored")
            && line["pod"] == "default/client"
    })
    .unwrap();
    // It never had one.
    assert_eq!(ask(&mesh).as_deref(), Ok(MARKER));
    let line = a
        .wait_for_access("the connection", TIMEOUT, |line| line["result"] == "ok")
        .unwrap();
    assert_eq!(line["path"], "plaintext", "{line}");

    say_ready(&api, true);
    eventually(TIMEOUT, "the tunnel to be tried", || ask(&mesh).err()).unwrap();
    let capture = mesh.wire().capture().unwrap();
    say_ready(&api, false);
    let line = wait_for_refusal(&mesh, &a);
    let reason = line["reason"].as_str().unwrap();
    assert!(
        reason.contains("no daemon is ready on its node b")
            && reason.contains("auth-daemon.io/tunnel: disabled"),
        "{line}"
    );
    a.kill().unwrap();
    let a = start();
    wait_for_refusal(&mesh, &a);
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));

    // Until an administrator says so.
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "b", "annotations": {"auth-daemon.io/tunnel": "disabled"}},
    });
    api.create("/api/v1/nodes", &node).unwrap();
    let answer = eventually_ok(TIMEOUT, "plaintext", || {
        ask(&mesh).map_err(anyhow::Error::msg)
    });
    assert_eq!(answer.unwrap(), MARKER);
}
