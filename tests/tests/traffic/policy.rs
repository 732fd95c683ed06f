//! Policies in force: refusals and their reasons, changes while connections are open, and `auth-daemon policy`.

use std::process::Command;

use mesh_tests::{
    App, Context, DaemonOptions, Firewall, Nginx, Place, Pod, PodSpec, Process, Result, TIMEOUT,
    auth_daemon, eventually, eventually_ok,
};
use serde_json::{Value, json};

use crate::common::pair::Pair;

/// An AuthorizationPolicy for the pods with the label `app=web`.
fn authorization(name: &str, action: &str, rules: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "action": action, "rules": rules},
    })
}

/// Rules that match the service account of the pod `client` only.
fn from_client() -> Value {
    json!([{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/client"]}}]}])
}

/// Starts two clients with different accounts on node a, and an echo server on node b.
fn stage(options: &DaemonOptions) -> Result<(Pair, App)> {
    let other = PodSpec::new("other").on("a").service_account("other");
    let pair = Pair::start_with(options, |builder| builder.pod(other))?;
    let echo = pair.web.app("echo-server --port 8080")?.listening()?;
    Ok((pair, echo))
}

fn say(from: &Place, pair: &Pair) -> Result<Value> {
    let to = pair.web.at(8080);
    let command = format!("connect --to {to} --timeout 5000 --send hi --shutdown --read");
    let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
    Ok(events.last().context("no event")?.clone())
}

fn is_answered(from: &Place, pair: &Pair) -> Result<bool> {
    Ok(say(from, pair)?["text"] == "hi")
}

/// Opens a connection, waits for an answer, and leaves it open.
fn talk(from: &Pod, pair: &Pair) -> Result<App> {
    let to = pair.web.at(8080);
    let app = from.app(&format!("connect --to {to} --send hi --read"))?;
    // Each pod's account has the pod's name.
    let identity = format!("/sa/{}", from.name());
    eventually(TIMEOUT, "an open connection", || {
        let status = pair.far.status_json().ok()?;
        let mut open = status["connections"].as_array()?.iter();
        open.any(|line| {
            let client = line["clientIdentity"].as_str().unwrap_or_default();
            client.ends_with(&identity) && line["bytesToClient"] == 2
        })
        .then_some(())
    })?;
    Ok(app)
}

fn policy_command(pair: &Pair, arguments: &[&str]) -> Result<mesh_tests::Finished> {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", pair.mesh.node("b").netns().name()])
        .arg(auth_daemon()?)
        .arg("policy")
        .args(arguments);
    Process::spawn(command)?.finish(TIMEOUT)
}

#[test]
fn policy_refuses_callers_and_ends_open_connections() -> Result<()> {
    let (pair, _echo) = stage(&DaemonOptions::default())?;
    let other = pair.mesh.pod("other");
    let mut denied = talk(&pair.client, &pair)?;
    let mut allowed = talk(&other, &pair)?;
    let policy = authorization("web", "DENY", from_client());
    pair.mesh.manifests().apply(&policy)?;

    let ended = denied.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    let reason = "denied by AuthorizationPolicy default/web rules[0]";
    pair.far
        .wait_for_access("the end of the open one", TIMEOUT, |line| {
            line["result"] == "reset" && line["reason"] == reason
        })?;
    assert!(!is_answered(&pair.client, &pair)?);
    let line = pair.far.wait_for_access("the refusal", TIMEOUT, |line| {
        line["result"] == "refused" && line["reason"] == reason
    })?;
    assert_eq!(line["policy"], reason, "{line}");
    // The client's node logs the refusal, too.
    pair.near
        .wait_for_access("the refusal at the client", TIMEOUT, |line| {
            let logged = line["reason"].as_str().unwrap_or_default();
            logged.contains("its node forbids it") && logged.contains(reason)
        })?;
    assert!(is_answered(&other, &pair)?, "others are not concerned");
    let counted =
        "auth_daemon_policy_denials_total{kind=\"AuthorizationPolicy\",policy=\"default/web\"} ";
    let metrics = pair.far.metrics()?;
    assert!(metrics.contains(counted), "{metrics}");

    // The policy now allows what it denied, and nothing else.
    let policy = authorization("web", "ALLOW", from_client());
    pair.mesh.manifests().apply(&policy)?;
    let ended = allowed.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    eventually_ok(TIMEOUT, "the other verdict", || {
        is_answered(&pair.client, &pair)?
            .then_some(())
            .context("refused")
    })?;
    assert!(!is_answered(&other, &pair)?);
    // The pod's present labels count.
    pair.mesh.manifests().edit("Pod", "default", "web", |pod| {
        pod["metadata"]["labels"]["app"] = "elsewhere".into();
    })?;
    eventually_ok(TIMEOUT, "a pod that is not selected any more", || {
        is_answered(&other, &pair)?.then_some(()).context("refused")
    })
}

#[test]
fn modes_apply_by_namespace_and_port_and_policies_to_plaintext() -> Result<()> {
    let options = DaemonOptions::default().permissive();
    let (pair, _echo) = stage(&options)?;
    let _second = pair.web.app("echo-server --port 8081")?.listening()?;
    let outside = pair.mesh.outside();
    let answered = |port: u16| -> Result<bool> {
        let to = pair.web.at(port);
        let command = format!("connect --to {to} --timeout 5000 --send hi --shutdown --read");
        let events = outside.app(&command)?.finish(TIMEOUT)?.json_lines();
        Ok(events.last().is_some_and(|event| event["text"] == "hi"))
    };
    let becomes = |ports: [bool; 2]| {
        eventually_ok(TIMEOUT, "what plaintext meets", || {
            let now = [answered(8080)?, answered(8081)?];
            (now == ports).then_some(()).context(format!("{now:?}"))
        })
    };
    becomes([true, true])?;
    // The kernel alone carries it.
    let to = pair.web.at(8080);
    let mut open = outside.app(&format!("connect --to {to} --send hi --read"))?;
    open.event("connected", TIMEOUT)?;
    let peer = |spec: Value| {
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "web", "namespace": "default"}, "spec": spec,
        })
    };
    pair.mesh
        .manifests()
        .apply(&peer(json!({"mtls": {"mode": "STRICT"}})))?;
    let ended = open.event("failed", TIMEOUT)?;
    assert_eq!(ended["errno"], "ECONNRESET", "{ended}");
    becomes([false, false])?;
    pair.far.wait_for_access("the refusal", TIMEOUT, |line| {
        let reason = line["reason"].as_str().unwrap_or_default();
        reason.contains("STRICT by PeerAuthentication default/web")
    })?;
    assert!(is_answered(&pair.client, &pair)?, "mutual TLS as ever");
    let ports = json!({
        "selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"},
        "portLevelMtls": {"8081": {"mode": "PERMISSIVE"}},
    });
    pair.mesh.manifests().apply(&peer(ports))?;
    becomes([false, true])?;
    // A caller outside the mesh has no identity, so no rule that requires one matches.
    pair.mesh
        .manifests()
        .remove("PeerAuthentication", "default", "web")?;
    becomes([true, true])?;
    let policy = authorization("web", "ALLOW", from_client());
    pair.mesh.manifests().apply(&policy)?;
    becomes([false, false])?;
    assert!(is_answered(&pair.client, &pair)?);
    pair.mesh
        .manifests()
        .remove("AuthorizationPolicy", "default", "web")?;
    becomes([true, true])
}

#[test]
fn unreadable_policy_allows_nothing() -> Result<()> {
    let (pair, _echo) = stage(&DaemonOptions::default())?;
    let other = pair.mesh.pod("other");
    let good = authorization("web", "ALLOW", from_client());
    pair.mesh.manifests().apply(&good)?;
    let settles = |expected: [bool; 2]| {
        eventually_ok(TIMEOUT, "the policy", || {
            let now = [
                is_answered(&pair.client, &pair)?,
                is_answered(&other, &pair)?,
            ];
            (now == expected).then_some(()).context(format!("{now:?}"))
        })
    };
    settles([true, false])?;
    let mut bad = good.clone();
    bad["spec"]["rules"][0]["from"][0]["source"] = json!({"ipBlocks": ["10.0.0.0/33"]});
    pair.mesh.manifests().apply(&bad)?;
    pair.far
        .wait_for_log("the field at fault", TIMEOUT, |line| {
            let message = line["message"].as_str().unwrap_or_default();
            message.contains(
                "AuthorizationPolicy default/web: spec.rules[0].from[0].source.ipBlocks[0]",
            ) && message.contains("last good version stays in force")
        })?;
    settles([true, false])?;
    // There never was a readable version: it denies what it selects.
    pair.mesh
        .manifests()
        .remove("AuthorizationPolicy", "default", "web")?;
    settles([true, true])?;
    bad["metadata"]["name"] = "new".into();
    pair.mesh.manifests().apply(&bad)?;
    settles([false, false])
}

#[test]
fn audits_and_dry_runs_are_logged_and_explained() -> Result<()> {
    let (pair, _echo) = stage(&DaemonOptions::default())?;
    let manifests = pair.mesh.manifests();
    manifests.apply(&authorization("audit", "AUDIT", from_client()))?;
    let mut dry = authorization("dry", "DENY", from_client());
    dry["metadata"]["annotations"] = json!({"istio.io/dry-run": "true"});
    manifests.apply(&dry)?;
    let expected = "audited by AuthorizationPolicy default/audit rules[0]; dry run: denied by AuthorizationPolicy \
                default/dry rules[0]";
    eventually_ok(TIMEOUT, "the policies in the log", || {
        let answered = is_answered(&pair.client, &pair)?;
        answered.then_some(()).context("refused")?;
        let lines = pair.far.access_log();
        let line = lines.iter().find(|line| line["policy"] == expected);
        line.map(drop).context("not logged yet")
    })?;

    let ask = [
        "check",
        "--from",
        "default/client",
        "--to",
        "pod/default/web:8080",
    ];
    let answer = policy_command(&pair, &ask)?;
    assert!(answer.status.success(), "{answer:?}");
    manifests.apply(&authorization("deny", "DENY", from_client()))?;
    let text = eventually_ok(TIMEOUT, "the other answer", || {
        let answer = policy_command(&pair, &ask)?;
        (answer.status.code() == Some(1))
            .then_some(answer.stdout.clone())
            .context(format!("{answer:?}"))
    })?;
    assert!(
        text.contains("denied by AuthorizationPolicy default/deny rules[0]"),
        "{text}"
    );
    let list = policy_command(&pair, &["list"])?.ok()?.stdout;
    assert_eq!(list.matches("AuthorizationPolicy").count(), 3, "{list}");
    let nobody = policy_command(
        &pair,
        &[
            "check",
            "--from",
            "default/nobody",
            "--to",
            "pod/default/web:8080",
        ],
    )?;
    assert_eq!(nobody.status.code(), Some(2), "{nobody:?}");
    assert!(nobody.stderr.contains("default/nobody"), "{nobody:?}");
    Ok(())
}

/// Rules as a CNI makes them for a NetworkPolicy that lets `client` reach `web` on port 8080.
#[test]
fn network_policies_by_pod_and_port_still_apply() -> Result<()> {
    let (pair, _echo) = stage(&DaemonOptions::default())?;
    let _other_port = Nginx::start(&pair.web, 8081, "another port")?;
    let (client, web) = (pair.client.ipv4(), pair.web.ipv4());
    let rules = format!(
        "chain forward {{ type filter hook forward priority 0; policy accept;\n\
         ct state established,related accept\n\
         ip saddr {client} ip daddr {web} tcp dport 8080 accept\n\
         ip daddr {web} drop\n }}"
    );
    let _firewall = Firewall::install(pair.mesh.node("b"), &rules)?;
    assert!(
        is_answered(&pair.client, &pair)?,
        "pod and port are as the rules say"
    );
    let curl = ["-sS", "--max-time", "3", &format!("http://{web}:8081/")];
    let refused = pair.client.run("curl", curl)?;
    assert!(!refused.status.success(), "another port: {refused:?}");
    let command = format!("connect --to {web}:8080 --timeout 3000 --send hi --shutdown --read");
    let other = pair
        .mesh
        .pod("other")
        .app(&command)?
        .finish(TIMEOUT)?
        .json_lines();
    assert_ne!(
        other.last().context("no event")?["text"],
        "hi",
        "another pod"
    );
    Ok(())
}
