//! A pod with CAP_NET_ADMIN undoes what the daemon set up in its network namespace.

use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_tests::{Result, eventually};

use super::common::{lifecycle_pair::echoes, pair::Pair};

/// Longer than the daemon's interval between two checks.
const PATIENCE: Duration = Duration::from_secs(30);
const MARKER: &str = "marker-that-nobody-may-read";

/// Runs commands in the server's pod, and checks that the next connection fails instead of being answered in plaintext.
fn tamper(pair: &Pair, commands: &[&str]) -> Result<()> {
    for command in commands {
        let mut words = command.split(' ');
        let program = words.next().context("a program")?;
        pair.web.run(program, words)?.ok()?;
    }
    let capture = pair.mesh.wire().capture()?;
    let connect = format!("connect --to {} --send {MARKER} --read", pair.web.at(8080));
    pair.client.app(&connect)?.failure(PATIENCE)?;
    let crossed = capture.stop()?;
    ensure!(!crossed.packets().is_empty(), "nothing crossed at all");
    ensure!(
        !crossed.contains(MARKER.as_bytes()),
        "{:?}",
        crossed.packets()
    );
    Ok(())
}

/// Waits for a status that says of the pod that it has tampered, as `expected`.
fn is_named(pair: &Pair, expected: &str) -> Result<()> {
    let tampered = eventually(PATIENCE, "a status that names the pod", || {
        let status = pair.far.status().ok()?;
        let mut pods = status.pods.into_iter();
        pods.find(|pod| pod.pod == "default/web")?.tampered
    })?;
    ensure!(tampered.contains(expected), "{tampered}");
    Ok(())
}

/// Checks that the status names the pod, and that connections to it succeed again.
fn is_repaired(pair: &Pair) -> Result<()> {
    is_named(pair, "put back")?;
    echoes(&pair.client, pair.web.at(8080));
    echoes(&pair.client, pair.web.at6(8080));
    Ok(())
}

#[test]
fn a_pod_that_removes_the_rule_is_refused_named_and_repaired() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 8080")?.listening()?;
    tamper(
        &pair,
        &[
            "ip rule del preference 100",
            "ip -6 rule del preference 100",
        ],
    )?;
    is_repaired(&pair)
}

#[test]
fn a_pod_that_flushes_the_route_is_refused_named_and_repaired() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 8080")?.listening()?;
    tamper(&pair, &["ip route flush table 15006"])?;
    is_repaired(&pair)
}

#[test]
fn a_pod_that_switches_off_the_sysctl_is_refused_named_and_repaired() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 8080")?.listening()?;
    tamper(&pair, &["sysctl -w net.ipv4.tcp_fwmark_accept=0"])?;
    is_repaired(&pair)
}

#[test]
fn a_pod_that_prefers_a_rule_of_its_own_is_refused_and_named() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 8080")?.listening()?;
    tamper(&pair, &["ip rule add preference 50 lookup main"])?;
    is_named(&pair, "rules that precede the daemon's")?;
    let remove = ["rule", "del", "preference", "50"];
    pair.web.run("ip", remove)?.ok()?;
    echoes(&pair.client, pair.web.at(8080));
    Ok(())
}
