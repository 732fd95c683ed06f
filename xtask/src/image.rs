//! `cargo xtask image`: the daemon as a container image, without Docker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use mesh_tests::{AUTH_DAEMON_IMAGE, Architecture, AuthDaemonImage, shared_libraries};
use xtask_support::release;
use xtask_support::step::{self, programs, step, which};

use crate::sbom;

/// Options of the image.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The architecture; this machine's unless said otherwise
    #[arg(long)]
    arch: Option<Architecture>,
    /// Where the archive goes; target/release/auth-daemon.tar unless said otherwise, or auth-daemon-ARCH.tar for another
    /// architecture. Its bill of materials goes beside it, with .cdx.json instead of .tar
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The program to put into it as it is, instead of one that is built now. Build it with `cargo auditable`
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

/// Writes an OCI archive with the release build, and prints its path on stdout.
///
/// # Errors
/// If it does not build, or a file cannot be written.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let architecture = arguments.arch.map_or_else(Architecture::native, Ok)?;
    let output = match &arguments.output {
        Some(output) => output.clone(),
        None => default_output(architecture)?,
    };
    let program = match &arguments.binary {
        Some(program) => program.clone(),
        None => release::build(architecture)?,
    };
    write(&program, architecture, &output)?;
    println!("{}", output.display());
    Ok(())
}

fn default_output(architecture: Architecture) -> Result<PathBuf> {
    let name = if architecture.is_native() {
        "auth-daemon.tar".to_owned()
    } else {
        format!("auth-daemon-{}.tar", architecture.name())
    };
    Ok(programs()?.join(name))
}

/// Writes the archive and, beside it, its bill of materials.
fn write(program: &Path, architecture: Architecture, output: &Path) -> Result<()> {
    try_run(program, architecture)?;
    step(&format!("write the image {AUTH_DAEMON_IMAGE}"), || {
        let sbom = sbom::describe(program, architecture)?;
        let sbom_file = output.with_extension("cdx.json");
        fs::write(&sbom_file, &sbom).with_context(|| format!("writing {}", sbom_file.display()))?;
        let image = AuthDaemonImage {
            program,
            architecture,
            sbom: Some(sbom),
        };
        let digest = image.write(AUTH_DAEMON_IMAGE, output)?;
        let size = output
            .metadata()
            .with_context(|| format!("reading {}", output.display()))?
            .len();
        let archive = output.display();
        eprintln!("    {archive} ({} MB), {digest}", size >> 20);
        eprintln!("    {} lists what is in it", sbom_file.display());
        Ok(())
    })
}

/// Has the program print its version, to show that it runs with the libraries that go into the image.
fn try_run(program: &Path, architecture: Architecture) -> Result<()> {
    if architecture.is_native() {
        return step::run(Command::new(program).arg("--version"));
    }
    let emulator = format!("qemu-{}-static", architecture.machine());
    let Some(emulator) = which(&emulator) else {
        eprintln!("SKIPPED running the program: no {emulator} (Debian's qemu-user-static)");
        return Ok(());
    };
    let root = std::env::temp_dir().join(format!("image-{}", std::process::id()));
    let run = || {
        for (path, file) in shared_libraries(program, architecture)? {
            let copy = root.join(path.strip_prefix("/").unwrap_or(&path));
            fs::create_dir_all(copy.parent().unwrap_or(&root))?;
            fs::copy(&file, &copy).with_context(|| format!("copying {}", file.display()))?;
        }
        let mut emulated = Command::new(emulator);
        step::run(emulated.arg("-L").arg(&root).arg(program).arg("--version"))
    };
    let ran = run();
    let _ = fs::remove_dir_all(&root);
    ran
}
