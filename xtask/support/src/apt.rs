//! Debian packages, for the parts of this project's tools that are not Rust crates.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::step::{output, root, run, step, which};

/// Whether packages can be installed here: apt exists and this process is root.
pub fn usable() -> bool {
    root() && present()
}

/// Whether this distribution installs its packages with apt.
pub fn present() -> bool {
    which("apt-get").is_some()
}

/// Updates the package lists: a fresh machine or container image has none.
///
/// # Errors
/// If the archive cannot be reached.
pub fn update() -> Result<()> {
    let _turn = turn()?;
    step("read the package archive's index (apt-get update)", || {
        run(apt_get().args(["--quiet", "update"]))
    })
}

/// Whether the archive has all these packages, according to the index on this machine.
pub fn available(packages: &[String]) -> bool {
    packages.iter().all(|package| {
        output(
            Command::new("apt-cache")
                .args(["policy", package])
                .env("LC_ALL", "C"),
        )
        .is_some_and(|policy| has_candidate(&policy))
    })
}

fn has_candidate(policy: &str) -> bool {
    policy
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Candidate: "))
        .any(|version| version != "(none)")
}

/// Installs packages without starting the services that they contain. Call [`update`] first.
///
/// # Errors
/// If apt-get fails; its own messages are on stderr.
pub fn install(packages: &[String]) -> Result<()> {
    let _turn = turn()?;
    let _guard = NoServices::new()?;
    step(&format!("install {}", packages.join(" ")), || {
        let mut apt = apt_get();
        apt.args(["--quiet", "--yes", "--no-install-recommends", "install"])
            .args(packages);
        run(&mut apt)
    })
}

/// Waits until no other command of this project runs apt, and keeps others waiting while the file is open. apt waits for
/// another process's packages, but not for its index, and [`NoServices`] must outlast all that install.
fn turn() -> Result<File> {
    let path = env::temp_dir().join("auth-daemon-apt.lock");
    let file = File::options().create(true).append(true).open(&path);
    let lock = file.and_then(|file| file.lock().map(|()| file));
    lock.with_context(|| format!("cannot lock {}", path.display()))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // Another apt process, such as a machine's own updates after boot, may hold the lock for a while.
    command.env("DEBIAN_FRONTEND", "noninteractive").args([
        "-o",
        "DPkg::Lock::Timeout=300",
        "-o",
        "Dpkg::Use-Pty=0",
    ]);
    command
}

/// While this exists, installing a package starts no service: Debian runs `/usr/sbin/policy-rc.d`, and exit code 101
/// forbids it.
struct NoServices {
    ours: bool,
}

impl NoServices {
    const POLICY: &str = "/usr/sbin/policy-rc.d";

    fn new() -> Result<Self> {
        let created = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(Self::POLICY);
        match created {
            Ok(mut file) => {
                io::Write::write_all(&mut file, b"#!/bin/sh\nexit 101\n").context(Self::POLICY)?;
                Ok(Self { ours: true })
            }
            // Keep the administrator's own policy. Container images have exactly the same policy as ours.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Self { ours: false }),
            Err(error) => Err(error).context(Self::POLICY),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours && Path::new(Self::POLICY).exists() {
            let _ = fs::remove_file(Self::POLICY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_without_a_candidate_is_not_available() {
        assert!(has_candidate(
            "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n"
        ));
        assert!(!has_candidate(
            "llvm-99-dev:\n  Installed: (none)\n  Candidate: (none)\n"
        ));
        assert!(!has_candidate(""));
    }
}
