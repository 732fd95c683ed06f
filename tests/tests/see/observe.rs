//! `auth-daemon observe`, and `status` of several daemons.

use mesh_tests::{DaemonOptions, Finished, Node, Process, TIMEOUT, eventually};
use serde_json::Value;

use crate::common::{
    admin_port::forward_admin_port,
    lifecycle_pair::{Echoing, SERVICES, call, echoes, pair},
};

/// What `observe` prints without a terminal.
fn flows(node: &Node, options: &str) -> Vec<Value> {
    let words: Vec<_> = ["observe"]
        .into_iter()
        .chain(options.split_whitespace())
        .collect();
    node.auth(&words).unwrap().ok().unwrap().json_lines()
}

/// Waits until `observe` shows so many connections, and returns them.
fn shown(node: &Node, count: usize) -> Vec<Value> {
    eventually(TIMEOUT, "the connections", || {
        Some(flows(node, "")).filter(|flows| flows.len() == count)
    })
    .unwrap()
}

#[test]
fn observe_shows_who_called_whom_and_what_was_refused() {
    let stage = Echoing::start();
    let (mesh, client, web) = (&stage.mesh, &stage.client, &stage.web);
    let node = mesh.node("b");
    // A connection is shown once it has ended on its node: the first one before the second begins.
    echoes(client, SERVICES[0].parse().unwrap());
    let client_side = shown(mesh.node("a"), 1);
    shown(node, 1);
    assert_eq!(call(mesh.outside(), web.at(8080))["event"], "failed");
    let [allowed, denied] = <[Value; 2]>::try_from(shown(node, 2)).unwrap();
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
    assert_eq!(client_side[0]["service"], "default/web");
    assert_eq!(flows(mesh.node("a"), "--to default/web"), client_side);

    // A follower shows what ends later, also after a restart of the daemon.
    let follower = node.spawn_auth(&["observe", "--follow"]).unwrap();
    let follows = |follower: &Process, count: usize| {
        eventually(TIMEOUT, "the follower's lines", || {
            (follower.stdout().lines().count() == count).then_some(())
        })
        .unwrap();
    };
    follows(&follower, 2);
    echoes(client, SERVICES[1].parse().unwrap());
    follows(&follower, 3);
    stage.b.kill().unwrap();
    let _b = node.start_daemon().unwrap();
    eventually(TIMEOUT, "the next daemon to serve", || {
        (call(client, web.at(8080))["event"] == "finished").then_some(())
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

#[test]
fn several_daemons_are_shown_as_one_mesh() {
    let stage = Echoing::start();
    let (mesh, client) = (&stage.mesh, &stage.client);
    let (here, there) = (mesh.node("a"), mesh.node("b"));
    let of_b = forward_admin_port(here.netns(), there.netns()).to_string();
    let ask = |words: &str| -> Finished {
        let addresses = ["--address", "127.0.0.1", "--address", &of_b];
        let words: Vec<_> = words.split_whitespace().chain(addresses).collect();
        here.auth(&words).unwrap()
    };

    for _ in 0..3 {
        echoes(client, SERVICES[0].parse().unwrap());
    }
    let merged = eventually(TIMEOUT, "all lines of both nodes", || {
        let lines = ask("observe").ok().unwrap().json_lines();
        (lines.len() == 6).then_some(lines)
    })
    .unwrap();
    let times: Vec<_> = merged.iter().map(|flow| flow["time"].as_str()).collect();
    assert!(times.is_sorted(), "{times:?}");
    let of = |node: &str| merged.iter().filter(|flow| flow["node"] == node).count();
    assert_eq!((of("a"), of("b")), (3, 3));
    let only_b = ask("observe --node b").ok().unwrap().json_lines();
    assert!(only_b.iter().all(|flow| flow["direction"] == "inbound"));
    assert_eq!(only_b.len(), 3);

    let status = ask("status");
    assert_eq!(status.code(), Some(0), "{}", status.stdout);
    assert!(
        status.stdout.starts_with("NODES (2)\n"),
        "{}",
        status.stdout
    );
    assert!(
        status.stdout.contains("PROBLEMS (0)\n"),
        "{}",
        status.stdout
    );
    let status: Value = serde_json::from_str(&ask("status --json").ok().unwrap().stdout).unwrap();
    assert_eq!(status["nodes"][1]["node"], "b");
    assert_eq!(status["nodes"][1]["policies"], serde_json::json!([]));

    // A policy that cannot be read is a problem, also if its last good version stays in force.
    let policy = |action: &str| {
        serde_json::json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "all", "namespace": "default"},
            "spec": {"action": action, "rules": [{}]},
        })
    };
    for (action, expected) in [("ALLOW", 0), ("ALOW", 1)] {
        there.manifests().apply(&policy(action)).unwrap();
        let last = eventually(TIMEOUT, "the policy in the status", || {
            let status = ask("status");
            let has_policy = status.stdout.contains("POLICIES WITH ERRORS, OF 1");
            (has_policy && status.code() == Some(expected)).then_some(status.stdout)
        })
        .unwrap();
        let error = "AuthorizationPolicy default/all  spec.action";
        assert_eq!(last.contains(error), expected == 1, "{last}");
    }
    let policies = there.manifests();
    policies
        .remove("AuthorizationPolicy", "default", "all")
        .unwrap();

    // A node that cannot be reached does not hide the others.
    stage.b.kill().unwrap();
    let status = ask("status");
    assert_eq!(status.code(), Some(1));
    assert!(status.stdout.contains("UNREACHABLE"), "{}", status.stdout);
    assert!(status.stdout.contains("  a     "), "{}", status.stdout);
    let observed = ask("observe");
    assert_eq!(observed.code(), Some(1));
    assert_eq!(observed.json_lines().len(), 3);
    let named = format!("node {of_b} cannot be reached: ");
    assert!(observed.stderr.contains(&named), "{}", observed.stderr);
    let nobody = here.auth(&["status", "--address", &of_b]).unwrap();
    assert_eq!(nobody.code(), Some(2));
}

#[test]
fn a_daemon_that_observes_nothing_says_so() {
    let options = DaemonOptions::default().setting("observe", "nothing".into());
    let stage = Echoing::on(pair(), &options);
    echoes(&stage.client, stage.web.at(8080));
    // What is logged and counted stays.
    let ended =
        "auth_daemon_connections_total{direction=\"inbound\",path=\"tunnel\",result=\"ok\"} 1\n";
    eventually(TIMEOUT, "the connection in the metrics", || {
        stage.b.metrics().ok()?.contains(ended).then_some(())
    })
    .unwrap();
    let logged = stage
        .b
        .wait_for_access("its line", TIMEOUT, |line| line["result"] == "ok");
    logged.unwrap();

    let node = stage.mesh.node("b");
    for command in [
        &["observe"][..],
        &["strict-readiness"],
        &["policy", "suggest"],
    ] {
        let answer = node.auth(command).unwrap();
        assert!(![Some(0), None].contains(&answer.code()), "{answer:?}");
        let output = answer.stderr + &answer.stdout;
        assert!(
            output.contains("keeps no record of connections"),
            "{output}"
        );
        assert!(!output.contains("safe:"), "{output}");
    }
}
