//! The log in both formats, and the access log line of each connection.

use std::time::Instant;

use mesh_tests::{Daemon, DaemonOptions, PodSpec, ServiceSpec, TIMEOUT};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{
    Echoing, MARKER, SERVICES, call, daemons, daemons_with, echoes, pair,
};

#[test]
fn both_sides_log_exact_byte_counts() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _sink = web.app("sink --port 8080").unwrap().listening().unwrap();
    let (a, b) = daemons(&mesh);
    for (way, service) in [
        (web.at(8080), ""),
        (web.at6(8080), ""),
        (SERVICES[0].parse().unwrap(), "default/web"),
        (SERVICES[1].parse().unwrap(), "default/web"),
    ] {
        let mut source = client
            .app(&format!("source --to {way} --bytes 1000003"))
            .unwrap();
        let local = source.event("connected", TIMEOUT).unwrap()["local"].clone();
        source.success(TIMEOUT).unwrap();
        let endpoint = if way.is_ipv4() {
            web.at(8080)
        } else {
            web.at6(8080)
        };
        let outbound = line_of(&a, "outbound", &local);
        let inbound = line_of(&b, "inbound", &local);
        for line in [&outbound, &inbound] {
            // A header of 16 bytes, and 8 bytes with the number of bytes received.
            expect(
                line,
                &json!({
                    "target": "access",
                    "level": "INFO",
                    "path": "tunnel",
                    "client_identity": identity("client"),
                    "server_identity": identity("web"),
                    "destination": way.to_string(),
                    "endpoint": endpoint.to_string(),
                    "bytes_to_server": 1_000_019,
                    "bytes_to_client": 8,
                    "result": "ok",
                    "reason": "",
                }),
            );
            assert!(
                line["duration_ms"].as_u64().is_some_and(|ms| ms < 30_000),
                "{line}"
            );
        }
        assert_eq!(outbound["service"], service, "{outbound}");
    }
}

#[test]
fn log_has_the_duration_of_the_connection() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _stall = web
        .app("stall --port 8080 --seconds 0.7")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let start = Instant::now();
    // The second uses the first one's tunnel.
    for _ in 0..2 {
        let source = client
            .app(&format!("source --to {} --bytes 100", web.at(8080)))
            .unwrap();
        source.success(TIMEOUT).unwrap();
    }
    for daemon in [&a, &b] {
        let mut durations = Vec::new();
        daemon
            .wait_for_access("two lines", TIMEOUT, |line| {
                durations.push(line["duration_ms"].as_u64().unwrap());
                durations.len() == 2
            })
            .unwrap();
        let elapsed = start.elapsed().as_millis() as u64;
        assert!(
            durations.iter().all(|ms| (700..=elapsed).contains(ms)),
            "{durations:?} in {elapsed}"
        );
    }
}

#[test]
fn log_has_the_reason_of_a_refusal() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let (a, b) = daemons(&mesh);
    // No app listens on the port.
    assert_eq!(call(&client, web.at(9999))["event"], "failed");
    let to = json!(web.at(9999).to_string());
    let outbound = line_with(&a, "destination", &to);
    expect(
        &outbound,
        &json!({
            "direction": "outbound", "result": "refused", "client_identity": identity("client"),
            "bytes_to_server": 0, "bytes_to_client": 0, "endpoint": to,
        }),
    );
    assert!(reason(&outbound).contains("refused"), "{outbound}");
    let inbound = line_with(&b, "destination", &to);
    expect(
        &inbound,
        &json!({
            "direction": "inbound", "result": "refused", "client_identity": identity("client"),
            "server_identity": identity("web"), "client": outbound["client"],
        }),
    );
    assert!(reason(&inbound).contains("refused"), "{inbound}");

    // First the service lacks the port, then it lacks an endpoint.
    assert_eq!(
        call(&client, "10.96.0.7:81".parse().unwrap())["event"],
        "failed"
    );
    let line = line_with(&a, "destination", &"10.96.0.7:81".into());
    assert_eq!(line["result"], "refused");
    assert!(
        reason(&line).contains("default/web has no TCP port 81"),
        "{line}"
    );
    let pinned = ServiceSpec::new("pinned")
        .selector("app", "web")
        .address("10.96.0.8");
    let pinned = pinned.port(80, 8080).service_accounts("nobody").manifest();
    let addresses = || a.status().unwrap().kernel.mesh_addresses;
    let before = addresses();
    mesh.manifests().apply(&pinned).unwrap();
    mesh_tests::eventually(TIMEOUT, "the pinned service", || {
        (addresses() > before).then_some(())
    })
    .unwrap();
    assert_eq!(
        call(&client, "10.96.0.8:80".parse().unwrap())["event"],
        "failed"
    );
    let line = line_with(&a, "destination", &"10.96.0.8:80".into());
    assert_eq!(
        (&line["result"], &line["service"]),
        (&"refused".into(), &"default/pinned".into()),
        "{line}"
    );
    assert!(reason(&line).contains("no ready endpoint"), "{line}");

    // Plaintext from outside.
    assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");
    let line = line_with(&b, "client_identity", &"".into());
    expect(
        &line,
        &json!({
            "direction": "inbound", "result": "refused", "server_identity": identity("web"),
            "destination": web.at(8080).to_string(),
        }),
    );
    assert!(
        line["client"].as_str().unwrap().starts_with("192.0.2.10:"),
        "{line}"
    );
    assert!(reason(&line).contains("plaintext"), "{line}");
}

#[test]
fn log_says_which_side_reset() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let _reset = web
        .app("reset --port 9 --after 27")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    client
        .app(&format!("reset --to {} --after 5", web.at(8080)))
        .unwrap()
        .success(TIMEOUT)
        .unwrap();
    let cut = client
        .app(&format!(
            "connect --to {} --send {MARKER} --read",
            web.at(9)
        ))
        .unwrap();
    assert_eq!(cut.failure(TIMEOUT).unwrap()["errno"], "ECONNRESET");
    for (to, whose, up, down) in [
        (web.at(8080), "client's", 5, 5),
        (web.at(9), "server's", MARKER.len(), 0),
    ] {
        for daemon in [&a, &b] {
            let line = line_with(daemon, "destination", &to.to_string().into());
            expect(
                &line,
                &json!({
                    "result": "reset", "bytes_to_server": up, "bytes_to_client": down,
                    "client_identity": identity("client"), "server_identity": identity("web"),
                }),
            );
            assert!(reason(&line).contains(whose), "{line}");
        }
    }
}

#[test]
fn log_marks_connections_of_a_pod_to_itself() {
    let mesh = pair();
    let web = mesh.pod("web");
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    echoes(&web, SERVICES[0].parse().unwrap());
    let line = line_with(&b, "direction", &"outbound".into());
    expect(
        &line,
        &json!({
            "path": "self", "result": "ok", "service": "default/web", "client_identity": identity("web"),
            "server_identity": identity("web"), "bytes_to_server": MARKER.len(), "bytes_to_client": MARKER.len(),
        }),
    );
}

#[test]
fn json_log_has_one_object_per_line() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons_with(&mesh, &DaemonOptions::default().log_level("debug"));
    echoes(&client, web.at(8080));
    mesh.manifests().write("broken.yaml", "words").unwrap();
    line_with(&a, "result", &"ok".into());
    a.wait_for_log("a fault", TIMEOUT, |line| line["level"] == "ERROR")
        .unwrap();
    let text = a.log_text();
    let whole = text.rsplit_once('\n').unwrap().0;
    for line in whole.lines() {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        for field in ["timestamp", "level", "target"] {
            assert!(value[field].is_string(), "{line}");
        }
        assert!(value["fields"].is_null(), "flat: {line}");
    }
}

#[test]
fn text_log_is_readable() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let options = DaemonOptions::default().setting("log", json!({"format": "text"}));
    let (a, _b) = daemons_with(&mesh, &options);
    echoes(&client, web.at(8080));
    let line = mesh_tests::eventually(TIMEOUT, "the line of the connection", || {
        let text = a.log_text();
        // The last line may be incomplete.
        let (whole, _) = text.rsplit_once('\n')?;
        let mut lines = whole.lines();
        let line = lines.find(|line| line.contains("result=\"ok\""))?;
        Some(line.to_owned())
    })
    .unwrap();
    let identity = identity("client");
    for part in [
        "INFO",
        "access",
        "direction=\"outbound\"",
        &format!("client_identity={identity}"),
        &format!("bytes_to_server={}", MARKER.len()),
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    let text = a.log_text();
    assert!(!text.contains('\u{1b}'), "no colours in a file: {text}");
    assert!(serde_json::from_str::<Value>(text.lines().next().unwrap()).is_err());
    assert!(text.contains("pod enrolled pod=default/client"), "{text}");
}

#[test]
fn log_has_opentelemetrys_names() {
    let options = DaemonOptions::default().setting("accessLog", json!({"fields": "opentelemetry"}));
    let stage = Echoing::on(pair(), &options);
    let service = SERVICES[0];
    echoes(&stage.client, service.parse().unwrap());
    let server = stage.web.at(8080);
    assert_eq!(call(stage.mesh.outside(), server)["event"], "failed");

    let bytes = MARKER.len();
    let outbound = line_with(&stage.a, "auth_daemon.direction", &"outbound".into());
    let client = &outbound["network.local.port"];
    expect(
        &outbound,
        &json!({
            "client.address": stage.client.ipv4().to_string(), "client.port": client,
            "server.address": "10.96.0.7", "server.port": 80,
            "network.transport": "tcp", "network.type": "ipv4",
            "network.peer.address": server.ip().to_string(), "network.peer.port": server.port(),
            "tls.established": true, "tls.protocol.name": "tls", "tls.protocol.version": "1.3",
            "error.type": null,
            "auth_daemon.path": "tunnel", "auth_daemon.result": "ok", "auth_daemon.service": "default/web",
            "auth_daemon.client.identity": identity("client"), "auth_daemon.server.identity": identity("web"),
            "auth_daemon.bytes_to_server": bytes, "auth_daemon.bytes_to_client": bytes,
        }),
    );
    let inbound = line_with(&stage.b, "client.port", client);
    expect(
        &inbound,
        &json!({
            "auth_daemon.direction": "inbound", "server.address": "10.96.0.7",
            "network.local.address": server.ip().to_string(), "network.peer.port": client,
        }),
    );
    let denied = line_with(&stage.b, "error.type", &"denied".into());
    expect(
        &denied,
        &json!({
            "client.address": "192.0.2.10", "tls.established": false, "tls.protocol.name": null,
            "auth_daemon.path": "plaintext", "auth_daemon.result": "refused",
            "auth_daemon.client.identity": null,
        }),
    );
    let message = denied["error.message"].as_str().unwrap_or_default();
    assert!(message.contains("plaintext"), "{denied}");
    let own = ["client", "client_identity", "bytes_to_server", "reason"];
    assert!(own.iter().all(|name| denied[name].is_null()), "{denied}");
}

#[test]
fn log_leaves_out_what_the_sample_does_not_have() {
    let options = DaemonOptions::default().setting("accessLog", json!({"sample": "0%"}));
    let stage = Echoing::on(pair(), &options);
    let (client, server) = (&stage.client, stage.web.at(8080));
    echoes(client, server);
    mesh_tests::eventually(TIMEOUT, "the connection in what is observed", || {
        let flows = stage.mesh.node("b").auth(&["observe"]).ok()?.json_lines();
        (flows.first()?["result"] == "ok").then_some(())
    })
    .unwrap();
    assert_eq!(stage.b.access_log(), Vec::<Value>::new());

    // Refusals have their line, and so have connections that an AUDIT policy selects.
    assert_eq!(call(client, stage.web.at(9999))["event"], "failed");
    line_with(&stage.a, "result", &"refused".into());
    line_with(&stage.b, "result", &"refused".into());
    let audit = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "watch", "namespace": "default"},
        "spec": {"action": "AUDIT", "rules": [{}]},
    });
    stage.mesh.manifests().apply(&audit).unwrap();
    mesh_tests::eventually(TIMEOUT, "the line of an audited connection", || {
        echoes(client, server);
        let log = stage.b.access_log();
        log.into_iter().find(|line| line["result"] == "ok")
    })
    .map(|line| {
        assert!(
            line["policy"].as_str().unwrap().contains("audited by"),
            "{line}"
        )
    })
    .unwrap();
    let log = stage.a.access_log();
    assert!(log.iter().all(|line| line["result"] != "ok"), "{log:?}");
}

#[test]
fn log_level_filters_lines() {
    let mesh = pair();
    mesh.add_pod(PodSpec::new("lost").annotation("auth-daemon.io/netns", "/none"))
        .unwrap();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let node = mesh.node("a");
    let a = node
        .start_daemon_with(DaemonOptions::default().log_level("error,access=info"))
        .unwrap();
    let _b = mesh.node("b").start_daemon().unwrap();
    echoes(&client, web.at(8080));
    line_with(&a, "result", &"ok".into());
    let logs = a.logs();
    let about_lost = |line: &&Value| line["message"].as_str().is_some_and(|m| m.contains("lost"));
    assert_eq!(logs.iter().filter(about_lost).count(), 1, "{logs:?}");
    assert_eq!(logs.len(), 2, "{logs:?}");
}

fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

fn reason(line: &Value) -> &str {
    line["reason"].as_str().unwrap_or_default()
}

/// Waits for the line of a connection in this direction from this client address, which both sides log.
fn line_of(daemon: &Daemon, direction: &str, client: &Value) -> Value {
    let is = |line: &Value| line["direction"] == direction && line["client"] == *client;
    let what = format!("the {direction} connection of {client}");
    let found = daemon.wait_for_access(&what, TIMEOUT, is);
    found.unwrap_or_else(|error| panic!("{error:#}: {:#?}", daemon.access_log()))
}

fn line_with(daemon: &Daemon, field: &str, value: &Value) -> Value {
    let found = daemon.wait_for_access(&format!("{field}={value}"), TIMEOUT, |line| {
        line[field] == *value
    });
    found.unwrap_or_else(|error| panic!("{error:#}: {:#?}", daemon.access_log()))
}

fn expect(line: &Value, fields: &Value) {
    for (name, value) in fields.as_object().unwrap() {
        assert_eq!(&line[name], value, "{name} in {line}");
    }
}
