//! `cargo xtask vm-test`: the redirection and traffic tests on other kernels, each booted as a virtual machine.
//!
//! A machine has no disk: its kernel gets one archive with everything that runs in it (`guest`), does the steps of a plan
//! (`suite`) and reports over a serial line (`machine`).
#![forbid(unsafe_code)]

mod cluster;
mod guest;
mod kernels;
mod machine;
mod programs;
mod suite;
mod table;

use std::fs;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail};
use mesh_tests::vm::Plan;
use xtask_support::step::{self, root, step};
use xtask_support::{build, kubernetes, setup};

use kernels::{KERNELS, Kernel, Unpacked};
use machine::{Accelerator, Machine};
use suite::Suite;
use table::Column;

/// Options of the run.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A kernel of Debian's: 5.10, 6.1, 6.12 or unstable; several may be named. All of them unless said otherwise
    #[arg(long = "kernel", value_name = "NAME", value_parser = kernels::named)]
    kernels: Vec<&'static Kernel>,
    /// What continuous integration has time for: the checks, the demo and one round of the redirection tests
    #[arg(long)]
    short: bool,
    /// Instead, a Kubernetes cluster of two nodes with cgroup version 2 alone, on Debian's newest kernel unless one is named
    #[arg(long, conflicts_with_all = ["short", "save", "filters"])]
    kubernetes: bool,
    /// Test what is built already
    #[arg(long)]
    no_build: bool,
    /// Write the table of docs/KERNELS.md from this run, which then is one of all kernels
    #[arg(long, conflicts_with_all = ["kernels", "filters"])]
    save: bool,
    /// Only tests whose name contains one of these, and neither checks nor demo
    #[arg(last = true, value_name = "FILTER")]
    filters: Vec<String>,
}

/// Fetches the kernels, makes their machines, runs two of them at a time, and sums up.
///
/// # Errors
/// If not root, if something cannot be downloaded or built, or if anything fails in a machine.
pub fn run(arguments: &Arguments) -> Result<()> {
    if !root() {
        bail!("the machines hold files that only root can read: sudo -E cargo xtask vm-test");
    }
    kernels::supported_here()?;
    setup::run()?;
    setup::for_machines()?;
    if arguments.kubernetes {
        kubernetes::ensure()?;
    }
    if !arguments.no_build {
        build::programs()?;
    }
    let folder = step::programs()?.join("vm");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let chosen: Vec<&Kernel> = match arguments.kernels.as_slice() {
        [] if arguments.kubernetes => KERNELS.last().into_iter().collect(),
        [] => KERNELS.iter().collect(),
        some => some.to_vec(),
    };

    let (binaries, tests) = step("build the tests", || {
        if arguments.kubernetes {
            return Ok((cluster::build()?, Vec::new()));
        }
        programs::build(|module| suite::row(module).is_some(), &arguments.filters)
    })?;
    let guest = step("collect what runs in a machine", || {
        let mut guest = guest::collect(&binaries, &folder)?;
        if arguments.kubernetes {
            let kube_node = guest::stripped(&step::programs()?.join("kube-node"), &folder)?;
            cluster::add(&mut guest, &kube_node)?;
        }
        Ok(guest)
    })?;
    let mut accelerator = None;
    let mut prepared = Vec::new();
    for kernel in chosen {
        let unpacked = step(&format!("fetch Debian's kernel {}", kernel.name), || {
            kernels::fetch(kernel, &folder)
        })?;
        let accelerator = match &accelerator {
            Some(known) => *known,
            None => *accelerator.insert(Accelerator::probe(&unpacked.image)?),
        };
        let (suite, memory) = if arguments.kubernetes {
            (Suite::kubernetes(kernel, accelerator), cluster::MEMORY)
        } else {
            let is_filtered = !arguments.filters.is_empty();
            let suite = Suite::of(kernel, accelerator, &tests, arguments.short, is_filtered);
            (suite, MEMORY)
        };
        let machine = Machine {
            kernel: unpacked.image.clone(),
            archive: folder.join(format!("{}.cpio", kernel.name)),
            console: folder.join(format!("{}.console", kernel.name)),
            memory,
            accelerator,
        };
        prepared.push(Prepared {
            suite,
            unpacked,
            machine,
        });
    }
    let plan = |suite: &Suite| Plan {
        steps: suite.steps(),
        containers: arguments.kubernetes,
    };
    let run = |prepared: &Prepared| {
        let Prepared {
            suite,
            unpacked,
            machine,
        } = prepared;
        guest::write(&guest, unpacked, &plan(suite), &machine.archive)?;
        let (release, accelerator) = (&unpacked.release, machine.accelerator);
        let column = step(&format!("run Linux {release} ({accelerator})"), || {
            suite.run(machine, release)
        });
        let _ = fs::remove_file(&machine.archive);
        column
    };
    report(&some_at_once(&prepared, run)?, arguments.save)
}

/// What a machine runs, and on which kernel.
struct Prepared {
    suite: Suite,
    unpacked: Unpacked,
    machine: Machine,
}

/// Calls `run` for each machine, for two at a time: one alone keeps only one core busy for most of its time. The results
/// are in the machines' order.
fn some_at_once(
    machines: &[Prepared],
    run: impl Fn(&Prepared) -> Result<Column> + Sync,
) -> Result<Vec<Column>> {
    let queue = Mutex::new(machines.iter().enumerate());
    let next = || queue.lock().expect("no thread panics with it").next();
    let work = || {
        let mut columns = Vec::new();
        while let Some((index, machine)) = next() {
            columns.push((index, run(machine)?));
        }
        anyhow::Ok(columns)
    };
    let columns = thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no thread panics"))
            .collect::<Result<Vec<_>>>()
    })?;
    let mut columns: Vec<_> = columns.into_iter().flatten().collect();
    columns.sort_by_key(|(index, _)| *index);
    Ok(columns.into_iter().map(|(_, column)| column).collect())
}

/// Memory of a machine, in MiB.
const MEMORY: u32 = 4096;

fn report(columns: &[Column], save: bool) -> Result<()> {
    println!("{}", table::text(columns));
    if save {
        table::save(columns)?;
    }
    if columns.iter().all(Column::is_empty) {
        bail!("no test was run: none has such a name");
    }
    let failures: Vec<String> = columns.iter().flat_map(Column::failures).collect();
    for failure in &failures {
        eprintln!("FAILED {failure}");
    }
    if !failures.is_empty() {
        bail!(
            "{} failures on other kernels, see above and the consoles in {}",
            failures.len(),
            step::programs()?.join("vm").display()
        );
    }
    Ok(())
}
