//! `cargo xtask image`: the daemon as a container image, without Docker.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mesh_tests::{AUTH_DAEMON_IMAGE, auth_daemon_image};
use xtask_support::build;
use xtask_support::step::{programs, step, which};

/// Options of the image.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the archive goes; target/release/auth-daemon.tar unless said otherwise
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The program to put into it, instead of one that is built now
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

/// Writes an OCI archive with the release build, and prints its path on stdout.
///
/// # Errors
/// If it does not build, or the archive cannot be written.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let output = match &arguments.output {
        Some(output) => output.clone(),
        None => programs()?.join("auth-daemon.tar"),
    };
    write(arguments.binary.as_deref(), &output)?;
    println!("{}", output.display());
    Ok(())
}

/// Writes the archive to `output`.
///
/// # Errors
/// If it does not build, or the archive cannot be written.
pub(crate) fn write(binary: Option<&Path>, output: &Path) -> Result<()> {
    let binary = match binary {
        Some(binary) => binary.to_owned(),
        None => {
            build::daemon()?;
            programs()?.join("auth-daemon")
        }
    };
    for program in ["strip", "ldd"] {
        if which(program).is_none() {
            bail!("there is no {program}, which comes with a C compiler");
        }
    }
    step(&format!("write the image {AUTH_DAEMON_IMAGE}"), || {
        let digest = auth_daemon_image(&binary, AUTH_DAEMON_IMAGE, output)?;
        let size = output
            .metadata()
            .with_context(|| format!("reading {}", output.display()))?
            .len();
        eprintln!("    {} ({} MB), {digest}", output.display(), size >> 20);
        Ok(())
    })
}
