//! `cargo xtask fuzz`: searches for input that breaks a parser, with libFuzzer.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use xtask_support::step::{self, other_toolchain, output, step, which, workspace};
use xtask_support::{build_ebpf, cargo_install};

/// What to fuzz, and for how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these targets, by the name of their folder in auth-daemon/fuzz/seeds
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Add those of the found inputs to the seeds that reach code which no seed reaches
    #[arg(long)]
    keep: bool,
}

/// Runs the targets one after the other.
///
/// # Errors
/// If there is no nightly toolchain, something does not build, or an input is found that breaks a target. It is then in
/// auth-daemon/fuzz/artifacts.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if output(other_toolchain("cargo").args(["+nightly", "--version"])).is_none() {
        bail!("libFuzzer needs a nightly toolchain: rustup toolchain install nightly");
    }
    if which("cargo-fuzz").is_none() {
        cargo_install::install("cargo-fuzz", CARGO_FUZZ_VERSION)?;
    }
    build_ebpf::run(&build_ebpf::Arguments::default())?;
    let folder = workspace().join("auth-daemon/fuzz");
    let seeds = folder.join("seeds");
    let all = fs::read_dir(&seeds).with_context(|| format!("reading {}", seeds.display()))?;
    let mut targets: Vec<_> = all
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    targets.sort();
    for wanted in &arguments.targets {
        if !targets.contains(wanted) {
            bail!("no target {wanted}; there are {}", targets.join(", "));
        }
    }
    targets.retain(|name| arguments.targets.is_empty() || arguments.targets.contains(name));
    for target in targets {
        let corpus = folder.join("corpus").join(&target);
        fs::create_dir_all(&corpus).with_context(|| format!("making {}", corpus.display()))?;
        let fuzz = |folders: [&Path; 2], options: &[&str]| {
            step::run(
                other_toolchain("cargo")
                    .env("TARGET", &target)
                    // The parsers are safe Rust, and a sanitizer would halve the speed.
                    .args([
                        "+nightly",
                        "fuzz",
                        "run",
                        "--sanitizer",
                        "none",
                        "--fuzz-dir",
                    ])
                    .arg(&folder)
                    .arg("parsers")
                    .args(folders)
                    .args(["--", LONGEST_INPUT])
                    .args(options),
            )
        };
        let seeds = seeds.join(&target);
        let seconds = arguments.seconds;
        step(&format!("fuzz {target} for {seconds} s"), || {
            fuzz([&corpus, &seeds], &[&format!("-max_total_time={seconds}")])
        })?;
        if arguments.keep {
            step(&format!("keep what was found of {target}"), || {
                // Without counters: that an input runs the same code more often makes it no seed.
                fuzz(
                    [&seeds, &corpus],
                    &["-set_cover_merge=1", "-use_counters=0"],
                )
            })?;
        }
    }
    Ok(())
}

const CARGO_FUZZ_VERSION: &str = "0.13.1";
/// Longer inputs are slower, and find nothing in parsers whose limits are tested by hand.
const LONGEST_INPUT: &str = "-max_len=4096";
