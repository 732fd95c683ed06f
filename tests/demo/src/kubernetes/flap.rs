//! The daemon of the server's node stops answering for a moment, while its pods take plaintext.

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::apps::MARKER;
use mesh_tests::cluster::meshed::{APPS, DAEMON, MeshedCluster, PATIENCE, SYSTEM, is_ready, name};
use mesh_tests::eventually_ok;
use serde_json::json;

use super::super::evidence::Evidence;
use super::super::tcpdump::{Tcpdump, packets, readable};
use super::{
    CLIENT, NODES, OUTSIDER, answered, ask, ask_in_vain, logged_so_far, pod_address, text, who,
};

pub(super) fn flap(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    let permissive = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "permissive", "namespace": APPS}, "spec": {"mtls": {"mode": "PERMISSIVE"}},
    });
    cluster.apply(&[permissive])?;
    let url = who(cluster)?;
    eventually_ok(PATIENCE, "an answer in plaintext", || {
        cluster.curl(OUTSIDER, &url)
    })?;
    evidence.saw(format!(
        "with PeerAuthentication PERMISSIVE, curl from {OUTSIDER}, outside the mesh: answered"
    ));
    // The client's daemon reaches the server by the tunnel.
    ask(cluster, evidence, CLIENT)?;

    let daemon = cluster.daemon_on(NODES[1])?;
    let process = cluster.process(&daemon, "container")?;
    let node = cluster.cluster.node(NODES[1]);
    node.run("kill", ["-STOP", &process])?.ok()?;
    let refused = is_refused(cluster, evidence, name(&daemon));
    // Fails if the kubelet has ended it in the meantime, to start another.
    node.run("kill", ["-CONT", &process])?;
    refused?;

    eventually_ok(PATIENCE, "the daemon to be ready again", || {
        cluster.daemon_on(NODES[1])
    })?;
    answered(cluster)?;
    evidence.saw(format!(
        "kill -CONT: the daemon is ready again, and {CLIENT} answered"
    ));
    cluster
        .kubectl(&format!("delete peerauthentication -n {APPS} permissive"))
        .map(drop)
}

/// Checks that the client is refused while `daemon` does not answer, and that it sends nothing in plaintext.
fn is_refused(cluster: &MeshedCluster, evidence: &Evidence, daemon: &str) -> Result<()> {
    eventually_ok(PATIENCE, "the daemon not to be ready", || {
        let pods = cluster.pods(SYSTEM, DAEMON)?;
        let pod = pods.iter().find(|pod| name(pod) == daemon);
        ensure!(!is_ready(pod.context("the daemon's pod is gone")?), "ready");
        Ok(())
    })?;
    evidence.saw(format!(
        "kill -STOP: {daemon}, the daemon of {}, is not ready",
        NODES[1]
    ));
    let (client, outsider) = (
        pod_address(cluster, CLIENT)?.to_string(),
        pod_address(cluster, OUTSIDER)?.to_string(),
    );
    let node = cluster.cluster.node(NODES[0]).node();
    let filter = format!("tcp and (host {client} or host {outsider} or port {FENCE})");
    let tcpdump = Tcpdump::start(cluster.cluster.wire(), node, &filter)?;
    let line = eventually_ok(PATIENCE, "the refusal", || {
        let why = ask_in_vain(cluster, CLIENT)?;
        let line = logged_so_far(cluster, NODES[0], |line| {
            line["result"] == "refused" && text(line, "reason").contains(HAD_DAEMON)
        })?;
        evidence.saw(format!("curl from {CLIENT}: {why}"));
        Ok(line)
    })?;
    evidence.saw(format!(
        "the daemon of {} logged: client_identity={} reason={}",
        NODES[0], line["client_identity"], line["reason"]
    ));
    // What is sent in plaintext is readable there.
    cluster.curl(OUTSIDER, &who(cluster)?)?;
    let fence = format!("{}.{FENCE}: ", node.ipv4());
    let url = format!("http://{}:{FENCE}/", node.ipv4());
    let outside = cluster.cluster.mesh().outside();
    outside.run("curl", ["-s", "--max-time", "2", &url])?;
    let seen = tcpdump.stop(&fence)?;
    let marked = readable(&seen, MARKER);
    let of = |address: &str| {
        let mut headers = marked.iter();
        headers.any(|header| header.contains(&format!("{address}.")))
    };
    evidence.saw(format!(
        "tcpdump -A on the link of {}: {} packets; {} contain the answer, {} of them of {CLIENT}",
        NODES[0],
        packets(&seen),
        marked.len(),
        if of(&client) { "some" } else { "none" }
    ));
    ensure!(of(&outsider), "tcpdump shows no plaintext at all");
    ensure!(!of(&client), "an answer to {CLIENT} is readable");
    Ok(())
}

/// Part of the reason for which the client's daemon refuses.
const HAD_DAEMON: &str = "there was one before, so plaintext would be a downgrade";
/// A port at which nothing listens.
const FENCE: u16 = 1;
