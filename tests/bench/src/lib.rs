//! `cargo xtask bench`: measures the daemon's cost, side by side with plain connections and with Envoy sidecars.
//!
//! The loads run on a thread of their own. This thread collects their results, stops a load that hangs, cleans up after
//! Ctrl-C, and prints the results at the end.
#![forbid(unsafe_code)]

mod built_in;
mod ca;
mod chart;
mod counters;
mod endurance;
mod envoy;
mod loads;
mod machine;
mod number;
mod proxies;
mod report;
mod results;
mod runner;
mod scale;
mod stage;
mod system;
mod table;
mod targets;
mod topology;
mod usage;
mod ztunnel;

use std::env;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::Package;
use mesh_tests::peers::ztunnel::named;
use xtask_support::step::root;
use xtask_support::supervise::supervise;
use xtask_support::{build, peers, setup};

use report::Report;
use runner::Plan;
use system::System;

/// Options of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Another part than the way of connections
    what: Option<Part>,
    /// How often each load is put on each system
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// How long each load lasts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Only rows whose key or name contains this; may be given more than once
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Which systems to compare; else direct, envoy, ours, and ztunnel where ZTUNNEL names its binary. hbone is ours, by
    /// HBONE
    #[arg(long, value_delimiter = ',')]
    systems: Vec<System>,
    /// Print one JSON object on stdout, and everything else on stderr
    #[arg(long)]
    json: bool,
    /// Draw a chart of the results into this file
    #[arg(long, value_name = "PATH")]
    svg: Option<PathBuf>,
    /// Save the results in docs/bench.json, the chart in docs/bench.svg and the table in docs/PERFORMANCE.md
    #[arg(long)]
    save: bool,
    /// Measure what is built already
    #[arg(long)]
    no_build: bool,
}

/// Other benchmarks.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Part {
    /// How fast the CA issues
    Ca,
    /// What a large cluster costs a daemon
    Scale,
    /// 50,000 connections at the same time
    Hold,
    /// A million short connections beside 10,000 idle ones
    Churn,
}

/// Installs and builds what is needed, runs the benchmark, and prints the results.
///
/// # Errors
/// If a system cannot be started, if a load fails or takes the wrong path, or when interrupted. A slow result is not an
/// error.
pub fn run(arguments: &Arguments) -> Result<()> {
    match arguments.what {
        Some(Part::Ca) => return ca::run(arguments.json),
        Some(Part::Scale) => return scale::run(arguments.json),
        Some(Part::Hold | Part::Churn) | None => {}
    }
    let plan = prepare(arguments)?;
    if env::var_os(AUTH_DAEMON).is_none() {
        return again_with_shipped_daemon(arguments.no_build);
    }
    if let Some(part) = arguments.what {
        return endurance::run(part, arguments.json);
    }
    let mut report = Report::new(plan, arguments.json);
    let measured = measure(&mut report);
    report.finish(measured.as_ref().err());
    measured?;
    if let Some(path) = &arguments.svg {
        report.draw(path)?;
    }
    ensure!(
        report.problems.is_empty(),
        "{} loads did not go well",
        report.problems.len()
    );
    if arguments.save {
        report.save()?;
    }
    Ok(())
}

/// Names the daemon as it ships in the environment, where all that starts daemons looks for it, and starts this program
/// again.
fn again_with_shipped_daemon(is_built: bool) -> Result<()> {
    let daemon = if is_built {
        build::shipped_daemon_path()?
    } else {
        build::shipped_daemon()?
    };
    let mut again = Command::new(env::current_exe().context("finding this program")?);
    again.args(env::args_os().skip(1)).env(AUTH_DAEMON, daemon);
    Err(again.exec()).context("cannot start this program again")
}

fn prepare(arguments: &Arguments) -> Result<Plan> {
    let ztunnel = named()?.map(|_| System::Ztunnel);
    let mut systems = arguments.systems.clone();
    if systems.is_empty() {
        systems = ALWAYS.into_iter().chain(ztunnel).collect();
    }
    ensure!(
        ztunnel.is_some() || !systems.contains(&System::Ztunnel),
        "set ZTUNNEL to the path of a ztunnel binary"
    );
    systems.sort_unstable();
    systems.dedup();
    let plan = Plan {
        systems,
        rounds: usize::try_from(arguments.rounds).context("too many rounds")?,
        time: Duration::from_secs(arguments.seconds),
        only: arguments.only.clone(),
    };
    ensure!(
        !plan.loads().is_empty(),
        "no row is called {}",
        plan.only.join(" or ")
    );
    if arguments.svg.is_some() || arguments.save {
        ensure!(
            ALWAYS.iter().all(|system| plan.systems.contains(system)),
            "a chart compares all systems"
        );
    }
    ensure!(
        !arguments.save || plan.only.is_empty(),
        "--save is for all rows: it replaces the whole table"
    );
    if !root() {
        bail!(
            "the benchmark makes network namespaces and loads eBPF programs: run it as root (sudo -E cargo xtask bench)"
        );
    }
    if !arguments.no_build {
        setup::run()?;
        build::helpers()?;
    }
    if arguments.what.is_none() && plan.systems.contains(&System::Envoy) {
        peers::ensure(&Package::ENVOY)?;
    }
    Ok(plan)
}

fn measure(report: &mut Report) -> Result<()> {
    let plan = report.plan.clone();
    let longest = plan.time + LONGEST;
    supervise(
        longest,
        move |events, stop| runner::measure(&plan, &events, stop),
        |event| {
            report.take(event);
            Ok(())
        },
    )
}

/// Names the daemon to measure.
const AUTH_DAEMON: &str = "AUTH_DAEMON";
/// The systems that can be compared on every machine.
const ALWAYS: [System; 3] = [System::Direct, System::Envoy, System::Ours];
/// How much longer than its duration a load may take, including the start of fresh proxies for it.
const LONGEST: Duration = Duration::from_secs(180);
