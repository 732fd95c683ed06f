//! Readiness, `status`, metrics and `check`.

use std::net::SocketAddr;
use std::path::Path;

use mesh_tests::{
    Context, DaemonOptions, Finished, PodSpec, TIMEOUT, eventually, eventually_ok, http_get,
};
use serde_json::Value;

use crate::common::lifecycle_pair::{MARKER, SERVICES, daemons, pair};
use crate::privileges::without;

#[test]
fn ready_when_all_pods_are_enrolled() {
    let mesh = pair();
    for number in 0..10 {
        mesh.add_pod(PodSpec::new(&format!("more-{number}")).on("b"))
            .unwrap();
    }
    let node = mesh.node("b");
    let readiness: SocketAddr = "127.0.0.1:15021".parse().unwrap();
    assert!(http_get(node.netns(), readiness, "/healthz/ready").is_err());
    let mut b = node.spawn_daemon(DaemonOptions::default()).unwrap();
    // At first nothing listens, then 503, then 200. With 200, all pods are enrolled.
    eventually(TIMEOUT, "readiness", || {
        let answer = http_get(node.netns(), readiness, "/healthz/ready").ok()?;
        assert!([200, 503].contains(&answer.status), "{answer:?}");
        (answer.status == 200).then_some(())
    })
    .unwrap();
    let status = b.status().unwrap();
    assert!(status.ready);
    assert_eq!((status.pods.len(), status.kernel.pods), (11, 11));
    assert!(
        status.pods.iter().all(|pod| pod.enrolled),
        "{:?}",
        status.pods
    );

    // A kubelet probes from the node's own address. The status is served on the loopback only.
    for address in [node.ipv4().into(), std::net::IpAddr::from(node.ipv6())] {
        let answer = http_get(node.netns(), (address, 15021).into(), "/healthz/ready").unwrap();
        assert_eq!(answer.status, 200, "{address}: {answer:?}");
        let status = http_get(mesh.outside().netns(), (address, 15000).into(), "/status");
        assert!(status.is_err(), "{address}: {status:?}");
    }
    assert!(b.is_running());
}

#[test]
fn status_shows_pods_certificates_and_live_connections() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let lost = PodSpec::new("lost")
        .on("a")
        .annotation("auth-daemon.io/netns", "/run/netns/none");
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    mesh.add_pod(lost).unwrap();
    let service = SERVICES[0];
    let mut app = client
        .app(&format!("connect --to {service} --send {MARKER} --read"))
        .unwrap();
    let local = app.event("connected", TIMEOUT).unwrap()["local"].clone();
    let bytes = MARKER.len() as u64;
    let live = |status: &Value| {
        let connection = status["connections"][0].clone();
        let all = connection["bytesToServer"] == bytes && connection["bytesToClient"] == bytes;
        all.then_some(connection)
    };
    let not_enrolled = |status: &Value| {
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        pods.into_iter().find(|pod| pod["pod"] == "default/lost")
    };
    let node = mesh.node("a");
    let (status, connection, lost) = eventually(TIMEOUT, "the connection in the status", || {
        let finished = node.auth(&["status", "--json"]).unwrap();
        let status = json(&finished);
        let found = (status.clone(), live(&status)?, not_enrolled(&status)?);
        assert_eq!(finished.code(), Some(1), "a pod is not enrolled");
        Some(found)
    })
    .unwrap();

    assert_eq!(
        (&status["node"], &status["mode"]),
        (&"a".into(), &"STRICT".into())
    );
    assert_eq!(
        status["connections"].as_array().unwrap().len(),
        1,
        "{status}"
    );
    let identity = |account: &str| format!("spiffe://cluster.local/ns/default/sa/{account}");
    for (field, expected) in [
        ("direction", "outbound".to_owned()),
        ("client", local.as_str().unwrap().to_owned()),
        ("destination", service.to_owned()),
        ("service", "default/web".to_owned()),
        ("clientIdentity", identity("client")),
        ("serverIdentity", identity("web")),
    ] {
        assert_eq!(connection[field], expected, "{field} in {connection}");
    }
    let inbound = b.status().unwrap().connections;
    assert_eq!(inbound.len(), 1, "{inbound:?}");
    assert_eq!(
        (inbound[0].direction.as_str(), inbound[0].bytes_to_server),
        ("inbound", bytes)
    );
    assert_eq!(inbound[0].client_identity, Some(identity("client")));

    assert_eq!(lost["enrolled"], false);
    let reason = lost["reason"].as_str().unwrap();
    assert!(reason.contains("/run/netns/none"), "{reason}");
    let pods = status["pods"].as_array().unwrap();
    let enrolled = pods
        .iter()
        .find(|pod| pod["pod"] == "default/client")
        .unwrap();
    assert_eq!(
        (&enrolled["enrolled"], &enrolled["identity"]),
        (&true.into(), &identity("client").into())
    );

    let certificate = &status["certificates"][0];
    assert_eq!(certificate["identity"], identity("client"));
    let issued = |line: &Value| line["message"] == "certificate issued";
    let issued = a.wait_for_log("the certificate", TIMEOUT, issued).unwrap();
    assert_eq!(certificate["serial"], issued["serial"]);
    let serial = certificate["serial"].as_str().unwrap();
    assert!(
        serial.len() >= 16 && serial.bytes().all(|digit| digit.is_ascii_hexdigit()),
        "{serial}"
    );
    // Times in the same RFC 3339 format sort as text.
    let time = |field: &str| certificate[field].as_str().unwrap().to_owned();
    assert!(time("notBefore") < time("notAfter"), "{certificate}");
    assert!(time("notAfter").ends_with('Z'), "{certificate}");

    let table = node.auth(&["status"]).unwrap().stdout;
    for part in [
        "node a",
        "mode STRICT",
        "ready",
        "PODS (2)",
        "CERTIFICATES (1)",
        "CONNECTIONS (1)",
        serial,
        &time("notAfter"),
        local.as_str().unwrap(),
        service,
        reason,
        &identity("web"),
    ] {
        assert!(
            table.contains(part),
            "{part:?} is not in the table:\n{table}"
        );
    }
    let row = table.lines().find(|line| line.contains(service)).unwrap();
    assert_eq!(row.matches(&format!(" {bytes} ")).count(), 2, "{row}");
    app.process().kill().unwrap();
    eventually(TIMEOUT, "the connection to leave the status", || {
        a.status().unwrap().connections.is_empty().then_some(())
    })
    .unwrap();
}

#[test]
fn metrics_count_connections_by_result() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons(&mesh);
    let [address, refused] = [8080, 8081].map(|port| format!("{}:{port}", web.addresses()[0]));
    let talk = format!("connect --to {address} --send {MARKER} --shutdown --read");
    client.app(&talk).unwrap().finish(TIMEOUT).unwrap();
    let in_vain = client
        .app(&format!("connect --to {refused} --read"))
        .unwrap();
    in_vain.finish(TIMEOUT).unwrap();
    let bytes = MARKER.len();
    for (daemon, direction) in [(&a, "outbound"), (&b, "inbound")] {
        let expected = [
            format!(
                "auth_daemon_connections_total{{direction=\"{direction}\",path=\"tunnel\",result=\"ok\"}} 1\n"
            ),
            format!(
                "auth_daemon_connections_total{{direction=\"{direction}\",path=\"tunnel\",result=\"refused\"}} 1\n"
            ),
            format!(
                "auth_daemon_connection_bytes_total{{direction=\"{direction}\",path=\"tunnel\",to=\"server\"}} {bytes}\n"
            ),
            "auth_daemon_pods{state=\"enrolled\"} 1\n".to_owned(),
            "auth_daemon_ready 1\n".to_owned(),
        ];
        // The line is written, and the connection counted, after the app has seen the end.
        eventually_ok(TIMEOUT, "all that is counted", || {
            let metrics = daemon.metrics()?;
            for line in &expected {
                let found = metrics.contains(line).then_some(());
                found.with_context(|| format!("no {line} in:\n{metrics}"))?;
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn the_reference_names_each_metric_and_each_field_of_the_status() {
    const PAGES: [&str; 3] = [
        include_str!("../../../docs/OPERATIONS.md"),
        include_str!("../../../docs/FEDERATION.md"),
        include_str!("../../../docs/MULTICLUSTER.md"),
    ];
    let names = |name: &str| PAGES.iter().any(|page| page.contains(name));
    let mesh = pair();
    let daemon = mesh.node("a").start_daemon().unwrap();

    let metrics = daemon.metrics().unwrap();
    let families = metrics.lines().filter_map(|line| {
        let family = line.strip_prefix("# TYPE ")?;
        family.split(' ').next()
    });
    let families: Vec<_> = families.collect();
    assert!(families.contains(&"auth_daemon_ready"), "{metrics}");
    let unknown: Vec<_> = families.into_iter().filter(|name| !names(name)).collect();
    assert_eq!(unknown, [""; 0], "metrics that the reference lacks");

    let status = daemon.status_json().unwrap();
    let pods = status["pods"][0].as_object().unwrap();
    let fields = status.as_object().unwrap().keys().chain(pods.keys());
    let fields = fields.map(|field| field.as_str());
    // As code: `pods[]`, `pool.idle`, `ready`.
    let lacks = |field: &&str| {
        !["`", ".", "["]
            .iter()
            .any(|end| names(&format!("`{field}{end}")))
    };
    let unknown: Vec<_> = fields.filter(lacks).collect();
    assert_eq!(unknown, [""; 0], "fields that the reference lacks");
}

#[test]
fn status_reports_that_no_daemon_runs() {
    let mesh = pair();
    for arguments in [&["status"][..], &["status", "--json"]] {
        let finished = mesh.node("a").auth(arguments).unwrap();
        assert_eq!(finished.code(), Some(2));
        assert_eq!(finished.stdout, "");
        let complaint = "no daemon answers at http://127.0.0.1:15000";
        assert!(finished.stderr.contains(complaint), "{}", finished.stderr);
    }
}

#[test]
fn check_passes_on_this_machine() {
    let mesh = pair();
    let node = mesh.node("a");
    let text = node.auth(&["check"]).unwrap();
    assert_eq!(text.code(), Some(0), "{}{}", text.stdout, text.stderr);
    assert!(!text.stdout.contains("MISSING"), "{}", text.stdout);
    assert!(text.stdout.lines().count() >= 6, "{}", text.stdout);
    let report = json(&node.auth(&["check", "--json"]).unwrap().ok().unwrap());
    assert_eq!(report["ok"], true, "{report}");
    for need in [
        "kernel",
        "capabilities",
        "cgroup v2",
        "bpf file system",
        "eBPF programs",
    ] {
        let findings = report["findings"].as_array().unwrap();
        let finding = findings.iter().find(|finding| finding["name"] == need);
        assert_eq!(
            finding.unwrap_or_else(|| panic!("no {need} in {report}"))["ok"],
            true
        );
    }
    // Also beside a running daemon, with its configuration, and without changing anything.
    let a = node.start_daemon().unwrap();
    let config = node.folder().join("auth-daemon.yaml").display().to_string();
    node.auth(&["check", "--config", &config])
        .unwrap()
        .ok()
        .unwrap();
    let kernel = a.status().unwrap().kernel;
    assert_eq!(kernel.pods, 1);
    assert!(a.is_ready());
}

#[test]
fn check_reports_missing_requirements() {
    let mesh = pair();
    let node = mesh.node("a");
    if !Path::new("/usr/bin/setpriv").exists() {
        println!("SKIPPED check_reports_missing_requirements: no setpriv (util-linux)");
        return;
    }
    let few = without(node, "-net_admin,-sys_ptrace", &["check"]);
    assert_eq!(few.code(), Some(1), "{}", few.stdout);
    let line = few
        .stdout
        .lines()
        .find(|line| line.contains("capabilities"))
        .unwrap();
    for part in ["MISSING", "CAP_NET_ADMIN", "CAP_SYS_PTRACE"] {
        assert!(line.contains(part), "{line}");
    }
    assert!(!line.contains("CAP_SYS_ADMIN"), "{line}");
    assert!(few.stderr.contains("1 of"), "{}", few.stderr);

    let none = without(node, "-all", &["check", "--json"]);
    assert_eq!(none.code(), Some(1), "{}", none.stdout);
    let report = json(&none);
    assert_eq!(report["ok"], false);
    let missing = |name: &str| {
        let findings = report["findings"].as_array().unwrap();
        let finding = findings
            .iter()
            .find(|finding| finding["name"] == name)
            .unwrap();
        assert_eq!(finding["ok"], false, "{finding}");
        finding["detail"].as_str().unwrap().to_owned()
    };
    let capabilities = missing("capabilities");
    for name in ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "run as root"] {
        assert!(capabilities.contains(name), "{capabilities}");
    }
    assert!(!missing("eBPF programs").is_empty());

    let config = node.folder().join("no-cgroup.yaml");
    let text = "nodeName: a\ndiscovery: {files: /m}\nca: {directory: /ca}\n\
                kernel: {cgroup: /proc, pins: /tmp/pins}\n";
    std::fs::write(&config, text).unwrap();
    let elsewhere = node
        .auth(&["check", "--config", &config.display().to_string()])
        .unwrap();
    assert_eq!(elsewhere.code(), Some(1), "{}", elsewhere.stdout);
    for part in ["/proc is not a cgroup v2", "/tmp/pins is not on one"] {
        assert!(elsewhere.stdout.contains(part), "{}", elsewhere.stdout);
    }
}

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap()
}
