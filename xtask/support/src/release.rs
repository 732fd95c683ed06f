//! The daemon's program as it is released: for any supported architecture, the same from the same sources, and with a list
//! of its crates in the section `.dep-v0`, which scanners for vulnerabilities read (`cargo auditable`).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::Architecture;

use crate::apt;
use crate::build::DIST_PROFILE;
use crate::build_ebpf;
use crate::cargo_install;
use crate::reproducible::{self, Folder};
use crate::step::{self, other_toolchain, output, step, which, workspace};

/// Builds it into a target folder of its own, whatever the environment says about compilers, and returns its path.
///
/// # Errors
/// If something that is needed is missing and cannot be installed from here: the message says what. If it does not
/// compile, or contains the path of a folder of this machine.
pub fn build(architecture: Architecture) -> Result<PathBuf> {
    build_ebpf::run(&build_ebpf::Arguments::default())?;
    ensure_compilers(architecture)?;
    if which("cargo-auditable").is_none() {
        cargo_install::install("cargo-auditable", CARGO_AUDITABLE_VERSION)?;
    }
    let workspace = workspace();
    let folders = reproducible::folders(&workspace);
    let target = workspace.join("target/image");
    let name = format!("build auth-daemon for {}", architecture.name());
    step(&name, || {
        let mut cargo = cargo(architecture, &workspace, &folders);
        cargo.args(["auditable", "build", "--profile", DIST_PROFILE, "--locked"]);
        cargo.args(["--package", "auth-daemon", "--bin", "auth-daemon"]);
        cargo.args(["--target", &architecture.rust_target()]);
        step::run(cargo.arg("--target-dir").arg(&target))
    })?;
    let program = target
        .join(architecture.rust_target())
        .join(DIST_PROFILE)
        .join("auth-daemon");
    let bytes = fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    if let Some(path) = reproducible::mentioned(&folders, &bytes) {
        bail!(
            "{} contains the path {}, so it would differ in another folder: find what compiled it without the options of \
             xtask/support/src/reproducible.rs",
            program.display(),
            path.display()
        );
    }
    Ok(program)
}

/// A cargo that compiles for `architecture`, the same in every folder.
fn cargo(architecture: Architecture, workspace: &Path, folders: &[Folder]) -> Command {
    let mut command = other_toolchain(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace);
    // Variables that choose or configure a compiler are not passed on, except for the toolchain that runs us.
    if let Some(toolchain) = env::var_os("RUSTUP_TOOLCHAIN") {
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    let target = architecture.rust_target().replace('-', "_");
    command
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            reproducible::rust_options(folders).join("\u{1f}"),
        )
        .env(
            format!("CFLAGS_{target}"),
            reproducible::c_options(folders).join(" "),
        )
        .env("CARGO_PROFILE_DIST_DEBUG", "false")
        .env("CARGO_PROFILE_DIST_STRIP", "debuginfo");
    if !architecture.is_native() {
        // C code finds its compiler by the target's name.
        let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase());
        command.env(linker, cross_compiler(architecture));
    }
    command
}

fn cross_compiler(architecture: Architecture) -> String {
    format!("{}-gcc", architecture.gnu_target())
}

/// Installs the C compiler and Rust's standard library for a foreign architecture, where they are missing.
fn ensure_compilers(architecture: Architecture) -> Result<()> {
    if architecture.is_native() {
        return Ok(());
    }
    let gcc = cross_compiler(architecture);
    if which(&gcc).is_none() {
        let packages = [
            format!("gcc-{}", architecture.gnu_target().replace('_', "-")),
            format!("libc6-dev-{}-cross", architecture.name()),
        ];
        ensure!(
            apt::usable(),
            "{gcc} and its C library are missing. To install them:\n  sudo apt-get install {}\n",
            packages.join(" ")
        );
        apt::update()?;
        apt::install(&packages)?;
    }
    let target = architecture.rust_target();
    if !has_standard_library(&target) {
        let command = format!("rustup target add {target}");
        ensure!(
            which("rustup").is_some(),
            "Rust's standard library for {target} is missing. To install it where rustup is: {command}"
        );
        step(
            &format!("install Rust's standard library for {target}"),
            || step::run(other_toolchain("rustup").args(["target", "add", &target])),
        )?;
        ensure!(
            has_standard_library(&target),
            "rustc does not find its standard library for {target} after `{command}`: is another rustc first in PATH?"
        );
    }
    Ok(())
}

fn has_standard_library(target: &str) -> bool {
    let asked = ["--print", "target-libdir", "--target", target];
    output(other_toolchain("rustc").args(asked))
        .is_some_and(|folder| Path::new(folder.trim()).is_dir())
}

const CARGO_AUDITABLE_VERSION: &str = "0.7.7";

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a program that prints the path of one of its sources in this folder, and returns its bytes.
    fn built_in(folder: &Path) -> Vec<u8> {
        fs::create_dir_all(folder.join("src")).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write(
            "Cargo.toml",
            "[package]\nname = \"x\"\nedition = \"2024\"\n[workspace]\n[profile.dist]\ninherits = \"release\"\n",
        );
        // Cargo gives rustc relative paths of a package's own sources, but absolute ones of generated sources.
        write(
            "src/main.rs",
            "include!(concat!(env!(\"CARGO_MANIFEST_DIR\"), \"/src/part.rs\"));\n",
        );
        write("src/part.rs", "fn main() { println!(\"{}\", file!()); }\n");
        let architecture = Architecture::native().unwrap();
        let folders = reproducible::folders(folder);
        let mut cargo = cargo(architecture, folder, &folders);
        let target = architecture.rust_target();
        cargo.args(["build", "--profile", DIST_PROFILE, "--offline"]);
        cargo.args(["--target", &target]);
        step::run(cargo.arg("--target-dir").arg(folder.join("target"))).unwrap();
        let program = folder
            .join("target")
            .join(target)
            .join(DIST_PROFILE)
            .join("x");
        assert_eq!(
            output(&mut Command::new(&program)).unwrap(),
            "/build/src/part.rs\n"
        );
        let bytes = fs::read(program).unwrap();
        assert_eq!(reproducible::mentioned(&folders, &bytes), None);
        bytes
    }

    #[test]
    fn two_folders_give_one_program() {
        let folder = env::temp_dir().join(format!("reproducible-{}", std::process::id()));
        let one = built_in(&folder.join("one"));
        let other = built_in(&folder.join("another/deeper"));
        fs::remove_dir_all(&folder).unwrap();
        assert!(one == other);
    }
}
