//! `cargo xtask deb`: the daemon as a Debian package, for machines outside Kubernetes.

use std::path::PathBuf;

use anyhow::Result;
use mesh_tests::Architecture;
use xtask_support::deb::{self, Compression};
use xtask_support::release;
use xtask_support::step::workspace;

/// Options of the package.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The folder that the package goes to; target/debian unless said otherwise
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// The program to put into it, instead of one that is built now
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

/// Writes a package for this machine's architecture, and prints its path on stdout.
///
/// # Errors
/// If it does not build, or a file cannot be written.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    deb::ensure()?;
    let program = match &arguments.binary {
        Some(program) => program.clone(),
        None => release::build(Architecture::native()?)?,
    };
    let output = arguments.output.clone();
    let output = output.unwrap_or_else(|| workspace().join("target/debian"));
    let package = deb::pack(&program, &output, Compression::Best)?;
    println!("{}", package.display());
    Ok(())
}
