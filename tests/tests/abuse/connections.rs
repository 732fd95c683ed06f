//! Pods that flood a server with connections, or hold very many.

use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_tests::{App, Daemon, Pod, PodSpec, Result, TIMEOUT, eventually_ok};

use crate::stage::{DESCRIPTORS, Stage};

#[test]
fn a_pod_that_floods_with_connects_does_not_make_its_neighbours_fail() -> Result<()> {
    let mut stage = Stage::set()?;
    let flood = |stage: &Stage, target: &Pod| {
        let to = stage.echo(target);
        stage.attacker.app(&format!("flood --to {to}"))
    };
    stage.compare_with("the attacker only burns CPU time", |stage| {
        let burn = || stage.attacker.spawn("sh", ["-c", "while :; do :; done"]);
        Ok([burn()?, burn()?])
    })?;
    stage.compare_with("the same load outside the mesh", |stage| {
        flood(stage, &stage.outside)
    })?;
    stage.attack(
        "flood of connects",
        |stage| flood(stage, &stage.target),
        |_, flood| {
            eventually_ok(TIMEOUT, "a flood", || {
                let flooding = flood.event("flooding", TIMEOUT)?;
                ensure!(flooding["connected"].as_u64() > Some(0), "{flooding}");
                Ok(())
            })
        },
    )
}

#[test]
fn a_pod_that_hoards_connections_is_refused_beyond_its_share() -> Result<()> {
    let mut stage = Stage::set()?;
    stage.attack("hoard of connections", hoard, |stage, hoard| {
        let held = settled(hoard)?;
        // Of 3000 connections, the attacker gets at most half in its own node, and a third at the server.
        ensure!(held > 0 && held <= SHARE_OF_PEER, "{held} connections held");
        refused(&stage.near, &stage.attacker, "outbound-connections")?;
        refused(&stage.far, &stage.target, "peer-connections")?;
        // The reserve still serves the control plane.
        let known = stage.near.status_json()?["pods"].clone();
        let late = stage.mesh.add_pod(PodSpec::new("late").on("a"))?;
        stage.near.wait_enrolled(&[late.full_name()])?;
        ensure!(
            known.as_array().is_some_and(|pods| pods.len() == 2),
            "{known}"
        );
        stage.mesh.remove_pod("late")
    })
}

#[test]
fn connects_that_nobody_answers_take_only_their_own_pods_share() -> Result<()> {
    let mut stage = Stage::set()?;
    stage
        .target
        .run("ip", ["link", "set", "eth0", "down"])?
        .ok()?;
    stage.attack("connects half done", hoard, |stage, _| {
        refused(&stage.near, &stage.attacker, "outbound-connections")
    })
}

/// The attacker opens more connections than its node has room for.
fn hoard(stage: &Stage) -> Result<App> {
    let to = stage.echo(&stage.target);
    let hoard = format!("hoard --to {to} --connections {HOARD}");
    let mut hoard = stage.attacker.app(&hoard)?;
    hoard.event("opened", LONG)?;
    Ok(hoard)
}

/// The number of connections that an attacker still holds, once no more of them are refused: the daemons decide on each within
/// ten seconds, and the attacker counts them once a second.
pub(crate) fn settled(hoard: &mut App) -> Result<u64> {
    const COUNTS: usize = 12;
    let (mut last, mut times) = (u64::MAX, 0);
    eventually_ok(LONG, "the hoard to settle", || {
        let now = hoard.event("holding", TIMEOUT)?["connections"].as_u64();
        let now = now.unwrap_or_default();
        let same = now == std::mem::replace(&mut last, now);
        times = if same { times + 1 } else { 1 };
        ensure!(times >= COUNTS, "{now} held");
        Ok(now)
    })
}

/// Asserts that the daemon reports refusals in its log, metrics and status.
fn refused(daemon: &Daemon, pod: &Pod, reason: &str) -> Result<()> {
    let lines = |daemon: &Daemon| {
        let lines = daemon.logs().into_iter();
        let lines = lines.filter(|line| line["reason"] == reason && line["target"] != "access");
        lines.collect::<Vec<_>>()
    };
    let logged = lines(daemon);
    ensure!(
        logged
            .first()
            .is_some_and(|line| line["pod"] == pod.full_name()),
        "{logged:?}"
    );
    eventually_ok(TIMEOUT, "refusals in the status", || {
        let status = daemon.status_json()?;
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let pod = pods.iter().find(|known| known["pod"] == pod.full_name());
        let count = pod.and_then(|pod| pod["refused"][reason].as_u64());
        let count = count.with_context(|| format!("{pod:?}"))?;
        // One line every ten seconds, not one for each refusal.
        let logged = lines(daemon).len() as u64;
        ensure!(count > 10 * logged, "{count} refusals, {logged} lines");
        Ok(())
    })?;
    let metric = format!("auth_daemon_refused_shares_total{{reason=\"{reason}\"}}");
    let metrics = daemon.metrics()?;
    ensure!(metrics.contains(&metric), "{metrics}");
    Ok(())
}

/// Connections that an attacker tries to hold, more than the node has room for.
const HOARD: u64 = 7000;
/// The most that one client can hold at a server: a third of the node's capacity, which is three quarters of the
/// descriptors, of which a connection takes two.
const SHARE_OF_PEER: u64 = DESCRIPTORS * 3 / 4 / 2 / 3;
const LONG: Duration = Duration::from_secs(120);
