//! Pods that create processes and network namespaces endlessly.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_tests::{DaemonOptions, Pod, PodSpec, Process, Result, TIMEOUT, eventually_ok};
use serde_json::Value;

use crate::common::by_uid::pause;
use crate::stage::Stage;

/// Limit of the processes of a pod with a bomb.
const MOST: u32 = 512;
/// Minimum number of processes of the bomb, which stays just below the limit.
const PROCESSES: usize = 400;
/// More than the kernel's ring buffer of reports has room for, which is 2,048.
const NAMESPACES: u64 = 3000;
/// Time limit for as many.
const LONG: Duration = Duration::from_secs(240);
/// Forks until no process is left for it, and then again.
const BOMB: &str = "while :; do sh -c 'while :; do sleep 5 & done' 2>/dev/null; done";

/// A stage with a pod that the daemon finds by its processes, as it does in a cluster, and the pod's first process.
fn stage() -> Result<(Stage, Pod, Process)> {
    let options = DaemonOptions::default().log_level("debug");
    let stage = Stage::set_with(&options, |mesh| {
        // With it comes the cgroup that contains all pods.
        let outside = PodSpec::new("first").on("a").by_uid();
        mesh.pod(outside.annotation("auth-daemon.io/mesh", "disabled"))
    })?;
    let bomber = PodSpec::new("bomber").on("a").by_uid();
    let bomber = stage.mesh.add_pod(bomber)?;
    let first = pause(&bomber);
    stage.near.wait_enrolled(&[bomber.full_name()])?;
    bomber.place().limit(MOST)?;
    Ok((stage, bomber, first))
}

#[test]
fn a_fork_bomb_does_not_keep_a_new_pod_closed() -> Result<()> {
    let (stage, bomber, _first) = stage()?;
    let quiet = enrolled(&stage, "before")?;
    let _bomb = bomber.spawn("sh", ["-c", BOMB])?;
    eventually_ok(TIMEOUT, "the bomb to start", || {
        let processes = fs::read_to_string(bomber.cgroup().join("cgroup.procs"))?;
        let count = processes.lines().count();
        ensure!(count > PROCESSES, "{count} processes");
        Ok(())
    })?;
    let start = stage.near.log_position();
    let attacked = enrolled(&stage, "meanwhile")?;
    // A scan from before the new pod's first process has found none.
    let of_one = |line: &Value| {
        line["message"] == "scanned the cgroups of pods for their processes"
            && line["pods"] == 1
            && line["processes"] != 0
    };
    let scan = stage
        .near
        .wait_for_log_after(start, "the scan", TIMEOUT, of_one)?;
    ensure!(scan["processes"] == 1, "{scan}");
    println!("a fork bomb: enrolment ÷ quiet = {:.1}", attacked / quiet);
    bomber.kill_processes()
}

/// Starts a pod and waits until it is enrolled. Returns the seconds that it took.
fn enrolled(stage: &Stage, name: &str) -> Result<f64> {
    let began = Instant::now();
    let _process = start(stage, name)?;
    stage.near.wait_enrolled(&[format!("default/{name}")])?;
    Ok(began.elapsed().as_secs_f64())
}

fn start(stage: &Stage, name: &str) -> Result<Process> {
    let pod = PodSpec::new(name).on("a").by_uid();
    Ok(pause(&stage.mesh.add_pod(pod)?))
}

#[test]
fn namespaces_that_a_pod_makes_do_not_hide_a_new_pods_first_socket() -> Result<()> {
    let (stage, bomber, _first) = stage()?;
    // Nobody reads the reports.
    stage.near.suspend()?;
    let reported = (|| {
        let made = format!("namespaces --count {NAMESPACES}");
        bomber.app(&made)?.success(LONG)?;
        let late = start(&stage, "late")?;
        // Nobody answers.
        let socket = "udp-send --to 127.0.0.1:9 --timeout 1";
        stage.mesh.pod("late").app(socket)?.finish(TIMEOUT)?;
        Ok::<_, anyhow::Error>(late)
    })();
    stage.near.resume()?;
    let _late = reported?;
    let enrolled =
        |line: &Value| line["message"] == "pod enrolled" && line["pod"] == "default/late";
    let line = stage
        .near
        .wait_for_log("the enrolment", TIMEOUT, enrolled)?;
    // The field is there only if the kernel's report has arrived.
    ensure!(line["unserved_microseconds"].is_u64(), "{line}");
    Ok(())
}
