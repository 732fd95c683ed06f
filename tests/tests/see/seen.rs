//! What follows from the connections that were seen: suggested policies, who STRICT would cut off, and dry runs.

use std::fs;

use mesh_tests::{Mesh, Node, PodSpec, ServiceSpec, TIMEOUT, eventually};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{Echoing, SERVICES, call, echoes};

fn policy(kind: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": kind,
        "metadata": {"name": name, "namespace": "default"}, "spec": spec,
    })
}

/// `client` and `other` on node a, and `web` on node b behind a Service.
fn mesh() -> Mesh {
    let web = PodSpec::new("web").on("b").service_account("web");
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("other").on("a").service_account("other"))
        .pod(web.label("app", "web"))
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .port(80, 8080),
        )
        .start()
        .unwrap()
}

fn pairs(node: &Node) -> Vec<Value> {
    let answer = mesh_tests::http_get(node.netns(), ([127, 0, 0, 1], 15000).into(), "/pairs");
    let answer: Value = serde_json::from_str(&answer.unwrap().body).unwrap();
    answer["pairs"].as_array().unwrap().clone()
}

/// Waits until the node has counted so many connections to its pods.
fn counted(node: &Node, connections: u64) {
    eventually(TIMEOUT, "the connections in the pairs", || {
        let pairs = pairs(node).into_iter();
        let inbound = pairs.filter(|pair| pair["direction"] == "inbound");
        let count: u64 = inbound
            .filter_map(|pair| pair["connections"].as_u64())
            .sum();
        (count == connections).then_some(())
    })
    .unwrap();
}

fn apply(mesh: &Mesh, object: &Value) {
    for node in ["a", "b"] {
        mesh.node(node).manifests().apply(object).unwrap();
    }
}

#[test]
fn applying_suggested_policies_refuses_nothing_that_was_seen() {
    let stage = Echoing::on(mesh(), &Default::default());
    let Echoing {
        client, web, mesh, ..
    } = &stage;
    let (other, node) = (mesh.pod("other"), mesh.node("b"));
    let service = SERVICES[0].parse().unwrap();
    echoes(client, service);
    echoes(client, web.at(8080));
    counted(node, 2);

    let strict = node.auth(&["strict-readiness"]).unwrap();
    assert_eq!(strict.code(), Some(0), "{}", strict.stdout);
    // However many minutes that took.
    let (_, safe) = strict
        .stdout
        .split_once("default    8080  safe: 2 connections in ")
        .unwrap_or_else(|| panic!("{}", strict.stdout));
    let (span, _) = safe.split_once(", all mTLS").unwrap();
    assert!(span.ends_with(" min"), "{span}");

    let suggested = node
        .auth(&["policy", "suggest", "--namespace", "default"])
        .unwrap()
        .ok()
        .unwrap()
        .stdout;
    assert!(
        suggested.contains("# cluster.local/ns/default/sa/client: 2 connections to port 8080"),
        "{suggested}"
    );
    let elsewhere = node
        .auth(&["policy", "suggest", "--namespace", "bank"])
        .unwrap();
    assert!(!elsewhere.stdout.contains("kind:"), "{}", elsewhere.stdout);

    // The comparison names the callers that would be refused: others than those seen.
    let (old, new) = (
        node.folder().join("old.yaml"),
        node.folder().join("new.yaml"),
    );
    fs::write(&old, "{apiVersion: v1, kind: List, items: []}\n").unwrap();
    fs::write(&new, &suggested).unwrap();
    let (old, new) = (old.display().to_string(), new.display().to_string());
    let diff = ["policy", "check", "--diff", &old, &new, "-o", "json"];
    let diff: Value = serde_json::from_str(&node.auth(&diff).unwrap().stdout).unwrap();
    assert_eq!(diff["ending"], json!([]), "{diff}");
    let refused = diff["refused"].as_array().unwrap();
    let of = |name: &str, port: &str| {
        refused.iter().any(|change| {
            let client = change["client"].as_str().unwrap_or_default();
            let ports = change["ports"].as_str().unwrap_or_default();
            let named = ports == "all" || ports.split(',').any(|own| own == port);
            change["server"] == "default/web" && client.contains(name) && named
        })
    };
    assert!(of("default/other", "8080"), "{diff}");
    assert!(!of("default/client", "8080"), "{diff}");

    for name in ["a", "b"] {
        mesh.node(name)
            .manifests()
            .write("seen.yaml", &suggested)
            .unwrap();
    }
    eventually(TIMEOUT, "the policy in force", || {
        (call(&other, web.at(8080))["event"] == "failed").then_some(())
    })
    .unwrap();
    assert_eq!(call(&other, service)["event"], "failed");
    echoes(client, service);
    echoes(client, web.at(8080));
}

#[test]
fn callers_that_strict_would_cut_off_are_named_once_they_are_seen() {
    let mesh = mesh();
    let permissive = json!({"mtls": {"mode": "PERMISSIVE"}});
    apply(&mesh, &policy("PeerAuthentication", "default", permissive));
    let stage = Echoing::on(mesh, &Default::default());
    let Echoing {
        client, web, mesh, ..
    } = &stage;
    let node = mesh.node("b");
    echoes(client, web.at(8080));
    echoes(mesh.outside(), web.at(8080));
    counted(node, 1);

    // The kernel lets callers from outside reach the app, so the daemon must not call the port safe.
    let strict = node.auth(&["strict-readiness"]).unwrap();
    assert_eq!(strict.code(), Some(2), "{}", strict.stdout);
    assert!(!strict.stdout.contains("safe:"), "{}", strict.stdout);
    let (_, advice) = strict.stdout.split_once("In each namespace:\n").unwrap();
    assert!(strict.stdout.contains("default/web"), "{}", strict.stdout);

    // What it advises makes them visible.
    let advice: String = advice
        .lines()
        .map(|line| format!("{}\n", line.trim_start()))
        .collect();
    let advice = advice.replace("{name: ", "{namespace: default, name: ");
    node.manifests().write("audit.yaml", &advice).unwrap();
    let cut_off = eventually(TIMEOUT, "a caller from outside", || {
        echoes(mesh.outside(), web.at(8080));
        let strict = node.auth(&["strict-readiness"]).unwrap();
        (strict.code() == Some(1)).then_some(strict.stdout)
    })
    .unwrap();
    assert!(cut_off.contains("default    8080  cuts off "), "{cut_off}");
    let json = node
        .auth(&["strict-readiness", "-o", "json"])
        .unwrap()
        .stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["unseen"], json!([]));
    assert_eq!(json["ports"][0]["authenticated"], 1);

    // Their address is in the suggested policy, so that it refuses nothing that was seen.
    let suggested = node
        .auth(&["policy", "suggest"])
        .unwrap()
        .ok()
        .unwrap()
        .stdout;
    let address = json["ports"][0]["cut_off"][0]["address"].as_str().unwrap();
    assert!(
        suggested.contains(&format!("ipBlocks: [\"{address}\"]")),
        "{suggested}"
    );
}

#[test]
fn a_dry_run_shows_what_it_would_refuse() {
    let mesh = mesh();
    let mut dry_run = policy(
        "AuthorizationPolicy",
        "trial",
        json!({"action": "DENY", "rules": [{"from": [{"source": {"serviceAccounts": ["other"]}}]}]}),
    );
    dry_run["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    apply(&mesh, &dry_run);
    let stage = Echoing::on(mesh, &Default::default());
    let Echoing {
        client, web, mesh, ..
    } = &stage;
    let (other, node) = (mesh.pod("other"), mesh.node("b"));
    echoes(client, web.at(8080));
    echoes(&other, web.at(8080));
    counted(node, 2);
    // A connection is counted a moment before it is shown.
    let [flow] = eventually(TIMEOUT, "the connection that would be denied", || {
        let observed = node.auth(&["observe", "--would-be-denied"]).unwrap();
        <[Value; 1]>::try_from(observed.json_lines()).ok()
    })
    .unwrap();
    assert_eq!(
        (&flow["client_pod"], &flow["verdict"]),
        (&"default/other".into(), &"allowed".into())
    );
    let expected = "dry run: denied by AuthorizationPolicy default/trial rules[0]";
    assert!(
        flow["policy"].as_str().unwrap().contains(expected),
        "{flow}"
    );
    let metric = "auth_daemon_dry_run_denials_total{kind=\"AuthorizationPolicy\",policy=\"default/trial\"} 1\n";
    let metrics = stage.b.metrics().unwrap();
    assert!(metrics.contains(metric), "{metrics}");
    let would: Vec<_> = pairs(node)
        .iter()
        .map(|pair| pair["would_be_denied"].clone())
        .collect();
    assert!(
        would.contains(&json!(1)) && would.contains(&json!(0)),
        "{would:?}"
    );
}
