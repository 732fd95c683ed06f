//! Ports at which services and pods are exposed on addresses that are not their own: a pod of the mesh that dials one
//! is tunnelled as if it had dialled the service, or for a host port the pod. In STRICT, so plaintext would be refused.

use std::net::SocketAddr;

use mesh_tests::{App, Context, DaemonOptions, Place, PodSpec, Result, TIMEOUT, eventually_ok};
use serde_json::{Value, json};

use crate::common::pair::{self, Pair};

const MARKER: &str = "exposed-port-marker";
const NODE_PORT: u16 = 30080;
const HOST_PORT: u16 = 9090;
/// A node of which these nodes know only the object.
const THIRD_NODE: &str = "192.0.2.33";
const LOAD_BALANCER: &str = "198.51.100.7";
const EXTERNAL: &str = "198.51.100.8";

/// A pair whose service `web` is exposed in every way, and whose pod `web` has a host port. Another pod is on its node.
fn stage() -> Result<(Pair, App)> {
    let neighbour = PodSpec::new("neighbour").on("b").service_account("client");
    let mesh = pair::builder().routed().pod(neighbour).start()?;
    let manifests = mesh.manifests();
    let addresses = |name: &str| {
        let node = mesh.node(name);
        [node.ipv4().to_string(), node.ipv6().to_string()]
    };
    for (name, addresses) in [
        ("a", addresses("a").to_vec()),
        ("b", addresses("b").to_vec()),
        ("third", vec![THIRD_NODE.to_owned()]),
    ] {
        let addresses = addresses.iter();
        let addresses = addresses.map(|ip| json!({"type": "InternalIP", "address": ip}));
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "status": {"addresses": addresses.collect::<Vec<_>>()},
        });
        manifests.write(&format!("node-{name}.json"), &node.to_string())?;
    }
    manifests.edit("Service", "default", "web", |service| {
        service["spec"]["type"] = "LoadBalancer".into();
        service["spec"]["ports"][0]["nodePort"] = NODE_PORT.into();
        service["spec"]["externalIPs"] = json!([EXTERNAL]);
        service["status"] = json!({"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER}]}});
    })?;
    let host = addresses("b").map(|ip| json!({"ip": ip}));
    manifests.edit("Pod", "default", "web", |pod| {
        pod["spec"]["containers"][0]["ports"] =
            json!([{"containerPort": 8080, "hostPort": HOST_PORT}]);
        pod["status"]["hostIPs"] = host.to_vec().into();
    })?;
    let pair = Pair::on(mesh, &DaemonOptions::default())?;
    let echo = pair.web.app("echo-server --port 8080")?.listening()?;
    Ok((pair, echo))
}

fn is_answered(from: &Place, to: SocketAddr) -> Result<bool> {
    let command = format!("connect --to {to} --timeout 5000 --send {MARKER} --shutdown --read");
    let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
    Ok(events.last().context("no event")?["text"] == MARKER)
}

fn dialled(line: &Value, to: SocketAddr) -> bool {
    line["destination"] == to.to_string()
}

#[test]
fn an_exposed_port_is_tunnelled_as_the_service_or_the_pod() -> Result<()> {
    let (pair, _echo) = stage()?;
    let [a, b] = ["a", "b"].map(|name| pair.mesh.node(name));
    let capture = pair.mesh.wire().capture()?;
    let at = |address: &str, port: u16| -> Result<SocketAddr> {
        Ok((address.parse::<std::net::IpAddr>()?, port).into())
    };
    let service = "default/web";
    for (to, service) in [
        (SocketAddr::from((a.ipv4(), NODE_PORT)), service),
        ((a.ipv6(), NODE_PORT).into(), service),
        ((b.ipv4(), NODE_PORT).into(), service),
        ((b.ipv6(), NODE_PORT).into(), service),
        (at(THIRD_NODE, NODE_PORT)?, service),
        (at(LOAD_BALANCER, 80)?, service),
        (at(EXTERNAL, 80)?, service),
        ((b.ipv4(), HOST_PORT).into(), ""),
        ((b.ipv6(), HOST_PORT).into(), ""),
    ] {
        assert!(is_answered(&pair.client, to)?, "{to}");
        let line = pair
            .near
            .wait_for_access("the client's line", TIMEOUT, |line| dialled(line, to))?;
        assert_eq!(line["result"], "ok", "{line}");
        assert_eq!(line["service"], service, "{line}");
        assert_eq!(
            line["server_identity"], "spiffe://cluster.local/ns/default/sa/web",
            "{line}"
        );
    }
    let recorded = capture.stop()?;
    assert!(!recorded.contains(MARKER.as_bytes()), "plaintext");
    Ok(())
}

#[test]
fn an_exposed_port_of_a_service_on_the_same_node() -> Result<()> {
    let (pair, _echo) = stage()?;
    let neighbour = pair.mesh.pod("neighbour");
    let to = SocketAddr::from((pair.mesh.node("b").ipv4(), NODE_PORT));
    // The first connection goes through the daemon, later ones stay in the kernel.
    for _ in 0..3 {
        assert!(is_answered(&neighbour, to)?);
    }
    eventually_ok(TIMEOUT, "lines of all connections", || {
        let lines = pair.far.access_log();
        let ours = lines
            .iter()
            .filter(|line| dialled(line, to) && line["result"] == "ok");
        (ours.count() >= 3).then_some(()).context("too few")
    })
}

#[test]
fn other_ports_of_a_node_and_the_loopback_keep_the_kernels_own_path() -> Result<()> {
    let (pair, _echo) = stage()?;
    let node = pair.mesh.node("a");
    let _on_node = node.app("echo-server --port 8099")?.listening()?;
    let _own = pair.client.app("echo-server --port 30080")?.listening()?;
    for to in [
        SocketAddr::from((node.ipv4(), 8099)),
        (node.ipv6(), 8099).into(),
        ([127, 0, 0, 1], NODE_PORT).into(),
    ] {
        assert!(is_answered(&pair.client, to)?, "{to}");
        let lines = pair.near.access_log();
        assert!(
            !lines.iter().any(|line| dialled(line, to)),
            "{to} is captured"
        );
    }
    Ok(())
}

#[test]
fn a_port_that_two_services_expose_is_refused() -> Result<()> {
    let (pair, echo) = stage()?;
    let to: SocketAddr = format!("{EXTERNAL}:80").parse()?;
    assert!(is_answered(&pair.client, to)?);
    let thief = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "thief", "namespace": "default"},
        "spec": {
            "clusterIP": "10.96.0.99", "externalIPs": [EXTERNAL], "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": 8080}],
        },
    });
    pair.mesh.manifests().apply(&thief)?;
    eventually_ok(TIMEOUT, "a refusal", || {
        (!is_answered(&pair.client, to)?)
            .then_some(())
            .context("answered")
    })?;
    let accepted = echo.events_of("accepted").len();
    assert!(!is_answered(&pair.client, to)?);
    assert_eq!(echo.events_of("accepted").len(), accepted);
    let both = "is exposed by service default/thief and service default/web";
    pair.near.wait_for_access("the refusal", TIMEOUT, |line| {
        let reason = line["reason"].as_str();
        dialled(line, to)
            && line["result"] == "refused"
            && reason.is_some_and(|text| text.contains(both))
    })?;
    pair.near.wait_for_log("the dispute", TIMEOUT, |line| {
        let message = line["message"].as_str();
        message.is_some_and(|text| {
            text.contains(
                "198.51.100.8:80 is exposed by service default/thief and by service default/web",
            )
        })
    })?;
    Ok(())
}
