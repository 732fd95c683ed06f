//! `cargo xtask chart`: renders deploy/auth-daemon.yaml from the Helm chart.

use std::fs;

use anyhow::{Context, Result};
use mesh_tests::chart;

use xtask_support::kubernetes;
use xtask_support::step::step;

/// Renders the file, with the helm that the tests use.
///
/// # Errors
/// If helm cannot be built, or does not accept the chart.
pub(crate) fn run() -> Result<()> {
    if chart::helm_missing().is_some() {
        kubernetes::ensure()?;
    }
    let path = chart::rendered_file();
    step("render deploy/chart into deploy/auth-daemon.yaml", || {
        fs::write(&path, chart::render()?).with_context(|| format!("writing {}", path.display()))
    })
}
