//! `cargo xtask setup`: installs the programs that tests, demo and bench run.

use std::process::Command;

use anyhow::{Result, bail};

use crate::apt;
use crate::step::{self, step, which};

/// Installs what is missing; returns immediately if nothing is.
///
/// # Errors
/// If something is missing and cannot be installed from here: the message names it.
pub fn run() -> Result<()> {
    ensure(&PROGRAMS)
}

/// Installs the programs that create virtual machines, where they are missing.
///
/// # Errors
/// As [`run`].
pub fn for_machines() -> Result<()> {
    ensure(&FOR_MACHINES)
}

/// Installs the programs that make Debian packages, where they are missing.
///
/// # Errors
/// As [`run`].
pub fn for_packages() -> Result<()> {
    ensure(&FOR_PACKAGES)
}

/// Installs the programs that check Debian packages and their units, where they are missing.
///
/// # Errors
/// As [`run`].
pub fn for_checks_of_packages() -> Result<()> {
    ensure(&FOR_CHECKS_OF_PACKAGES)
}

fn ensure(programs: &[Program]) -> Result<()> {
    let missing: Vec<&Program> = programs
        .iter()
        .filter(|program| which(program.command).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let commands = missing
        .iter()
        .map(|program| program.command)
        .collect::<Vec<_>>()
        .join(", ");
    let packages: Vec<String> = missing
        .iter()
        .map(|program| program.package.to_owned())
        .collect();
    if !apt::present() {
        bail!("these programs are missing, please install them: {commands}");
    }
    if !apt::usable() {
        bail!(
            "these programs are missing: {commands}. To install them:\n  sudo apt-get update\n  \
             sudo apt-get install --no-install-recommends {}\n",
            packages.join(" ")
        );
    }
    step(&format!("install what the tests run: {commands}"), || {
        apt::update()?;
        apt::install(&packages)?;
        if missing.iter().any(|program| program.command == "nginx")
            && which("update-rc.d").is_some()
        {
            // It was not started just now, and must not take port 80 after the next start of the machine either: only
            // the tests' own nginx runs, inside a pod.
            step::run(Command::new("update-rc.d").args(["nginx", "disable"]))?;
        }
        Ok(())
    })
}

/// A program and the Debian package that contains it.
#[derive(Clone, Copy, Debug)]
struct Program {
    command: &'static str,
    package: &'static str,
}

const FOR_MACHINES: [Program; 4] = [
    Program {
        command: "qemu-system-x86_64",
        package: "qemu-system-x86",
    },
    Program {
        command: "depmod",
        package: "kmod",
    },
    Program {
        command: "modprobe",
        package: "kmod",
    },
    Program {
        command: "ping",
        package: "iputils-ping",
    },
];

const FOR_PACKAGES: [Program; 2] = [
    Program {
        command: "dpkg-shlibdeps",
        package: "dpkg-dev",
    },
    Program {
        command: "strip",
        package: "binutils",
    },
];

const FOR_CHECKS_OF_PACKAGES: [Program; 1] = [Program {
    command: "systemd-analyze",
    package: "systemd",
}];

const PROGRAMS: [Program; 15] = [
    Program {
        command: "ip",
        package: "iproute2",
    },
    Program {
        command: "nginx",
        package: "nginx-light",
    },
    Program {
        command: "iperf3",
        package: "iperf3",
    },
    Program {
        command: "wrk",
        package: "wrk",
    },
    Program {
        command: "setpriv",
        package: "util-linux",
    },
    Program {
        command: "curl",
        package: "curl",
    },
    Program {
        command: "tcpdump",
        package: "tcpdump",
    },
    Program {
        command: "openssl",
        package: "openssl",
    },
    Program {
        command: "faketime",
        package: "faketime",
    },
    Program {
        command: "nft",
        package: "nftables",
    },
    Program {
        command: "python3",
        package: "python3-minimal",
    },
    Program {
        command: "promtool",
        package: "prometheus",
    },
    Program {
        command: "tmux",
        package: "tmux",
    },
    Program {
        command: "ps",
        package: "procps",
    },
    Program {
        command: "chromium",
        package: "chromium",
    },
];
