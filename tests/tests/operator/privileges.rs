//! The capabilities that the chart grants to the daemon: each is needed, and together they suffice.

use std::net::SocketAddr;
use std::path::Path;

use mesh_tests::{DaemonOptions, Finished, Node, Process, TIMEOUT, auth_daemon, chart, eventually};

use crate::common::by_uid;
use crate::common::lifecycle_pair::{MARKER, echoes, pair, ways};

/// Does what each capability is for, with those of the chart alone: fails if one is removed from the chart, even if the
/// daemon's own check no longer asks for it.
#[test]
fn daemon_works_with_the_capabilities_of_the_chart() {
    let mesh = by_uid::pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .container("c1")
        .unwrap()
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let client = client.container("c1").unwrap();
    let _first = by_uid::sleep(&client);
    let start = |node| {
        let options = DaemonOptions::default().capabilities(&chart::capabilities().unwrap());
        // Its programs are loaded and attached (SYS_ADMIN, NET_ADMIN).
        mesh.node(node).start_daemon_with(options).unwrap()
    };
    let (a, b) = (start("a"), start("b"));
    // Found through the namespaces of processes that have other rights than the daemon (SYS_PTRACE).
    a.wait_enrolled(&["default/client"]).unwrap();
    b.wait_enrolled(&["default/web"]).unwrap();
    // Its threads for quiet pods have precedence (SYS_NICE).
    for daemon in [&a, &b] {
        eventually(TIMEOUT, "a preferred thread", || {
            let preferred = nice_values(daemon.pid()).any(|nice| nice == -10);
            preferred.then_some(())
        })
        .unwrap();
    }
    // Delivered from the client's own address and port (NET_ADMIN, and NET_BIND_SERVICE for the port).
    for (to, port) in ways(&web).into_iter().zip(700_u64..) {
        let dial = format!("connect --to {to} --source-port {port} --send {MARKER} --read");
        let mut dial = client.app(&format!("{dial} --shutdown")).unwrap();
        let accepted = echo.event("accepted", TIMEOUT).unwrap();
        let peer: SocketAddr = accepted["peer"].as_str().unwrap().parse().unwrap();
        assert_eq!(u64::from(peer.port()), port, "{to}: {accepted}");
        let finished = dial.event("finished", TIMEOUT).unwrap();
        assert_eq!(finished["text"], MARKER, "{to}: {finished}");
    }
}

/// The nice value of each thread of a process.
fn nice_values(pid: u32) -> impl Iterator<Item = i64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(|task| {
        // The thread may have ended meanwhile.
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
        // Field 19 of proc_pid_stat(5); the name, field 2, is in parentheses.
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        Some(fields.split(' ').nth(16).unwrap().parse().unwrap())
    })
}

#[test]
fn daemon_without_capabilities_exits_with_the_reason() {
    let mesh = pair();
    let node = mesh.node("a");
    if !Path::new("/usr/bin/setpriv").exists() {
        println!(
            "SKIPPED daemon_without_capabilities_exits_with_the_reason: no setpriv (util-linux)"
        );
        return;
    }
    let granted = chart::capabilities().unwrap();
    assert!(granted.len() > 3, "{granted:?}");
    // A valid configuration, as the test library writes it.
    node.start_daemon().unwrap().kill().unwrap();
    node.unload().unwrap().ok().unwrap();
    let config = node.folder().join("auth-daemon.yaml").display().to_string();
    let failed = without(node, "-all", &["run", "--config", &config]);
    assert_eq!(failed.code(), Some(1), "{}{}", failed.stdout, failed.stderr);
    let last = failed.stderr.lines().last().unwrap();
    assert!(last.starts_with("auth-daemon: "), "{}", failed.stderr);
    for capability in &granted {
        assert!(last.contains(capability), "{}", failed.stderr);
    }
    // With all but one of those that the chart grants, it names that one.
    for missing in &granted {
        let others = granted.iter().filter(|one| *one != missing);
        let set: String = others
            .map(|one| format!(",+{}", one.trim_start_matches("CAP_").to_lowercase()))
            .collect();
        let failed = without(node, &format!("-all{set}"), &["run", "--config", &config]);
        assert_eq!(failed.code(), Some(1), "{}{}", failed.stdout, failed.stderr);
        for capability in &granted {
            let named = failed.stderr.contains(&format!("{capability} ("));
            assert_eq!(named, capability == missing, "{}", failed.stderr);
        }
    }
    let _a = node.start_daemon().unwrap();
    let web = mesh.pod("web");
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let _b = mesh.node("b").start_daemon().unwrap();
    echoes(&mesh.pod("client"), web.at(8080));
}

/// Runs the daemon's program without some capabilities, `-net_admin` or `-all`.
pub(crate) fn without(node: &Node, capabilities: &str, arguments: &[&str]) -> Finished {
    let mut command = node.place().command("setpriv").unwrap();
    command
        .arg(format!("--bounding-set={capabilities}"))
        .arg(auth_daemon().unwrap())
        .args(arguments);
    Process::spawn(command).unwrap().finish(TIMEOUT).unwrap()
}
