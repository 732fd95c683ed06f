//! Plaintext connections that are open when a pod is enrolled, when its policies change, and when the daemon restarts.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use mesh_tests::{
    App, Daemon, DaemonOptions, Mesh, Place, Pod, PodSpec, TIMEOUT, eventually, slowdown,
};
use serde_json::{Value, json};

use crate::common::lifecycle_pair::{MARKER, assert_reset, builder, daemons_with, pair};

/// Within which a connection that policy would not admit must end.
const LIMIT: Duration = Duration::from_secs(2);

fn echo(place: &Place) -> App {
    place
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap()
}

/// A conversation that goes on until one side ends it.
fn conversation(from: &Place, to: SocketAddr) -> App {
    let mut chat = from.app(&format!("chat --to {to} --interval 10")).unwrap();
    chat.event("round", TIMEOUT).unwrap();
    chat
}

fn goes_on(chat: &App) {
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 5).then_some(())
    })
    .unwrap();
}

/// Asserts that the conversations are reset soon after `since`, and that the log has one line about them.
fn assert_ended<const N: usize>(chats: [App; N], since: Instant, daemon: &Daemon) {
    for chat in chats {
        assert_reset(&chat.failure(TIMEOUT).unwrap());
    }
    let took = since.elapsed();
    assert!(took < LIMIT * slowdown(), "{took:?}");
    let is_line = |line: &Value| {
        let message = line["message"].as_str().unwrap_or_default();
        message.starts_with("plaintext connections ended")
    };
    let line = daemon
        .wait_for_log("the connections' end", TIMEOUT, is_line)
        .unwrap();
    assert_eq!(
        (&line["pod"], &line["connections"]),
        (&"default/web".into(), &N.into()),
        "{line}"
    );
    assert!(
        line["reason"].as_str().is_some_and(|why| !why.is_empty()),
        "{line}"
    );
    let lines = daemon.logs().into_iter().filter(is_line);
    assert_eq!(lines.count(), 1);
}

#[test]
fn plaintext_open_before_enrolment_is_reset() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echoes = [echo(&web), echo(mesh.outside())];
    let outside = (mesh.outside_ipv4(), 8080).into();
    let inbound = [
        conversation(mesh.outside(), web.at(8080)),
        conversation(mesh.outside(), web.at6(8080)),
        conversation(&client, web.at(8080)),
        // As a process of the node did before there was a daemon to record it.
        conversation(mesh.node("b").place(), web.at(8080)),
    ];
    let outbound = conversation(&web, outside);
    let itself = conversation(&web, web.at(8080));
    let b = mesh.node("b").start_daemon().unwrap();
    assert_ended(inbound, Instant::now(), &b);
    goes_on(&outbound);
    goes_on(&itself);
}

/// An app that is slow to accept: its connections are established, or about to be, before its pod is enrolled.
fn late_listener(place: &Place, port: u16, defers: bool) -> TcpListener {
    let listener = place.listen(([0, 0, 0, 0], port).into()).unwrap();
    if defers {
        let seconds: nix::libc::c_int = 60;
        // SAFETY: `seconds` is a readable int, the length matches, and the descriptor is open.
        let result = unsafe {
            nix::libc::setsockopt(
                listener.as_raw_fd(),
                nix::libc::IPPROTO_TCP,
                nix::libc::TCP_DEFER_ACCEPT,
                (&raw const seconds).cast(),
                size_of::<nix::libc::c_int>() as nix::libc::socklen_t,
            )
        };
        assert_eq!(result, 0);
    }
    listener
}

#[test]
fn plaintext_that_races_enrolment_reaches_no_app() {
    let mesh = pair();
    let web = mesh.pod("web");
    // Established and not accepted; and with TCP_DEFER_ACCEPT in SYN_RECV until the caller sends something.
    for (port, defers) in [(8081, false), (8082, true)] {
        let listener = late_listener(&web, port, defers);
        let mut caller = mesh.outside().connect(web.at(port)).unwrap();
        let b = mesh.node("b").start_daemon().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        caller.set_read_timeout(Some(LIMIT)).unwrap();
        // The first call after the RST reports it.
        let written = caller.write_all(MARKER.as_bytes());
        let error = written
            .and_then(|()| caller.read_exact(&mut [0; 1]))
            .unwrap_err();
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionReset,
            "{port}: {error}"
        );
        listener.set_nonblocking(true).unwrap();
        if let Ok((mut accepted, _)) = listener.accept() {
            accepted.set_nonblocking(false).unwrap();
            accepted.set_read_timeout(Some(TIMEOUT)).unwrap();
            let mut got = Vec::new();
            let _ = accepted.read_to_end(&mut got);
            assert!(got.is_empty(), "{port}: {} bytes arrived", got.len());
        }
        b.kill().unwrap();
        mesh.node("b").unload().unwrap();
    }
}

fn peer_authentication(mode: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "web", "namespace": "default"}, "spec": {"mtls": {"mode": mode}},
    })
}

/// Conversations with `web` that no sweep may end: over a tunnel, from a pod of the same node in the kernel and through the
/// daemon, from the node itself, and of the pod with itself and others.
fn protected(mesh: &Mesh) -> Vec<App> {
    let (client, web, near) = (mesh.pod("client"), mesh.pod("web"), mesh.pod("near"));
    let first = conversation(&near, web.at(8080));
    vec![
        conversation(&client, web.at(8080)),
        conversation(&client, web.at6(8080)),
        first,
        conversation(&near, web.at(8080)),
        conversation(mesh.node("b").place(), web.at(8080)),
        conversation(&web, web.at(8080)),
        conversation(&web, (mesh.outside_ipv4(), 8080).into()),
        conversation(&web, near.at(8080)),
    ]
}

#[test]
fn plaintext_is_reset_when_permissive_becomes_strict() {
    let mesh = builder().routed().start().unwrap();
    let web = mesh.pod("web");
    let near = mesh.add_pod(PodSpec::new("near").on("b")).unwrap();
    let _echoes = [echo(&web), echo(mesh.outside()), echo(&near)];
    let (_a, b) = daemons_with(&mesh, &DaemonOptions::default().permissive());
    let others = protected(&mesh);
    let plain = [
        conversation(mesh.outside(), web.at(8080)),
        conversation(mesh.outside(), web.at6(8080)),
    ];
    let since = Instant::now();
    mesh.manifests()
        .apply(&peer_authentication("STRICT"))
        .unwrap();
    assert_ended(plain, since, &b);
    // The second sweep has passed, too.
    std::thread::sleep(LIMIT);
    others.iter().for_each(goes_on);
}

#[test]
fn plaintext_is_reset_when_a_policy_denies_it_and_not_when_one_allows_it() {
    let mesh = builder().routed().start().unwrap();
    let web = mesh.pod("web");
    let near = mesh.add_pod(PodSpec::new("near").on("b")).unwrap();
    let _echoes = [echo(&web), echo(mesh.outside()), echo(&near)];
    let (_a, b) = daemons_with(&mesh, &DaemonOptions::default().permissive());
    let others = protected(&mesh);
    let admitted = conversation(mesh.outside(), web.at(8080));
    let denied = conversation(mesh.outside(), web.at6(8080));
    let since = Instant::now();
    let blocks = json!([format!("{}/128", mesh.outside_ipv6())]);
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"action": "DENY", "rules": [{"from": [{"source": {"ipBlocks": blocks}}]}]},
    });
    mesh.manifests().apply(&policy).unwrap();
    assert_ended([denied], since, &b);
    std::thread::sleep(LIMIT);
    goes_on(&admitted);
    others.iter().for_each(goes_on);
}

/// Addresses of `web`'s netns that no object lists.
const UNLISTED: [&str; 2] = ["10.77.2.200", "fd77:2::c8"];

fn add_unlisted_addresses(web: &Pod) -> [SocketAddr; 2] {
    UNLISTED.map(|address| {
        let address: IpAddr = address.parse().unwrap();
        let (text, more): (_, &[&str]) = match address {
            IpAddr::V4(v4) => (format!("{v4}/24"), &[]),
            // Never a source address.
            IpAddr::V6(v6) => (format!("{v6}/64"), &["nodad", "preferred_lft", "0"]),
        };
        let command = ["address", "add", &text, "dev", "eth0"];
        web.run("ip", command.iter().chain(more))
            .unwrap()
            .ok()
            .unwrap();
        (address, 8080).into()
    })
}

/// The daemon carries these itself: in PERMISSIVE it is asked about callers of the pods' networks that no object claims,
/// and about all callers where a policy selects the pod.
#[test]
fn plaintext_through_the_daemon_to_an_unlisted_address_is_reset_when_policies_deny_it() {
    let mesh = pair();
    let web = mesh.pod("web");
    let unlisted = add_unlisted_addresses(&web);
    let _echo = echo(&web);
    let (_a, b) = daemons_with(&mesh, &DaemonOptions::default().permissive());
    let allow = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"action": "ALLOW", "rules": [{"to": [{"operation": {"ports": ["8080"]}}]}]},
    });
    mesh.manifests().apply(&allow).unwrap();
    let through_the_daemon = |chat: &App| {
        let connected = &chat.events_of("connected")[0];
        let status = b.status_json().unwrap();
        let mut open = status["connections"].as_array().unwrap().iter();
        open.any(|line| line["client"] == connected["local"])
    };
    for to in unlisted {
        let chat = eventually(TIMEOUT, "the daemon to carry plaintext", || {
            let command = format!("chat --to {to} --interval 10");
            let mut chat = mesh.outside().app(&command).unwrap();
            // It is refused while the pod is still STRICT.
            chat.event("round", TIMEOUT).ok()?;
            through_the_daemon(&chat).then_some(chat)
        })
        .unwrap();
        let since = Instant::now();
        mesh.manifests()
            .apply(&peer_authentication("STRICT"))
            .unwrap();
        assert_reset(&chat.failure(TIMEOUT).unwrap());
        let took = since.elapsed();
        assert!(took < LIMIT * slowdown(), "{to}: {took:?}");
        b.wait_for_access("the end", TIMEOUT, |line| {
            let reason = line["reason"].as_str().unwrap_or_default();
            line["destination"] == to.to_string()
                && reason.ends_with("STRICT by PeerAuthentication default/web")
        })
        .unwrap();
        mesh.manifests()
            .remove("PeerAuthentication", "default", "web")
            .unwrap();
    }
}

#[test]
fn plaintext_is_reset_after_a_restart_with_strict_and_not_after_one_without() {
    let mesh = pair();
    let web = mesh.pod("web");
    let _echo = echo(&web);
    let permissive = DaemonOptions::default().permissive();
    let start =
        |options: &DaemonOptions| mesh.node("b").start_daemon_with(options.clone()).unwrap();
    let b = start(&permissive);
    let plain = conversation(mesh.outside(), web.at(8080));
    let node = conversation(mesh.node("b").place(), web.at(8080));
    b.kill().unwrap();
    let b = start(&permissive);
    std::thread::sleep(LIMIT);
    goes_on(&plain);
    b.kill().unwrap();
    let b = start(&DaemonOptions::default());
    assert_ended([plain], Instant::now(), &b);
    std::thread::sleep(LIMIT);
    goes_on(&node);
}

#[test]
fn a_draining_daemons_tunnels_survive_the_next_ones_sweep() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let near = mesh.add_pod(PodSpec::new("near").on("b")).unwrap();
    let _echo = echo(&web);
    let options = DaemonOptions::default().drain(Duration::from_secs(120));
    let (_a, mut b) = daemons_with(&mesh, &options);
    let open = [
        conversation(&client, web.at(8080)),
        conversation(&near, web.at(8080)),
        conversation(&near, web.at(8080)),
        conversation(mesh.node("b").place(), web.at(8080)),
    ];
    let next = mesh.node("b").spawn_daemon(options.stand_by()).unwrap();
    next.wait_probed("standing by").unwrap();
    b.process()
        .signal(nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    next.wait_probed("ready").unwrap();
    std::thread::sleep(LIMIT);
    open.iter().for_each(goes_on);
    let ended = |line: &Value| {
        let message = line["message"].as_str().unwrap_or_default();
        message.starts_with("plaintext connections ended")
    };
    assert_eq!(next.logs().into_iter().filter(ended).count(), 0);
    assert!(b.is_running(), "it still drains");
}
