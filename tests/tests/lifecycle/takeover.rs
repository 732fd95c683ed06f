//! Two daemons on one node: one stands by, and takes over when the other one stops, which still has open connections.

use std::time::Duration;

use mesh_tests::{
    Daemon, DaemonOptions, Mesh, Pod, PodSpec, Result, TIMEOUT, eventually, eventually_ok,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::lifecycle_pair::{
    MARKER, assert_refused, assert_reset, call, daemons_with, echoes, pair, ways,
};
use crate::common::lifecycle_traces::{attached_to_node, files, wait_attached_to_node};
use crate::common::with_ca::{WithCa, spiffe};

/// Longer than a test, so the drain cuts nothing.
fn patient() -> DaemonOptions {
    DaemonOptions::default().drain(Duration::from_secs(120))
}

/// A daemon that stands by on a node where another one serves.
fn standing_by(mesh: &Mesh, node: &str, options: &DaemonOptions) -> Result<Daemon> {
    let next = mesh.node(node).spawn_daemon(options.clone().stand_by())?;
    next.wait_probed("standing by")?;
    Ok(next)
}

/// Ends the daemon that serves, and waits until the one that stands by does.
fn take_over(serving: &mut Daemon, next: &Daemon) -> Result<()> {
    serving.process().signal(Signal::SIGTERM)?;
    next.wait_probed("ready")
}

/// A conversation that goes on until it is killed.
fn conversation(from: &Pod, to: std::net::SocketAddr) -> Result<mesh_tests::App> {
    let mut chat = from.app(&format!("chat --to {to} --interval 10"))?;
    chat.event("round", TIMEOUT)?;
    Ok(chat)
}

/// Waits until it has had some more rounds.
fn goes_on(chat: &mesh_tests::App) -> Result<()> {
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 5).then_some(())
    })
}

/// Asserts that `unload` refuses, and leaves everything where it is.
fn assert_held(mesh: &Mesh, name: &str) -> Result<()> {
    let node = mesh.node(name);
    let before = (files(node.pins()), attached_to_node(node));
    let refused = node.unload()?;
    assert_eq!(refused.code(), Some(1), "{}", refused.stdout);
    let complaint = format!("another auth-daemon holds {}", node.pins().display());
    assert!(refused.stderr.contains(&complaint), "{}", refused.stderr);
    assert_eq!((files(node.pins()), attached_to_node(node)), before);
    Ok(())
}

#[test]
fn on_the_clients_node() -> Result<()> {
    takes_over("a")
}

#[test]
fn on_the_servers_node() -> Result<()> {
    takes_over("b")
}

/// Takes over on this node, with a conversation under way that outlives it all.
fn takes_over(name: &str) -> Result<()> {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 8080")?.listening()?;
    let (a, b) = daemons_with(&mesh, &patient());
    let (mut serving, _other) = if name == "a" { (a, b) } else { (b, a) };
    for to in ways(&web) {
        echoes(&client, to);
    }
    let capture = mesh.wire().capture()?;
    let mut chat = conversation(&client, web.at(8080))?;
    let attached = attached_to_node(mesh.node(name));
    let mut next = standing_by(&mesh, name, &patient())?;
    assert_eq!(attached_to_node(mesh.node(name)), attached);
    assert_held(&mesh, name)?;
    for to in ways(&web) {
        echoes(&client, to);
    }
    assert_eq!(next.access_log(), Vec::<Value>::new(), "it serves nothing");

    take_over(&mut serving, &next)?;
    for to in ways(&web) {
        echoes(&client, to);
    }
    goes_on(&chat)?;
    assert!(serving.is_running());
    // One program a hook, not two.
    wait_attached_to_node(mesh.node(name), &attached);
    // The new daemon owns the pins while the previous one still runs.
    assert_held(&mesh, name)?;
    let served = |line: &Value| line["result"] == "ok";
    next.wait_for_access("what it has served", TIMEOUT, served)?;

    let ends = chat.event("connected", TIMEOUT)?;
    chat.process().kill()?;
    assert_eq!(serving.process().wait(TIMEOUT)?.code(), Some(0));
    let lines = serving.access_log();
    let of_chat = lines.iter().filter(|line| line["client"] == ends["local"]);
    assert_eq!(of_chat.count(), 1, "the conversation: {lines:?}");
    // Until now, the previous one answered operators' requests.
    next.wait_ready()?;
    assert_eq!(next.status()?.kernel.pods, 1);
    for to in ways(&web) {
        echoes(&client, to);
    }
    let recording = capture.stop()?;
    assert!(!recording.contains(MARKER.as_bytes()));
    assert_eq!(next.terminate(TIMEOUT)?.code(), Some(0));
    assert_refused(&match name {
        "a" => call(&client, web.at(8080)),
        _ => call(mesh.outside(), web.at(8080)),
    });
    Ok(())
}

#[test]
fn a_killed_daemon_is_followed_by_the_one_that_stands_by() -> Result<()> {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 8080")?.listening()?;
    let (a, _b) = daemons_with(&mesh, &patient());
    let chat = conversation(&client, web.at(8080))?;
    let mut next = standing_by(&mesh, "a", &patient())?;
    a.kill()?;
    next.wait_probed("ready")?;
    assert_reset(&chat.failure(TIMEOUT)?);
    for to in ways(&web) {
        echoes(&client, to);
    }
    next.wait_ready()
}

#[test]
fn a_standby_can_stop_again() -> Result<()> {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 8080")?.listening()?;
    let (mut a, _b) = daemons_with(&mesh, &patient());
    let chat = conversation(&client, web.at(8080))?;
    let node = mesh.node("a");
    let before = (files(node.pins()), attached_to_node(node));
    for _ in 0..2 {
        let next = standing_by(&mesh, "a", &patient())?;
        assert_eq!(next.terminate(TIMEOUT)?.code(), Some(0));
    }
    goes_on(&chat)?;
    echoes(&client, web.at(8080));
    assert!(a.is_running() && a.is_ready());
    assert_eq!((files(node.pins()), attached_to_node(node)), before);
    Ok(())
}

#[test]
fn what_the_kernel_carries_on_one_node_stays_and_is_logged_once() -> Result<()> {
    let mesh = Mesh::builder()
        .node("a")
        .routed()
        .pod(PodSpec::new("client").on("a").service_account("client"))
        .pod(PodSpec::new("web").on("a").service_account("web"))
        .start()?;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 8080")?.listening()?;
    let mut serving = mesh.node("a").start_daemon_with(patient())?;
    serving.wait_enrolled(&["default/client", "default/web"])?;
    echoes(&client, web.at(8080));
    let mut chat = client.app(&format!("chat --to {} --interval 10", web.at(8080)))?;
    let ends = chat.event("connected", TIMEOUT)?;
    let mut next = standing_by(&mesh, "a", &patient())?;
    take_over(&mut serving, &next)?;
    // The daemon carries none of it.
    assert_eq!(serving.process().wait(TIMEOUT)?.code(), Some(0));
    goes_on(&chat)?;
    echoes(&client, web.at(8080));

    chat.process().kill()?;
    let of_chat = |line: &Value| line["client"] == ends["local"];
    for direction in ["inbound", "outbound"] {
        let line = next.wait_for_access("the conversation", TIMEOUT, |line| {
            of_chat(line) && line["direction"] == direction
        })?;
        assert_eq!(line["path"], "same-node", "{line}");
        assert_eq!(line["client_identity"], spiffe("client"), "{line}");
        assert_eq!(line["server_identity"], spiffe("web"), "{line}");
        assert!(line["bytes_to_server"].as_u64() >= Some(8), "{line}");
    }
    next.wait_ready()?;
    let lines = |daemon: &Daemon| {
        daemon
            .access_log()
            .iter()
            .filter(|line| of_chat(line))
            .count()
    };
    assert_eq!((lines(&serving), lines(&next)), (0, 2));
    Ok(())
}

#[test]
fn a_daemon_that_was_replaced_still_cuts_what_is_revoked() -> Result<()> {
    // One daemon carries all of it: no other one can cut it.
    let options = patient().same_node_tunnel();
    let mut stage = WithCa::start_with(&Default::default(), &options)?;
    let _echo = stage.other.app("echo-server --port 7")?.listening()?;
    let to = stage.other.at(7);
    let chat = stage.chat(&stage.client, to)?;
    let bystander = stage.chat(&stage.web, to)?;
    let next = standing_by(&stage.mesh, "a", &options.ca(&stage.ca))?;
    take_over(&mut stage.near, &next)?;
    goes_on(&chat)?;

    let start = stage.near.log_position();
    let client = spiffe("client");
    stage.ca.operate(&["revoke", "--identity", &client])?.ok()?;
    assert_reset(&chat.failure(TIMEOUT)?);
    let revoked = format!("{client} is revoked");
    stage.reason(&stage.near, start, &revoked, "reset")?;
    goes_on(&bystander)?;
    // The next one learns of it without this one.
    eventually_ok(TIMEOUT, "new connections to be refused", || {
        let reaches = stage.reaches(&stage.client, to)?;
        anyhow::ensure!(!reaches, "one was served");
        Ok(())
    })?;
    stage.reason(&next, 0, &revoked, "refused")?;
    Ok(())
}

#[test]
fn one_whose_programs_are_refused_does_not_stand_by() -> Result<()> {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 8080")?.listening()?;
    let (mut a, _b) = daemons_with(&mesh, &patient());
    let chat = conversation(&client, web.at(8080))?;
    let node = mesh.node("a");
    let before = (files(node.pins()), attached_to_node(node));
    let mut next = node.spawn_daemon(patient().stand_by().programs_refused())?;
    assert_eq!(next.process().wait(TIMEOUT)?.code(), Some(1));
    assert!(
        next.log_text().contains("refuses the eBPF program"),
        "{}",
        next.log_text()
    );
    assert_eq!((files(node.pins()), attached_to_node(node)), before);
    goes_on(&chat)?;
    echoes(&client, web.at(8080));
    assert!(a.is_running() && a.is_ready());
    Ok(())
}

#[test]
fn one_whose_programs_are_refused_leaves_those_of_the_one_before() -> Result<()> {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web.app("echo-server --port 8080")?.listening()?;
    let (a, _b) = daemons_with(&mesh, &patient());
    echoes(&client, web.at(8080));
    let node = mesh.node("a");
    let before = (files(node.pins()), attached_to_node(node));
    a.kill()?;
    let mut refused = node.spawn_daemon(patient().programs_refused())?;
    assert_eq!(refused.process().wait(TIMEOUT)?.code(), Some(1));
    assert!(
        refused.log_text().contains("refuses the eBPF program"),
        "{}",
        refused.log_text()
    );
    assert_eq!((files(node.pins()), attached_to_node(node)), before);
    for to in ways(&web) {
        assert_refused(&call(&client, to));
    }
    let _a = node.start_daemon()?;
    for to in ways(&web) {
        echoes(&client, to);
    }
    Ok(())
}
