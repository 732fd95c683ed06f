//! `cargo xtask bench`: measures the daemon's cost, side by side with plain connections and with Envoy sidecars.
//!
//! The loads run on a thread of their own. This thread collects their results, stops a load that hangs, cleans up after
//! Ctrl-C, and prints the results at the end.
#![forbid(unsafe_code)]

mod built_in;
mod ca;
mod chart;
mod counters;
mod envoy;
mod loads;
mod machine;
mod number;
mod peer;
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

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use mesh_tests::remove_own;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use xtask_support::step::root;
use xtask_support::{build, setup};

use report::Report;
use runner::{Event, Plan};
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
    /// Which systems to compare; else direct, envoy, ours, and ztunnel where ZTUNNEL names its binary
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
        None => {}
    }
    let plan = prepare(arguments)?;
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

fn prepare(arguments: &Arguments) -> Result<Plan> {
    let ztunnel = ztunnel::named()?.map(|_| System::Ztunnel);
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
        build::programs()?;
    }
    if plan.systems.contains(&System::Envoy) {
        envoy::binary()?;
    }
    Ok(plan)
}

fn measure(report: &mut Report) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot wait for signals")?;
    }
    let (sender, events) = channel();
    let stop = Arc::new(AtomicBool::new(false));
    let measuring = thread::Builder::new()
        .name("loads".to_owned())
        .spawn({
            let (plan, stop) = (report.plan.clone(), Arc::clone(&stop));
            move || runner::measure(&plan, &sender, &stop)
        })
        .context("cannot start a thread")?;
    let followed = follow(&events, report, &interrupted);
    if followed.is_err() {
        stop.store(true, Ordering::Relaxed);
        eprintln!("cleaning up");
        // This unblocks the running load, which then ends.
        let _ = remove_own();
        let end = Instant::now() + CLEAN_UP;
        while events
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        remove_own().context("cannot clean up")?;
    }
    followed?;
    measuring
        .join()
        .map_err(|_| anyhow!("the thread that measures panicked"))?
}

/// Receives events from the loads until there are no more.
fn follow(events: &Receiver<Event>, report: &mut Report, interrupted: &AtomicBool) -> Result<()> {
    let mut current = String::new();
    let longest = report.plan.time + LONGEST;
    let mut deadline = Instant::now() + longest;
    loop {
        match events.recv_timeout(POLL) {
            Ok(Event::Begins(what)) => {
                current = what;
                deadline = Instant::now() + longest;
            }
            Ok(event) => report.take(event),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted during {current}");
        }
        if Instant::now() > deadline {
            bail!("{current} did not end within {longest:?}");
        }
    }
}

/// The systems that can be compared on every machine.
const ALWAYS: [System; 3] = [System::Direct, System::Envoy, System::Ours];
/// How much longer than its duration a load may take, including the start of fresh proxies for it.
const LONGEST: Duration = Duration::from_secs(180);
/// How long a stopped load may take to notice it.
const CLEAN_UP: Duration = Duration::from_secs(10);
/// Interval at which Ctrl-C is checked.
const POLL: Duration = Duration::from_millis(100);
