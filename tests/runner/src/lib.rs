//! `cargo xtask test`: builds the tests, runs them in parallel, and prints a summary.
#![forbid(unsafe_code)]

pub mod binaries;
mod output;
mod runner;
mod summary;

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result, bail};
use xtask_support::step::{cargo, programs, root, step};
use xtask_support::{build, deb, kubernetes, peers, setup};

use binaries::Binary;
use output::{read, temporary_file};
use runner::Test;
pub use summary::Summary;

/// Options of the test run.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only tests whose name contains one of these: scenarios, or any test if no scenario's name does
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Tests of all crates, not only scenarios, whose name contains a NAME
    #[arg(long)]
    all: bool,
    /// Test the daemon that is built already
    #[arg(long)]
    no_build: bool,
}

/// Installs and builds what the tests need, runs them, and prints a summary.
///
/// # Errors
/// If not root, if something does not build, or if a test fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    if !root() {
        bail!(
            "the tests make network namespaces and load eBPF programs: run them as root (sudo -E cargo xtask test)"
        );
    }
    if !arguments.no_build {
        setup::run()?;
        peers::ensure_or_say();
        kubernetes::ensure_or_say();
        deb::ensure_or_say();
        build::programs()?;
    }
    // The scenarios run the daemon but do not link it: without the other crates' tests, they build in seconds.
    let named = !arguments.names.is_empty() && !arguments.all;
    if named && run_tests(&SCENARIOS, &arguments.names)? {
        return Ok(());
    }
    if !run_tests(&["--workspace"], &arguments.names)? {
        bail!("no test's name contains {}", arguments.names.join(" or "));
    }
    Ok(())
}

/// The options that select the scenario tests, which live in `tests/tests`.
const SCENARIOS: [&str; 4] = ["--package", "mesh-tests", "--test", "*"];

/// Runs those tests of the binaries that cargo's options select whose name contains one of these, or all, and sums up.
/// Returns false when there are none.
///
/// # Errors
/// If a test fails.
pub fn run_tests(options: &[&str], names: &[String]) -> Result<bool> {
    let binaries = step("build the tests", || binaries::build(options))?;
    let mut summary = Summary::default();
    let mut tests = Vec::new();
    for binary in &binaries {
        tests.extend(select(binary, binary.tests()?, names));
        summary.add_ignored(select(binary, binary.ignored()?, names).count());
    }
    if tests.is_empty() {
        return Ok(false);
    }
    step("run the tests", || {
        let path = programs()?.join("test.log");
        let mut log =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("    all output goes to {}", path.display());
        runner::run(tests, &mut log, &mut summary)?;
        let documented = !names.is_empty() || doc_tests(options, &mut log, &mut summary)?;
        print!("\n{}", summary.describe());
        if !documented || !summary.failed_tests().is_empty() {
            bail!("tests failed, see {}", path.display());
        }
        Ok(true)
    })
}

fn select<'a>(
    binary: &'a Binary,
    tests: Vec<String>,
    names: &[String],
) -> impl Iterator<Item = Test<'a>> {
    tests
        .into_iter()
        .map(move |name| Test { binary, name })
        .filter(move |test| {
            names.is_empty() || names.iter().any(|name| test.full_name().contains(name))
        })
}

/// Runs the examples in documentation and tells whether all of them work.
fn doc_tests(options: &[&str], log: &mut File, summary: &mut Summary) -> Result<bool> {
    if options != ["--workspace"] {
        return Ok(true);
    }
    let mut file = temporary_file()?;
    let writer = || file.try_clone().context("cannot share a file");
    let passed = cargo()
        .args(["test", "--release", "--doc", "--no-fail-fast"])
        .args(options)
        .stdout(writer()?)
        .stderr(writer()?)
        .status()
        .context("cannot run cargo")?
        .success();
    let output = read(&mut file)?;
    output.lines().for_each(|line| summary.line(line));
    log.write_all(output.as_bytes())
        .context("cannot write the log")?;
    if !passed {
        print!("{output}");
    }
    Ok(passed)
}
