//! A node whose clock is an hour off: calls fail, and both nodes log that the clocks differ.

use std::path::Path;

use mesh_tests::{Daemon, DaemonOptions, Mesh, Nginx, PodSpec, Result, TIMEOUT};
use serde_json::Value;

/// The library of Debian's package `faketime`, for programs with threads.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

fn off_by(offset: &str) -> DaemonOptions {
    DaemonOptions::default()
        .environment("LD_PRELOAD", LIBRARY)
        .environment("FAKETIME", offset)
        // Only the wall clock is wrong; timers run normally.
        .environment("DONT_FAKE_MONOTONIC", "1")
}

#[test]
fn both_sides_report_a_slow_clock() -> Result<()> {
    clock_off("both_sides_report_a_slow_clock", "-1h")
}

#[test]
fn both_sides_report_a_fast_clock() -> Result<()> {
    clock_off("both_sides_report_a_fast_clock", "+1h")
}

fn clock_off(test: &str, offset: &str) -> Result<()> {
    if !Path::new(LIBRARY).exists() {
        println!("SKIPPED {test}: no {LIBRARY}; install the package faketime");
        return Ok(());
    }
    let mesh = Mesh::builder()
        .node("right")
        .node("wrong")
        .pod(PodSpec::new("one").on("right").service_account("one"))
        .pod(PodSpec::new("two").on("wrong").service_account("two"))
        .start()?;
    let right = mesh.node("right").start_daemon()?;
    let wrong = mesh.node("wrong").start_daemon_with(off_by(offset))?;
    right.wait_enrolled(&["default/one"])?;
    wrong.wait_enrolled(&["default/two"])?;
    let _servers = [
        Nginx::start(&mesh.pod("one"), 8080, "one")?,
        Nginx::start(&mesh.pod("two"), 8080, "two")?,
    ];
    for (from, to, client_daemon, server_daemon) in [
        ("one", "two", &right, &wrong),
        ("two", "one", &wrong, &right),
    ] {
        let url = format!("http://{}/", mesh.pod(to).at(8080));
        let answer = mesh.pod(from).run("curl", ["-sS", "-m", "15", &url])?;
        // The reset may come while the app connects, sends or receives.
        assert!(
            matches!(answer.code(), Some(7 | 55 | 56)) && answer.stdout.is_empty(),
            "{from} to {to}: curl exits with {:?}: {} {}",
            answer.code(),
            answer.stdout,
            answer.stderr
        );
        let client = refusal(client_daemon, "outbound")?;
        let server = refusal(server_daemon, "inbound")?;
        println!("{from} to {to}: {client} / {server}");
        for reason in [&client, &server] {
            assert!(reason.contains("clock"), "{from} to {to}: {reason}");
        }
        // The side whose clock is before the certificate's validity can report the difference. The certificate is valid from
        // five minutes before it was issued, and may be a few minutes old by now.
        let says = |reason: &str| (50..=55).any(|m| reason.contains(&format!("{m} minutes")));
        assert!(
            says(&client) || says(&server),
            "{from} to {to}: {client} / {server}"
        );
    }
    Ok(())
}

/// Returns the reason of the only refusal in this direction.
fn refusal(daemon: &Daemon, direction: &str) -> Result<String> {
    let is = |line: &Value| line["direction"] == direction;
    daemon.wait_for_access(direction, TIMEOUT, is)?;
    let lines: Vec<_> = daemon.access_log().into_iter().filter(is).collect();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert_eq!(lines[0]["result"], "refused", "{}", lines[0]);
    Ok(lines[0]["reason"].as_str().unwrap_or_default().to_owned())
}
