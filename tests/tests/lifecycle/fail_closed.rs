//! A daemon is killed: its pods' connections end, no new ones are made, and nothing continues in plaintext.

use std::time::{Duration, Instant};

use mesh_tests::{DaemonOptions, Mesh, PodSpec, TIMEOUT, eventually, slowdown};
use serde_json::Value;

use crate::common::lifecycle_pair::{
    self, MARKER, assert_refused, assert_reset, call, daemons, echoes, pair, ways,
};

#[test]
fn captured_connects_are_refused_at_once_and_nothing_crosses_the_wire() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let mut outside = mesh
        .outside()
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    echoes(&client, web.at(8080));
    echo.event("closed", TIMEOUT).unwrap();
    a.kill().unwrap();

    let capture = mesh.wire().capture().unwrap();
    for to in ways(&web) {
        for how in ["", "--non-blocking"] {
            let start = Instant::now();
            let arguments = format!("connect --to {to} --send {MARKER} --read {how}");
            assert_refused(&client.app(&arguments).unwrap().failure(TIMEOUT).unwrap());
            let took = start.elapsed();
            assert!(
                took < Duration::from_secs(2) * slowdown(),
                "{to} {how}: refused after {took:?}"
            );
        }
    }
    // Servers outside the mesh are reached as usual.
    client
        .app(&format!("connect --to {}:8080", mesh.outside_ipv4()))
        .unwrap()
        .success(TIMEOUT)
        .unwrap();
    outside.event("accepted", TIMEOUT).unwrap();
    let recording = capture.stop().unwrap();
    assert!(!recording.contains(MARKER.as_bytes()));
    let dialled: Vec<_> = recording
        .connections()
        .into_iter()
        .map(|(_, to)| to)
        .collect();
    assert_eq!(
        dialled,
        [(mesh.outside_ipv4(), 8080).into()],
        "only the outside was dialled"
    );
    assert_eq!(echo.events_of("accepted").len(), 1);
}

#[test]
fn pods_of_one_dead_node_refuse_each_other_too() {
    let mesh = Mesh::builder()
        .node("a")
        .pod(PodSpec::new("client").service_account("client"))
        .pod(PodSpec::new("web").service_account("web"))
        .start()
        .unwrap();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    // What the kernel carries alone lasts a few seconds longer: same_node_changes.rs.
    let options = DaemonOptions::default().same_node_tunnel();
    let daemon = mesh.start_daemons_with(&options).unwrap().remove(0);
    echoes(&client, web.at(8080));
    echo.event("closed", TIMEOUT).unwrap();
    daemon.kill().unwrap();
    assert_refused(&call(&client, web.at(8080)));
    assert_refused(&call(&client, web.at6(8080)));
    // A pod reaches itself as usual: that never leaves it.
    echoes(&web, web.at(8080));
    echoes(&web, web.at6(8080));
    echoes(&web, "127.0.0.1:8080".parse().unwrap());
}

#[test]
fn connections_end_with_a_reset_when_the_clients_daemon_is_killed() {
    connections_are_reset_when_killed("a");
}

#[test]
fn connections_end_with_a_reset_when_the_servers_daemon_is_killed() {
    connections_are_reset_when_killed("b");
}

/// An idle connection, a conversation and a transfer, all under way when the daemon of `dying` is killed.
fn connections_are_reset_when_killed(dying: &str) {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let mut sink = web.app("sink --port 9").unwrap().listening().unwrap();
    let (a, b) = daemons(&mesh);
    let capture = mesh.wire().capture_start_of_packets(256).unwrap();
    let mut idle = client
        .app(&format!(
            "connect --to {} --send {MARKER} --read",
            web.at(8080)
        ))
        .unwrap();
    let mut chat = client.app(&format!("chat --to {}", web.at6(8080))).unwrap();
    let transfer = client
        .app(&format!("source --to {} --bytes 1000000000000", web.at(9)))
        .unwrap();
    idle.event("connected", TIMEOUT).unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let moving = |daemon: &mesh_tests::Daemon| {
        let status = daemon.status().unwrap();
        let mut bytes = status
            .connections
            .iter()
            .map(|connection| connection.bytes_to_server);
        (status.connections.len() == 3 && bytes.any(|bytes| bytes > 1_000_000)).then_some(())
    };
    eventually(TIMEOUT, "three connections, one with a megabyte", || {
        moving(&a).and_then(|()| moving(&b))
    })
    .unwrap();

    let (dying, _living) = if dying == "a" { (a, b) } else { (b, a) };
    dying.kill().unwrap();
    let deadline = Duration::from_secs(5);
    for app in [idle, chat, transfer] {
        assert_reset(&app.failure(deadline).unwrap());
    }
    for _ in 0..2 {
        assert_reset(&echo.event("closed", deadline).unwrap());
    }
    assert_reset(&sink.event("closed", deadline).unwrap());
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
}

#[test]
fn strict_pods_of_a_dead_node_refuse_plaintext_and_tunnels() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    echoes(&client, web.at(8080));
    echo.event("closed", TIMEOUT).unwrap();
    b.kill().unwrap();

    let capture = mesh.wire().capture().unwrap();
    for to in [
        web.at(8080),
        web.at6(8080),
        web.at(15008),
        web.at6(15008),
        web.at(15001),
    ] {
        assert_refused(&call(mesh.outside(), to));
    }
    for to in ways(&web) {
        // The client's daemon runs: it accepts the connection, finds no server and reports that.
        let failed = call(&client, to);
        let errno: &Value = &failed["errno"];
        assert!(
            errno == "ECONNRESET" || errno == "ECONNREFUSED",
            "{to}: {failed}"
        );
        assert!(
            failed["text"].as_str().is_none_or(str::is_empty),
            "{to}: {failed}"
        );
    }
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
    assert_eq!(
        echo.events_of("accepted").len(),
        1,
        "nothing reached the app"
    );
    // The node's own probes need no daemon.
    echoes(mesh.node("b").place(), web.at(8080));
    echoes(mesh.node("b").place(), web.at6(8080));
}

#[test]
fn the_other_nodes_pods_are_served_on() {
    let mesh = pair();
    let other = mesh
        .add_pod(
            PodSpec::new("other")
                .on("b")
                .service_account("web")
                .label("app", "web"),
        )
        .unwrap();
    let dead = mesh
        .add_pod(
            PodSpec::new("dead")
                .on("a")
                .service_account("web")
                .label("app", "web"),
        )
        .unwrap();
    let web = mesh.pod("web");
    let servers = [&web, &other, &dead].map(|pod| {
        pod.app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap()
    });
    let (a, _b) = daemons(&mesh);
    a.kill().unwrap();
    // A third of the service's endpoints do not answer; others are tried instead.
    for _ in 0..5 {
        for service in lifecycle_pair::SERVICES {
            echoes(&other, service.parse().unwrap());
        }
    }
    assert_eq!(servers[2].events_of("accepted"), Vec::<Value>::new());
}

#[test]
fn apps_that_do_not_read_find_the_reset_when_they_do() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut server = web
        .app("stall --port 9 --seconds 1")
        .unwrap()
        .listening()
        .unwrap();
    let _source = web
        .app("source --port 10 --bytes 1000000000000")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let _sender = client
        .app(&format!("source --to {} --bytes 1000000000000", web.at(9)))
        .unwrap();
    let mut reader = client
        .app(&format!("stall --to {} --seconds 1", web.at6(10)))
        .unwrap();
    server.event("stalled", TIMEOUT).unwrap();
    reader.event("stalled", TIMEOUT).unwrap();
    // Each end's own daemon dies, with the app's window full.
    a.kill().unwrap();
    b.kill().unwrap();
    let deadline = Duration::from_secs(5);
    assert_reset(&server.event("closed", deadline).unwrap());
    assert_reset(&reader.failure(deadline).unwrap());
}

#[test]
fn permissive_pods_refuse_what_would_have_been_a_tunnel() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let daemons = mesh
        .start_daemons_with(&DaemonOptions::default().permissive())
        .unwrap();
    echoes(&client, web.at(8080));
    for daemon in daemons {
        daemon.kill().unwrap();
    }
    let capture = mesh.wire().capture().unwrap();
    for to in ways(&web) {
        assert_refused(&call(&client, to));
    }
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
    // Callers that were never expected to use the tunnel are admitted, as usual.
    echoes(mesh.outside(), web.at(8080));
    echoes(mesh.outside(), web.at6(8080));
    // A pod of the mesh that bypasses its own node's capture is not.
    let to = web.at(8080);
    let around = client.enter(|| std::net::TcpStream::connect(to)).unwrap();
    let kind = around.map(drop).map_err(|error| error.kind());
    assert_eq!(kind, Err(std::io::ErrorKind::ConnectionRefused));
}
