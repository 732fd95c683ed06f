//! Revocations are enforced within two seconds on every node, for new and open connections.

use std::time::Instant;

use mesh_tests::{App, CaOptions, Daemon, DaemonOptions, Result, TIMEOUT, eventually_ok, slowdown};
use serde_json::Value;

use crate::common::with_ca::{LEARNT, WithCa, serial, spiffe};

/// Waits for the conversation to be reset, at most [`LEARNT`] after `since`.
fn ends(chat: App, since: Instant) -> Result<()> {
    let failed = chat.failure(TIMEOUT)?;
    let took = since.elapsed();
    assert_eq!(failed["errno"], "ECONNRESET", "{failed}");
    assert!(took < LEARNT * slowdown(), "it took {took:?}");
    Ok(())
}

/// Waits until a daemon knows that `name` is revoked, and so refuses it itself.
fn knows(daemon: &Daemon, kind: &str, name: &str) -> Result<()> {
    eventually_ok(TIMEOUT, &format!("{} to know of it", daemon.node()), || {
        let listed = daemon.status_json()?["trust"]["revoked"][kind].clone();
        let mut listed_names = listed.as_array().into_iter().flatten();
        let is_it = |entry: &Value| entry["identity"] == name || entry["node"] == name;
        anyhow::ensure!(listed_names.any(is_it), "{listed}");
        Ok(())
    })
}

/// Checks that the conversation continues.
fn goes_on(chat: &App) -> Result<()> {
    let rounds = chat.events_of("round").len();
    eventually_ok(TIMEOUT, "the conversation to continue", || {
        anyhow::ensure!(chat.events_of("round").len() > rounds + 2);
        Ok(())
    })
}

#[test]
fn revoked_identity_is_refused_until_reinstated() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    let to = stage.web.at(7);
    let chat = stage.chat(&stage.client, to)?;
    let bystander = stage.chat(&stage.other, to)?;
    let (near, far) = (stage.near.log_position(), stage.far.log_position());

    let client = spiffe("client");
    stage
        .ca
        .operate(&["revoke", "--identity", &client, "--reason", "keyCompromise"])?
        .ok()?;
    let since = Instant::now();
    ends(chat, since)?;
    // The node that learns of the revocation first resets the connection; the other one sees the reset.
    let revoked = format!("{client} is revoked (keyCompromise)");
    eventually_ok(TIMEOUT, "a line that says why", || {
        let mut lines = stage.near.access_log_after(near);
        lines.extend(stage.far.access_log_after(far));
        let is_logged = lines
            .iter()
            .any(|line| line["result"] == "reset" && line["reason"] == revoked);
        anyhow::ensure!(is_logged, "{lines:#?}");
        Ok(())
    })?;
    // The client's node may be the other one.
    knows(&stage.near, "identities", &client)?;
    assert!(!stage.reaches(&stage.client, to)?, "a new connection");
    stage.reason(&stage.near, near, &revoked, "refused")?;
    goes_on(&bystander)?;

    stage
        .ca
        .operate(&["unrevoke", "--identity", &client])?
        .ok()?;
    stage.wait_reaches(&stage.client, to)?;
    Ok(())
}

#[test]
fn clients_refuse_revoked_server() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    let to = stage.web.at(7);
    let chat = stage.chat(&stage.client, to)?;
    stage
        .ca
        .operate(&["revoke", "--identity", &spiffe("web")])?
        .ok()?;
    let since = Instant::now();
    ends(chat, since)?;
    // Perhaps by the server's node, which has learnt of it first.
    knows(&stage.near, "identities", &spiffe("web"))?;
    let start = stage.near.log_position();
    assert!(!stage.reaches(&stage.client, to)?);
    let revoked = format!("{} is revoked (unspecified)", spiffe("web"));
    stage.reason(&stage.near, start, &revoked, "refused")?;
    Ok(())
}

#[test]
fn revoked_certificate_is_refused_and_its_successor_accepted() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    let to = stage.web.at(7);
    let chat = stage.chat(&stage.client, to)?;
    let bystander = stage.chat(&stage.other, to)?;
    let stolen = serial(&stage.near, "client")?;
    let start = stage.far.log_position();
    let answer = stage
        .ca
        .operate(&["revoke", "--serial", &stolen, "--reason", "superseded"])?
        .ok()?;
    let since = Instant::now();
    assert!(answer.stdout.contains(&stolen), "{}", answer.stdout);
    ends(chat, since)?;
    let revoked = format!(
        "certificate {stolen} of {} is revoked (superseded)",
        spiffe("client")
    );
    stage.reason(&stage.far, start, &revoked, "reset")?;
    // The daemon has requested another certificate, and new tunnels use it.
    stage.wait_reaches(&stage.client, to)?;
    assert_ne!(serial(&stage.near, "client")?, stolen);
    goes_on(&bystander)?;
    assert_eq!(
        stage.near.status_json()?["trust"]["revoked"]["certificates"],
        1
    );
    Ok(())
}

#[test]
fn revoked_node_is_refused_by_all_others() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    let to = stage.web.at(7);
    let chats = [
        stage.chat(&stage.client, to)?,
        stage.chat(&stage.other, to)?,
    ];
    let near = stage.near.log_position();
    stage.ca.operate(&["revoke", "--node", "b"])?.ok()?;
    let since = Instant::now();
    for chat in chats {
        ends(chat, since)?;
    }
    // Perhaps by the revoked node itself.
    knows(&stage.near, "nodes", "b")?;
    assert!(!stage.reaches(&stage.client, to)?);
    stage.reason(&stage.near, near, "is revoked", "refused")?;
    // The CA issues nothing to it any more.
    let late = stage.mesh.add_pod(
        mesh_tests::PodSpec::new("late")
            .on("b")
            .service_account("late"),
    )?;
    stage.far.wait_enrolled(&[late.full_name()])?;
    stage
        .far
        .wait_for_log("why there is no certificate", TIMEOUT, |line| {
            line["message"]
                .as_str()
                .is_some_and(|message| message.starts_with("no certificate issued"))
                && line["identity"] == spiffe("late")
                && line["error"]
                    .as_str()
                    .is_some_and(|error| error.contains("node b is revoked"))
        })?;
    stage.ca.operate(&["unrevoke", "--node", "b"])?.ok()?;
    stage.wait_reaches(&stage.client, to)?;
    Ok(())
}

#[test]
fn revocation_ends_same_node_connections() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.other.app("echo-server --port 7")?.listening()?;
    let to = stage.other.at(7);
    // The daemon carries the first connection, the kernel the second.
    let first = stage.chat(&stage.client, to)?;
    eventually_ok(TIMEOUT, "a verdict", || {
        let verdicts = stage.near.status_json()?["sameNode"]["verdicts"].clone();
        anyhow::ensure!(verdicts == 1, "{verdicts}");
        Ok(())
    })?;
    // Without a verdict for a moment, if the daemon cannot renew its lease in time.
    let second = eventually_ok(TIMEOUT, "the kernel to carry a connection", || {
        let mut chat = stage.chat(&stage.client, to)?;
        chat.event("round", TIMEOUT)?;
        let connections = stage.near.status()?.connections;
        let mut clients = connections.iter().map(|open| open.client.to_string());
        anyhow::ensure!(
            !clients.any(|client| client == local(&chat)),
            "the daemon does"
        );
        Ok(chat)
    })?;
    let start = stage.near.log_position();
    stage
        .ca
        .operate(&["revoke", "--identity", &spiffe("client")])?
        .ok()?;
    let since = Instant::now();
    ends(first, since)?;
    ends(second, since)?;
    let revoked = format!("{} is revoked", spiffe("client"));
    stage.reason(&stage.near, start, &revoked, "reset")?;
    assert!(!stage.reaches(&stage.client, to)?);
    stage.reason(&stage.near, start, &revoked, "refused")?;
    Ok(())
}

fn local(chat: &App) -> String {
    let connected = chat.events_of("connected");
    connected[0]["local"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn revocations_stay_in_force_while_the_ca_is_down() -> Result<()> {
    let stage = WithCa::start()?;
    let _echo = stage.web.app("echo-server --port 7")?.listening()?;
    let to = stage.web.at(7);
    stage
        .ca
        .operate(&["revoke", "--identity", &spiffe("client")])?
        .ok()?;
    let since = Instant::now();
    eventually_ok(LEARNT, "both nodes to learn it", || {
        for daemon in [&stage.near, &stage.far] {
            let listed = daemon.status_json()?["trust"]["revoked"]["identities"].clone();
            anyhow::ensure!(listed[0]["identity"] == spiffe("client"), "{listed}");
        }
        Ok(())
    })?;
    println!("learnt after {:?}", since.elapsed());
    let WithCa {
        near,
        far,
        ca,
        client,
        other,
        web,
        mesh,
    } = stage;
    ca.kill()?;
    let refused = |from: &mesh_tests::Pod| -> Result<bool> {
        let command = format!("connect --to {to} --send hi --shutdown --read");
        let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
        Ok(events.last().is_none_or(|last| last["text"] != "hi"))
    };
    assert!(refused(&client)?, "without a CA");
    assert!(!refused(&other)?, "others continue without a CA");
    // The CA still has the revocation after a restart.
    let ca = mesh.start_ca(&CaOptions::default())?;
    let version = |daemon: &mesh_tests::Daemon| -> Result<u64> {
        Ok(daemon.status_json()?["trust"]["version"]
            .as_u64()
            .unwrap_or(0))
    };
    let before = version(&near)?;
    ca.operate(&["revoke", "--identity", &spiffe("nobody")])?
        .ok()?;
    eventually_ok(TIMEOUT, "the new CA to be heard", || {
        anyhow::ensure!(version(&near)? > before && version(&far)? > before);
        Ok(())
    })?;
    assert!(refused(&client)?, "with the CA that came back");
    // A daemon that starts now learns of it, too.
    near.terminate(TIMEOUT)?;
    let near = mesh
        .node("a")
        .start_daemon_with(DaemonOptions::default().ca(&ca))?;
    near.wait_enrolled(&[client.full_name(), other.full_name()])?;
    eventually_ok(TIMEOUT, "others to continue", || {
        anyhow::ensure!(!refused(&other)?);
        Ok(())
    })?;
    assert!(refused(&client)?, "by a daemon that started later");
    drop(web);
    Ok(())
}
