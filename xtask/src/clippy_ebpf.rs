//! `cargo xtask clippy-ebpf`: clippy over the eBPF programs, with the compiler that builds them.

use anyhow::Result;
use xtask_support::build_ebpf::Arguments;
use xtask_support::step::{self, step};
use xtask_support::toolchain;

/// Runs clippy with warnings denied.
///
/// # Errors
/// If clippy reports something, or there is no toolchain and none can be installed.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    step("clippy on the eBPF programs", || {
        let toolchain = toolchain::ensure(arguments.wanted())?;
        let linter = toolchain::linter(toolchain.kind)?;
        step::run(
            toolchain
                .cargo(Some(&linter))
                .args(["--", "-D", "warnings"]),
        )
    })
}
