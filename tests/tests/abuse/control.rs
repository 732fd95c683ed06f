//! What the daemon does beside connections: policies, and the log.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::{DaemonOptions, Manifests, Process, Result, TIMEOUT, auth_daemon, eventually_ok};
use serde_json::{Value, json};

use crate::stage::Stage;

/// Number of policies that change.
const POLICIES: usize = 1000;
/// Connections that stay open meanwhile, fewer than the attacker's share.
const OPEN: u64 = 900;
const LONG: Duration = Duration::from_secs(120);

#[test]
fn a_thousand_policies_that_change_cut_no_connection_and_refuse_no_neighbour() -> Result<()> {
    let mut stage = Stage::set()?;
    stage.attack(
        "policies that change",
        |stage| {
            let to = stage.echo(&stage.target);
            let hoard = format!("hoard --to {to} --connections {OPEN}");
            let mut hoard = stage.attacker.app(&hoard)?;
            hoard.event("opened", LONG)?;
            let manifests = stage.mesh.manifests().clone();
            thread::spawn(move || write_policies(&manifests));
            Ok(hoard)
        },
        |stage, hoard| {
            eventually_ok(LONG, "the policies to be in force", || {
                let listed = list_policies(stage)?;
                let count = listed.matches("/nobody-").count();
                ensure!(count >= POLICIES, "{count} policies: {listed}");
                Ok(())
            })?;
            let held = hoard.event("holding", TIMEOUT)?;
            ensure!(held["connections"] == OPEN, "{held}");
            let manifests = stage.mesh.manifests();
            for number in 0..POLICIES {
                manifests.remove("AuthorizationPolicy", "default", &name(number))?;
            }
            Ok(())
        },
    )
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
