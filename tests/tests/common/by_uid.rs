//! Pods that the daemon finds by their UID.

use std::fs;

use mesh_tests::{Daemon, Kubernetes, Mesh, Place, Pod, PodSpec, Process, ServiceSpec};
use serde_json::{Value, json};

/// A mesh with `client` on node a and `web` on node b, each with its own service account and without a process, and a
/// service in front of `web`.
pub(crate) fn pair() -> Mesh {
    let pod = |name: &str| PodSpec::new(name).service_account(name).by_uid();
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(pod("client").on("a"))
        .pod(pod("web").on("b").label("app", "web"))
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .address("fd96::7")
                .port(80, 8080),
        )
        .start()
        .unwrap()
}

/// Starts daemons on both nodes, which enrol no pod yet.
pub(crate) fn daemons(mesh: &Mesh) -> (Daemon, Daemon) {
    let start = |node| mesh.node(node).start_daemon().unwrap();
    (start("a"), start("b"))
}

/// Starts the first process of a pod, in a container of its own.
pub(crate) fn pause(pod: &Pod) -> Process {
    sleep(&pod.container("pause").unwrap())
}

/// Starts a process that does nothing and creates no socket.
pub(crate) fn sleep(place: &Place) -> Process {
    place.spawn("sleep", ["1000"]).unwrap()
}

/// Creates the object of a pod, and a process by which it is found.
pub(crate) fn publish(api: &Kubernetes, pod: &Pod) -> Process {
    let pods = format!("/api/v1/namespaces/{}/pods", pod.namespace());
    let mut manifest = pod.manifest();
    let status = json!({"status": manifest["status"].take()});
    for container in manifest["spec"]["containers"].as_array_mut().unwrap() {
        container["image"] = "app".into();
    }
    let created = api.create(&pods, &manifest).unwrap();
    let uid = created["metadata"]["uid"].as_str().unwrap();
    let process = sleep(&pod.container_of(uid).unwrap());
    let path = format!("{pods}/{}/status", pod.name());
    api.merge(&path, &status).unwrap();
    process
}

/// The network namespace of a place, as the daemon's status shows an unnamed namespace.
pub(crate) fn netns(place: &Place) -> String {
    let read = || fs::read_link("/proc/thread-self/ns/net");
    let link = place.enter(read).unwrap().unwrap();
    link.to_str().unwrap().to_owned()
}

/// The log lines of a daemon about a pod's enrolment.
pub(crate) fn enrolments(daemon: &Daemon, pod: &str) -> Vec<Value> {
    let lines = daemon.logs().into_iter();
    lines
        .filter(|line| line["message"] == "pod enrolled" && line["pod"] == pod)
        .collect()
}
