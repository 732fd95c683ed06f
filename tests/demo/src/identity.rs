//! Identities: those of both ends in the logs, and a server with the wrong identity.

use std::net::SocketAddr;

use anyhow::{Context, Result, anyhow, ensure};
use mesh_tests::{CertificateStatus, Daemon, TIMEOUT, eventually_ok};
use serde_json::Value;

use super::evidence::Evidence;
use super::stage::{CLIENT, LOGGED, NODE_A, NODE_B, PORT, SHOP, Stage};

pub(super) fn identity_in_log(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (a, b) = (stage.daemon(NODE_A)?, stage.daemon(NODE_B)?);
    let starts = [a.log_position(), b.log_position()];
    let web = stage.mesh.pod("web-1").at(PORT);
    stage.ask(web, &stage.path("identity"))?;
    for ((daemon, start), direction) in [a, b].into_iter().zip(starts).zip(["outbound", "inbound"])
    {
        let line = daemon.wait_for_log_after(
            start,
            &format!("an {direction} connection to {web}"),
            LOGGED,
            |line| {
                line["target"] == "access"
                    && line["direction"] == direction
                    && line["destination"] == web.to_string()
                    && line["result"] == "ok"
            },
        )?;
        let fields = [
            "direction",
            "path",
            "client",
            "client_identity",
            "destination",
            "server_identity",
            "bytes_to_client",
            "result",
        ];
        let shown: Vec<_> = fields
            .map(|field| format!("{field}={}", text(&line[field])))
            .into();
        evidence.saw(format!("{}: {}", daemon.node(), shown.join(" ")));
        ensure!(line["path"] == "tunnel", "it did not go through the tunnel");
        for (field, account) in [("client_identity", "client"), ("server_identity", "web")] {
            ensure!(
                line[field] == spiffe(account),
                "{field} is {}, not {}",
                line[field],
                spiffe(account)
            );
        }
    }
    Ok(())
}

pub(super) fn secure_naming(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, a, b) = (
        stage.mesh.pod(CLIENT),
        stage.daemon(NODE_A)?,
        stage.daemon(NODE_B)?,
    );
    let service = SocketAddr::new(SHOP.parse()?, 80);
    let answer = stage.ask(service, &stage.path("shop-before"))?;
    evidence.saw(format!(
        "pod shop holds a certificate of {}, as {NODE_A} expects: {:?}",
        spiffe("web"),
        answer.body
    ));
    become_account(stage, b, "impostor")?;
    evidence.saw(format!(
        "{NODE_B} now gives pod shop a certificate of {}; {NODE_A} still expects {}",
        spiffe("impostor"),
        spiffe("web")
    ));
    let start = a.log_position();
    let stolen = stage.path("shop-stolen");
    let why = stage.ask_in_vain(&client, service, &stolen)?;
    evidence.saw(format!("curl http://{service}: {why}"));
    let line = a.wait_for_log_after(start, "the refusal", LOGGED, |line| {
        line["target"] == "access"
            && line["destination"] == service.to_string()
            && line["result"] == "refused"
    })?;
    let reason = text(&line["reason"]);
    evidence.saw(format!("{NODE_A} logged: {reason}"));
    ensure!(
        reason.contains("secure naming")
            && reason.contains(&spiffe("impostor"))
            && reason.contains(&spiffe("web")),
        "the log does not name both identities"
    );
    become_account(stage, b, "web")?;
    let after = stage.path("shop-after");
    stage.ask(service, &after)?;
    stage.request("shop", &after)?;
    let seen = stage.requests("shop", &stolen).len();
    evidence.saw(format!(
        "with its right account back it is answered again; nginx logged that request, and {seen} of the refused one"
    ));
    ensure!(seen == 0, "the refused request reached nginx");
    Ok(())
}

/// Changes the identity that the server's node assigns to pod shop, and waits until the node has its certificate.
fn become_account(stage: &Stage, daemon: &Daemon, account: &str) -> Result<()> {
    let manifests = stage.mesh.node(NODE_B).manifests();
    manifests.edit("Pod", "default", "shop", |pod| {
        pod["spec"]["serviceAccountName"] = account.into();
    })?;
    let wanted = spiffe(account);
    eventually_ok(TIMEOUT, &format!("pod shop to be {wanted}"), || {
        let status = daemon.status()?;
        let pod = status.pods.iter().find(|pod| pod.pod == "default/shop");
        let pod = pod.context("it is not known")?;
        if pod.identity != wanted || !pod.enrolled {
            return Err(anyhow!("it is {} ({:?})", pod.identity, pod.reason));
        }
        let mut certificates = status.certificates.iter();
        let is_issued =
            |held: &CertificateStatus| held.identity == wanted && !held.serial.is_empty();
        ensure!(certificates.any(is_issued), "it has no certificate yet");
        Ok(())
    })
}

fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
