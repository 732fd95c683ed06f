//! `cargo xtask build`: the eBPF object, then the daemon that embeds it, then all else.

use anyhow::Result;

use crate::build_ebpf;
use crate::step::{self, cargo, step};

/// Builds all that tests and demo need, optimised.
///
/// # Errors
/// When the toolchain is missing or something does not compile.
pub(crate) fn run() -> Result<()> {
    build_ebpf::run(&build_ebpf::Arguments::default())?;
    step("build the workspace", || {
        // With the tests: they switch on features of crates that the daemon uses too, and building without them first
        // would compile those crates twice.
        step::run(cargo().args(["build", "--release", "--workspace", "--all-targets"]))
    })
}
