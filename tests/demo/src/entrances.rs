//! Ways into a pod other than its own address, and callers that look like the node: all are judged as any caller from
//! outside.

use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};

use anyhow::{Result, ensure};
use mesh_tests::{Firewall, Nginx, Place};

use super::evidence::Evidence;
use super::stage::{LOGGED, NEIGHBOUR, NODE_B, PORT, Stage};

/// An address that no object lists.
const SECOND: &str = "10.77.2.200";
const NODE_PORT: u16 = 30080;
/// The address of the servers' node by which its pods know it.
const GATEWAY: &str = "10.77.2.1";
const PUBLISHED_PORT: u16 = 8088;

pub(super) fn second_address(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1");
    let address = format!("{SECOND}/32");
    web.run("ip", ["address", "add", &address, "dev", "eth0"])?
        .ok()?;
    stage.mesh.route_to_pod(&web, SECOND.parse()?)?;
    evidence.saw(format!("web-1: ip address add {address} dev eth0"));
    let (outside, from) = (
        stage.mesh.outside().clone(),
        stage.mesh.outside_ipv4().into(),
    );
    let to = SocketAddr::new(SECOND.parse()?, PORT);
    refused(stage, evidence, &outside, from, to)?;
    web.run("ip", ["address", "delete", &address, "dev", "eth0"])?
        .ok()?;
    Ok(())
}

pub(super) fn node_port(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (web, node) = (stage.mesh.pod("web-1"), stage.mesh.node(NODE_B));
    let _translation = Firewall::node_port(node, NODE_PORT, &web, PORT)?;
    let to = SocketAddr::from((node.ipv4(), NODE_PORT));
    evidence.saw(format!(
        "{NODE_B}: {to} is translated to {}, and its callers to {GATEWAY}",
        web.at(PORT)
    ));
    let outside = stage.mesh.outside().clone();
    refused(stage, evidence, &outside, GATEWAY.parse()?, to)?;
    node_is_answered(stage, evidence, web.at(PORT))
}

pub(super) fn host_network(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1").at(PORT);
    let agent = stage.host_network.clone();
    evidence.saw(format!(
        "a process in the network of {NODE_B} and the cgroup {}",
        agent.cgroup().display()
    ));
    refused(stage, evidence, &agent, GATEWAY.parse()?, web)?;
    node_is_answered(stage, evidence, web)
}

pub(super) fn nested_namespace(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let pod = stage.mesh.pod(NEIGHBOUR);
    let (nested, v4, v6) = stage.mesh.nest(&pod)?;
    let inside = SocketAddrV4::new(v4, PORT);
    let _published = Firewall::published_port(
        &pod,
        PUBLISHED_PORT,
        inside,
        SocketAddrV6::new(v6, PORT, 0, 0),
    )?;
    let _nginx = Nginx::start(&nested, PORT, &format!("{} from inside", stage.marker))?;
    let to = pod.at(PUBLISHED_PORT);
    evidence.saw(format!("{NEIGHBOUR} forwards {to} to nginx at {inside}"));
    let (outside, client) = (stage.mesh.outside(), stage.mesh.outside_ipv4());
    refused(stage, evidence, outside, client.into(), to)?;
    node_is_answered(stage, evidence, to)
}

/// Verifies that a request is refused, that the daemon of the server logs a caller at `client`, and that no answer and no
/// request reaches the wire's other end or the app.
fn refused(
    stage: &Stage,
    evidence: &Evidence,
    from: &Place,
    client: IpAddr,
    to: SocketAddr,
) -> Result<()> {
    let daemon = stage.daemon(NODE_B)?;
    let start = daemon.log_position();
    let path = stage.path("another-way");
    let capture = stage.mesh.wire().capture()?;
    let why = stage.ask_in_vain(from, to, &path)?;
    let recording = capture.stop()?;
    evidence.saw(format!("curl from {} to http://{to}: {why}", from.name()));
    let answers = recording.streams().iter().any(|stream| {
        let text = String::from_utf8_lossy(&stream.to_client);
        text.contains(&stage.marker)
    });
    ensure!(!answers, "an answer crossed the wire in plaintext");
    evidence.saw(format!(
        "on the wire: {} packets, and no byte of an answer",
        recording.packets().len()
    ));
    let line = daemon.wait_for_log_after(start, "the refusal", LOGGED, |line| {
        let caller = line["client"].as_str().and_then(|text| text.parse().ok());
        line["target"] == "access"
            && line["result"] == "refused"
            && caller.is_some_and(|caller: SocketAddr| caller.ip() == client)
    })?;
    evidence.saw(format!(
        "{NODE_B} logged: client={} server_identity={} result=refused reason={}",
        line["client"], line["server_identity"], line["reason"]
    ));
    // A later request is logged by nginx. An earlier one would be as well.
    let (web, after) = (stage.mesh.pod("web-1"), stage.path("the-usual-way"));
    stage.ask(web.at(PORT), &after)?;
    stage.request("web-1", &after)?;
    let seen = stage.requests("web-1", &path).len();
    ensure!(seen == 0, "the request reached nginx");
    Ok(())
}

fn node_is_answered(stage: &Stage, evidence: &Evidence, to: SocketAddr) -> Result<()> {
    let node = stage.mesh.node(NODE_B);
    stage.ask_from(node, to, &stage.path("probe"))?;
    evidence.saw(format!(
        "curl from {NODE_B} itself to http://{to}: answered"
    ));
    Ok(())
}
