//! The folder of manifests: what is written there takes effect, and what cannot be read does no harm.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_tests::{Daemon, PodSpec, ServiceSpec, TIMEOUT, eventually, eventually_ok, slowdown};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{
    MARKER, SERVICES, assert_soon, call, daemons, echoes, pair, ways,
};

#[test]
fn an_edit_takes_effect_within_a_second() {
    let mesh = pair();
    let (a, _b) = daemons(&mesh);
    let start = addresses(&a);
    let mut took = Vec::new();
    for round in 1..=8 {
        let service = ServiceSpec::new("edited")
            .selector("app", "web")
            .port(80, 8080);
        let service = (1..=round).fold(service, |service, last| {
            service.address(&format!("10.96.1.{last}"))
        });
        // Renamed into place: from here on it counts.
        mesh.manifests().apply(&service.manifest()).unwrap();
        let since = Instant::now();
        until(&a, start + round);
        took.push(since.elapsed());
    }
    mesh.manifests()
        .remove("Service", "default", "edited")
        .unwrap();
    let since = Instant::now();
    until(&a, start);
    took.push(since.elapsed());
    assert_soon(took, Duration::from_secs(1));
}

#[test]
fn a_service_can_be_called_within_a_second() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (_a, _b) = daemons(&mesh);
    let mut took = Vec::new();
    for number in 97..=99 {
        let service = ServiceSpec::new(&format!("new-{number}"))
            .selector("app", "web")
            .address(&format!("10.96.0.{number}"));
        mesh.manifests()
            .apply(&service.port(1000, 8080).manifest())
            .unwrap();
        let since = Instant::now();
        // An address that nothing has yet does not answer: many short attempts.
        let call = format!("connect --to 10.96.0.{number}:1000 --timeout 100");
        eventually(TIMEOUT, "the service to answer", || {
            client.app(&call).unwrap().success(TIMEOUT).ok()
        })
        .unwrap();
        took.push(since.elapsed());
    }
    assert_soon(took, Duration::from_millis(1200));
}

#[test]
fn a_broken_file_keeps_its_last_good_state_and_the_log_says_what_is_wrong() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let before = (a.status().unwrap().kernel, b.status().unwrap().kernel);
    let mut chat = client
        .app(&format!("chat --to {} --interval 10", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let pod = "pod-default-web.json";
    let service = "service-default-web.json";
    let wrong_address = with(web.manifest(), "/status/podIPs/0/ip", json!("10.77.2.999"));
    let wrong_type = with(web.manifest(), "/spec/containers", json!("none"));
    let wrong_port = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"port": 80}, {"port": 70000}]},
    });
    let wrong_account = with(web.manifest(), "/spec/serviceAccountName", json!("a/b"));
    let good = web.manifest().to_string();
    let one_of_two = format!("{good}\n---\n{wrong_address}");
    for (file, text, complaints) in [
        (
            pod,
            wrong_address.to_string(),
            vec!["Pod default/web", "podIP", "10.77.2.999"],
        ),
        (
            pod,
            wrong_type.to_string(),
            vec!["Pod web", "spec.containers"],
        ),
        (
            pod,
            wrong_account.to_string(),
            vec!["default/web", "spec.serviceAccountName"],
        ),
        (pod, one_of_two, vec!["document 2", "podIP"]),
        (
            pod,
            "kind: Pod\napiVersion: v1\nmetadata: {name: [".to_owned(),
            vec!["not YAML"],
        ),
        (pod, "just words".to_owned(), vec!["apiVersion", "kind"]),
        (
            service,
            wrong_port.to_string(),
            vec!["Service default/web", "spec.ports[1].port"],
        ),
    ] {
        let position = b.log_position();
        mesh.manifests().write(file, &text).unwrap();
        let line = b
            .wait_for_log_after(position, "the fault", Duration::from_secs(5), |line| {
                line["level"] == "ERROR"
            })
            .unwrap();
        let named = mesh.node("b").manifests().folder().join(file);
        assert_eq!(line["file"], named.display().to_string(), "{line}");
        for complaint in complaints {
            assert!(
                line["error"].as_str().unwrap().contains(complaint),
                "{complaint}: {line}"
            );
        }
        for to in ways(&web) {
            echoes(&client, to);
        }
    }
    assert_eq!(
        (a.status().unwrap().kernel, b.status().unwrap().kernel),
        before
    );
    assert!(!b.log_text().contains("pod released"));
    chat.event("round", TIMEOUT).unwrap();
    assert!(
        chat.process().ended().unwrap().is_none(),
        "the conversation goes on"
    );

    // Once corrected, it counts again.
    mesh.manifests()
        .apply(&with(web.manifest(), "/metadata/labels/app", json!("else")))
        .unwrap();
    eventually(TIMEOUT, "the service to lose its endpoint", || {
        (call(&client, web.at(8080))["event"] == "finished"
            && call(&client, SERVICES[0].parse().unwrap())["event"] == "failed")
            .then_some(())
    })
    .unwrap();
    // It is refused, and stays the mesh's.
    assert_eq!(a.status().unwrap().kernel, before.0);
}

#[test]
fn a_broken_file_harms_no_other() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    // It is there before the daemons start, and so has no last good state.
    mesh.manifests()
        .write("broken.yaml", "kind: Pod\napiVersion: v1\nmetadata: 7\n")
        .unwrap();
    mesh.manifests()
        .write("notes.txt", "not a manifest at all")
        .unwrap();
    mesh.manifests()
        .write("other.yaml", "apiVersion: apps/v1\nkind: Deployment\n")
        .unwrap();
    let folder = mesh.node("a").manifests().folder().join("folder.yaml");
    std::fs::create_dir(folder).unwrap();
    let (a, _b) = daemons(&mesh);
    for to in ways(&web) {
        echoes(&client, to);
    }
    let faults: Vec<_> = a
        .logs()
        .into_iter()
        .filter(|line| line["level"] == "ERROR")
        .collect();
    let names = |file: &str| {
        let named = |line: &&Value| {
            line["file"]
                .as_str()
                .is_some_and(|name| name.ends_with(file))
        };
        faults.iter().filter(named).count()
    };
    assert_eq!(
        (
            names("broken.yaml"),
            names("other.yaml"),
            names("notes.txt")
        ),
        (1, 0, 0)
    );
    assert!(names("folder.yaml") >= 1, "{faults:?}");
}

#[test]
fn a_removed_file_removes_its_pods() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let start = || {
        web.app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap()
    };
    let echo = start();
    let (a, b) = daemons(&mesh);
    let before = addresses(&a);
    echoes(&client, web.at(8080));
    mesh.manifests().remove("Pod", "default", "web").unwrap();
    // Two addresses of the pod. Its service has no endpoint any more, and stays the mesh's.
    until(&a, before - 2);
    until(&b, before - 2);
    for to in ways(&web) {
        assert_eq!(call(&client, to)["event"], "failed", "{to}");
    }
    drop(echo);
    eventually(TIMEOUT, "the pod's release", || {
        b.status().unwrap().pods.is_empty().then_some(())
    })
    .unwrap();
    mesh.manifests().apply(&web.manifest()).unwrap();
    let _echo = start();
    b.wait_enrolled(&["default/web"]).unwrap();
    until(&a, before);
    for to in ways(&web) {
        echoes(&client, to);
    }
}

#[test]
fn files_of_several_documents_and_lists_are_read() {
    let mesh = pair();
    let client = mesh.pod("client");
    let (a, b) = daemons(&mesh);
    let before = addresses(&a);
    let pods = ["one", "two", "three", "four"].map(|name| {
        mesh.add_pod_quietly(PodSpec::new(name).on("b").label("app", name))
            .unwrap()
    });
    let _echoes = pods.each_ref().map(|pod| {
        pod.app("echo-server --port 8080")
            .unwrap()
            .listening()
            .unwrap()
    });
    let [one, two, three, four] = pods.each_ref().map(|pod| pod.manifest());
    let service = ServiceSpec::new("one")
        .selector("app", "one")
        .address("10.96.0.41");
    let service = service.port(80, 8080).manifest();
    let several = format!("---\n# comments, too\n{one}\n---\n{service}\n---\n---\n{two}\n");
    mesh.manifests().write("several.yml", &several).unwrap();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [three]});
    mesh.manifests()
        .write("list.json", &list.to_string())
        .unwrap();
    let mut bare = four;
    bare.as_object_mut()
        .unwrap()
        .retain(|name, _| name != "kind" && name != "apiVersion");
    let typed = json!({"apiVersion": "v1", "kind": "PodList", "items": [bare]});
    mesh.manifests()
        .write("typed-list.yaml", &typed.to_string())
        .unwrap();
    b.wait_enrolled(&[
        "default/one",
        "default/two",
        "default/three",
        "default/four",
    ])
    .unwrap();
    until(&a, before + 9);
    for pod in &pods {
        echoes(&client, pod.at(8080));
        echoes(&client, pod.at6(8080));
    }
    echoes(&client, "10.96.0.41:80".parse().unwrap());
    for file in ["several.yml", "list.json", "typed-list.yaml"] {
        mesh.manifests().remove_file(file).unwrap();
    }
    until(&a, before);
}

#[test]
fn an_address_of_two_pods_is_refused_and_the_log_names_both() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    let mut thief = with(web.manifest(), "/metadata/name", json!("thief"));
    thief["spec"]["nodeName"] = "elsewhere".into();
    thief["metadata"]["uid"] = "another".into();
    thief["status"]["podIPs"] = json!([{"ip": web.ipv4()}]);
    thief["metadata"]["labels"] = json!({});
    mesh.manifests().apply(&thief).unwrap();
    let line = a
        .wait_for_log("the contradiction", Duration::from_secs(5), |line| {
            line["level"] == "ERROR"
        })
        .unwrap();
    for part in ["default/web", "default/thief", &web.ipv4().to_string()] {
        assert!(line["message"].as_str().unwrap().contains(part), "{line}");
    }
    let refused = call(&client, web.at(8080));
    assert_eq!(refused["event"], "failed", "{refused}");
    let access = a
        .wait_for_access("the refusal", TIMEOUT, |line| line["result"] == "refused")
        .unwrap();
    assert!(
        access["reason"].as_str().unwrap().contains("more than one"),
        "{access}"
    );
    assert_eq!(echo.events_of("accepted"), Vec::<Value>::new());
    // What is not in dispute continues.
    echoes(&client, web.at6(8080));
    echo.event("accepted", TIMEOUT).unwrap();
    mesh.manifests().remove("Pod", "default", "thief").unwrap();
    eventually_ok(
        Duration::from_secs(5),
        "the address to be served again",
        || {
            let answer = call(&client, web.at(8080));
            anyhow::ensure!(answer["event"] == "finished", "{answer}");
            Ok(())
        },
    )
    .unwrap();
}

#[test]
fn a_service_of_others_is_left_alone() {
    let mesh = pair();
    let client = mesh.pod("client");
    let web = mesh.pod("web");
    let mut outside = mesh
        .outside()
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let nobody = PodSpec::new("nobody").label("app", "nobody");
    mesh.add_pod(nobody.annotation("auth-daemon.io/mesh", "disabled"))
        .unwrap();
    let [a, b] = ["a", "b"].map(|node| mesh.node(node).start_daemon().unwrap());
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    let (before, position) = (addresses(&a), a.log_position());
    // A service whose pods are not of the mesh; its address is the outside host's, so that a server answers.
    let foreign = |label: &str| {
        let service = ServiceSpec::new("foreign")
            .selector("app", label)
            .port(8080, 8080);
        service.address(&mesh.outside_ipv4().to_string()).manifest()
    };
    mesh.manifests().apply(&foreign("nobody")).unwrap();
    let read = |line: &Value| line["message"] == "manifests read" && line["services"] == 2;
    a.wait_for_log_after(position, "the new service", TIMEOUT, read)
        .unwrap();
    assert_eq!(addresses(&a), before);
    let to: SocketAddr = (mesh.outside_ipv4(), 8080).into();
    let capture = mesh.wire().capture().unwrap();
    echoes(&client, to);
    assert!(
        capture.stop().unwrap().contains(MARKER.as_bytes()),
        "it is none of ours"
    );
    let accepted = outside.event("accepted", TIMEOUT).unwrap();
    assert!(
        accepted["peer"]
            .as_str()
            .unwrap()
            .starts_with(&client.ipv4().to_string())
    );
    assert_eq!(a.access_log(), Vec::<Value>::new());

    // With a pod of the mesh behind it, it is.
    mesh.manifests().apply(&foreign("web")).unwrap();
    until(&a, before + 1);
    let capture = mesh.wire().capture().unwrap();
    echoes(&client, to);
    assert!(!capture.stop().unwrap().contains(MARKER.as_bytes()));
    assert_eq!(outside.events_of("accepted").len(), 1);
}

#[test]
fn two_thousand_pods_take_effect_in_a_few_seconds() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    let before = addresses(&a);
    let pods: Vec<Value> = (0..2000)
        .map(|number| {
            let (high, low) = (number / 250, number % 250 + 1);
            json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": format!("pod-{number}"), "namespace": format!("team-{high}"),
                    "uid": format!("uid-{number}"), "labels": {"app": format!("app-{}", number % 50)},
                },
                "spec": {
                    "nodeName": format!("node-{}", number % 40), "serviceAccountName": format!("sa-{}", number % 50),
                    "containers": [{"name": "app", "ports": [{"name": "http", "containerPort": 8080}]}],
                },
                "status": {
                    "phase": "Running",
                    "podIPs": [{"ip": format!("10.88.{high}.{low}")}, {"ip": format!("fd88::{high:x}:{low:x}")}],
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            })
        })
        .collect();
    let text = json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string();
    mesh.manifests().write("many.json", &text).unwrap();
    let since = Instant::now();
    until(&a, before + 4000);
    println!("2,000 pods after {:?}", since.elapsed());
    assert!(
        since.elapsed() < Duration::from_secs(5) * slowdown(),
        "{:?}",
        since.elapsed()
    );
    echoes(&client, web.at(8080));
    echoes(&client, SERVICES[0].parse().unwrap());

    // A small edit beside them takes effect as fast as without them.
    let service = ServiceSpec::new("edited")
        .selector("app", "web")
        .address("10.96.1.1");
    mesh.manifests()
        .apply(&service.port(80, 8080).manifest())
        .unwrap();
    let since = Instant::now();
    until(&a, before + 4001);
    assert!(
        since.elapsed() < Duration::from_secs(3) * slowdown(),
        "{:?}",
        since.elapsed()
    );
    mesh.manifests().remove_file("many.json").unwrap();
    until(&a, before + 1);
}

fn addresses(daemon: &Daemon) -> u64 {
    daemon.status().unwrap().kernel.mesh_addresses
}

fn until(daemon: &Daemon, wanted: u64) {
    eventually_ok(TIMEOUT, "the mesh's addresses in the kernel", || {
        let now = daemon.status()?.kernel.mesh_addresses;
        anyhow::ensure!(now == wanted, "{now}, not {wanted}");
        Ok(())
    })
    .unwrap();
}

fn with(mut manifest: Value, pointer: &str, value: Value) -> Value {
    *manifest.pointer_mut(pointer).unwrap() = value;
    manifest
}
