//! Two trust domains. Each trusts the other's workloads as long as its configuration says so.

use std::fs;

use mesh_tests::{
    App, Context, Daemon, Process, Result, TIMEOUT, eventually_ok,
    two_domains::{FAR, FAR_SERVICE, NEAR, NEAR_SERVICE, TwoDomains},
};
use serde_json::{Value, json};

use crate::common::with_ca::wait_certified;

const SECRET: &str = "what-no-wire-may-show";

/// Waits until the conversation is reset.
fn ends(chat: App) -> Result<()> {
    let failed = chat.failure(TIMEOUT)?;
    assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
    Ok(())
}

fn refusal(daemon: &Daemon, start: u64, what: &str) -> Result<Value> {
    daemon.wait_for_log_after(
        start,
        &format!("a refusal with {what:?}"),
        TIMEOUT,
        |line| {
            line["target"] == "access"
                && line["result"] != "ok"
                && line["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains(what))
        },
    )
}

#[test]
fn pods_of_two_trust_domains_reach_each_other_while_entries_say_so() -> Result<()> {
    let stage = TwoDomains::start()?;
    for daemon in [&stage.near, &stage.far] {
        // Without one, a connection is refused for that reason.
        wait_certified(daemon)?;
    }
    let capture = stage.mesh.wire().capture()?;
    assert_eq!(stage.both_echo(SECRET)?, [false, false], "no entry");
    refusal(&stage.near, 0, "of which no root is trusted")?;
    refusal(&stage.far, 0, "of which no root is trusted")?;

    stage.federate()?;
    stage.wait_both_echo(SECRET, [true, true])?;
    for (daemon, client, server) in [
        (&stage.far, (NEAR, "near"), (FAR, "far-web")),
        (&stage.near, (FAR, "far"), (NEAR, "near-web")),
    ] {
        let id = |(domain, account)| format!("spiffe://{domain}/ns/default/sa/{account}");
        let line = daemon.wait_for_access("the served connection", TIMEOUT, |line| {
            line["result"] == "ok" && line["client_identity"] == id(client)
        })?;
        assert_eq!(line["server_identity"], id(server), "{line:#}");
        assert_eq!(line["path"], "tunnel", "{line:#}");
    }
    let shown = &stage.near.status_json()?["federation"][0];
    assert_eq!(
        (&shown["trustDomain"], &shown["roots"]),
        (&json!(FAR), &json!(1)),
        "{shown}"
    );
    assert_eq!(shown["error"], Value::Null, "{shown}");
    let metrics = stage.near.metrics()?;
    let roots = format!("auth_daemon_foreign_bundle_roots{{trust_domain=\"{FAR}\"}} 1\n");
    assert!(metrics.contains(&roots), "{metrics}");

    // Without its entry, a trust domain's connections end, whichever side opened them.
    let to_far = stage.chat("near", FAR_SERVICE)?;
    let to_near = stage.chat("far", NEAR_SERVICE)?;
    let start = stage.near.log_position();
    stage
        .near
        .edit_config(|config| config["federation"] = json!([]))?;
    ends(to_far)?;
    ends(to_near)?;
    refusal(&stage.near, start, "of which no root is trusted")?;
    assert_eq!(stage.both_echo(SECRET)?, [false, false]);
    assert_eq!(stage.near.status_json()?["federation"], json!([]));

    stage.federate()?;
    stage.wait_both_echo(SECRET, [true, true])?;
    // The same for a bundle's file.
    let to_near = stage.chat("far", NEAR_SERVICE)?;
    fs::remove_file(stage.near_bundle())?;
    ends(to_near)?;
    stage.wait_both_echo(SECRET, [false, false])?;
    assert!(!capture.stop()?.contains(SECRET.as_bytes()));
    Ok(())
}

#[test]
fn policies_name_foreign_principals() -> Result<()> {
    let stage = TwoDomains::start()?;
    stage.federate()?;
    stage.wait_both_echo(SECRET, [true, true])?;
    assert!(stage.echoes("a/other", FAR_SERVICE, SECRET)?, "no policy");
    let policy = |principal: &str| {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "partner", "namespace": "default"},
            "spec": {"rules": [{"from": [{"source": {"principals": [principal]}}]}]},
        })
    };
    let manifests = stage.mesh.node("b").manifests();
    manifests.apply(&policy(&format!("{NEAR}/ns/default/sa/near")))?;
    eventually_ok(TIMEOUT, "the other account to be refused", || {
        anyhow::ensure!(!stage.echoes("a/other", FAR_SERVICE, SECRET)?);
        Ok(())
    })?;
    assert!(stage.echoes("near", FAR_SERVICE, SECRET)?);
    // The account of that name in the mesh's own trust domain is another one.
    manifests.apply(&policy(&format!("{FAR}/ns/default/sa/near")))?;
    stage.wait_both_echo(SECRET, [false, true])
}

#[test]
fn bundle_outlasts_its_endpoint_and_follows_a_rotation() -> Result<()> {
    let mut stage = TwoDomains::start()?;
    stage.federate()?;
    stage.wait_both_echo(SECRET, [true, true])?;
    let sequence = |stage: &TwoDomains| -> Result<u64> {
        let status = stage.near.status_json()?;
        status["federation"][0]["sequence"]
            .as_u64()
            .with_context(|| format!("{status}"))
    };
    eventually_ok(TIMEOUT, "the endpoint's bundle", || sequence(&stage))?;
    let before = sequence(&stage)?;
    stage.ca.operate(&["rotate-root"])?.ok()?;
    eventually_ok(TIMEOUT, "the bundle with both roots", || {
        let status = stage.near.status_json()?["federation"][0].clone();
        anyhow::ensure!(status["roots"] == 2, "{status}");
        anyhow::ensure!(sequence(&stage)? > before, "{status}");
        Ok(())
    })?;
    assert_eq!(stage.both_echo(SECRET)?, [true, true]);

    stage.ca.process().kill()?;
    eventually_ok(TIMEOUT, "the failure to show", || {
        let status = stage.near.status_json()?["federation"][0].clone();
        anyhow::ensure!(status["error"].is_string(), "{status}");
        Ok(())
    })?;
    assert_eq!(
        stage.both_echo(SECRET)?,
        [true, true],
        "the known bundle stays"
    );
    Ok(())
}

#[test]
fn documented_commands_show_the_federation() -> Result<()> {
    let stage = TwoDomains::start()?;
    stage.federate()?;
    stage.wait_both_echo(SECRET, [true, true])?;
    let page = include_str!("../../../docs/FEDERATION.md");
    // Those for SPIRE are in `spire.rs`.
    let (page, _) = page
        .split_once("## Federate with SPIRE")
        .context("no section")?;
    let commands = page.split("```sh\n").skip(1);
    let commands: Vec<_> = commands
        .filter_map(|rest| Some(rest.split_once("```")?.0))
        .collect();
    let node = stage.mesh.node("a").place();
    let folder = node.folder().join("commands");
    fs::create_dir(&folder)?;
    std::os::unix::fs::symlink(mesh_tests::auth_daemon()?, folder.join("auth-daemon"))?;
    let path = format!("{}:{}", folder.display(), std::env::var("PATH")?);
    let endpoint = format!("{}:8443", stage.mesh.outside_ipv4());
    let mut outputs = Vec::new();
    for command in &commands {
        let mut shell = node.command("sh")?;
        shell.env("PATH", &path).arg("-c");
        shell.arg(command.replace("ca.far.example:8443", &endpoint));
        outputs.push(Process::spawn(shell)?.finish(TIMEOUT)?.ok()?.stdout);
    }
    let [status, bundle] = &outputs[..] else {
        panic!("{commands:?}");
    };
    assert!(status.contains("1 root, current at"), "{status}");
    let bundle: Value = serde_json::from_str(bundle)?;
    let [root, jwt] = bundle["keys"].as_array().context("no keys")?.as_slice() else {
        panic!("{bundle}");
    };
    assert_eq!(
        (&root["use"], &jwt["use"], &bundle["spiffe_refresh_hint"]),
        (&json!("x509-svid"), &json!("jwt-svid"), &json!(1))
    );
    Ok(())
}
