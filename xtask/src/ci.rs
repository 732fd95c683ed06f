//! `cargo xtask ci`: runs the steps of continuous integration on a developer's machine.

use std::process::Command;

use anyhow::Result;
use xtask_support::step::{self, workspace};

/// Runs `.ci/run`, the only list of those steps.
///
/// # Errors
/// If one of the steps fails; the script has named it.
pub(crate) fn run() -> Result<()> {
    let mut script = Command::new(workspace().join(".ci/run"));
    step::forget_package(&mut script);
    step::run(&mut script)
}
