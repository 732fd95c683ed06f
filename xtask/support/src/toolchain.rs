//! The compiler and linker for the eBPF programs: which are installed, which are used, and why.
//!
//! rustup has no `core` for BPF targets. Either a distribution brings a compiler with one (Debian's `rustc-web`), or a
//! nightly compiles `core` from its source. Both emit LLVM bitcode, which bpf-linker reads with an LLVM of its own: it
//! must be at least as new as the compiler's.

mod missing;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;

use self::missing::Missing;
use crate::apt;
use crate::reproducible;
use crate::step::{other_toolchain, output, which, workspace};

/// A compiler and a linker that work together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// Where the compiler comes from.
    pub kind: Kind,
    /// Its version.
    pub compiler: Compiler,
    /// bpf-linker.
    pub linker: Linker,
}

impl Toolchain {
    /// A cargo command line for the eBPF crate: `build`, or with `linter` clippy instead. Arguments may be added.
    pub fn cargo(&self, linter: Option<&Path>) -> Command {
        let host_cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = match (self.kind, linter) {
            (Kind::System, None) => other_toolchain(host_cargo),
            (Kind::System, Some(linter)) => {
                let mut command = other_toolchain(linter);
                // cargo-clippy calls cargo in its turn, and Debian's may not be installed.
                command.env("CARGO", host_cargo);
                command
            }
            (Kind::Nightly, _) => {
                let mut command = other_toolchain("rustup");
                command.args(["run", "nightly", "cargo"]);
                command
            }
        };
        command.arg(if linter.is_some() { "clippy" } else { "build" });
        if self.kind == Kind::Nightly {
            command.arg("-Zbuild-std=core");
        }
        if self.kind == Kind::System {
            // The targets are unstable, whichever compiler built their core.
            command
                .env("RUSTC", SYSTEM_RUSTC)
                .env("RUSTC_BOOTSTRAP", "1");
        }
        let mut options = ["-Cdebuginfo=2", "-Clink-arg=--btf"]
            .map(str::to_owned)
            .to_vec();
        // BTF names source files.
        let folders = reproducible::folders(&workspace());
        options.extend(reproducible::rust_options(&folders));
        command
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker.path)
            .env("CARGO_ENCODED_RUSTFLAGS", options.join("\u{1f}"))
            .args(["--release", "--target", TARGET, "--manifest-path"])
            .arg(workspace().join("auth-ebpf/Cargo.toml"))
            .arg("--target-dir")
            .arg(target_directory());
        command
    }

    /// One line with the choice and its reason.
    fn describe(&self, wanted: Option<Kind>) -> String {
        let Compiler { version, llvm } = &self.compiler;
        let compiler = match self.kind {
            Kind::System => SYSTEM_RUSTC,
            Kind::Nightly => "rustup's nightly",
        };
        let why = match self.kind {
            _ if wanted.is_some() => "because it was asked for".to_owned(),
            Kind::System => format!("because it comes with core for {TARGET}"),
            Kind::Nightly => format!("because it has rust-src, and {SYSTEM_RUSTC} does not serve"),
        };
        let linker = match self.linker.llvm {
            Some(llvm) => format!("LLVM {llvm}"),
            None => "its LLVM is linked in, version unknown".to_owned(),
        };
        let path = self.linker.path.display();
        format!(
            "eBPF toolchain: {compiler} {version} (LLVM {llvm}), {why}; linker {path} ({linker})"
        )
    }
}

/// Where a compiler for BPF targets comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The distribution's own rustc, with core for BPF targets: Debian's rustc-web.
    System,
    /// rustup's nightly with the component rust-src.
    Nightly,
}

/// A compiler, as described by `rustc -vV`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// `1.96.0`, `1.97.0-nightly`.
    pub version: String,
    /// The major version of its LLVM.
    pub llvm: u32,
}

impl Compiler {
    /// Reads what `rustc -vV` prints; `None` where that names no LLVM.
    pub fn parse(verbose_version: &str) -> Option<Self> {
        let field = |name: &str| {
            verbose_version
                .lines()
                .find_map(|line| line.strip_prefix(name))
        };
        Some(Self {
            version: field("release: ")?.trim().to_owned(),
            llvm: first_number(field("LLVM version: ")?)?,
        })
    }
}

/// An installed bpf-linker that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linker {
    /// Its program.
    pub path: PathBuf,
    /// The major version of the LLVM that it loads, `None` where it was linked in.
    pub llvm: Option<u32>,
}

impl Linker {
    /// Whether it can read the compiler's bitcode: that of older LLVMs can be read, that of newer ones cannot.
    fn reads(&self, compiler: &Compiler) -> bool {
        self.llvm.is_none_or(|llvm| llvm >= compiler.llvm)
    }
}

/// The toolchains on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The distribution's rustc, if it has core for BPF targets.
    pub system: Option<Compiler>,
    /// rustup's nightly, if it has rust-src.
    pub nightly: Option<Compiler>,
    /// bpf-linker, if it runs.
    pub linker: Option<Linker>,
}

impl Facts {
    /// Finds the toolchains on this machine.
    pub fn probe() -> Self {
        Self {
            system: probe_system(),
            nightly: probe_nightly(),
            linker: probe_linker(),
        }
    }

    /// Takes the first compiler that the linker can follow: the system's, because it needs no unstable build of core.
    ///
    /// # Errors
    /// If something is missing: the error says what.
    pub fn choose(&self, wanted: Option<Kind>) -> Result<Toolchain, Missing> {
        let compilers: Vec<(Kind, &Compiler)> =
            [(Kind::System, &self.system), (Kind::Nightly, &self.nightly)]
                .into_iter()
                .filter(|(kind, _)| wanted.is_none_or(|wanted| wanted == *kind))
                .filter_map(|(kind, compiler)| Some((kind, compiler.as_ref()?)))
                .collect();
        let Some(&(_, first)) = compilers.first() else {
            return Err(Missing::Compiler { wanted });
        };
        let Some(linker) = &self.linker else {
            return Err(Missing::Linker {
                compiler_llvm: first.llvm,
            });
        };
        match compilers
            .iter()
            .find(|(_, compiler)| linker.reads(compiler))
        {
            Some(&(kind, compiler)) => Ok(Toolchain {
                kind,
                compiler: compiler.clone(),
                linker: linker.clone(),
            }),
            None => Err(Missing::NewerLinker {
                path: linker.path.clone(),
                llvm: linker.llvm,
                compiler_llvm: first.llvm,
            }),
        }
    }
}

/// Finds the toolchain, and reports which. As root, installs what is missing if apt and cargo suffice.
///
/// # Errors
/// If something is missing that cannot be installed from here: the message contains the commands.
pub fn ensure(wanted: Option<Kind>) -> Result<Toolchain> {
    // Two things may be missing, one after the other: a compiler, and then a linker that can follow it.
    for _ in 0..2 {
        match Facts::probe().choose(wanted) {
            Ok(toolchain) => {
                eprintln!("    {}", toolchain.describe(wanted));
                return Ok(toolchain);
            }
            Err(missing) => {
                eprintln!("    {}", missing.describe());
                if !apt::usable() || !missing.install()? {
                    return Err(give_up(&missing));
                }
            }
        }
    }
    let toolchain = Facts::probe()
        .choose(wanted)
        .map_err(|missing| give_up(&missing))?;
    eprintln!("    {}", toolchain.describe(wanted));
    Ok(toolchain)
}

fn give_up(missing: &Missing) -> anyhow::Error {
    anyhow!(
        "{}. To put that right:\n{}",
        missing.describe(),
        missing.instructions(apt::present())
    )
}

/// Where the eBPF crate is compiled: its own folder, whatever the workspace's is.
pub fn target_directory() -> PathBuf {
    workspace().join("auth-ebpf/target")
}

/// The clippy that belongs to the toolchain's compiler, installed if need be; `None` for rustup's, which brings its own.
///
/// # Errors
/// If it is missing and cannot be installed from here: the message contains the command.
pub fn linter(kind: Kind) -> Result<PathBuf> {
    match kind {
        Kind::System => {
            let packages = ["rust-web-clippy".to_owned()];
            let program = Path::new("/usr/bin/cargo-clippy");
            if !program.exists() {
                if !apt::usable() {
                    bail!(
                        "clippy is missing. To install it:\n  sudo apt-get install {}\n",
                        packages.join(" ")
                    );
                }
                apt::update()?;
                apt::install(&packages)?;
            }
            Ok(program.to_path_buf())
        }
        Kind::Nightly => {
            let probe = output(other_toolchain("rustup").args([
                "run",
                "nightly",
                "cargo",
                "clippy",
                "--version",
            ]));
            probe.context("clippy is missing. To install it:\n  rustup component add clippy --toolchain nightly\n")?;
            Ok(PathBuf::from("cargo-clippy"))
        }
    }
}

fn probe_system() -> Option<Compiler> {
    let rustc = || other_toolchain(SYSTEM_RUSTC);
    let libraries = output(rustc().args(["--print", "target-libdir", "--target", TARGET]))?;
    let core = fs::read_dir(libraries.trim())
        .ok()?
        .flatten()
        .any(|file| is_core(&file.file_name()));
    Compiler::parse(&output(rustc().arg("-vV"))?).filter(|_| core)
}

fn is_core(file: &OsString) -> bool {
    let name = file.to_string_lossy();
    name.starts_with("libcore-") && name.ends_with(".rlib")
}

fn probe_nightly() -> Option<Compiler> {
    let rustc = |argument: &[&str]| {
        // A probe must not make rustup download a nightly.
        let mut command = other_toolchain("rustup");
        output(
            command
                .env("RUSTUP_AUTO_INSTALL", "0")
                .args(["run", "nightly", "rustc"])
                .args(argument),
        )
    };
    let sysroot = rustc(&["--print", "sysroot"])?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    Compiler::parse(&rustc(&["-vV"])?).filter(|_| source.exists())
}

fn probe_linker() -> Option<Linker> {
    let path = which("bpf-linker")?;
    // A linker that lost its libLLVM to an upgrade is unusable.
    output(Command::new(&path).arg("--version"))?;
    let libraries = output(Command::new("ldd").arg(&path)).unwrap_or_default();
    Some(Linker {
        llvm: loaded_llvm(&libraries),
        path,
    })
}

/// The LLVM among the libraries that `ldd` lists: `libLLVM.so.22.1 => …`, once `libLLVM-15.so.1 => …`.
fn loaded_llvm(libraries: &str) -> Option<u32> {
    let (_, name) = libraries.split_once("libLLVM")?;
    first_number(name)
}

fn first_number(text: &str) -> Option<u32> {
    let start = text.find(|letter: char| letter.is_ascii_digit())?;
    let digits = &text[start..];
    let end = digits
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(digits.len());
    digits[..end].parse().ok()
}

/// The eBPF programs' target: little-endian, as are all machines that this project runs on.
pub const TARGET: &str = "bpfel-unknown-none";

const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn compiler(llvm: u32) -> Option<Compiler> {
        Some(Compiler {
            version: "1.96.0".to_owned(),
            llvm,
        })
    }

    fn linker(llvm: Option<u32>) -> Option<Linker> {
        Some(Linker {
            path: "/bin/bpf-linker".into(),
            llvm,
        })
    }

    #[test]
    fn a_compiler_is_read_from_its_verbose_version() {
        let debian = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
            commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\ncommit-date: 2026-05-25\n\
            host: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(Compiler::parse(debian), compiler(22));
        let nightly = Compiler::parse("release: 1.97.0-nightly\nLLVM version: 22.1.4\n").unwrap();
        assert_eq!(nightly.version, "1.97.0-nightly");
        assert_eq!(Compiler::parse("release: 1.97.0\n"), None);
        assert_eq!(
            Compiler::parse("release: 1.97.0\nLLVM version: none\n"),
            None
        );
        assert_eq!(Compiler::parse(""), None);
    }

    #[test]
    fn the_linkers_llvm_is_read_from_its_libraries() {
        let debian = "\tlinux-vdso.so.1 (0x1)\n\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x2)\n";
        assert_eq!(loaded_llvm(debian), Some(22));
        assert_eq!(
            loaded_llvm("\tlibLLVM-15.so.1 => /usr/lib/libLLVM-15.so.1 (0x2)\n"),
            Some(15)
        );
        assert_eq!(loaded_llvm("\tstatically linked\n"), None);
    }

    #[test]
    fn the_systems_compiler_comes_first() {
        let facts = Facts {
            system: compiler(22),
            nightly: compiler(22),
            linker: linker(Some(22)),
        };
        assert_eq!(facts.choose(None).unwrap().kind, Kind::System);
        assert_eq!(
            facts.choose(Some(Kind::Nightly)).unwrap().kind,
            Kind::Nightly
        );
        let facts = Facts {
            system: None,
            ..facts
        };
        assert_eq!(facts.choose(None).unwrap().kind, Kind::Nightly);
        assert_eq!(
            facts.choose(Some(Kind::System)),
            Err(Missing::Compiler {
                wanted: Some(Kind::System)
            })
        );
    }

    #[test]
    fn the_linker_must_be_as_new_as_the_compiler() {
        let facts = Facts {
            system: compiler(22),
            nightly: compiler(23),
            linker: linker(Some(22)),
        };
        assert_eq!(facts.choose(None).unwrap().kind, Kind::System);
        let wrong = facts.choose(Some(Kind::Nightly)).unwrap_err();
        assert!(
            wrong
                .describe()
                .contains("LLVM 22, older than the compiler's LLVM 23"),
            "{}",
            wrong.describe()
        );
        // The other compiler serves where the first is too new for the linker.
        let facts = Facts {
            system: compiler(23),
            nightly: compiler(22),
            ..facts
        };
        assert_eq!(facts.choose(None).unwrap().kind, Kind::Nightly);
        // A newer linker reads older bitcode. The LLVM of a static one is unknown, so it is tried.
        assert!(
            Facts {
                linker: linker(Some(24)),
                ..facts.clone()
            }
            .choose(None)
            .is_ok()
        );
        assert!(
            Facts {
                linker: linker(None),
                ..facts
            }
            .choose(None)
            .is_ok()
        );
    }
}
