//! A pod is enrolled before its addresses are known.

use mesh_tests::{Mesh, Pod, TIMEOUT, eventually};
use serde_json::{Value, json};

use crate::common::by_uid::{daemons, enrolments, pair, pause};
use crate::common::lifecycle_pair::{MARKER, assert_reset, call, echoes, pod_status};

/// Without `status.podIP`, as a pod's object is until its kubelet has reported.
fn forget_addresses(mesh: &Mesh, pod: &Pod) {
    let change = |object: &mut Value| object["status"] = json!({"phase": "Pending"});
    mesh.manifests()
        .edit("Pod", pod.namespace(), pod.name(), change)
        .unwrap();
}

#[test]
fn its_connections_continue_when_its_addresses_are_known() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    forget_addresses(&mesh, &client);
    let (a, b) = daemons(&mesh);
    let _sandboxes = [pause(&client), pause(&web)];
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let status = pod_status(&a, "default/client").unwrap();
    assert!(status.addresses.is_empty(), "{status:?}");
    let listen = |pod: &Pod| {
        let app = pod.container("c1").unwrap();
        let echo = app.app("echo-server --port 8080").unwrap();
        echo.listening().unwrap()
    };
    let _echoes = [listen(&client), listen(&web)];

    // Its outbound connections work as usual, under its own name, and it sees its own address as usual.
    let capture = mesh.wire().capture().unwrap();
    for (to, own) in [
        (web.at(8080), client.at(0)),
        (web.at6(8080), client.at6(0)),
        ("10.96.0.7:80".parse().unwrap(), client.at(0)),
    ] {
        let answer = call(&client, to);
        assert_eq!(answer["text"], MARKER, "{to}: {answer}");
        let local: std::net::SocketAddr = answer["local"].as_str().unwrap().parse().unwrap();
        assert_eq!(local.ip(), own.ip(), "{answer}");
        let is_it = |line: &Value| {
            line["client"] == local.to_string()
                && line["client_identity"] == "spiffe://cluster.local/ns/default/sa/client"
        };
        for daemon in [&a, &b] {
            daemon
                .wait_for_access("who called", TIMEOUT, is_it)
                .unwrap();
        }
    }
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
    // It admits no inbound connections but the node's own probes.
    for to in [client.at(8080), client.at6(8080)] {
        for from in [web.place(), mesh.outside()] {
            assert_refused(&call(from, to));
        }
        echoes(mesh.node("a"), to);
    }

    let mut chat = client.app(&format!("chat --to {}", web.at(8080))).unwrap();
    chat.event("round", TIMEOUT).unwrap();
    mesh.manifests().apply(&client.manifest()).unwrap();
    a.wait_for_log("the addresses", TIMEOUT, |line| {
        line["message"] == "a pod's addresses are known" && line["pod"] == "default/client"
    })
    .unwrap();
    eventually(TIMEOUT, "web's node to know them", || {
        (call(&web, client.at(8080))["event"] == "finished").then_some(())
    })
    .unwrap();
    for to in [client.at(8080), client.at6(8080)] {
        echoes(&web, to);
        assert_refused(&call(mesh.outside(), to));
        echoes(mesh.node("a"), to);
    }
    echoes(&client, web.at(8080));
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 2).then_some(())
    })
    .unwrap();
    assert_eq!(enrolments(&a, "default/client").len(), 1);
    let status = pod_status(&a, "default/client").unwrap();
    assert_eq!(status.addresses, client.addresses());
}

#[test]
fn addresses_set_in_its_namespace_are_not_trusted() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    forget_addresses(&mesh, &client);
    let (a, b) = daemons(&mesh);
    let _sandboxes = [pause(&client), pause(&web)];
    let app = web.app("echo-server --port 8080").unwrap();
    let _echo = app.listening().unwrap();
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    // It takes the address of another pod, to which no other host responds.
    let stolen = "10.77.1.200";
    let mut other = client.manifest();
    other["metadata"]["name"] = "other".into();
    other["metadata"]["uid"] = "11111111-2222-4333-8444-555555555555".into();
    other["spec"]["serviceAccountName"] = "other".into();
    other["status"]["podIP"] = stolen.into();
    other["status"]["podIPs"] = json!([{"ip": stolen}]);
    mesh.manifests().apply(&other).unwrap();
    for arguments in [
        format!("addr add {stolen}/32 dev eth0"),
        format!("route replace default via 10.77.1.1 src {stolen}"),
    ] {
        let changed = client.run("ip", arguments.split(' ')).unwrap();
        changed.ok().unwrap();
    }
    let denied = |line: &Value| {
        let reason = line["reason"].as_str().unwrap_or_default();
        line["result"] == "refused"
            && reason.contains(&format!("{stolen} is the address of pod default/other"))
    };
    eventually(TIMEOUT, "node b to know whose address it is", || {
        let answer = call(&client, web.at(8080));
        b.access_log()
            .iter()
            .any(denied)
            .then(|| assert_reset(&answer))
    })
    .unwrap();
    let as_other = "spiffe://cluster.local/ns/default/sa/other";
    for line in b.access_log() {
        assert_ne!(line["client_identity"], as_other, "{line}");
    }
}

fn assert_refused(event: &Value) {
    if event["errno"] != "ECONNREFUSED" {
        assert_reset(event);
    }
}
