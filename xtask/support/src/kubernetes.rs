//! `cargo xtask kubernetes`: the programs of a real Kubernetes, for the tests that need an API server or a whole cluster, and
//! others that are built the same way: istiod, and SPIRE's server.
//!
//! They are built from the Go modules below `tests/tools` into `$KUBE` or `/opt/kube`, once for each version.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use mesh_tests::{GoModule, programs_folder};

use crate::apt;
use crate::step::{executable, step, which, workspace};

/// Programs that come from Debian, and their packages.
const INSTALLED: [(&str, &str); 6] = [
    ("runc", "runc"),
    ("curl", "curl"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("conntrack", "conntrack"),
    ("busybox", "busybox-static"),
];

/// Installs and builds what is missing or not current.
///
/// # Errors
/// If a package cannot be installed, Go is missing, or a program does not build.
pub fn ensure() -> Result<()> {
    install()?;
    build(&GoModule::ALL.each_ref())
}

/// Builds those of these modules that are missing or not current.
///
/// # Errors
/// If Go is missing, or a program does not build.
pub fn build(modules: &[&GoModule]) -> Result<()> {
    let tools = workspace().join("tests/tools");
    let stale = || -> Result<Vec<&GoModule>> {
        let mut stale = Vec::new();
        for &module in modules {
            if !module.is_current(&tools)? {
                stale.push(module);
            }
        }
        Ok(stale)
    };
    if stale()?.is_empty() {
        return Ok(());
    }
    let go = go().context("Go is missing: install it from https://go.dev/dl")?;
    let _lock = lock()?;
    // Another command may have built them while this one waited.
    for module in stale()? {
        let name = format!(
            "build {} into {} (once; Kubernetes and SPIRE take minutes)",
            module.programs.join(", "),
            module.folder().display()
        );
        step(&name, || module.build(&tools, &go))?;
    }
    Ok(())
}

/// Like [`ensure`], for commands that also work without these programs: tests that need them are then reported as
/// skipped.
pub fn ensure_or_say() {
    if let Err(error) = ensure() {
        eprintln!(
            "    no Kubernetes or SPIRE: {error:#}\n    tests that need one are skipped; `cargo xtask kubernetes` tries again"
        );
    }
}

/// Waits until no other command builds into the folder of the built programs. The lock ends with the returned file.
fn lock() -> Result<File> {
    let folder = programs_folder();
    let path = folder.join(".lock");
    let opened = fs::create_dir_all(&folder).and_then(|()| File::create(&path));
    let file = opened.with_context(|| format!("creating {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!(
            "    waiting for another command that builds into {}",
            folder.display()
        );
    }
    file.lock()
        .with_context(|| format!("locking {}", path.display()))?;
    Ok(file)
}

fn install() -> Result<()> {
    let packages: Vec<String> = INSTALLED
        .iter()
        .filter(|(program, _)| which(program).is_none())
        .map(|(_, package)| (*package).to_owned())
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    if !apt::usable() {
        bail!(
            "the cluster tests need the packages {}, which only root can install, with apt",
            packages.join(", ")
        );
    }
    step("install what a Kubernetes cluster needs", || {
        apt::update()?;
        apt::install(&packages)
    })
}

/// The `go` command, also from the folder of Go's own installer, which root's PATH may lack.
fn go() -> Option<PathBuf> {
    let installed = PathBuf::from("/usr/local/go/bin/go");
    which("go").or_else(|| executable(&installed).then_some(installed))
}
