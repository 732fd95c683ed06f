//! SIGTERM: connections that end in time end in order, the rest is cut at the deadline, and no new ones are accepted.

use std::time::{Duration, Instant};

use mesh_tests::{Daemon, DaemonOptions, TIMEOUT, eventually, eventually_ok, http_get, slowdown};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::lifecycle_pair::{
    assert_refused, assert_reset, call, daemons, daemons_with, echoes, pair, ways,
};

#[test]
fn a_connection_that_ends_in_time_ends_cleanly_on_the_clients_node() {
    ends_cleanly("a");
}

#[test]
fn a_connection_that_ends_in_time_ends_cleanly_on_the_servers_node() {
    ends_cleanly("b");
}

/// The daemon of this node is stopped in the middle of a conversation that takes another second.
fn ends_cleanly(stopped: &str) {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, b) = daemons_with(
        &mesh,
        &DaemonOptions::default().drain(Duration::from_secs(120)),
    );
    let (mut stopped, _other) = if stopped == "a" { (a, b) } else { (b, a) };
    let mut chat = client
        .app(&format!(
            "chat --to {} --rounds 22 --interval 50",
            web.at(8080)
        ))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    stopped.process().signal(Signal::SIGTERM).unwrap();
    assert_eq!(chat.success(TIMEOUT).unwrap()["rounds"], 22);
    let closed = echo.event("closed", TIMEOUT).unwrap();
    assert_eq!(
        (&closed["errno"], &closed["bytes"]),
        (&Value::Null, &176.into())
    );
    // With nothing left to wait for, it does not wait.
    let since = Instant::now();
    let status = stopped.process().wait(Duration::from_secs(10)).unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(
        since.elapsed() < Duration::from_secs(5) * slowdown(),
        "{:?}",
        since.elapsed()
    );
    let lines = stopped.access_log();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(
        (&lines[0]["result"], &lines[0]["reason"]),
        (&"ok".into(), &"".into())
    );
}

#[test]
fn a_connection_that_does_not_end_is_reset_at_the_deadline() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let drain = Duration::from_millis(1500) * slowdown();
    let (mut a, _b) = daemons_with(&mesh, &DaemonOptions::default().drain(drain));
    let mut chat = client
        .app(&format!("chat --to {} --interval 20", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let since = Instant::now();
    a.process().signal(Signal::SIGTERM).unwrap();
    drains(&a);
    let rounds = chat.events_of("round").len();
    let failed = chat.failure(TIMEOUT).unwrap();
    let took = since.elapsed();
    assert_reset(&failed);
    assert!(
        took >= drain && took < drain + Duration::from_secs(2) * slowdown(),
        "{took:?}"
    );
    assert!(
        failed["rounds"].as_u64().unwrap() > rounds as u64 + 3,
        "it went on meanwhile: {failed}"
    );
    assert_reset(&echo.event("closed", TIMEOUT).unwrap());
    let status = a.process().wait(Duration::from_secs(5)).unwrap();
    assert_eq!(status.code(), Some(0), "a drain that cuts is no failure");
    let lines = a.access_log();
    assert_eq!(
        (lines.len(), &lines[0]["result"]),
        (1, &"reset".into()),
        "{lines:?}"
    );
    assert!(
        lines[0]["reason"].as_str().unwrap().contains("daemon"),
        "{lines:?}"
    );
}

/// Waits until a daemon that was asked to stop drains: none of its listeners is open any more.
fn drains(daemon: &Daemon) {
    let says_so = |line: &Value| line["message"] == "draining";
    daemon
        .wait_for_log("that it drains", TIMEOUT, says_so)
        .unwrap();
}

#[test]
fn a_draining_daemon_admits_no_connection() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (mut a, mut b) = daemons_with(
        &mesh,
        &DaemonOptions::default().drain(Duration::from_secs(600)),
    );
    // These leave tunnels behind that could carry another connection.
    for to in ways(&web) {
        echoes(&client, to);
    }
    let mut chat = client
        .app(&format!("chat --to {} --interval 20", web.at(8080)))
        .unwrap();
    chat.event("round", TIMEOUT).unwrap();

    // First the server's side: the connection is refused although the tunnels between them are still open.
    b.process().signal(Signal::SIGTERM).unwrap();
    drains(&b);
    for to in ways(&web) {
        let failed = call(&client, to);
        assert_eq!(failed["event"], "failed", "{to}: {failed}");
    }
    assert_refused(&call(mesh.outside(), web.at(8080)));
    assert_eq!(
        echo.events_of("accepted").len(),
        5,
        "{:?}",
        echo.events_of("accepted")
    );

    a.process().signal(Signal::SIGTERM).unwrap();
    drains(&a);
    for to in ways(&web) {
        assert_refused(&call(&client, to));
    }

    for (daemon, node) in [(&mut a, mesh.node("a")), (&mut b, mesh.node("b"))] {
        assert!(daemon.is_running());
        let answer = http_get(
            node.netns(),
            "127.0.0.1:15021".parse().unwrap(),
            "/healthz/ready",
        )
        .unwrap();
        assert_eq!(answer.status, 503, "{}", answer.body);
        assert!(!daemon.status().unwrap().ready);
        // Refused connections may still be closing.
        eventually_ok(TIMEOUT, "the conversation alone", || {
            let open = daemon.status()?.connections;
            anyhow::ensure!(open.len() == 1, "{open:?}");
            Ok(())
        })
        .unwrap();
    }
    // The one that was there is still served.
    let rounds = chat.events_of("round").len();
    eventually(TIMEOUT, "the conversation to continue", || {
        (chat.events_of("round").len() > rounds + 3).then_some(())
    })
    .unwrap();
    chat.process().kill().unwrap();
    echo.event("closed", TIMEOUT).unwrap();
    for daemon in [&mut a, &mut b] {
        assert_eq!(daemon.process().wait(TIMEOUT).unwrap().code(), Some(0));
    }
}

#[test]
fn a_drain_of_nothing_cuts_at_once() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let mut echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let options = DaemonOptions::default().setting("drain", "0s".into());
    let (mut a, _b) = daemons_with(&mesh, &options);
    let mut chat = client.app(&format!("chat --to {}", web.at(8080))).unwrap();
    chat.event("round", TIMEOUT).unwrap();
    let since = Instant::now();
    a.process().signal(Signal::SIGTERM).unwrap();
    assert_eq!(a.process().wait(TIMEOUT).unwrap().code(), Some(0));
    let took = since.elapsed();
    assert!(took < Duration::from_millis(1500) * slowdown(), "{took:?}");
    assert_reset(&chat.failure(TIMEOUT).unwrap());
    assert_reset(&echo.event("closed", TIMEOUT).unwrap());
}

#[test]
fn an_idle_daemon_stops_at_once_and_the_next_one_continues() {
    let mesh = pair();
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _echo = web
        .app("echo-server --port 8080")
        .unwrap()
        .listening()
        .unwrap();
    let (a, _b) = daemons(&mesh);
    echoes(&client, web.at(8080));
    let since = Instant::now();
    assert_eq!(a.terminate(TIMEOUT).unwrap().code(), Some(0));
    let took = since.elapsed();
    assert!(
        took < Duration::from_secs(3) * slowdown(),
        "nothing was under way: {took:?}"
    );
    let _a = mesh.node("a").start_daemon().unwrap();
    for to in ways(&web) {
        echoes(&client, to);
    }
}
