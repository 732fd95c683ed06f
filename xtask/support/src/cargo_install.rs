//! Programs that are distributed as crates, installed with the cargo that runs us.

use std::process::Command;

use anyhow::Result;

use crate::step::{cargo, run, step};

/// Installs a crate's program with the cargo that runs us.
///
/// # Errors
/// If it does not compile or the registry cannot be reached.
pub fn install(name: &str, version: &str) -> Result<()> {
    let install = CargoInstall {
        variables: Vec::new(),
        arguments: [name, "--version", version].map(str::to_owned).to_vec(),
    };
    step(&format!("install {name} {version}"), || {
        run(&mut install.command())
    })
}

/// A `cargo install` command, to run or to print.
pub struct CargoInstall {
    /// Its environment variables.
    pub variables: Vec<(String, String)>,
    /// The arguments after `cargo install`: the crate and its options.
    pub arguments: Vec<String>,
}

impl CargoInstall {
    /// A command that runs it.
    pub fn command(&self) -> Command {
        let mut command = cargo();
        // A user's settings for our own build do not apply to tools.
        for name in [
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_BUILD_RUSTFLAGS",
            "CARGO_TARGET_DIR",
        ] {
            command.env_remove(name);
        }
        command
            .args(["install", "--locked", "--force"])
            .args(&self.arguments);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command
    }
}

impl std::fmt::Display for CargoInstall {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, value) in &self.variables {
            write!(out, "{name}=\"{value}\" ")?;
        }
        write!(
            out,
            "cargo install --locked --force {}",
            self.arguments.join(" ")
        )
    }
}
