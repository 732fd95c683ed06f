//! A pod with CAP_NET_ADMIN undoes what the daemon set up in its network namespace.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use mesh_tests::{Result, eventually};

use super::common::{
    lifecycle_pair::{call, echoes},
    pair::Pair,
};

/// Longer than the daemon's interval between two checks.
const PATIENCE: Duration = Duration::from_secs(30);
/// Times that the daemon may repair the pod before a connection fails.
const ATTEMPTS: usize = 5;
const MARKER: &str = "marker-that-nobody-may-read";

/// Runs commands in the server's pod, and checks that the next connection over IPv4 fails instead of being answered in
/// plaintext. If the daemon repairs the pod before that connection, the commands run again: the last must affect IPv4, so
/// that one check of the daemon repairs all or the connection fails.
fn tamper(pair: &Pair, commands: &[&str]) -> Result<()> {
    let connect = format!(
        "connect --to {} --send {MARKER} --shutdown --read",
        pair.web.at(8080)
    );
    for _ in 0..ATTEMPTS {
        for command in commands {
            let mut words = command.split(' ');
            let program = words.next().context("a program")?;
            pair.web.run(program, words)?.ok()?;
        }
        let capture = pair.mesh.wire().capture()?;
        let connected = pair.client.app(&connect)?.finish(PATIENCE)?;
        let crossed = capture.stop()?;
        ensure!(!crossed.packets().is_empty(), "nothing crossed at all");
        ensure!(
            !crossed.contains(MARKER.as_bytes()),
            "{:?}",
            crossed.packets()
        );
        if !connected.status.success() {
            return Ok(());
        }
        ensure!(
            is_named(pair)?.contains("restored"),
            "it succeeded although nothing was repaired: {}",
            connected.stdout
        );
    }
    bail!("the daemon repaired the pod {ATTEMPTS} times in a row before a connection could fail")
}

/// Waits for a status that says of the pod that it has tampered. Returns what it says.
fn is_named(pair: &Pair) -> Result<String> {
    eventually(PATIENCE, "a status that names the pod", || {
        let status = pair.far.status().ok()?;
        let mut pods = status.pods.into_iter();
        pods.find(|pod| pod.pod == "default/web")?.tampered
    })
}

/// Checks that the status names the pod, and that connections to it succeed again. A check of the daemon may have come
/// between two commands of the pod: then the next one repairs what the second command did.
fn is_repaired(pair: &Pair) -> Result<()> {
    let tampered = is_named(pair)?;
    ensure!(tampered.contains("restored"), "{tampered}");
    for server in [pair.web.at(8080), pair.web.at6(8080)] {
        eventually(PATIENCE, "a connection to the pod", || {
            (call(&pair.client, server)["event"] == "finished").then_some(())
        })?;
        echoes(&pair.client, server);
    }
    Ok(())
}

#[test]
fn a_pod_that_removes_the_rule_is_refused_named_and_repaired() -> Result<()> {
    let pair = Pair::start()?;
    let _echo = pair.web.app("echo-server --port 8080")?.listening()?;
    tamper(
        &pair,
        &[
            "ip -6 rule del preference 100",
            "ip rule del preference 100",
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
    let tampered = is_named(&pair)?;
    ensure!(
        tampered.contains("rules that precede the daemon's"),
        "{tampered}"
    );
    let remove = ["rule", "del", "preference", "50"];
    pair.web.run("ip", remove)?.ok()?;
    echoes(&pair.client, pair.web.at(8080));
    Ok(())
}
