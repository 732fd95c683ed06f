//! What is missing when the eBPF programs cannot be built here, and how to install it.

use std::path::PathBuf;

use anyhow::Result;

use super::{Kind, SYSTEM_RUSTC, TARGET};
use crate::apt;
use crate::cargo_install::CargoInstall;
use crate::step::{run, step};

/// Why the eBPF programs cannot be built here yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No compiler with core for BPF targets.
    Compiler {
        /// Where it was asked to come from.
        wanted: Option<Kind>,
    },
    /// No bpf-linker that runs.
    Linker {
        /// The compiler's LLVM, which the linker has to read.
        compiler_llvm: u32,
    },
    /// bpf-linker cannot read what the compiler writes.
    NewerLinker {
        /// The linker.
        path: PathBuf,
        /// Its LLVM.
        llvm: Option<u32>,
        /// The compiler's LLVM.
        compiler_llvm: u32,
    },
}

impl Missing {
    /// One sentence that describes the problem.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Compiler {
                wanted: Some(Kind::Nightly),
            } => "rustup has no nightly with the component rust-src".to_owned(),
            Self::Compiler {
                wanted: Some(Kind::System),
            } => format!("{SYSTEM_RUSTC} has no core for {TARGET}"),
            Self::Compiler { wanted: None } => format!(
                "no compiler for {TARGET}: {SYSTEM_RUSTC} has no core for it, and rustup no nightly with rust-src"
            ),
            Self::Linker { .. } => "bpf-linker is not installed, or does not run".to_owned(),
            Self::NewerLinker {
                path,
                llvm,
                compiler_llvm,
            } => format!(
                "{} uses LLVM {}, older than the compiler's LLVM {compiler_llvm}, whose bitcode it cannot read",
                path.display(),
                llvm.map_or_else(|| "?".to_owned(), |llvm| llvm.to_string()),
            ),
        }
    }

    /// The commands that fix it, for a user to type.
    pub(crate) fn instructions(&self, debian: bool) -> String {
        let debian_packages = |packages: &[String]| {
            format!(
                "  sudo apt-get update\n  sudo apt-get install --no-install-recommends {}\n",
                packages.join(" ")
            )
        };
        let nightly = "  rustup toolchain install nightly --profile minimal --component rust-src\n";
        match self {
            Self::Compiler {
                wanted: Some(Kind::Nightly),
            } => nightly.to_owned(),
            Self::Compiler { .. } if debian => {
                let packages = debian_packages(&compiler_packages());
                format!(
                    "{packages}or, where the archive does not have them (Debian 12 does), with rustup:\n{nightly}"
                )
            }
            Self::Compiler { .. } => nightly.to_owned(),
            Self::Linker {
                compiler_llvm: llvm,
            }
            | Self::NewerLinker {
                compiler_llvm: llvm,
                ..
            } => {
                let prebuilt = "  cargo binstall --force bpf-linker\n\
                    (or take the program for this machine from https://github.com/aya-rs/bpf-linker/releases)\n";
                match linker_install(*llvm) {
                    Some(install) if debian => {
                        let packages = debian_packages(&linker_packages(*llvm));
                        let from_source = format!("{packages}  {install}\n");
                        format!(
                            "{from_source}or, where the archive does not have them (Debian 12 does):\n{prebuilt}"
                        )
                    }
                    Some(install) => format!(
                        "{prebuilt}or, with LLVM {llvm} under {}:\n  {install}\n",
                        llvm_prefix(*llvm)
                    ),
                    None => prebuilt.to_owned(),
                }
            }
        }
    }

    /// Fixes it with apt and cargo. Returns false if the archive lacks what is needed.
    pub(crate) fn install(&self) -> Result<bool> {
        match self {
            Self::Compiler {
                wanted: Some(Kind::Nightly),
            } => Ok(false),
            Self::Compiler { .. } => {
                apt::update()?;
                let packages = compiler_packages();
                let found = apt::available(&packages);
                if found {
                    apt::install(&packages)?;
                }
                Ok(found)
            }
            Self::Linker {
                compiler_llvm: llvm,
            }
            | Self::NewerLinker {
                compiler_llvm: llvm,
                ..
            } => {
                let Some(install) = linker_install(*llvm) else {
                    return Ok(false);
                };
                apt::update()?;
                let packages = linker_packages(*llvm);
                if !apt::available(&packages) {
                    return Ok(false);
                }
                apt::install(&packages)?;
                step(
                    &format!("install bpf-linker {LINKER_VERSION} for LLVM {llvm}"),
                    || run(&mut install.command()),
                )?;
                Ok(true)
            }
        }
    }
}

/// How to build bpf-linker against the distribution's LLVM, `None` where our version of it does not know that LLVM.
fn linker_install(llvm: u32) -> Option<CargoInstall> {
    // Its features: llvm-21, llvm-22, llvm-23.
    if !(21..=23).contains(&llvm) {
        return None;
    }
    let prefix = llvm_prefix(llvm);
    Some(CargoInstall {
        variables: vec![
            ("LLVM_PREFIX".to_owned(), prefix.clone()),
            (format!("LLVM_SYS_{llvm}1_PREFIX"), prefix.clone()),
            ("RUSTFLAGS".to_owned(), format!("-L {prefix}/lib")),
        ],
        arguments: [
            "bpf-linker",
            "--version",
            LINKER_VERSION,
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ]
        .map(str::to_owned)
        .to_vec(),
    })
}

fn compiler_packages() -> Vec<String> {
    ["rustc-web", "libstd-rust-web-dev-bpf"]
        .map(str::to_owned)
        .to_vec()
}

fn linker_packages(llvm: u32) -> Vec<String> {
    vec![
        format!("llvm-{llvm}-dev"),
        format!("libpolly-{llvm}-dev"),
        "zlib1g-dev".to_owned(),
        "g++".to_owned(),
    ]
}

fn llvm_prefix(llvm: u32) -> String {
    format!("/usr/lib/llvm-{llvm}")
}

const LINKER_VERSION: &str = "0.13.0";

#[cfg(test)]
mod tests {
    use super::super::{Facts, tests::compiler};
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_commands() {
        let nothing = Facts::default().choose(None).unwrap_err();
        assert_eq!(nothing, Missing::Compiler { wanted: None });
        assert!(
            nothing.instructions(true).contains(
                "apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf"
            )
        );
        assert!(!nothing.instructions(false).contains("apt-get"));
        assert!(nothing.instructions(false).contains("--component rust-src"));

        let unlinked = Facts {
            system: compiler(22),
            ..Facts::default()
        }
        .choose(None)
        .unwrap_err();
        assert_eq!(unlinked, Missing::Linker { compiler_llvm: 22 });
        let typed = unlinked.instructions(true);
        assert!(
            typed.contains("llvm-22-dev libpolly-22-dev zlib1g-dev"),
            "{typed}"
        );
        assert!(
            typed.contains(
                "LLVM_PREFIX=\"/usr/lib/llvm-22\" LLVM_SYS_221_PREFIX=\"/usr/lib/llvm-22\" RUSTFLAGS=\"-L /usr/lib/llvm-22/lib\" \
                 cargo install --locked --force bpf-linker --version 0.13.0 --no-default-features --features llvm-22"
            ),
            "{typed}"
        );
        // An LLVM that this bpf-linker cannot be built for: only a finished program helps.
        assert!(
            !Missing::Linker { compiler_llvm: 30 }
                .instructions(true)
                .contains("llvm-30")
        );
    }
}
