//! The software bill of materials of the daemon's image (CycloneDX 1.3): the crates that its program says it is made of,
//! and the shared libraries beside it, with their Debian packages.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use mesh_tests::{Architecture, shared_libraries};
use serde_json::{Value, json};
use xtask_support::cargo_install;
use xtask_support::step::{output, which};

/// Describes the image of a program that `cargo auditable` has built. The same program and libraries give the same text.
///
/// # Errors
/// If the program has no list of its crates, or the converter cannot be installed.
pub(crate) fn describe(program: &Path, architecture: Architecture) -> Result<String> {
    if which("auditable2cdx").is_none() {
        cargo_install::install("auditable2cdx", AUDITABLE2CDX_VERSION)?;
    }
    let converter = which("auditable2cdx").context("auditable2cdx was not installed")?;
    let said = output(Command::new(converter).arg(program)).with_context(|| {
        format!(
            "{} has no list of its crates: build it with `cargo auditable build`",
            program.display()
        )
    })?;
    let mut sbom: Value = serde_json::from_str(&said).context("reading auditable2cdx's output")?;
    let components = sbom["components"]
        .as_array_mut()
        .context("auditable2cdx lists no components")?;
    for (path, file) in shared_libraries(program, architecture)? {
        components.push(library(&path, &file));
    }
    Ok(format!("{sbom:#}\n"))
}

/// A shared library, as a component.
fn library(path: &Path, file: &Path) -> Value {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The format requires a version.
    let mut component =
        json!({"type": "library", "bom-ref": path, "name": name, "version": "unknown"});
    if let Some((package, version, architecture)) = debian_package(file) {
        let url = format!("pkg:deb/debian/{package}@{version}?arch={architecture}");
        component["purl"] = url.replace('+', "%2B").into();
        component["version"] = version.into();
    }
    component
}

/// The Debian package that a file is from, with its version and architecture.
fn debian_package(file: &Path) -> Option<(String, String, String)> {
    // Before /lib became a link to /usr/lib, packages named files below it, and dpkg still knows them so.
    let older = Path::new("/").join(file.strip_prefix("/usr").unwrap_or(file));
    let search = |path: &Path| output(Command::new("dpkg-query").arg("--search").arg(path));
    let owner = search(file).or_else(|| search(&older))?;
    let package = owner.split(": ").next()?;
    let format = "--showformat=${Package} ${Version} ${Architecture}";
    let shown = output(Command::new("dpkg-query").args(["--show", format, package]))?;
    let mut fields = shown.split(' ').map(str::to_owned);
    Some((fields.next()?, fields.next()?, fields.next()?))
}

const AUDITABLE2CDX_VERSION: &str = "0.1.0";
