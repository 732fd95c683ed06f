//! `cargo xtask build`: the eBPF object, then the daemon that embeds it, then everything else.

use anyhow::Result;

use crate::build_ebpf;
use crate::step::{self, cargo, step};

/// Builds the whole workspace with its tests.
///
/// # Errors
/// If the toolchain is missing or something does not compile.
pub fn run() -> Result<()> {
    build("the workspace", &["--workspace", "--all-targets"])
}

/// Builds the daemon.
///
/// # Errors
/// As [`run`].
pub fn daemon() -> Result<()> {
    build("auth-daemon", &DAEMON)
}

/// Builds what a mesh runs: the daemon, and the helper programs of its pods and nodes.
///
/// # Errors
/// As [`run`].
pub fn programs() -> Result<()> {
    daemon()?;
    // Apart from the daemon, these share their dependencies with xtask, which is already built. Building them together
    // with the daemon would compile those dependencies again, with the daemon's features.
    build(
        "the helper programs",
        &["--package", "mesh-tests", "--bins"],
    )
}

fn build(what: &str, options: &[&str]) -> Result<()> {
    build_ebpf::run(&build_ebpf::Arguments::default())?;
    step(&format!("build {what}"), || {
        step::run(cargo().args(["build", "--release"]).args(options))
    })
}

const DAEMON: [&str; 4] = ["--package", "auth-daemon", "--bin", "auth-daemon"];
