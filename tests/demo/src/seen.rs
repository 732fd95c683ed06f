//! What the daemons show of the connections, and the policies that follow from it.

use anyhow::{Context, Result, ensure};
use mesh_tests::{TIMEOUT, eventually_ok};

use super::evidence::Evidence;
use super::stage::{CLIENT, NODE_B, PORT, Stage};

/// A port of `web-1` that nobody called before.
const UNSEEN: u16 = 7999;
const FILE: &str = "suggested.yaml";

pub(super) fn observe(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let web = stage.mesh.pod("web-1").at(PORT);
    stage.ask(web, &stage.path("observed"))?;
    stage.ask_in_vain(stage.mesh.outside(), web, &stage.path("observed-outside"))?;
    for (options, verdict) in [
        ("--from default/client", "allowed"),
        ("--plaintext", "denied"),
    ] {
        let words = format!("observe --to default/web-1 --verdict {verdict} {options}");
        let words: Vec<_> = words.split(' ').collect();
        let line = eventually_ok(TIMEOUT, "the connection", || {
            let shown = stage.mesh.node(NODE_B).auth(&words)?.ok()?.json_lines();
            shown.last().cloned().context("nothing is shown")
        })?;
        let text = stage
            .mesh
            .node(NODE_B)
            .auth(&[&words[..], &["-o", "text"]].concat())?;
        evidence.saw(format!("auth-daemon {}:", words.join(" ")));
        evidence.saw(text.stdout.lines().last().unwrap_or_default().to_owned());
        ensure!(line["verdict"] == verdict, "another connection: {line}");
    }
    Ok(())
}

pub(super) fn suggested_policy(stage: &mut Stage, evidence: &Evidence) -> Result<()> {
    let (client, web) = (stage.mesh.pod(CLIENT), stage.mesh.pod("web-1"));
    let _echo = web
        .app(&format!("echo-server --port {UNSEEN} --quiet"))?
        .listening()?;
    stage.ask(web.at(PORT), &stage.path("seen"))?;
    let node = stage.mesh.node(NODE_B);
    let words = ["policy", "suggest", "--namespace", "default"];
    let suggested = eventually_ok(TIMEOUT, "the client among the callers", || {
        let suggested = node.auth(&words)?.ok()?.stdout;
        let is_complete = suggested.contains("principals: [\"cluster.local/ns/default/sa/client\"");
        ensure!(is_complete, "it suggests: {suggested}");
        Ok(suggested)
    })?;
    evidence.saw(format!(
        "auth-daemon {} suggests, among others:",
        words.join(" ")
    ));
    let found = suggested.lines().find(|line| line.contains("/sa/client: "));
    evidence.saw(found.unwrap_or_default().trim().to_owned());
    stage.mesh.manifests().write(FILE, &suggested)?;
    let connect = format!(
        "connect --to {} --timeout 10000 --send x --shutdown --read",
        web.at(UNSEEN)
    );
    let refused = eventually_ok(TIMEOUT, "the refusal of what was not seen", || {
        let mut events = client.app(&connect)?.finish(TIMEOUT)?.json_lines();
        let last = events.pop().context("no event")?;
        ensure!(last["event"] == "failed", "it ends with {last}");
        Ok(last)
    })?;
    evidence.saw(format!(
        "applied: {CLIENT} to port {UNSEEN}: {}",
        refused["errno"]
    ));
    stage.ask(web.at(PORT), &stage.path("still-served"))?;
    evidence.saw(format!("and to port {PORT}, as before: answered"));
    stage.mesh.manifests().remove_file(FILE)?;
    eventually_ok(TIMEOUT, "all ports to be open again", || {
        let mut events = client.app(&connect)?.finish(TIMEOUT)?.json_lines();
        let last = events.pop().context("no event")?;
        ensure!(last["event"] == "finished", "it ends with {last}");
        Ok(())
    })
}
