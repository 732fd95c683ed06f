//! Policies between pods of one node: the kernel carries only connections that they allow, for as long as they do.

use std::time::Duration;

use mesh_tests::{Context, Result, TIMEOUT, eventually_ok};
use serde_json::{Value, json};

use crate::common::neighbours::{Neighbours, echo, is_direct, refused, wait_for_verdicts};

fn policy(action: &str, account: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}}, "action": action,
            "rules": [{
                "from": [{"source": {"principals": [format!("cluster.local/ns/default/sa/{account}")]}}],
                "to": [{"operation": {"ports": ["8080"]}}],
            }],
        },
    })
}

#[test]
fn policy_change_ends_connections_that_the_kernel_carries() -> Result<()> {
    let stage = Neighbours::start()?;
    let _echo = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    stage.decide(to)?;
    stage.decide_from(&stage.other, to)?;
    let talk = |from: &mesh_tests::Pod| {
        let mut app = from.app(&format!("connect --to {to} --send hi --read"))?;
        let local = app.event("connected", TIMEOUT)?["local"].clone();
        assert!(is_direct(from, &local)?, "it stays in the kernel");
        Ok::<_, mesh_tests::Error>(app)
    };
    let mut denied = talk(&stage.client)?;
    let mut allowed = talk(&stage.other)?;

    stage.mesh.manifests().apply(&policy("DENY", "client"))?;
    let ended = denied.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    let reason = "denied by AuthorizationPolicy default/web rules[0]";
    stage
        .daemon
        .wait_for_access("why the open one ended", TIMEOUT, |line| {
            line["path"] == "same-node" && line["result"] == "reset" && line["reason"] == reason
        })?;
    wait_for_verdicts(&stage.daemon, 1)?;
    refused(&stage.client, to)?;
    stage
        .daemon
        .wait_for_access("the refusal", TIMEOUT, |line| {
            line["result"] == "refused"
                && line["reason"]
                    .as_str()
                    .is_some_and(|logged| logged.contains(reason))
        })?;
    echo(&stage.other, to)?;
    let ended = allowed.process().ended()?;
    assert_eq!(
        ended, None,
        "a client that is still allowed notices nothing"
    );

    stage.mesh.manifests().apply(&policy("ALLOW", "client"))?;
    let ended = allowed.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    eventually_ok(TIMEOUT, "the other verdict", || {
        let command = format!("connect --to {to} --send hi --shutdown --read");
        let answer = stage.client.app(&command)?.finish(TIMEOUT)?.json_lines();
        let answered = answer.last().is_some_and(|event| event["text"] == "hi");
        answered.then_some(()).context("refused")
    })?;
    refused(&stage.other, to)?;
    Ok(())
}

#[test]
fn restart_ends_only_connections_that_policies_deny() -> Result<()> {
    let stage = Neighbours::start()?;
    let _echo = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    let rules = policy("ALLOW", "client");
    stage.mesh.manifests().apply(&rules)?;
    stage.decide(to)?;
    let mut allowed = stage
        .client
        .app(&format!("connect --to {to} --send hi --read"))?;
    let local = allowed.event("connected", TIMEOUT)?["local"].clone();
    assert!(is_direct(&stage.client, &local)?, "it stays in the kernel");
    let Neighbours { daemon, mesh, .. } = stage;
    daemon.kill()?;
    let daemon = mesh.start_daemons()?.remove(0);
    // The open connection rests on a verdict of the previous daemon.
    wait_for_verdicts(&daemon, 1)?;
    assert_eq!(allowed.process().ended()?, None, "it is allowed as it was");
    // The policy changes to deny it while no daemon runs.
    daemon.kill()?;
    mesh.manifests().apply(&policy("DENY", "client"))?;
    let _daemon = mesh.start_daemons()?.remove(0);
    let ended = allowed.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    Ok(())
}

#[test]
fn address_of_another_pod_does_not_give_its_identity() -> Result<()> {
    let stage = Neighbours::start()?;
    let server = stage.web.app("echo-server --port 8080")?.listening()?;
    let to = stage.web.at(8080);
    let forged = stage.client.ipv4();
    // Allowed by identity and by address.
    let mut rules = policy("ALLOW", "client");
    rules["spec"]["rules"][0]["from"] = json!([{"source": {
        "principals": ["cluster.local/ns/default/sa/client"], "ipBlocks": [forged.to_string()],
    }}]);
    stage.mesh.manifests().apply(&rules)?;
    eventually_ok(TIMEOUT, "the policy", || refused(&stage.other, to))?;
    stage.decide(to)?;
    let heard = server.events_of("accepted").len();
    let start = stage.daemon.log_position();

    // A pod with CAP_NET_ADMIN takes the client's address. Bound to it, its connection reaches the daemon.
    let ip = |arguments: &str| -> Result<()> {
        stage.other.run("ip", arguments.split(' '))?.ok()?;
        Ok(())
    };
    ip(&format!("addr add {forged}/32 dev lo"))?;
    let bound = format!("dial --to {to} --bind {forged}");
    stage.other.app(&bound)?.failure(TIMEOUT)?;
    let claim = format!("says that it is {forged}");
    stage
        .daemon
        .wait_for_log_after(start, "the refusal", TIMEOUT, |line| {
            let reason = line["reason"].as_str().unwrap_or_default();
            line["result"] == "refused" && reason.contains(&claim)
        })?;
    // From that address, and bypassing the connect hooks, straight to the app's port: answers go to the client.
    ip(&format!(
        "route add {}/32 via 10.77.1.1 src {forged} onlink dev eth0",
        to.ip()
    ))?;
    let dial = format!("dial --to {to} --send forged");
    let routed = stage.other.app(&dial)?.finish(Duration::from_millis(1500));
    assert!(!routed.is_ok_and(|ended| ended.status.success()));
    let past = stage
        .other
        .enter(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(1500)))?;
    assert!(past.is_err(), "{past:?}");
    assert_eq!(server.events_of("accepted").len(), heard, "nothing arrived");
    // The address's owner is served as before.
    echo(&stage.client, to).map(drop)
}
