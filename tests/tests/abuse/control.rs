//! What the daemon does beside connections: policies, and the log.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use mesh_tests::{
    App, DaemonOptions, Manifests, PodSpec, Process, Result, TIMEOUT, auth_daemon, eventually,
    eventually_ok,
};
use serde_json::{Value, json};

use crate::connections::settled;
use crate::stage::Stage;

/// Number of policies that change.
const POLICIES: usize = 1000;
/// Connections that stay open meanwhile: as many through the daemons as one client may have at a server with
/// [`DESCRIPTORS`], and to a pod of the same node, in the kernel.
const OPEN: [u64; 2] = [2400, 7600];
/// The daemons' limit of open files.
const DESCRIPTORS: u64 = 20_000;
const LONG: Duration = Duration::from_secs(120);

#[test]
fn a_thousand_policies_that_change_cut_no_connection_and_refuse_no_neighbour() -> Result<()> {
    let options = DaemonOptions::default().descriptors(DESCRIPTORS);
    let mut stage = Stage::set_with(&options, |mesh| {
        let near = PodSpec::new("near").on("a").service_account("near");
        mesh.routed().pod(near)
    })?;
    let near = stage.mesh.pod("near");
    let _server = near.app("sink --port 7000")?.listening()?;
    let open = [stage.echo(&stage.target), stage.echo(&near)];
    let mut hoards = Vec::new();
    for (to, connections) in open.into_iter().zip(OPEN) {
        let hoard = format!("hoard --to {to} --connections {connections}");
        hoards.push(stage.attacker.app(&hoard)?);
    }
    let mut held = Vec::new();
    for (hoard, connections) in hoards.iter_mut().zip(OPEN) {
        hoard.event("opened", LONG)?;
        // On a busy machine, more handshakes may be in progress than a client may have, or more connections pass through the
        // daemon before it leaves them to the kernel. Those beyond the shares are refused.
        let settled = settled(hoard)?;
        ensure!(settled > connections / 2, "{settled} of {connections}");
        held.push(settled);
    }
    stage.attack(
        "policies that change",
        |stage| {
            let manifests = stage.mesh.manifests().clone();
            let writer = thread::spawn(move || write_policies(&manifests));
            Ok(Writing(Some(writer)))
        },
        |stage, _| {
            eventually_ok(LONG, "the policies to be in force", || {
                let listed = list_policies(stage)?;
                let count = listed.matches("/nobody-").count();
                ensure!(count >= POLICIES, "{count} policies: {listed}");
                Ok(())
            })?;
            for (hoard, held) in hoards.iter().zip(held) {
                let now = count_open(hoard)?;
                ensure!(now == held, "of {held} connections, {now} are left");
            }
            let manifests = stage.mesh.manifests();
            for number in 0..POLICIES {
                manifests.remove("AuthorizationPolicy", "default", &name(number))?;
            }
            Ok(())
        },
    )
}

/// The number of connections that are open now, by an event that the hoard wrote from now on.
fn count_open(hoard: &App) -> Result<u64> {
    let earlier = hoard.events_of("holding").len();
    // The next event may have been counted already.
    let now = eventually(TIMEOUT, "the hoard to count its connections", || {
        hoard.events_of("holding").into_iter().nth(earlier + 1)
    })?;
    now["connections"].as_u64().context("no number")
}

/// The thread that writes policies. Dropping it waits until it has written them all.
struct Writing(Option<thread::JoinHandle<Result<()>>>);

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(writer) = self.0.take() {
            writer.join().ok();
        }
    }
}

/// The policies that the daemon of node b knows.
fn list_policies(stage: &Stage) -> Result<String> {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", stage.mesh.node("b").netns().name()])
        .arg(auth_daemon()?)
        .args(["policy", "list"]);
    Ok(Process::spawn(command)?.finish(TIMEOUT)?.ok()?.stdout)
}

fn write_policies(manifests: &Manifests) -> Result<()> {
    (0..POLICIES).try_for_each(|number| manifests.apply(&policy(number)))
}

fn name(number: usize) -> String {
    format!("nobody-{number}")
}

/// A policy for all pods that denies an account which no pod has.
fn policy(number: usize) -> Value {
    let principal = format!("cluster.local/ns/default/sa/nobody-{number}");
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name(number), "namespace": "default"},
        "spec": {
            "action": "DENY",
            "rules": [{"from": [{"source": {"principals": [principal]}}]}],
        },
    })
}

#[test]
fn a_log_that_nobody_reads_holds_up_no_connection() -> Result<()> {
    let stage = Stage::set_with(&DaemonOptions::default().log_stalls(), |mesh| mesh)?;
    // Each connection is a line of some 400 bytes at either daemon; a pipe holds 64 KiB.
    let to = stage.echo(&stage.web);
    let churn = format!("churn --to {to} --connections 1000 --concurrency 8");
    stage.neighbour.app(&churn)?.success(LONG)?;
    for daemon in [&stage.near, &stage.far] {
        let metrics = daemon.metrics()?;
        ensure!(metrics.contains("auth_daemon_lost_log_lines "), "{metrics}");
    }
    Ok(())
}
