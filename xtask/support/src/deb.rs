//! Debian packages of the daemon, written by cargo-deb from `package.metadata.deb` in auth-daemon/Cargo.toml.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use mesh_tests::Architecture;

use crate::build::DIST_PROFILE;
use crate::cargo_install;
use crate::setup;
use crate::step::{self, cargo, output, step, which, workspace};

/// Installs cargo-deb and the programs that it runs, where they are missing.
///
/// # Errors
/// If they cannot be installed from here: the message names them.
pub fn ensure() -> Result<()> {
    setup::for_packages()?;
    if which("cargo-deb").is_none() {
        cargo_install::install("cargo-deb", CARGO_DEB_VERSION)?;
    }
    Ok(())
}

/// Like [`ensure`], with what the tests check packages with. Tests that need what is missing are reported as skipped.
pub fn ensure_or_say() {
    if let Err(error) = ensure().and_then(|()| setup::for_checks_of_packages()) {
        eprintln!(
            "    no Debian package: {error:#}\n    tests that need it are skipped; `cargo xtask test` tries again"
        );
    }
}

/// How hard to compress a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// For packages that are distributed; takes a minute.
    Best,
    /// For tests.
    Fast,
}

/// Packs `program`, which was built for this machine's architecture, and returns the path of the package in
/// `folder`. The same program gives the same package. Needs what [`ensure`] installs.
///
/// # Errors
/// If a file cannot be read or written, or cargo-deb fails.
pub fn pack(program: &Path, folder: &Path, compression: Compression) -> Result<PathBuf> {
    let scratch = env::temp_dir().join(format!("deb-{}", std::process::id()));
    let packed = step("write the Debian package", || {
        let package = pack_in(&scratch, program, compression)?;
        let name = package.file_name().context("a package has a name")?;
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let place = folder.join(name);
        fs::copy(&package, &place).with_context(|| format!("writing {}", place.display()))?;
        Ok(place)
    });
    let _ = fs::remove_dir_all(&scratch);
    packed
}

/// Packs `program` below `scratch`.
fn pack_in(scratch: &Path, program: &Path, compression: Compression) -> Result<PathBuf> {
    // cargo-deb takes the program from where cargo puts it.
    let triple = Architecture::native()?.rust_target();
    let built = scratch.join(&triple).join(DIST_PROFILE);
    fs::create_dir_all(&built).with_context(|| format!("making {}", built.display()))?;
    fs::copy(program, built.join("auth-daemon"))
        .with_context(|| format!("copying {}", program.display()))?;
    let folder = scratch.join("written");
    let mut deb = cargo();
    deb.args(["deb", "--no-build", "--locked", "--strip"])
        .args(["--package", "auth-daemon", "--profile", DIST_PROFILE])
        .args(["--target", &triple, "--output"])
        .arg(&folder)
        .env("CARGO_TARGET_DIR", scratch);
    if compression == Compression::Fast {
        deb.arg("--fast");
    }
    // Variables that Debian's own tools read: who makes the package, and the time of its files.
    if let (Ok(name), Ok(address)) = (env::var("DEBFULLNAME"), env::var("DEBEMAIL")) {
        deb.args(["--maintainer", &format!("{name} <{address}>")]);
    }
    if env::var_os(DATE).is_none() {
        deb.env(DATE, changed()?);
    }
    step::run(&mut deb)?;
    let written = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let written = written.flatten().map(|entry| entry.path());
    written
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .last()
        .context("cargo-deb wrote no package")
}

/// The time of the last entry in the package's changelog, in seconds since 1970.
fn changed() -> Result<String> {
    let changelog = workspace().join("deploy/debian/changelog");
    let mut parse = Command::new("dpkg-parsechangelog");
    parse.arg("-l").arg(&changelog).args(["-S", "Timestamp"]);
    let time = output(&mut parse)
        .with_context(|| format!("dpkg-parsechangelog cannot read {}", changelog.display()))?;
    Ok(time.trim().to_owned())
}

const CARGO_DEB_VERSION: &str = "3.8.0";
/// The variable with the time of whatever is built, <https://reproducible-builds.org/docs/source-date-epoch>.
const DATE: &str = "SOURCE_DATE_EPOCH";
