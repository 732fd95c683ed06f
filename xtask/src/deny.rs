//! `cargo xtask deny`: checks licences, sources and duplicates of all dependencies, and advisories against them.

use std::process::Command;

use anyhow::Result;
use xtask_support::cargo_install;
use xtask_support::step::{self, cargo, step, which, workspace};

/// Checks the workspace and the eBPF crate against the rules of deny.toml.
///
/// # Errors
/// If a rule is violated, or cargo-deny cannot be installed.
pub(crate) fn run() -> Result<()> {
    if which("cargo-deny").is_none() {
        cargo_install::install("cargo-deny", CARGO_DENY_VERSION)?;
    }
    let mut locked = Vec::new();
    for manifest in ["Cargo.toml", "auth-ebpf/Cargo.toml"] {
        if workspace()
            .join(manifest)
            .with_file_name("Cargo.lock")
            .exists()
        {
            locked.push(manifest);
        } else {
            eprintln!("SKIPPED deny of {manifest}: it has no Cargo.lock yet");
        }
    }
    for manifest in &locked {
        step(
            &format!("licences, sources and duplicates of {manifest}"),
            || step::run(&mut check(manifest, &["licenses", "sources", "bans"])),
        )?;
    }
    if locked.is_empty() || !fetch_advisories() {
        return Ok(());
    }
    for manifest in &locked {
        step(&format!("advisories against {manifest}"), || {
            step::run(&mut check(manifest, &["--disable-fetch", "advisories"]))
        })?;
    }
    Ok(())
}

fn check(manifest: &str, arguments: &[&str]) -> Command {
    let mut command = cargo_deny(cargo(), manifest);
    command.arg("check");
    if manifest != "Cargo.toml" {
        // The rules are written for the workspace: the small crate need not use every exception.
        for unused in [
            "license-not-encountered",
            "license-exception-not-encountered",
            "unmatched-skip",
        ] {
            command.args(["--allow", unused]);
        }
    }
    command.args(arguments);
    command
}

/// Updates the advisory database, and returns whether it could be reached: it is a git repository, and some networks
/// allow only crates.
fn fetch_advisories() -> bool {
    eprintln!("==> fetch the advisory database");
    let cargo = cargo();
    let mut limited = Command::new("timeout");
    limited
        .current_dir(workspace())
        .arg("120")
        .arg(cargo.get_program());
    let reached = step::run(cargo_deny(limited, "Cargo.toml").args(["fetch", "db"])).is_ok();
    if !reached {
        eprintln!("SKIPPED advisories: their database cannot be reached");
    }
    reached
}

fn cargo_deny(mut cargo: Command, manifest: &str) -> Command {
    // Run as cargo's subcommand, because cargo finds it in its install folder, whether that is in the PATH or not.
    cargo
        .args(["deny", "--manifest-path"])
        .args([manifest, "--all-features"]);
    cargo.args(["--config", "deny.toml"]);
    cargo
}

const CARGO_DENY_VERSION: &str = "0.20.2";
