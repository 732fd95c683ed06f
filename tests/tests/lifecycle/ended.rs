//! Pods that have finished, or whose objects are gone, while their processes run.

use mesh_tests::{Daemon, Mesh, Pod, PodSpec, TIMEOUT, eventually, eventually_ok};
use serde_json::Value;

use crate::common::by_uid;
use crate::common::lifecycle_pair::{
    MARKER, assert_reset, becomes_reachable, call, daemons, echoes, pair, pod_status, ways,
};
use crate::common::lifecycle_traces::wait_attached_to_netns;

const WEB: &str = "default/web";

/// Sets the phase of a pod's object, as the kubelet does when it evicts the pod or the node shuts down.
fn set_phase(mesh: &Mesh, pod: &str, phase: &str) {
    let change = |pod: &mut Value| pod["status"]["phase"] = phase.into();
    mesh.manifests()
        .edit("Pod", "default", pod, change)
        .unwrap();
}

/// Waits until the status says that the pod is served only because of its processes, and why.
fn wait_ended(daemon: &Daemon, why: &str) {
    eventually_ok(TIMEOUT, "the reason in the status", || {
        let status = pod_status(daemon, WEB);
        let reason = status.as_ref().and_then(|status| status.reason.clone());
        let reason = reason.unwrap_or_default();
        anyhow::ensure!(
            reason.contains(why) && reason.contains("processes run in its netns"),
            "{status:?}"
        );
        Ok(())
    })
    .unwrap();
    let is_why = |line: &Value| line["message"].as_str().unwrap_or_default().contains(why);
    let line = daemon
        .wait_for_log("why it stays", TIMEOUT, is_why)
        .unwrap();
    assert_eq!(line["pod"], WEB, "{line}");
}

fn wait_released(daemon: &Daemon, pod: &Pod) {
    eventually(TIMEOUT, "the pod's release", || {
        pod_status(daemon, WEB).is_none().then_some(())
    })
    .unwrap();
    wait_attached_to_netns(pod, 0);
    assert_eq!(daemon.status().unwrap().kernel.pods, 0);
}

fn assert_no_errors(daemon: &Daemon) {
    let errors: Vec<_> = daemon
        .logs()
        .into_iter()
        .filter(|line| line["level"] == "ERROR")
        .collect();
    assert!(errors.is_empty(), "{errors:?}");
}

/// Nobody outside the mesh reaches the pod.
fn assert_closed(mesh: &Mesh, web: &Pod) {
    for to in [web.at(8080), web.at6(8080)] {
        let answer = call(mesh.outside(), to);
        assert!(
            ["ECONNRESET", "ECONNREFUSED"].contains(&answer["errno"].as_str().unwrap_or_default()),
            "{answer}"
        );
    }
}

#[test]
fn a_finished_pod_is_served_while_its_processes_run() {
    for phase in ["Failed", "Succeeded"] {
        let mesh = pair();
        let (client, web) = (mesh.pod("client"), mesh.pod("web"));
        let echo = web
            .app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap();
        let (a, b) = daemons(&mesh);
        let mut chat = client
            .app(&format!("chat --to {} --interval 10", web.at(8080)))
            .unwrap();
        chat.event("round", TIMEOUT).unwrap();
        set_phase(&mesh, "web", phase);
        wait_ended(&b, "has finished");

        let capture = mesh.wire().capture().unwrap();
        let [v4, v6, services @ ..] = ways(&web);
        for to in [v4, v6] {
            echoes(&client, to);
        }
        for service in services {
            eventually_ok(TIMEOUT, "the service to have no endpoint", || {
                let answer = call(&client, service);
                anyhow::ensure!(answer["event"] == "failed", "{answer}");
                Ok(())
            })
            .unwrap();
        }
        assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
        assert_closed(&mesh, &web);
        chat.event("round", TIMEOUT).unwrap();

        drop((chat, echo));
        wait_released(&b, &web);
        assert_no_errors(&b);
        // It has no process, which is what a finished pod is expected to have.
        b.kill().unwrap();
        let b = mesh.node("b").start_daemon().unwrap();
        assert_eq!(b.status().unwrap().pods.len(), 0);
        assert_no_errors(&b);
        assert_no_errors(&a);
    }
}

#[test]
fn a_pod_whose_manifest_is_removed_is_served_while_its_processes_run() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    let mut chat = client
        .app(&format!("chat --to {} --interval 10", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    mesh.manifests().remove("Pod", "default", "web").unwrap();
    wait_ended(&b, "object is gone");
    let capture = mesh.wire().capture().unwrap();
    eventually_ok(TIMEOUT, "the client's node to know that it is gone", || {
        let answer = call(&client, web.at(8080));
        anyhow::ensure!(answer["event"] == "failed", "{answer}");
        Ok(())
    })
    .unwrap();
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
    assert_closed(&mesh, &web);
    chat.event("round", TIMEOUT).unwrap();
    // The object comes back: nothing has happened.
    mesh.manifests().apply(&web.manifest()).unwrap();
    eventually(TIMEOUT, "the pod to be an ordinary one", || {
        let status = pod_status(&b, WEB)?;
        (status.enrolled && status.reason.unwrap_or_default().is_empty()).then_some(())
    })
    .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    becomes_reachable(&client, web.at(8080));
    mesh.manifests().remove("Pod", "default", "web").unwrap();
    wait_ended(&b, "object is gone");
    drop((chat, echo));
    wait_released(&b, &web);
    assert_no_errors(&b);
}

#[test]
fn a_pod_found_by_its_uid_is_served_until_its_last_process_ends() {
    let mesh = by_uid::pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let pauses = [by_uid::pause(&client), by_uid::pause(&web)];
    let echo = web
        .container("c1")
        .unwrap()
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = by_uid::daemons(&mesh);
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&[WEB]).unwrap();
    set_phase(&mesh, "web", "Failed");
    wait_ended(&b, "has finished");
    echoes(&client.container("c1").unwrap(), web.at(8080));
    assert_closed(&mesh, &web);

    // The next daemon finds it by its processes.
    b.kill().unwrap();
    let b = mesh.node("b").start_daemon().unwrap();
    wait_ended(&b, "has finished");
    echoes(&client.container("c1").unwrap(), web.at(8080));
    assert_closed(&mesh, &web);

    // Garbage collection, or a forced deletion.
    mesh.manifests().remove("Pod", "default", "web").unwrap();
    wait_ended(&b, "object is gone");
    let [_client, of_web] = pauses;
    drop(of_web);
    assert_closed(&mesh, &web);
    drop(echo);
    wait_released(&b, &web);
    assert_no_errors(&b);
}

#[test]
fn the_next_daemon_refuses_a_netns_that_no_object_names_until_its_processes_end() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let other = client
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let permissive = mesh_tests::DaemonOptions::default().permissive();
    let start = |node: &str| {
        let options = permissive.clone();
        mesh.node(node).start_daemon_with(options).unwrap()
    };
    let (_a, b) = (start("a"), start("b"));
    echoes(mesh.outside(), web.at(8080));
    b.kill().unwrap();
    mesh.manifests().remove("Pod", "default", "web").unwrap();
    let b = start("b");
    let reason = eventually(TIMEOUT, "the netns in the status", || {
        let status = pod_status(&b, "unknown")?;
        status
            .reason
            .filter(|reason| reason.contains("1 processes run"))
    })
    .unwrap();
    assert!(reason.contains("no object names it: refused"), "{reason}");
    // Although the mode is PERMISSIVE: the pod's policies are not known without its object.
    assert_closed(&mesh, &web);
    let denied = call(&web, client.at(8080));
    assert_eq!(
        (&denied["stage"], &denied["errno"]),
        (&"connect".into(), &"EPERM".into()),
        "{denied}"
    );
    assert!(other.events_of("accepted").is_empty());

    // Its object says that it is not in the mesh: released at once.
    let mut manifest = web.manifest();
    manifest["metadata"]["labels"]["auth-daemon.io/mesh"] = "disabled".into();
    mesh.manifests().apply(&manifest).unwrap();
    eventually(TIMEOUT, "the release", || {
        (b.status().ok()?.kernel.pods == 0).then_some(())
    })
    .unwrap();
    wait_attached_to_netns(&web, 0);
    echoes(mesh.outside(), web.at(8080));

    mesh.manifests().apply(&web.manifest()).unwrap();
    b.wait_enrolled(&[WEB]).unwrap();
    b.kill().unwrap();
    mesh.manifests().remove("Pod", "default", "web").unwrap();
    let b = start("b");
    eventually(TIMEOUT, "the netns in the status", || {
        pod_status(&b, "unknown")
    })
    .unwrap();
    drop(echo);
    eventually(TIMEOUT, "the release", || {
        let status = b.status().ok()?;
        (status.kernel.pods == 0 && status.pods.is_empty()).then_some(())
    })
    .unwrap();
    wait_attached_to_netns(&web, 0);
}

#[test]
fn a_finished_pods_address_is_the_new_pods() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    echoes(&client, web.at(8080));
    set_phase(&mesh, "web", "Failed");
    wait_ended(&b, "has finished");
    // The network is gone and the processes are not.
    web.run("ip", ["link", "set", "eth0", "down"]).unwrap();
    let spec = PodSpec::new("new")
        .on("b")
        .service_account("new")
        .address(web.ipv4().into())
        .ipv4_only();
    let new = mesh.add_pod(spec).unwrap();
    assert_eq!(new.ipv4(), web.ipv4());
    let _other = new
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    b.wait_enrolled(&["default/new"]).unwrap();
    eventually_ok(TIMEOUT, "the address to be the new pod's", || {
        let answer = call(&client, new.at(8080));
        anyhow::ensure!(answer["event"] == "finished", "{answer}");
        Ok(())
    })
    .unwrap();
    let identity = "spiffe://cluster.local/ns/default/sa/new";
    b.wait_for_access("the new pod's identity", TIMEOUT, |line| {
        line["server_identity"] == identity
    })
    .unwrap();
    assert_reset(&call(mesh.outside(), new.at(8080)));
    assert_no_errors(&b);
}
