//! Authorization: Istio's policies, for new connections and for open ones.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::{TIMEOUT, eventually, eventually_ok, slowdown};
use serde_json::{Value, json};

use super::evidence::Evidence;
use super::stage::{CLIENT, LOGGED, NEIGHBOUR, NODE_B, PORT, Stage, soon};

const NAME: &str = "web";
/// Time limit for a change to affect open connections.
const LIVE: Duration = Duration::from_secs(1);

/// Denies the service account of the pod `client`.
fn deny() -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}}, "action": "DENY",
            "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/client"]}}]}],
        },
    })
}

/// Runs a part of a check, then removes the check's policy in any case, so that a failure does not spread to later checks.
fn until_removed(stage: &Stage, kind: &str, part: impl FnOnce() -> Result<()>) -> Result<()> {
    let shown = part();
    stage.mesh.manifests().remove(kind, "default", NAME)?;
    let web = stage.mesh.pod("web-1");
    let served = eventually_ok(TIMEOUT, "the client to be served again", || {
        stage
            .ask(web.at(PORT), &stage.path("allowed-again"))
            .map(drop)
    });
    shown.and(served)
}

pub(super) fn policy_deny(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, neighbour) = (stage.mesh.pod(CLIENT), stage.mesh.pod(NEIGHBOUR));
    let web = stage.mesh.pod("web-1").at(PORT);
    let daemon = stage.daemon(NODE_B)?;
    let start = daemon.log_position();
    stage.mesh.manifests().apply(&deny())?;
    until_removed(stage, "AuthorizationPolicy", || {
        daemon.wait_for_log_after(start, "the policy", LOGGED, |line| {
            line["message"] == "policies changed"
        })?;
        evidence.saw(format!("applied: {}", deny()["spec"]));
        // Again until there is a line: a request that was open when the policy came into force was reset, and not refused.
        let (why, line) = eventually_ok(TIMEOUT, "the client's refusal", || {
            let why = stage.ask_in_vain(&client, web, &stage.path("denied"))?;
            let mut lines = daemon.access_log_after(start).into_iter();
            let refused = lines.find(|line| line["result"] == "refused");
            Ok((why, refused.context("no line of it yet")?))
        })?;
        evidence.saw(format!("curl from {CLIENT} to http://{web}: {why}"));
        evidence.saw(format!(
            "{NODE_B} logged: client_identity={} reason={}",
            line["client_identity"], line["reason"]
        ));
        ensure!(
            line["reason"] == "denied by AuthorizationPolicy default/web rules[0]",
            "another reason: {line}"
        );
        let path = stage.path("not-denied");
        stage.ask_from(&neighbour, web, &path)?;
        evidence.saw(format!("curl from {NEIGHBOUR} to http://{web}: answered"));
        Ok(())
    })
}

pub(super) fn policy_live(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, neighbour) = (stage.mesh.pod(CLIENT), stage.mesh.pod(NEIGHBOUR));
    let web = stage.mesh.pod("web-1");
    let _echo = web.app("echo-server --port 7008 --quiet")?.listening()?;
    let to = web.at(7008);
    let chat = |from: &mesh_tests::Pod| -> Result<mesh_tests::App> {
        let mut chat = from.app(&format!("chat --to {to} --interval 50"))?;
        chat.event("connected", TIMEOUT)?;
        soon("a few rounds", || {
            (chat.events_of("round").len() > 3).then_some(())
        })?;
        Ok(chat)
    };
    let (denied, allowed) = (chat(&client)?, chat(&neighbour)?);
    let since = Instant::now();
    stage.mesh.manifests().apply(&deny())?;
    until_removed(stage, "AuthorizationPolicy", || {
        let ended = denied.failure(TIMEOUT)?;
        let took = since.elapsed();
        evidence.saw(format!(
            "the policy was written: {CLIENT}'s open connection ended with {} after {} ms",
            ended["errno"],
            took.as_millis()
        ));
        ensure!(took < LIVE * slowdown(), "it took too long");
        let rounds = allowed.events_of("round").len();
        eventually(LOGGED, "the neighbour's chat to continue", || {
            (allowed.events_of("round").len() > rounds + 3).then_some(())
        })?;
        evidence.saw(format!(
            "{NEIGHBOUR}'s continues: {} rounds",
            allowed.events_of("round").len()
        ));
        drop(allowed);
        Ok(())
    })
}

pub(super) fn strict_refuses_plaintext(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1").at(PORT);
    let outside = stage.mesh.outside();
    let peer = |mode: &str| {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": NAME, "namespace": "default"}, "spec": {"mtls": {"mode": mode}},
        })
    };
    let why = stage.ask_in_vain(outside, web, &stage.path("strict"))?;
    evidence.saw(format!(
        "by default, curl from outside to http://{web}: {why}"
    ));
    stage.mesh.manifests().apply(&peer("PERMISSIVE"))?;
    until_removed(stage, "PeerAuthentication", || {
        eventually_ok(TIMEOUT, "an answer in plaintext", || {
            stage
                .ask_from(outside, web, &stage.path("permissive"))
                .map(drop)
        })?;
        evidence.saw("with PeerAuthentication PERMISSIVE: answered");
        stage.mesh.manifests().apply(&peer("STRICT"))?;
        let why = eventually_ok(TIMEOUT, "the refusal", || {
            stage.ask_in_vain(outside, web, &stage.path("strict-again"))
        })?;
        evidence.saw(format!("with STRICT again: {why}"));
        stage.ask(web, &stage.path("strict-and-mutual"))?;
        evidence.saw(format!("and from {CLIENT}, of the mesh: answered"));
        Ok(())
    })
}
