//! Pods come, go, and change under a running daemon.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::{Daemon, Mesh, Place, PodSpec, TIMEOUT, eventually, eventually_ok, slowdown};
use serde_json::Value;

use crate::common::lifecycle_pair::{
    MARKER, assert_reset, assert_soon, becomes_reachable, call, daemons, echoes, pair, pod_status,
    ways,
};
use crate::common::lifecycle_traces::{Routing, files, wait_attached_to_netns};

#[test]
fn a_label_takes_a_running_pod_out() {
    leaves_the_mesh(|mesh| disable(mesh, "labels"));
}

#[test]
fn an_annotation_takes_a_running_pod_out() {
    leaves_the_mesh(|mesh| disable(mesh, "annotations"));
}

fn disable(mesh: &Mesh, how: &str) {
    let change = |pod: &mut Value| {
        pod["metadata"][how]["auth-daemon.io/mesh"] = "disabled".into();
    };
    mesh.manifests()
        .edit("Pod", "default", "web", change)
        .unwrap();
}

/// `web` leaves by `leave` while connections of both directions stand.
fn leaves_the_mesh(leave: impl Fn(&Mesh)) {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let clean = Routing::of(&web);
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let _other = client
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let mut inbound = client.app(&format!("chat --to {}", web.at(8080))).unwrap();
    let mut outbound = web.app(&format!("chat --to {}", client.at6(8080))).unwrap();
    for chat in [&mut inbound, &mut outbound] {
        chat.event("round", TIMEOUT).unwrap();
    }
    assert!(Routing::of(&web).is_prepared());
    leave(&mesh);

    for chat in [inbound, outbound] {
        assert_reset(&chat.failure(Duration::from_secs(5)).unwrap());
    }
    assert_reset(&echo.event("closed", Duration::from_secs(5)).unwrap());
    released(&b, "default/web");
    assert_eq!(Routing::of(&web), clean);
    wait_attached_to_netns(&web, 0);
    let node = mesh.node("b");
    assert_eq!(files(&node.pins().join("v2/pods")).len(), 0);
    assert_eq!(b.status().unwrap().kernel.pods, 0);
    assert_eq!(
        b.status().unwrap().certificates.len(),
        0,
        "nobody needs its certificate"
    );
    eventually(TIMEOUT, "node a to forget its addresses", || {
        let addresses = |daemon: &Daemon| daemon.status().unwrap().kernel.mesh_addresses;
        // Node b keeps its own, as many as node a has.
        (addresses(&a) == addresses(&b)).then_some(())
    })
    .unwrap();

    let capture = mesh.wire().capture().unwrap();
    echoes(mesh.outside(), web.at(8080));
    for to in [web.at(8080), web.at6(8080)] {
        echoes(&client, to);
    }
    assert!(
        capture.stop().unwrap().contains(MARKER.as_bytes()),
        "it communicates in plaintext"
    );
    // Pods of the mesh are still STRICT: they refuse web, which is no longer in it.
    let refused = call(&web, client.at(8080));
    assert_reset(&refused);
}

#[test]
fn a_recreated_pod_is_enrolled_within_about_a_second() {
    let mesh = pair();
    let (client, old) = (mesh.pod("client"), mesh.pod("web"));
    let _other = client
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let echo = old
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    for to in ways(&old) {
        echoes(&client, to);
    }
    let mut chat = client
        .app(&format!("chat --to {} --interval 10", old.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let namespace = |place: &Place| {
        let read = || fs::read_link("/proc/thread-self/ns/net");
        place.enter(read).unwrap().unwrap()
    };
    let (gone, before) = (namespace(&old), b.status().unwrap());
    let position = b.log_position();

    let web = mesh.recreate_pod("web").unwrap();
    let since = Instant::now();
    drop((echo, old));
    let enrolled = |line: &Value| line["message"] == "pod enrolled";
    b.wait_for_log_after(position, "the enrolment", Duration::from_secs(10), enrolled)
        .unwrap();
    let took = since.elapsed();
    assert!(
        took < Duration::from_millis(2500) * slowdown(),
        "enrolled after {took:?}"
    );
    chat.failure(TIMEOUT).unwrap();
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    for to in ways(&web) {
        echoes(&client, to);
    }
    echoes(&web, client.at(8080));
    echoes(&web, client.at6(8080));

    let node = mesh.node("b");
    eventually(TIMEOUT, "the old pod to be released", || {
        (b.status().ok()?.kernel.pods == before.kernel.pods).then_some(())
    })
    .unwrap();
    assert_eq!(files(&node.pins().join("v2/pods")).len(), 1);
    wait_attached_to_netns(&web, 1);
    eventually_ok(
        Duration::from_secs(10),
        "the old namespace to be released",
        || {
            let held: Vec<_> = fs::read_dir(format!("/proc/{}/fd", b.pid()))?
                .flatten()
                .filter(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == gone))
                .collect();
            let descriptors = held.len();
            anyhow::ensure!(
                descriptors == 0,
                "the daemon still holds {gone:?} {descriptors} times"
            );
            Ok(())
        },
    )
    .unwrap();
}

#[test]
fn a_namespace_that_is_not_there_yet_is_waited_for() {
    let mesh = pair();
    let (_a, b) = daemons(&mesh);
    let path = mesh.node("b").folder().join("late-netns");
    let spec = PodSpec::new("late")
        .on("b")
        .annotation("auth-daemon.io/netns", &path.display().to_string());
    let late = mesh.add_pod_quietly(spec).unwrap();
    let _echo = late
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    mesh.manifests().apply(&late.manifest()).unwrap();
    let status = eventually(TIMEOUT, "the pod in the status", || {
        pod_status(&b, "default/late")
    })
    .unwrap();
    assert!(!status.enrolled);
    let reason = status.reason.unwrap();
    for part in ["default/late", &path.display().to_string(), "No such file"] {
        assert!(reason.contains(part), "{reason}");
    }
    // It is retried each second; it takes some seconds to see that nothing more is logged about it.
    thread::sleep(Duration::from_millis(2500));
    let lines: Vec<_> = b
        .logs()
        .into_iter()
        .filter(|line| line["message"] == reason.as_str())
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0]["level"], "ERROR");

    symlink(late.netns().path(), &path).unwrap();
    b.wait_enrolled(&["default/late"]).unwrap();
    becomes_reachable(&mesh.pod("client"), late.at(8080));
    let count = b
        .logs()
        .into_iter()
        .filter(|line| line["message"] == reason.as_str())
        .count();
    assert_eq!(count, 1);
}

#[test]
fn a_new_pod_takes_part_within_a_second() {
    let mesh = pair();
    let (_a, b) = daemons(&mesh);
    let client = mesh.pod("client");
    let mut took = Vec::new();
    for name in ["new", "newer", "newest"] {
        let new = mesh
            .add_pod_quietly(PodSpec::new(name).on("b").label("app", "web"))
            .unwrap();
        let _echo = new
            .app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap();
        let since = Instant::now();
        mesh.manifests().apply(&new.manifest()).unwrap();
        let enrolled = || pod_status(&b, &new.full_name()).filter(|pod| pod.enrolled);
        eventually(TIMEOUT, "the new pod's enrolment", enrolled).unwrap();
        took.push(since.elapsed());
        becomes_reachable(&client, new.at(8080));
        assert_reset(&call(mesh.outside(), new.at(8080)));
    }
    assert_soon(took, Duration::from_secs(1));
}

fn released(daemon: &Daemon, name: &str) {
    let gone = || pod_status(daemon, name).is_none().then_some(());
    eventually(Duration::from_secs(5), "the pod to leave the status", gone).unwrap();
}
