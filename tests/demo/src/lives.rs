//! Pods whose objects say that they have ended, and connections that are older than the rules.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::{TIMEOUT, eventually_ok, slowdown};
use serde_json::{Value, json};

use super::evidence::Evidence;
use super::stage::{CLIENT, LOGGED, NODE_A, NODE_B, PORT, Stage};

/// Within which plaintext that policies no longer admit must end.
const LIMIT: Duration = Duration::from_secs(2);
const ECHO_PORT: u16 = 7009;

pub(super) fn still_running(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let shop = stage.mesh.pod("shop");
    let to = shop.at(PORT);
    let (near, far) = (stage.daemon(NODE_A)?, stage.daemon(NODE_B)?);
    let start = far.log_position();
    stage
        .mesh
        .manifests()
        .edit("Pod", "default", "shop", |pod| {
            pod["status"]["phase"] = "Failed".into();
        })?;
    evidence.saw("pod shop: status.phase is Failed; its nginx still runs");
    let line = far.wait_for_log_after(start, "the daemon to keep the pod", TIMEOUT, |line| {
        let message = line["message"].as_str().unwrap_or_default();
        line["pod"] == "default/shop" && message.starts_with("pod stays enrolled")
    })?;
    evidence.saw(format!("{NODE_B} logged: {}", line["message"]));

    let capture = stage.mesh.wire().capture()?;
    let (start, since) = (far.log_position(), near.log_position());
    let why = stage.ask_in_vain(stage.mesh.outside(), to, &stage.path("failed"))?;
    evidence.saw(format!("curl from outside to http://{to}: {why}"));
    let line = far.wait_for_log_after(start, "the refusal", LOGGED, |line| {
        line["target"] == "access" && line["result"] == "refused"
    })?;
    evidence.saw(format!("{NODE_B} logged: reason={}", line["reason"]));
    let answer = stage.ask(to, &stage.path("failed"))?;
    evidence.saw(format!(
        "curl from {CLIENT} to http://{to} got {:?}",
        answer.body
    ));
    let line = near.wait_for_log_after(since, "the connection", LOGGED, |line| {
        line["target"] == "access" && line["destination"] == to.to_string()
    })?;
    evidence.saw(format!(
        "{NODE_A} logged: path={} server_identity={}",
        line["path"], line["server_identity"]
    ));
    ensure!(line["path"] == "tunnel", "another path: {line}");
    // The request from outside is readable up to the pod that refuses it; no answer is.
    let recording = capture.stop()?;
    let answered = recording
        .streams()
        .iter()
        .any(|stream| String::from_utf8_lossy(&stream.to_client).contains(&stage.marker));
    ensure!(!answered, "an answer crossed the wire in plaintext");
    evidence.saw(format!(
        "on the wire: {} packets, and no byte of an answer",
        recording.packets().len()
    ));

    stage.mesh.manifests().apply(&shop.manifest())?;
    eventually_ok(TIMEOUT, "an answer again", || {
        stage.ask(to, &stage.path("running-again")).map(drop)
    })
}

pub(super) fn open_plaintext_ends(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1");
    let outside = stage.mesh.outside();
    let _echo = web
        .app(&format!("echo-server --port {ECHO_PORT} --quiet"))?
        .listening()?;
    let daemon = stage.daemon(NODE_B)?;
    let mode = |mode: &str| -> Value {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "web", "namespace": "default"}, "spec": {"mtls": {"mode": mode}},
        })
    };
    stage.mesh.manifests().apply(&mode("PERMISSIVE"))?;
    let to = web.at(ECHO_PORT);
    let chat = eventually_ok(TIMEOUT, "plaintext to be admitted", || {
        let mut chat = outside.app(&format!("chat --to {to} --interval 20"))?;
        chat.event("round", TIMEOUT)?;
        Ok(chat)
    })?;
    evidence.saw(format!(
        "PERMISSIVE: a connection from outside to {to} is open in plaintext"
    ));
    let (start, since) = (daemon.log_position(), Instant::now());
    stage.mesh.manifests().apply(&mode("STRICT"))?;
    let ended = chat.failure(TIMEOUT)?;
    let took = since.elapsed();
    evidence.saw(format!(
        "STRICT: it ended with {} after {} ms",
        ended["errno"],
        took.as_millis()
    ));
    ensure!(took < LIMIT * slowdown(), "it took too long");
    // The kernel carries it, or the daemon, if it began before the change of mode had reached the kernel.
    let line = daemon.wait_for_log_after(start, "the line about it", LOGGED, |line| {
        let message = line["message"].as_str().unwrap_or_default();
        let is_carried = line["target"] == "access" && line["destination"] == to.to_string();
        message.starts_with("plaintext connections ended") || is_carried
    })?;
    evidence.saw(format!(
        "{NODE_B} logged: {} reason={}",
        line["message"], line["reason"]
    ));
    let start = daemon.log_position();
    stage
        .mesh
        .manifests()
        .remove("PeerAuthentication", "default", "web")?;
    daemon.wait_for_log_after(start, "the policy to be gone", LOGGED, |line| {
        line["message"] == "policies changed"
    })?;
    Ok(())
}
