//! Addresses that a service and the node both have, and addresses that no object claims any more.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::{Firewall, Node, PodSpec, TIMEOUT, eventually, eventually_ok};
use serde_json::json;

use super::evidence::Evidence;
use super::stage::{CLIENT, LOGGED, NODE_A, NODE_B, PORT, SHOP, Stage, WEB};
use super::tcpdump::{Tcpdump, packets, readable};

pub(super) fn service_on_node_address(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1");
    let node = stage.mesh.node(NODE_A);
    let daemon = stage.daemon(NODE_A)?;
    // What kube-proxy's IPVS mode does: the node has the service's address and forwards what is sent there.
    let forward = Firewall::install(
        node,
        &format!(
            "counter forwarded {{}}\nchain prerouting {{\n  type nat hook prerouting priority dstnat;\n\
             \x20 ip daddr {WEB} tcp dport 80 counter name forwarded dnat ip to {}\n}}",
            web.at(PORT)
        ),
    )?;
    let before = daemon.status()?.kernel.mesh_addresses;
    let addresses = [format!("{WEB}/32"), SPARE.to_owned()];
    for address in &addresses {
        node.run("ip", ["address", "add", address, "dev", "lo"])?
            .ok()?;
    }
    evidence.saw(format!(
        "{NODE_A}: ip address add {WEB}/32 dev lo; nft: ip daddr {WEB} tcp dport 80 dnat to {}",
        web.at(PORT)
    ));
    eventually(
        LOGGED,
        "the daemon to notice the node's new addresses",
        || (daemon.status().ok()?.kernel.mesh_addresses == before + 1).then_some(()),
    )?;

    let start = daemon.log_position();
    let tcpdump = tcpdump(stage)?;
    let service = SocketAddr::new(WEB.parse()?, 80);
    let answer = stage.ask(service, &stage.path("on-node"))?;
    evidence.saw(format!("curl http://{service} got {:?}", answer.body));
    let text = stop(tcpdump, stage)?;
    let line = daemon.wait_for_log_after(start, "the connection", LOGGED, |line| {
        line["target"] == "access" && line["destination"] == service.to_string()
    })?;
    evidence.saw(format!(
        "{NODE_A} logged: path={} service={} endpoint={}",
        line["path"], line["service"], line["endpoint"]
    ));
    ensure!(line["path"] == "tunnel", "another path: {line}");
    unreadable(&text, &stage.marker, evidence)?;
    let packets = forward.packets("forwarded")?;
    evidence.saw(format!("the node's own rule forwarded {packets} packets"));
    ensure!(packets == 0, "the node forwarded the client's connection");

    // Verify that the rule forwards what is not captured.
    let stranger = stage
        .mesh
        .add_pod_quietly(PodSpec::new("stranger").on(NODE_A))?;
    let _ = stage.ask_in_vain(&stranger, service, &stage.path("stranger"))?;
    let packets = forward.packets("forwarded")?;
    evidence.saw(format!(
        "of a pod that is not enrolled, it forwarded {packets}, and STRICT refused them"
    ));
    ensure!(packets > 0, "the rule forwards nothing");
    stage.mesh.remove_pod("stranger")?;
    for address in &addresses {
        node.run("ip", ["address", "delete", address, "dev", "lo"])?
            .ok()?;
    }
    Ok(())
}

pub(super) fn node_port_tunnelled(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1");
    let manifests = stage.mesh.manifests();
    let (near, far) = (stage.mesh.node(NODE_A), stage.mesh.node(NODE_B));
    // What kube-proxy does. Nothing may reach these rules.
    let _translations = [
        Firewall::node_port(near, NODE_PORT, &web, PORT)?,
        Firewall::node_port(far, NODE_PORT, &web, PORT)?,
    ];
    for node in [near, far] {
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "status": {"addresses": [{"type": "InternalIP", "address": node.ipv4()}]},
        });
        manifests.write(&node_file(node), &object.to_string())?;
    }
    let daemon = stage.daemon(NODE_A)?;
    manifests.edit("Service", "default", "web", |service| {
        service["spec"]["type"] = "NodePort".into();
        service["spec"]["ports"][0]["nodePort"] = NODE_PORT.into();
    })?;
    for node in [near, far] {
        let to = SocketAddr::from((node.ipv4(), NODE_PORT));
        eventually_ok(LOGGED, "the daemon to know the node port", || {
            stage.ask(to, &stage.path("early")).map(drop)
        })?;
    }
    let tcpdump = tcpdump(stage)?;
    for node in [near, far] {
        let start = daemon.log_position();
        let to = SocketAddr::from((node.ipv4(), NODE_PORT));
        let answer = stage.ask(to, &stage.path("node-port"))?;
        evidence.saw(format!(
            "curl http://{to}, a port of {}, got {:?}",
            node.name(),
            answer.body
        ));
        let line = daemon.wait_for_log_after(start, "the connection", LOGGED, |line| {
            line["target"] == "access" && line["destination"] == to.to_string()
        })?;
        evidence.saw(format!(
            "{NODE_A} logged: path={} service={} server_identity={}",
            line["path"], line["service"], line["server_identity"]
        ));
        ensure!(line["path"] == "tunnel", "another path: {line}");
    }
    unreadable(&stop(tcpdump, stage)?, &stage.marker, evidence)?;
    manifests.edit("Service", "default", "web", |service| {
        service["spec"]["type"] = "ClusterIP".into();
        service["spec"]["ports"][0]["nodePort"].take();
    })?;
    for node in [near, far] {
        manifests.remove_file(&node_file(node))?;
    }
    Ok(())
}

fn node_file(node: &Node) -> String {
    format!("node-{}.json", node.name())
}

pub(super) fn removed_address(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, shop) = (stage.mesh.pod(CLIENT), stage.mesh.pod("shop"));
    let daemon = stage.daemon(NODE_A)?;
    let (pod, service) = (shop.at(PORT), SocketAddr::new(SHOP.parse()?, 80));
    for to in [pod, service] {
        stage.ask(to, &stage.path("before-removal"))?;
    }
    stage.mesh.manifests().remove("Pod", "default", "shop")?;
    evidence.saw("removed: the manifest of pod shop; its nginx still runs");

    let tcpdump = tcpdump(stage)?;
    for (to, expected) in [
        (pod, "was the address of pod default/shop"),
        (service, "no ready endpoint"),
    ] {
        let start = daemon.log_position();
        // Again until there is a line: a request that was open when the removal came into force was reset, and not refused.
        let (why, line) = eventually_ok(TIMEOUT, "a refusal", || {
            let why = stage.ask_in_vain(&client, to, &stage.path("removed"))?;
            let lines = daemon.access_log_after(start);
            let mut lines = lines.into_iter();
            let refused = lines
                .find(|line| line["destination"] == to.to_string() && line["result"] == "refused");
            Ok((why, refused.context("no line of it yet")?))
        })?;
        evidence.saw(format!("curl from {CLIENT} to http://{to}: {why}"));
        evidence.saw(format!(
            "{NODE_A} logged: client_identity={} result={} reason={}",
            line["client_identity"], line["result"], line["reason"]
        ));
        let reason = line["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains(expected), "another reason: {line}");
    }

    stage.mesh.manifests().apply(&shop.manifest())?;
    for to in [pod, service] {
        eventually_ok(TIMEOUT, "an answer again", || {
            stage.ask(to, &stage.path("claimed-again")).map(drop)
        })?;
    }
    evidence.saw("with its manifest again: answered");
    unreadable(&stop(tcpdump, stage)?, &stage.marker, evidence)
}

/// Verifies that tcpdump has seen the marker in no packet.
fn unreadable(text: &str, marker: &str, evidence: &Evidence) -> Result<()> {
    let readable = readable(text, marker).len();
    evidence.saw(format!(
        "tcpdump -A on the link of {NODE_A}: {} packets, the marker is in {readable} of them",
        packets(text)
    ));
    ensure!(readable == 0, "the marker crossed the wire");
    Ok(())
}

/// Starts a tcpdump of what the client sends and receives on the link of its node.
fn tcpdump(stage: &Stage) -> Result<Tcpdump> {
    let client = stage.mesh.pod(CLIENT).ipv4();
    let filter = format!("tcp and host {client}");
    Tcpdump::start(stage.mesh.wire(), stage.mesh.node(NODE_A), &filter)
}

/// Ends it. Returns the packets as text.
fn stop(tcpdump: Tcpdump, stage: &Stage) -> Result<String> {
    let nobody = SocketAddr::new(stage.mesh.outside_ipv4().into(), 1);
    stage.ask_in_vain(&stage.mesh.pod(CLIENT), nobody, "/")?;
    tcpdump.stop(&format!("> {}.{}: ", nobody.ip(), nobody.port()))
}

/// An address that no service has: the daemon counts it among the node's.
const SPARE: &str = "198.51.100.9/32";
const NODE_PORT: u16 = 30080;
