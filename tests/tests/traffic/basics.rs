//! The basic function: what the apps see, and what the wire carries.

use std::time::Duration;

use mesh_tests::{Mesh, Nginx, PodSpec, ServiceSpec, eventually};

const MARKER: &str = "the-marker-that-must-not-cross-the-wire";

fn two_pods() -> Mesh {
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(
            PodSpec::new("web")
                .on("b")
                .service_account("web")
                .label("app", "web"),
        )
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .address("fd96::7")
                .port(80, 8080),
        )
        .start()
        .unwrap()
}

#[test]
fn curl_reaches_nginx_through_tls() {
    let mesh = two_pods();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let nginx = Nginx::start(&web, 8080, MARKER).unwrap();
    let _daemons = mesh.start_daemons().unwrap();
    let capture = mesh.wire().capture().unwrap();
    for address in [
        web.at(8080),
        web.at6(8080),
        "10.96.0.7:80".parse().unwrap(),
        "[fd96::7]:80".parse().unwrap(),
    ] {
        let url = format!("http://{address}/");
        let answer = client
            .run(
                "curl",
                ["-sS", "-m", "30", "-w", "\n%{remote_ip} %{local_ip}", &url],
            )
            .unwrap()
            .ok()
            .unwrap();
        assert!(answer.stdout.contains(MARKER), "{}", answer.stdout);
        println!("{address}: {}", answer.stdout);
    }
    let requests = eventually(
        Duration::from_secs(5),
        "four requests in nginx's log",
        || Some(nginx.requests()).filter(|requests| requests.len() == 4),
    )
    .unwrap();
    println!("{requests:?}");
    let recording = capture.stop().unwrap();
    assert!(!recording.contains(MARKER.as_bytes()));
    for stream in recording.streams() {
        stream.tls_records().unwrap();
    }
}
