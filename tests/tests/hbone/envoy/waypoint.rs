//! Envoy as a waypoint: a pod outside the mesh that all connections to a service go through, by HBONE on both sides.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    DaemonOptions, Envoy, Mesh, Package, Pod, PodSpec, ServiceSpec, TIMEOUT, eventually_ok,
};
use serde_json::json;

use super::GROUP;
use super::config::{Answer, Config};
use crate::common::authority::{files, spiffe};
use crate::common::pair::Pair;

/// The server's app.
const APP: u16 = 8080;
/// Envoy's loopback port, whose connections it sends on to the server.
const ONWARD: u16 = 9000;
const SERVICE: &str = "10.96.0.7:80";
const SERVICE6: &str = "[fd96::7]:80";
/// Where the service is exposed.
const NODE_PORT: u16 = 30080;
const EXTERNAL: &str = "198.51.100.8";
const LOAD_BALANCER: &str = "198.51.100.7";

fn mesh() -> Result<Mesh> {
    let service = |name: &str, last: u8| {
        ServiceSpec::new(name)
            .selector("app", name)
            .address(&format!("10.96.0.{last}"))
            .address(&format!("fd96::{last}"))
    };
    let web = PodSpec::new("web").on("b").service_account("web");
    Mesh::builder()
        .node("a")
        .node("b")
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(web.label("app", "web"))
        .service(service("web", 7).port(80, APP))
        .service(service("waypoint", 9).port(15008, 15008))
        .start()
}

/// Exposes the service, and makes node b's address known.
fn expose(mesh: &Mesh) -> Result<()> {
    let manifests = mesh.manifests();
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "b"},
        "status": {"addresses": [{"type": "InternalIP", "address": mesh.node("b").ipv4()}]},
    });
    manifests.write("node-b.json", &node.to_string())?;
    manifests.edit("Service", "default", "web", |service| {
        service["spec"]["type"] = "LoadBalancer".into();
        service["spec"]["ports"][0]["nodePort"] = NODE_PORT.into();
        service["spec"]["externalIPs"] = json!([EXTERNAL]);
        service["status"] = json!({"loadBalancer": {"ingress": [{"ip": LOAD_BALANCER}]}});
    })
}

/// Starts Envoy in the waypoint's pod with a certificate of this account.
fn start_envoy(pair: &Pair, pod: &Pod, account: &str) -> Result<Envoy> {
    let ca = pair.mesh.node("a").ca_folder();
    let mut config = Config::new(files(&ca, account, pod.folder())?);
    let log = pod.folder().join("access.log");
    let mut answers = Vec::new();
    for service in [SERVICE, SERVICE6] {
        answers.push((service.parse()?, Answer::App(ONWARD)));
    }
    config.serve(&answers, &log);
    let server = pair.web.at(APP);
    config.call(server.ip(), "web", &[(ONWARD, server)], &log);
    Envoy::start(pod, config.finish(), GROUP)
}

fn connect(to: &str) -> String {
    format!("connect --to {to} --send hello --shutdown --read")
}

/// Waits until a connection to the service is refused for a reason that has this text.
fn is_refused(pair: &Pair, because: &str) -> Result<()> {
    is_refused_at(pair, SERVICE, because)
}

/// Waits until a connection to `to` is refused for a reason that has this text.
fn is_refused_at(pair: &Pair, to: &str, because: &str) -> Result<()> {
    eventually_ok(TIMEOUT, because, || {
        pair.client.app(&connect(to))?.failure(TIMEOUT)?;
        let log = pair.near.access_log();
        let last = log.last().context("no line yet")?;
        let reason = last["reason"].as_str().unwrap_or_default();
        if !reason.contains(because) || last["result"] != "refused" {
            bail!("{last}");
        }
        Ok(())
    })
}

#[test]
fn connections_to_a_service_go_through_its_waypoint_or_nowhere() -> Result<()> {
    let test = "connections_to_a_service_go_through_its_waypoint_or_nowhere";
    if Package::folders(test, &[Package::ENVOY]).is_none() {
        return Ok(());
    }
    let mesh = mesh()?;
    expose(&mesh)?;
    let pair = Pair::on(mesh, &DaemonOptions::default())?;
    let waypoint = PodSpec::new("waypoint").on("b").service_account("waypoint");
    let waypoint = waypoint.label("app", "waypoint");
    let waypoint = pair
        .mesh
        .add_pod(waypoint.annotation("auth-daemon.io/mesh", "disabled"))?;
    let manifests = pair.mesh.manifests();
    // The server admits nobody but the waypoint.
    manifests.apply(&json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "only-waypoint", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/waypoint"]}}]}],
        },
    }))?;
    let _app = pair
        .web
        .app(&format!("echo-server --port {APP} --quiet"))?
        .listening()?;
    is_refused(&pair, "forbids")?;
    manifests.edit("Service", "default", "web", |service| {
        service["metadata"]["labels"]["istio.io/use-waypoint"] = "waypoint".into();
    })?;
    is_refused(&pair, "cannot connect")?;

    let impostor = start_envoy(&pair, &waypoint, "impostor")?;
    is_refused(&pair, "secure naming")?;
    drop(impostor);

    let _envoy = start_envoy(&pair, &waypoint, "waypoint")?;
    let recording = pair.mesh.wire().capture()?;
    // Envoy serves nothing but the service's own addresses.
    let exposed = [
        format!("{}:{NODE_PORT}", pair.mesh.node("b").ipv4()),
        format!("{EXTERNAL}:80"),
        format!("{LOAD_BALANCER}:80"),
    ];
    let all = exposed
        .each_ref()
        .map(|at| (at.as_str(), waypoint.at(15008)));
    for (service, at) in [
        (SERVICE6, waypoint.at6(15008)),
        (SERVICE, waypoint.at(15008)),
    ]
    .into_iter()
    .chain(all)
    {
        let served = pair.client.app(&connect(service))?.success(TIMEOUT)?;
        ensure!(served["received"] == "hello".len(), "{served}");
        // The log may also have a connection from before the policy was in force.
        let line = pair.near.wait_for_access(service, TIMEOUT, |line| {
            line["destination"] == service && line["path"] == "hbone" && line["result"] == "ok"
        })?;
        ensure!(
            line["endpoint"] == at.to_string().as_str()
                && line["service"] == "default/web"
                && line["client_identity"] == spiffe("client").as_str()
                && line["server_identity"] == spiffe("waypoint").as_str(),
            "{line}"
        );
    }
    // The server's node sees the waypoint as the client.
    let line = pair.far.wait_for_access("the waypoint", TIMEOUT, |line| {
        line["client_identity"] == spiffe("waypoint").as_str() && line["result"] == "ok"
    })?;
    ensure!(line["path"] == "hbone", "{line}");
    // Envoy writes its lines in batches.
    eventually_ok(TIMEOUT, "the service in the waypoint's log", || {
        let log = fs::read_to_string(waypoint.folder().join("access.log"))?;
        ensure!(
            log.contains(SERVICE) && log.contains(&spiffe("client")),
            "{log}"
        );
        Ok(())
    })?;
    let connections = recording.stop()?.connections();
    let around = |(from, to): &&(std::net::IpAddr, std::net::SocketAddr)| {
        let client = [pair.client.at(0).ip(), pair.client.at6(0).ip()];
        client.contains(from) && to.port() != 15008
    };
    ensure!(!connections.iter().any(|it| around(&it)), "{connections:?}");

    manifests.remove("Service", "default", "waypoint")?;
    is_refused(
        &pair,
        "no known service or pod is waypoint default/waypoint",
    )?;
    for at in &exposed {
        is_refused_at(
            &pair,
            at,
            "no known service or pod is waypoint default/waypoint",
        )?;
    }
    Ok(())
}
