//! A daemon starts where another was killed: it adopts what is pinned, corrects what has changed since, and serves.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use mesh_tests::{Daemon, DaemonOptions, Nginx, PodSpec, Status, TIMEOUT, eventually};

use crate::common::lifecycle_pair::{MARKER, becomes_reachable, daemons, echoes, pair, ways};
use crate::common::lifecycle_traces::{
    Routing, attached_to_node, files, wait_attached_to_netns, wait_attached_to_node,
};

#[test]
fn it_adopts_the_pins_and_serves_at_once() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (mut a, mut b) = daemons(&mesh);
    echoes(&client, web.at(8080));
    for (node, daemon, pod) in [("a", &mut a, &client), ("b", &mut b, &web)] {
        let node = mesh.node(node);
        let before = with_certificates(daemon);
        let (pins, programs, routing) =
            (files(node.pins()), attached_to_node(node), Routing::of(pod));
        assert!(routing.is_prepared(), "{routing:?}");
        daemon.process().kill().unwrap();
        assert_eq!(files(node.pins()), pins, "the pins outlive the daemon");
        assert_eq!(attached_to_node(node), programs, "so do the programs");

        *daemon = node.start_daemon().unwrap();
        // It is ready, so the first call works, whatever way it takes.
        for to in ways(&web) {
            echoes(&client, to);
        }
        let after = with_certificates(daemon);
        assert_eq!(after.kernel, before.kernel);
        assert_eq!(serials(&after).len(), serials(&before).len());
        assert!(
            serials(&after).is_disjoint(&serials(&before)),
            "{after:?}, before: {before:?}"
        );
        assert_eq!(files(node.pins()), pins);
        // One program a hook, not two.
        wait_attached_to_node(node, &programs);
        wait_attached_to_netns(pod, 1);
        assert_eq!(Routing::of(pod), routing);
    }
}

#[test]
fn nothing_slips_through_in_plaintext_while_daemons_die_and_start() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    let (mut a, mut b) = daemons(&mesh);
    let capture = mesh.wire().capture().unwrap();
    let urls = ways(&web).map(|to| format!("http://{to}/{MARKER}"));
    let calls = format!(
        "while :; do curl -s -o /dev/null -m 5 {}; done",
        urls.join(" ")
    );
    let mut callers: Vec<_> = (0..2)
        .map(|_| client.spawn("sh", ["-c", &calls]).unwrap())
        .collect();
    let more = |since: usize| {
        eventually(TIMEOUT, "more requests to come through", || {
            Some(nginx.requests().len()).filter(|requests| *requests > since + 8)
        })
        .unwrap()
    };
    let mut requests = more(0);
    for _ in 0..3 {
        for (node, daemon) in [("a", &mut a), ("b", &mut b)] {
            daemon.process().kill().unwrap();
            *daemon = mesh.node(node).start_daemon().unwrap();
            requests = more(requests);
        }
    }
    for caller in &mut callers {
        caller.kill().unwrap();
    }
    let recording = capture.stop().unwrap();
    assert!(!recording.contains(MARKER.as_bytes()));
    for stream in recording.streams().iter().filter(|stream| !stream.gap) {
        if let Err(error) = stream.tls_records() {
            panic!("{} to {}: {error}", stream.client, stream.server);
        }
    }
}

#[test]
fn pods_that_left_while_it_was_dead_are_cleaned_up() {
    let mesh = pair();
    let web = mesh.pod("web");
    let deleted = mesh.add_pod(PodSpec::new("deleted").on("b")).unwrap();
    let left = mesh.add_pod(PodSpec::new("left").on("b")).unwrap();
    let disabled = mesh.add_pod(PodSpec::new("disabled").on("b")).unwrap();
    let clean = [Routing::of(&left), Routing::of(&disabled)];
    let echo = |pod: &mesh_tests::Pod| {
        pod.app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap()
    };
    let _echoes = [echo(&web), echo(&disabled)];
    let node = mesh.node("b");
    let (_a, b) = daemons(&mesh);
    let before = b.status().unwrap().kernel;
    assert_eq!(
        (before.pods, files(&node.pins().join("v2/pods")).len()),
        (4, 4)
    );
    b.kill().unwrap();

    mesh.remove_pod("deleted").unwrap();
    mesh.manifests().remove("Pod", "default", "left").unwrap();
    let disable = |pod: &mut serde_json::Value| {
        pod["metadata"]["labels"]["auth-daemon.io/mesh"] = "disabled".into();
    };
    mesh.manifests()
        .edit("Pod", "default", "disabled", disable)
        .unwrap();
    let new = mesh.add_pod(PodSpec::new("new").on("b")).unwrap();
    let _echo = new
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let b = node.start_daemon().unwrap();
    b.wait_enrolled(&["default/web", "default/new"]).unwrap();

    // A netns without an object is released once its processes are counted.
    eventually(TIMEOUT, "the release of the others", || {
        let pods = b.status().ok()?.kernel.pods;
        (pods == 2).then_some(())
    })
    .unwrap();
    let after = b.status().unwrap().kernel;
    assert_eq!(files(&node.pins().join("v2/pods")).len(), 2);
    // Two addresses of each of three pods are gone, and two have come.
    assert_eq!(after.mesh_addresses, before.mesh_addresses - 6 + 2);
    assert_eq!([Routing::of(&left), Routing::of(&disabled)], clean);
    let _echo = echo(&left);
    for pod in [&left, &disabled] {
        wait_attached_to_netns(pod, 0);
        // They are outside the mesh now.
        echoes(mesh.outside(), pod.at(8080));
        echoes(mesh.outside(), pod.at6(8080));
    }
    for pod in [&web, &new] {
        becomes_reachable(&mesh.pod("client"), pod.at(8080));
        echoes(&mesh.pod("client"), pod.at6(8080));
    }
    drop(deleted);
}

#[test]
fn a_pod_recreated_without_a_daemon_is_served_both_ways() {
    let mesh = pair();
    let _echo = mesh
        .pod("client")
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    let before = b.status().unwrap().kernel;
    b.kill().unwrap();
    let web = mesh.recreate_pod("web").unwrap();
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let node = mesh.node("b");
    let b = node.start_daemon().unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    assert_eq!(b.status().unwrap().kernel, before);
    assert_eq!(files(&node.pins().join("v2/pods")).len(), 1);
    let client = mesh.pod("client");
    for (from, to) in [(&web, &client), (&client, &web)] {
        echoes(from, to.at(8080));
        echoes(from, to.at6(8080));
    }
}

#[test]
fn an_address_that_moved_while_it_was_dead_belongs_to_the_new_pod() {
    let mesh = pair();
    let client = mesh.pod("client");
    let (_a, b) = daemons(&mesh);
    let old = mesh.pod("web");
    b.kill().unwrap();
    mesh.remove_pod("web").unwrap();
    let heir = mesh
        .add_pod(
            PodSpec::new("heir")
                .on("b")
                .service_account("heir")
                .address(old.ipv4().into())
                .address(old.ipv6().into()),
        )
        .unwrap();
    let mut echo = heir
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let b = mesh.node("b").start_daemon().unwrap();
    b.wait_enrolled(&["default/heir"]).unwrap();
    becomes_reachable(&client, heir.at(8080));
    echoes(&client, heir.at6(8080));
    echo.event("accepted", TIMEOUT).unwrap();
    let line = b
        .wait_for_access("the call", TIMEOUT, |line| line["result"] == "ok")
        .unwrap();
    assert_eq!(
        line["server_identity"],
        "spiffe://cluster.local/ns/default/sa/heir"
    );
}

#[test]
fn rounds_of_death_and_start_leave_nothing() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let clean = Routing::of(&client);
    let node = mesh.node("a");
    let start = Instant::now();
    let (mut a, _b) = daemons(&mesh);
    let startup = start.elapsed();
    let (pins, programs, kernel) = (
        files(node.pins()),
        attached_to_node(node),
        a.status().unwrap().kernel,
    );
    for round in 0..8 {
        a.process().kill().unwrap();
        // Another dies at some moment of its start, when some things are done and others not.
        let mut early = node.spawn_daemon(DaemonOptions::default()).unwrap();
        thread::sleep(startup * round / 8);
        early.process().kill().unwrap();
        a = node.start_daemon().unwrap();
        a.wait_enrolled(&["default/client"]).unwrap();
        echoes(&client, web.at(8080));
        assert_eq!(files(node.pins()), pins, "round {round}");
        wait_attached_to_node(node, &programs);
        wait_attached_to_netns(&client, 1);
        assert_eq!(a.status().unwrap().kernel, kernel, "round {round}");
    }
    a.kill().unwrap();
    node.unload().unwrap().ok().unwrap();
    assert_eq!(
        Routing::of(&client),
        clean,
        "what the first daemon found is not forgotten"
    );
}

#[test]
fn a_second_daemon_refuses_to_start_and_disturbs_nothing() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    let node = mesh.node("a");
    let mut chat = client
        .app(&format!("chat --to {} --interval 10", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let (pins, programs, status) = (
        files(node.pins()),
        attached_to_node(node),
        with_certificates(&a),
    );

    // The same configuration; then one with other pins, as from another folder, on the same node.
    let config = node.folder().join("auth-daemon.yaml");
    let mut other: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    let other_pins = node.pins().with_file_name("a-second");
    other["kernel"]["pins"] = other_pins.display().to_string().into();
    let other_config = node.folder().join("second.yaml");
    std::fs::write(&other_config, other.to_string()).unwrap();
    let holds = format!("another auth-daemon holds {}", node.pins().display());
    for (config, complaint) in [
        (&config, holds.as_str()),
        (
            &other_config,
            "cannot listen on 127.0.0.1:15000: Address already in use",
        ),
    ] {
        let second = node
            .auth(&["run", "--config", &config.display().to_string()])
            .unwrap();
        assert_eq!(second.code(), Some(1), "{}", second.stderr);
        assert!(second.stderr.contains(complaint), "{}", second.stderr);
    }
    assert_eq!(files(&other_pins), BTreeSet::new());
    assert_eq!(files(node.pins()), pins);
    assert_eq!(attached_to_node(node), programs);
    assert!(a.is_ready());
    let after = a.status().unwrap();
    assert_eq!(
        (after.kernel, serials(&after)),
        (status.kernel, serials(&status))
    );
    assert_eq!(after.connections.len(), 1);
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 5).then_some(())
    })
    .unwrap();
    echoes(&client, web.at(8080));
}

/// The status, once the certificates are there.
fn with_certificates(daemon: &Daemon) -> Status {
    eventually(Duration::from_secs(5), "certificates", || {
        let status = daemon.status().ok()?;
        let there = !status.certificates.is_empty()
            && status
                .certificates
                .iter()
                .all(|certificate| certificate.not_after.is_string());
        there.then_some(status)
    })
    .unwrap()
}

fn serials(status: &Status) -> BTreeSet<&str> {
    status
        .certificates
        .iter()
        .map(|certificate| certificate.serial.as_str())
        .collect()
}
