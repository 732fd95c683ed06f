//! `auth-daemon observe`.

use mesh_tests::{Node, Process, TIMEOUT, eventually};
use serde_json::Value;

use crate::common::lifecycle_pair::{SERVICES, call, daemons, echoes, pair};

/// What `observe` prints without a terminal.
fn flows(node: &Node, options: &str) -> Vec<Value> {
    let words: Vec<_> = ["observe"]
        .into_iter()
        .chain(options.split_whitespace())
        .collect();
    node.auth(&words).unwrap().ok().unwrap().json_lines()
}

#[test]
fn observe_shows_who_called_whom_and_what_was_refused() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, b) = daemons(&mesh);
    echoes(&client, SERVICES[0].parse().unwrap());
    assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");

    let node = mesh.node("b");
    // A connection is shown once it has ended on its node.
    let [allowed, denied] = eventually(TIMEOUT, "both connections", || {
        <[Value; 2]>::try_from(flows(node, "")).ok()
    })
    .unwrap();
    assert_eq!(
        [
            &allowed["verdict"],
            &allowed["path"],
            &allowed["client_pod"],
            &allowed["server_pod"],
            &allowed["client_identity"],
            &allowed["node"],
        ],
        [
            "allowed",
            "tunnel",
            "default/client",
            "default/web",
            "spiffe://cluster.local/ns/default/sa/client",
            "b",
        ]
    );
    assert_eq!(denied["verdict"], "denied");
    assert_eq!(denied["client_pod"], Value::Null);
    assert_eq!(denied["server_pod"], "default/web");
    assert_ne!(denied["reason"], "");
    assert_eq!(
        flows(node, "--verdict denied"),
        std::slice::from_ref(&denied)
    );
    assert_eq!(flows(node, "--from default/client"), [allowed]);
    assert_eq!(flows(node, "--to default").len(), 2);
    assert_eq!(flows(node, "--plaintext"), [denied]);
    assert!(flows(node, "--plaintext --verdict allowed").is_empty());
    let client_side = flows(mesh.node("a"), "--to default/web");
    assert_eq!(client_side.len(), 1, "{client_side:?}");
    assert_eq!(client_side[0]["service"], "default/web");

    // A follower shows what ends later, also after a restart of the daemon.
    let follower = node.spawn_auth(&["observe", "--follow"]).unwrap();
    let shows = |follower: &Process, count: usize| {
        eventually(TIMEOUT, "the follower's lines", || {
            (follower.stdout().lines().count() == count).then_some(())
        })
        .unwrap();
    };
    shows(&follower, 2);
    echoes(&client, SERVICES[1].parse().unwrap());
    shows(&follower, 3);
    b.kill().unwrap();
    let _b = node.start_daemon().unwrap();
    eventually(TIMEOUT, "the next daemon to serve", || {
        (call(&client, web.at(8080))["event"] == "finished").then_some(())
    })
    .unwrap();
    eventually(TIMEOUT, "a line from the next daemon", || {
        let last = follower.stdout().lines().last()?.to_owned();
        let last: Value = serde_json::from_str(&last).ok()?;
        (last["destination"] == web.at(8080).to_string()).then_some(())
    })
    .unwrap();
    assert!(follower.stderr().contains("restarted"));
}
