//! Objects that claim a namespace or address of another pod or of the node. The first owner keeps it, and nothing
//! leaves the mesh because of it.

use mesh_tests::{Daemon, Mesh, Nginx, Pod, PodSpec, TIMEOUT, eventually, http_get};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{MARKER, daemons, pair, pod_status};

/// Another object, `twin`, for the pod `like`.
fn twin(like: &Pod, address: &str) -> Value {
    let mut manifest = like.manifest();
    manifest["metadata"]["name"] = "twin".into();
    manifest["metadata"]["uid"] = "twin".into();
    manifest["metadata"]["labels"] = json!({});
    manifest["status"]["podIP"] = address.into();
    manifest["status"]["podIPs"] = json!([{ "ip": address }]);
    manifest
}

fn reason_of(daemon: &Daemon, pod: &str) -> String {
    eventually(TIMEOUT, "a pod that is not enrolled", || {
        pod_status(daemon, pod).filter(|pod| !pod.enrolled)
    })
    .unwrap()
    .reason
    .unwrap_or_default()
}

/// The mesh reaches `web`, and a stranger does not.
fn assert_guarded(mesh: &Mesh, client: &Pod, web: &Pod) {
    let url = format!("http://{}/", web.at(8080));
    let curl = |place: &mesh_tests::Place| place.run("curl", ["-sS", "-m", "30", &url]).unwrap();
    let answer = curl(client.place());
    assert!(answer.stdout.contains(MARKER), "{answer:?}");
    let stranger = curl(mesh.outside());
    assert!(
        stranger.status.code() == Some(56) && stranger.stdout.is_empty(),
        "{stranger:?}"
    );
}

#[test]
fn a_namespace_stays_with_the_pod_that_was_first() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    let (_a, b) = daemons(&mesh);
    mesh.manifests().apply(&twin(&web, "10.77.2.99")).unwrap();
    let reason = reason_of(&b, "default/twin");
    assert!(
        reason.contains("is the network namespace of pod default/web"),
        "{reason}"
    );
    assert_guarded(&mesh, &client, &web);
    mesh.manifests().remove("Pod", "default", "twin").unwrap();
    eventually(TIMEOUT, "the twin to be forgotten", || {
        pod_status(&b, "default/twin").is_none().then_some(())
    })
    .unwrap();
    assert_guarded(&mesh, &client, &web);
}

#[test]
fn an_address_stays_with_the_pod_that_was_first_and_is_served_after_the_dispute() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    let (_a, b) = daemons(&mesh);
    let other = mesh.add_pod(PodSpec::new("other").on("b")).unwrap();
    b.wait_enrolled(&["default/other"]).unwrap();
    let claim = |pod: &mut Value| {
        pod["status"]["podIP"] = web.ipv4().to_string().into();
        pod["status"]["podIPs"] = json!([{ "ip": web.ipv4().to_string() }]);
    };
    mesh.manifests()
        .edit("Pod", "default", "other", claim)
        .unwrap();
    b.wait_for_log("the dispute", TIMEOUT, |line| {
        line["message"]
            .as_str()
            .is_some_and(|text| text.contains("is claimed by pod"))
    })
    .unwrap();
    // Refused at once, and not left hanging in another pod's listener.
    let stranger = mesh
        .outside()
        .run(
            "curl",
            ["-sS", "-m", "30", &format!("http://{}/", web.at(8080))],
        )
        .unwrap();
    assert_eq!(stranger.status.code(), Some(56), "{stranger:?}");
    mesh.manifests().apply(&other.manifest()).unwrap();
    eventually(TIMEOUT, "the address to be served again", || {
        let answer = client
            .run(
                "curl",
                ["-sS", "-m", "10", &format!("http://{}/", web.at(8080))],
            )
            .ok()?;
        answer.stdout.contains(MARKER).then_some(())
    })
    .unwrap();
    assert_guarded(&mesh, &client, &web);
}

#[test]
fn the_nodes_own_namespace_is_no_pods() {
    let mesh = pair();
    let (_a, b) = daemons(&mesh);
    let mut manifest = twin(&mesh.pod("web"), "10.77.2.99");
    manifest["metadata"]["annotations"]["auth-daemon.io/netns"] =
        format!("/proc/{}/ns/net", b.pid()).into();
    mesh.manifests().apply(&manifest).unwrap();
    let reason = reason_of(&b, "default/twin");
    assert!(
        reason.contains("is the node's own network namespace"),
        "{reason}"
    );
    let readiness = (mesh.node("b").ipv4(), 15021).into();
    let answer = http_get(mesh.outside().netns(), readiness, "/healthz/ready").unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[test]
fn a_pod_whose_path_is_gone_stays_guarded() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    // The way of a process of the pod's, which then ends.
    let mut process = web.spawn("sleep", ["600"]).unwrap();
    let path = format!("/proc/{}/ns/net", process.pid());
    let by_process = |pod: &mut Value| {
        pod["metadata"]["annotations"]["auth-daemon.io/netns"] = path.clone().into();
    };
    mesh.manifests()
        .edit("Pod", "default", "web", by_process)
        .unwrap();
    let (_a, b) = daemons(&mesh);
    assert_guarded(&mesh, &client, &web);
    process.kill().unwrap();
    eventually(TIMEOUT, "the path to be gone", || {
        (!std::path::Path::new(&path).exists()).then_some(())
    })
    .unwrap();
    // Any change of the registry makes the daemon check all its pods again.
    mesh.add_pod(PodSpec::new("later").on("b")).unwrap();
    b.wait_enrolled(&["default/later"]).unwrap();
    assert_guarded(&mesh, &client, &web);
    assert!(pod_status(&b, "default/web").unwrap().enrolled);
    let released = b
        .logs()
        .into_iter()
        .any(|line| line["message"] == "pod released");
    assert!(!released);
}

#[test]
fn a_pod_that_holds_the_daemons_port_is_refused_and_not_left_in_plaintext() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    let mut squatter = client
        .app("echo-server --port 15001")
        .unwrap()
        .listening()
        .unwrap();
    let a = mesh.node("a").start_daemon().unwrap();
    let _b = mesh.node("b").start_daemon().unwrap();
    let reason = reason_of(&a, "default/client");
    assert!(reason.contains("cannot listen inside it"), "{reason}");
    let capture = mesh.wire().capture().unwrap();
    for to in [web.at(8080), web.at6(8080)] {
        let call = client
            .app(&format!("connect --to {to} --send {MARKER}"))
            .unwrap();
        let failed = call.failure(TIMEOUT).unwrap();
        assert_eq!(
            (&failed["stage"], &failed["errno"]),
            (&"connect".into(), &"EPERM".into())
        );
    }
    let sent = capture.stop().unwrap();
    assert_eq!(
        sent.only(|packet| packet.touches(client.ipv4().into()))
            .packets()
            .len(),
        0
    );
    squatter.process().kill().unwrap();
    a.wait_enrolled(&["default/client"]).unwrap();
    assert_guarded(&mesh, &client, &web);
}
