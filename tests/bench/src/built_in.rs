//! Benchmarks of the daemon's crate, each a program that prints one JSON object.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask_support::build::DIST_PROFILE;
use xtask_support::step::{self, cargo, step};

/// Builds and runs the benchmark `name`, and returns its measurements.
///
/// # Errors
/// If it does not build, or fails.
pub(super) fn built_in(name: &str, what: &str) -> Result<Value> {
    step(what, || {
        let mut command = cargo();
        command
            .args(["bench", "--profile", DIST_PROFILE])
            .args(["--workspace", "--bench", name])
            .stderr(Stdio::inherit());
        let output = command
            .output()
            .with_context(|| format!("cannot run `{}`", step::show(&command)))?;
        ensure!(output.status.success(), "it ended with {}", output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        let object = text.lines().find(|line| line.starts_with('{'));
        let object = object.context("it has printed no results")?;
        serde_json::from_str::<Value>(object).context("reading its results")
    })
}
