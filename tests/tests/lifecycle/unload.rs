//! `auth-daemon unload` removes everything that a daemon leaves in the kernel, and nothing of a running one.

use std::time::Duration;

use mesh_tests::{PodSpec, TIMEOUT, eventually, eventually_ok};

use crate::common::lifecycle_pair::{MARKER, assert_refused, call, daemons, echoes, pair, ways};
use crate::common::lifecycle_traces::{
    Held, Routing, attached_to_netns, attached_to_node, files, wait_attached_to_netns,
};

#[test]
fn it_refuses_while_a_daemon_runs() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, _b) = daemons(&mesh);
    let mut chat = client
        .app(&format!("chat --to {} --interval 10", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    for name in ["a", "b"] {
        let node = mesh.node(name);
        let (pins, programs) = (files(node.pins()), attached_to_node(node));
        let refused = node.unload().unwrap();
        assert_eq!(
            refused.code(),
            Some(1),
            "{}{}",
            refused.stdout,
            refused.stderr
        );
        let complaint = format!("another auth-daemon holds {}", node.pins().display());
        assert!(refused.stderr.contains(&complaint), "{}", refused.stderr);
        assert_eq!(
            (files(node.pins()), attached_to_node(node)),
            (pins, programs)
        );
    }
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 5).then_some(())
    })
    .unwrap();
    for to in ways(&web) {
        echoes(&client, to);
    }
}

#[test]
fn it_leaves_nothing_and_pods_communicate_in_plaintext() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    // What the pods had before stays: here a sysctl, a rule and a route.
    client
        .netns()
        .set_parameters(&[("net/ipv4/tcp_fwmark_accept", "1")])
        .unwrap();
    for own in [
        "rule add fwmark 0x6d544c53 lookup 77 pref 200",
        "route add 198.51.100.0/24 dev lo table 77",
    ] {
        web.run("ip", own.split(' ')).unwrap().ok().unwrap();
    }
    let clean = [Routing::of(&client), Routing::of(&web)];
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    for to in ways(&web) {
        echoes(&client, to);
    }
    assert!(Routing::of(&client).is_prepared() && Routing::of(&web).is_prepared());
    let held = [Held::by(&a), Held::by(&b)];
    for held in &held {
        assert!(held.programs.len() >= 5 && held.maps.len() >= 8, "{held:?}");
    }
    a.kill().unwrap();
    b.kill().unwrap();
    assert_refused(&call(&client, web.at(8080)));

    for name in ["a", "b"] {
        let node = mesh.node(name);
        let unloaded = node.unload().unwrap().ok().unwrap();
        assert!(unloaded.stdout.contains("1 pods"), "{}", unloaded.stdout);
        assert!(!node.pins().exists(), "{:?}", files(node.pins()));
    }
    assert_eq!([Routing::of(&client), Routing::of(&web)], clean);
    // The kernel detaches a program soon after its link's pin is removed, and `unload` waits for that.
    let nodes: [u32; 2] = ["a", "b"].map(|name| attached_to_node(mesh.node(name)).values().sum());
    let netns = [&client, &web].map(|pod| attached_to_netns(pod));
    assert_eq!((nodes, netns), ([0, 0], [0, 0]));
    for held in &held {
        // The kernel frees them when they can no longer be in use.
        let what = "programs and maps to be gone";
        eventually(Duration::from_secs(10), what, || {
            (held.alive() == 0).then_some(())
        })
        .unwrap();
    }
    let capture = mesh.wire().capture().unwrap();
    for (from, to) in [
        (client.place(), web.at(8080)),
        (mesh.outside(), web.at6(8080)),
    ] {
        echoes(from, to);
    }
    let recording = capture.stop().unwrap();
    assert!(
        recording.contains(MARKER.as_bytes()),
        "they communicate in plaintext"
    );
    assert!(
        recording
            .streams()
            .iter()
            .all(|stream| stream.tls_records().is_err())
    );
}

#[test]
fn unloading_twice_or_nothing_is_fine_and_a_daemon_starts_again() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    let node = mesh.node("a");
    let before = (
        files(node.pins()),
        attached_to_node(node),
        a.status().unwrap().kernel,
    );
    a.kill().unwrap();
    node.unload().unwrap().ok().unwrap();
    for _ in 0..2 {
        let again = node.unload().unwrap().ok().unwrap();
        assert!(
            again.stdout.contains("nothing is loaded"),
            "{}",
            again.stdout
        );
        assert!(!node.pins().exists());
    }
    let a = node.start_daemon().unwrap();
    a.wait_enrolled(&["default/client"]).unwrap();
    eventually_ok(TIMEOUT, "the programs and pins of before", || {
        let after = (
            files(node.pins()),
            attached_to_node(node),
            a.status()?.kernel,
        );
        anyhow::ensure!(after == before, "{after:?}, not {before:?}");
        Ok(())
    })
    .unwrap();
    for to in ways(&web) {
        echoes(&client, to);
    }
}

#[test]
fn it_manages_when_pods_are_gone() {
    let mesh = pair();
    let gone = mesh.add_pod(PodSpec::new("gone").on("b")).unwrap();
    let nameless = mesh.add_pod(PodSpec::new("nameless").on("b")).unwrap();
    let clean = [Routing::of(&mesh.pod("web")), Routing::of(&nameless)];
    let sleeper = nameless.spawn("sleep", ["1000"]).unwrap();
    let (_a, b) = daemons(&mesh);
    b.kill().unwrap();
    // One has ended completely; the other's namespace remains until its last process exits.
    mesh.remove_pod("gone").unwrap();
    drop(gone);
    mesh.outside()
        .run("umount", ["-l".into(), nameless.netns().path()])
        .unwrap()
        .ok()
        .unwrap();
    let node = mesh.node("b");
    let unloaded = node.unload().unwrap().ok().unwrap();
    assert!(unloaded.stdout.contains("3 pods"), "{}", unloaded.stdout);
    assert!(!node.pins().exists(), "{:?}", files(node.pins()));
    let attached = attached_to_node(node);
    assert!(attached.values().all(|count| *count == 0), "{attached:?}");
    assert_eq!(
        [Routing::of(&mesh.pod("web")), Routing::of(&nameless)],
        clean
    );
    drop(sleeper);
}

#[test]
fn it_finishes_what_another_has_begun() {
    let mesh = pair();
    let web = mesh.pod("web");
    let clean = Routing::of(&web);
    let (_a, b) = daemons(&mesh);
    b.kill().unwrap();
    let node = mesh.node("b");
    // As if it had been killed between two pins: the links are gone, the maps not.
    std::fs::remove_dir_all(node.pins().join("v2/links")).unwrap();
    node.unload().unwrap().ok().unwrap();
    assert!(!node.pins().exists(), "{:?}", files(node.pins()));
    assert_eq!(Routing::of(&web), clean);
    wait_attached_to_netns(&web, 0);
}

#[test]
fn a_stopped_daemon_stays_in_force_until_unload() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    for daemon in [a, b] {
        let status = daemon.terminate(TIMEOUT).unwrap();
        assert_eq!(status.code(), Some(0));
    }
    for to in ways(&web) {
        assert_refused(&call(&client, to));
    }
    assert_refused(&call(mesh.outside(), web.at(8080)));
    for name in ["a", "b"] {
        mesh.node(name).unload().unwrap().ok().unwrap();
    }
    echoes(&client, web.at(8080));
    echoes(mesh.outside(), web.at(8080));
}
