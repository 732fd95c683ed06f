//! `cargo xtask build`: the eBPF object, then the daemon that embeds it, then everything else.

use std::path::PathBuf;

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

/// Builds the daemon as it ships, and returns its path.
///
/// # Errors
/// As [`run`].
pub fn shipped_daemon() -> Result<PathBuf> {
    build_ebpf::run(&build_ebpf::Arguments::default())?;
    step("build auth-daemon as it ships", || {
        step::run(
            cargo()
                .args(["build", "--profile", DIST_PROFILE])
                .args(DAEMON),
        )
    })?;
    shipped_daemon_path()
}

/// Where [`shipped_daemon`] puts the daemon.
///
/// # Errors
/// If the target folder cannot be found.
pub fn shipped_daemon_path() -> Result<PathBuf> {
    let folder = step::programs()?.with_file_name(DIST_PROFILE);
    Ok(folder.join("auth-daemon"))
}

/// Builds what a mesh runs: the daemon, and the helper programs of its pods and nodes.
///
/// # Errors
/// As [`run`].
pub fn programs() -> Result<()> {
    daemon()?;
    helpers()
}

/// Builds the helper programs of a mesh's pods and nodes.
///
/// # Errors
/// As [`run`].
pub fn helpers() -> Result<()> {
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

/// Cargo's profile of what ships, and its folder in the target folder.
pub const DIST_PROFILE: &str = "dist";
const DAEMON: [&str; 4] = ["--package", "auth-daemon", "--bin", "auth-daemon"];
