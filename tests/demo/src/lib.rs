//! `cargo xtask demo`: pods of two nodes use mutual TLS, and each check shows its evidence.
//!
//! The checks run on a thread of their own and report events as they happen. This thread prints them, stops a check
//! that hangs, and cleans up after Ctrl-C.
#![forbid(unsafe_code)]

mod addresses;
mod bulk;
mod ca;
mod checks;
mod claims;
mod entrances;
mod evidence;
mod failure;
mod federated;
mod identity;
mod kubernetes;
mod lives;
mod outside;
mod person;
mod policy;
mod report;
mod same_node;
mod seen;
mod server_hello;
mod stage;
mod tcpdump;
mod wire;
mod workload_api;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use mesh_tests::{MeshId, slowdown, traces};
use xtask_support::step::root;
use xtask_support::supervise::supervise;
use xtask_support::{build, setup};

use checks::{AFTER, BEFORE, Check};
use evidence::{Event, Evidence};
use report::Report;
use stage::Stage;

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Show the Helm chart on a real Kubernetes of two nodes instead
    #[arg(long)]
    kubernetes: bool,
    /// Keep the cluster until Ctrl-C, and say how to use it
    #[arg(long, requires = "kubernetes")]
    keep: bool,
    /// Print one JSON object on stdout, and everything else on stderr
    #[arg(long)]
    json: bool,
    /// Show what is built already
    #[arg(long)]
    no_build: bool,
}

/// Installs and builds what is needed, then runs the checks.
///
/// # Errors
/// If not root, if something does not build, or if a check fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.kubernetes {
        return kubernetes::run(arguments);
    }
    let names = BEFORE.iter().chain(&AFTER).map(|check| check.name);
    let mut report = Report::new(arguments.json, names.collect());
    let shown = prepare(arguments).and_then(|()| show(&mut report, perform));
    conclude(report, shown)
}

/// Finishes the report. Fails if the demo did, or if a check has failed.
fn conclude(report: Report, shown: Result<()>) -> Result<()> {
    let failed = report.finish(shown.as_ref().err());
    shown?;
    if !failed.is_empty() {
        bail!("these checks failed: {}", failed.join(", "));
    }
    Ok(())
}

fn prepare(arguments: &Arguments) -> Result<()> {
    if !root() {
        bail!(
            "the demo makes network namespaces and loads eBPF programs: run it as root (sudo -E cargo xtask demo)"
        );
    }
    if arguments.no_build {
        return Ok(());
    }
    setup::run()?;
    build::programs()
}

/// Runs the checks and reports them. An error means that the demo itself failed, and is the cause of all checks not
/// run.
fn show(
    report: &mut Report,
    perform: impl FnOnce(&Evidence, &AtomicBool) + Send + 'static,
) -> Result<()> {
    let work = |events, stop: &AtomicBool| {
        perform(&Evidence(events), stop);
        Ok(())
    };
    supervise(LONGEST * slowdown(), work, |event| {
        match event {
            Event::Begins(name, claim) => report.begins(name, claim),
            Event::Saw(what) => report.saw(what),
            Event::Ends(result) => report.ends(result)?,
        }
        Ok(())
    })
}

/// Starts the mesh, runs the checks on it and removes it.
fn perform(evidence: &Evidence, stop: &AtomicBool) {
    let Some(mut stage) = step(evidence, None, "two nodes with a pod network", || {
        Stage::set(evidence)
    }) else {
        return;
    };
    let id = stage.mesh.id();
    let ready = checks(&BEFORE, &mut stage, evidence, stop)
        && step(
            evidence,
            None,
            "auth-daemon ca outside, auth-daemon on both nodes",
            || stage.start_daemons(evidence),
        )
        .is_some();
    if ready {
        checks(&AFTER, &mut stage, evidence, stop);
    }
    step(evidence, None, "cleaning up", || {
        drop(stage);
        nothing_left(id)
    });
}

/// Runs checks until it has to stop. Returns whether all have run.
fn checks(checks: &[Check], stage: &mut Stage, evidence: &Evidence, stop: &AtomicBool) -> bool {
    for check in checks {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        step(evidence, Some(check.name), check.claim, || {
            let result = (check.run)(stage, evidence);
            if result.is_err() && !stop.load(Ordering::Relaxed) {
                stage.print_logs();
            }
            result
        });
    }
    true
}

fn step<T>(
    evidence: &Evidence,
    name: Option<&'static str>,
    claim: &'static str,
    work: impl FnOnce() -> Result<T>,
) -> Option<T> {
    let _ = evidence.0.send(Event::Begins(name, claim));
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("it panicked: {}", message.unwrap_or("?")))
    });
    let (value, outcome) = match result {
        Ok(value) => (Some(value), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let _ = evidence.0.send(Event::Ends(outcome));
    value
}

fn nothing_left(id: MeshId) -> Result<()> {
    let left = traces(id)?;
    if !left.is_empty() {
        bail!("the demo leaves behind: {left:?}");
    }
    Ok(())
}

/// Time limit for a check, and for each part of the setup. A cluster takes longest, on a busy machine.
const LONGEST: Duration = Duration::from_secs(300);
