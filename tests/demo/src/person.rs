//! A person outside the mesh acts as a service account.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Finished, OidcIssuer, TIMEOUT, eventually_ok};
use serde_json::{Value, json};

use super::evidence::Evidence;
use super::stage::{LOGGED, NODE_B, Stage};

/// The account that people on call may act as. No pod runs under it.
const ACCOUNT: &str = "default/support";

/// The issuer of people's tokens.
pub(super) fn login() -> Result<OidcIssuer> {
    OidcIssuer::new("https://login.example")
}

/// Who may act as which account.
pub(super) fn accounts() -> Value {
    json!([{"account": ACCOUNT, "groups": ["oncall"]}])
}

/// Asks the Service `web` for a path as a person in `group`.
fn ask(stage: &Stage, group: &str, path: &str) -> Result<Finished> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let token = stage.login.token(&json!({
        "aud": "mesh", "exp": now + 600, "email": "alice@example.com", "groups": [group],
    }))?;
    let fetch = format!("curl -sS --max-time 20 http://$AUTH_DAEMON_ADDRESS{path}");
    let command = ["default/web:80", "--as", ACCOUNT, "--", "sh", "-c", &fetch];
    stage
        .ca()?
        .connect(&stage.mesh, &token, &command)?
        .finish(TIMEOUT)
}

pub(super) fn person_connects(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let daemon = stage.daemon(NODE_B)?;
    let start = daemon.log_position();
    let recording = stage.mesh.wire().capture()?;
    // The command waits for the CA and for the server's node for ten seconds, and a busy machine may take longer.
    let answered = eventually_ok(TIMEOUT, "an answer", || {
        ask(stage, "oncall", &stage.path("person"))?.ok()
    })?;
    ensure!(answered.stdout.contains(&stage.marker), "{answered:?}");
    ensure!(
        !recording.stop()?.contains(stage.marker.as_bytes()),
        "the answer is readable on the wire"
    );
    evidence.saw(format!(
        "auth-daemon connect default/web:80 --as {ACCOUNT}, outside the mesh and without capabilities: answered, and not \
         readable on the wire"
    ));
    let line = daemon.wait_for_log_after(start, "the person's connection", LOGGED, |line| {
        line["target"] == "access" && line["client_person"].is_string()
    })?;
    evidence.saw(format!(
        "{NODE_B} logged: client_identity={} client_person={} path={}",
        line["client_identity"], line["client_person"], line["path"]
    ));
    ensure!(line["client_person"] == "oidc:alice@example.com", "{line}");
    let identity = "spiffe://cluster.local/ns/default/sa/support";
    ensure!(line["client_identity"] == identity, "{line}");

    let why = eventually_ok(TIMEOUT, "a refusal", || {
        let refused = ask(stage, "sales", &stage.path("stranger"))?;
        assert!(!refused.status.success(), "{refused:?}");
        // The command may have logged that the CA has ended its other stream, too.
        let mut lines = refused.stderr.lines();
        let why = lines.find(|line| line.contains("may not act as"));
        let why = why.with_context(|| format!("no reason: {refused:?}"))?;
        Ok(why.to_owned())
    })?;
    evidence.saw(format!("with a token of another group: {why}"));
    Ok(())
}
