//! The processor architectures that images are built for.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// A processor architecture, by its name in Go and in images (image-spec, config.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    /// x86_64
    Amd64,
    /// aarch64
    Arm64,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// This machine's architecture.
    ///
    /// # Errors
    /// If images for it are not supported.
    pub fn native() -> Result<Self> {
        let native = env::consts::ARCH;
        Self::ALL
            .into_iter()
            .find(|one| one.machine() == native)
            .with_context(|| format!("images for {native} are not supported"))
    }

    /// Whether this is this machine's architecture.
    pub fn is_native(self) -> bool {
        self.machine() == env::consts::ARCH
    }

    /// Its name in images.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// The kernel's name, `uname -m`, which is Rust's as well.
    pub fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// Rust's name of its Linux with the GNU C library.
    pub fn rust_target(self) -> String {
        format!("{}-unknown-linux-gnu", self.machine())
    }

    /// The GNU tools' name of its Linux, which begins the names of cross compilers' programs.
    pub fn gnu_target(self) -> String {
        format!("{}-linux-gnu", self.machine())
    }

    /// Folders of this machine that hold shared libraries of this architecture, apart from those in ld.so.conf: Debian's
    /// for a foreign architecture's own packages, and those of its cross compiler.
    pub(crate) fn library_folders(self) -> [PathBuf; 2] {
        let name = self.gnu_target();
        [format!("/lib/{name}"), format!("/usr/{name}/lib")].map(PathBuf::from)
    }
}
