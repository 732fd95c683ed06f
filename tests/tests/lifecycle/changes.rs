//! A pod changes under a running daemon: its service account, its addresses, its labels.

use std::time::Duration;

use mesh_tests::{Mesh, Nginx, Pod, PodSpec, TIMEOUT, eventually, eventually_ok};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{
    self, MARKER, assert_reset, becomes_reachable, call, daemons, echoes, pair, pod_status, ways,
};
use crate::common::lifecycle_traces::{Routing, wait_attached_to_netns};

#[test]
fn another_service_account_is_another_identity() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let mut chat = client.app(&format!("chat --to {}", web.at(8080))).unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let change = |pod: &mut Value| pod["spec"]["serviceAccountName"] = "other".into();
    mesh.manifests()
        .edit("Pod", "default", "client", change)
        .unwrap();

    // A connection that began under the old name does not continue under it.
    assert_reset(&chat.failure(Duration::from_secs(5)).unwrap());
    let other = "spiffe://cluster.local/ns/default/sa/other";
    eventually(TIMEOUT, "the pod under its new name", || {
        pod_status(&a, "default/client").filter(|pod| pod.identity == other && pod.enrolled)
    })
    .unwrap();
    becomes_reachable(&client, web.at(8080));
    for to in ways(&web) {
        echoes(&client, to);
    }
    let seen = b
        .wait_for_access("the new client", TIMEOUT, |line| line["result"] == "ok")
        .unwrap();
    assert_eq!(seen["client_identity"], other);
    let status = a.status().unwrap();
    let held: Vec<_> = status
        .certificates
        .iter()
        .map(|held| held.identity.as_str())
        .collect();
    assert_eq!(held, [other]);
    assert_eq!(status.kernel.pods, 1);
    wait_attached_to_netns(&client, 1);
    assert!(Routing::of(&client).is_prepared());
    let errors: Vec<_> = a
        .logs()
        .into_iter()
        .filter(|line| line["level"] == "ERROR")
        .collect();
    assert_eq!(errors, Vec::<Value>::new());
}

#[test]
fn nothing_slips_through_while_a_pod_is_enrolled_again() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    let (a, _b) = daemons(&mesh);
    let capture = mesh.wire().capture().unwrap();
    let urls = ways(&web).map(|to| format!("http://{to}/{MARKER}"));
    let calls = format!(
        "while :; do curl -s -o /dev/null -m 5 {}; done",
        urls.join(" ")
    );
    let mut callers: Vec<_> = (0..3)
        .map(|_| client.spawn("sh", ["-c", &calls]).unwrap())
        .collect();
    for round in 0..6 {
        let account = format!("account-{round}");
        let change = |pod: &mut Value| pod["spec"]["serviceAccountName"] = account.as_str().into();
        mesh.manifests()
            .edit("Pod", "default", "client", change)
            .unwrap();
        eventually(TIMEOUT, "the pod under its new name", || {
            let status = a.status().ok()?;
            let mut pods = status.pods.iter();
            pods.any(|pod| pod.enrolled && pod.identity.ends_with(&account))
                .then_some(())
        })
        .unwrap();
        let requests = nginx.requests().len();
        eventually(TIMEOUT, "more requests to come through", || {
            (nginx.requests().len() > requests + 8).then_some(())
        })
        .unwrap();
    }
    for caller in &mut callers {
        caller.kill().unwrap();
    }
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
}

#[test]
fn an_address_moves_once_its_old_owner_has_released_it() {
    address_moves(|mesh, one, two| {
        mesh.manifests().apply(one).unwrap();
        settle(mesh, one);
        mesh.manifests().apply(two).unwrap();
    });
}

#[test]
fn an_address_moves_although_both_claim_it_for_a_while() {
    address_moves(|mesh, one, two| {
        mesh.manifests().apply(two).unwrap();
        settle(mesh, two);
        mesh.manifests().apply(one).unwrap();
    });
}

/// Waits until node b's daemon serves the pod with the addresses of this manifest.
fn settle(mesh: &Mesh, manifest: &Value) {
    let wanted = &manifest["status"]["podIPs"];
    let name = format!("default/{}", manifest["metadata"]["name"].as_str().unwrap());
    let served = || {
        let status = mesh.node("b").auth(&["status", "--json"]).ok()?;
        let status: Value = serde_json::from_str(&status.stdout).ok()?;
        let pod = status["pods"]
            .as_array()?
            .iter()
            .find(|pod| pod["pod"] == name.as_str())?;
        let addresses = pod["addresses"]
            .as_array()?
            .iter()
            .map(|ip| json!({"ip": ip}));
        (pod["enrolled"] == true && json!(addresses.collect::<Vec<_>>()) == *wanted).then_some(())
    };
    eventually(TIMEOUT, "the manifest to take effect", served).unwrap();
}

/// The addresses of pod `one` become pod `two`'s, both on one node; `publish` gets the new manifests.
fn address_moves(publish: impl Fn(&Mesh, &Value, &Value)) {
    let mesh = pair();
    let client = mesh.pod("client");
    let [one, two] = ["one", "two"].map(|name| {
        mesh.add_pod(PodSpec::new(name).on("b").service_account(name).ipv4_only())
            .unwrap()
    });
    let (a, b) = daemons(&mesh);
    let moving = one.ipv4();
    let (fresh, old) = ("10.77.2.101", two.ipv4());
    let change = |pod: &Pod, from: &str, to: &str| {
        // With its last address a pod's default route goes.
        for command in [
            format!("addr del {from}/24 dev eth0"),
            format!("addr add {to}/24 dev eth0"),
            "route add default via 10.77.2.1".to_owned(),
        ] {
            pod.run("ip", command.split(' ')).unwrap().ok().unwrap();
        }
        let mut manifest = pod.manifest();
        manifest["status"]["podIP"] = to.into();
        manifest["status"]["podIPs"] = json!([{"ip": to}]);
        manifest
    };
    let manifests = [
        change(&one, &moving.to_string(), fresh),
        change(&two, &old.to_string(), &moving.to_string()),
    ];
    mesh.node("b")
        .run("ip", "neigh flush all".split(' '))
        .unwrap()
        .ok()
        .unwrap();
    publish(&mesh, &manifests[0], &manifests[1]);
    settle(&mesh, &manifests[0]);
    settle(&mesh, &manifests[1]);

    let mut servers = [&one, &two].map(|pod| {
        pod.app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap()
    });
    // The client's node may read its manifests a moment later.
    for (to, server, account) in [(moving.to_string(), 1, "two"), (fresh.to_owned(), 0, "one")] {
        let to = format!("{to}:8080").parse().unwrap();
        eventually_ok(Duration::from_secs(5), "the address to be served", || {
            let answer = call(&client, to);
            anyhow::ensure!(answer["text"] == MARKER, "{to}: {answer}");
            Ok(())
        })
        .unwrap();
        servers[server].event("accepted", TIMEOUT).unwrap();
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
        b.wait_for_access("the call", TIMEOUT, |line| {
            line["result"] == "ok" && line["server_identity"] == identity.as_str()
        })
        .unwrap();
    }
    // And each connects from its address under its own name.
    let _echo = client
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    for (pod, account) in [(&one, "one"), (&two, "two")] {
        echoes(pod, client.at(8080));
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
        a.wait_for_access("the call back", TIMEOUT, |line| {
            line["result"] == "ok" && line["client_identity"] == identity.as_str()
        })
        .unwrap();
    }
    // No pod has this one any more.
    let nobody = call(&client, (old, 8080).into());
    assert_eq!(nobody["event"], "failed", "{nobody}");
}

#[test]
fn a_pods_other_changes_do_not_touch_its_connections() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let mut chat = client
        .app(&format!("chat --to {} --interval 10", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let change = |pod: &mut Value| {
        pod["metadata"]["labels"]["version"] = "2".into();
        pod["status"]["conditions"][0]["status"] = "False".into();
    };
    let position = a.log_position();
    for name in ["client", "web"] {
        mesh.manifests()
            .edit("Pod", "default", name, change)
            .unwrap();
    }
    let read = |line: &Value| line["message"] == "manifests read";
    a.wait_for_log_after(position, "the edit", TIMEOUT, read)
        .unwrap();
    // It is not ready, so its service refuses; by its own address it is there.
    let service = lifecycle_pair::SERVICES[0].parse().unwrap();
    eventually(TIMEOUT, "the service to have no endpoint", || {
        (call(&client, service)["event"] == "failed").then_some(())
    })
    .unwrap();
    echoes(&client, web.at(8080));
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 5).then_some(())
    })
    .unwrap();
    for daemon in [&a, &b] {
        assert!(
            !daemon.log_text().contains("pod released"),
            "{}",
            daemon.log_text()
        );
    }
}
