//! Why the kernel side cannot be set up or changed.

use std::{io, path::PathBuf};

use aya::{
    maps::MapError,
    programs::{ProgramError, links::LinkError},
};

use super::programs::needs;

/// Why the kernel side cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Another daemon is running, or is being unloaded.
    #[error(
        "another auth-daemon holds {0}: one runs per node; stop it first, or give this one another kernel.pins"
    )]
    Locked(PathBuf),
    /// A pin could not be created, read or removed.
    #[error("{path}: {error}")]
    Pin {
        /// Path of the pin.
        path: PathBuf,
        /// Underlying error.
        error: io::Error,
    },
    /// A map operation failed.
    #[error("map {map}: {error}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// Underlying error.
        error: MapError,
    },
    /// The kernel rejected the programs or maps.
    #[error("cannot load the eBPF programs: {0}; `auth-daemon check` says what this kernel lacks")]
    Load(#[from] aya::EbpfError),
    /// The kernel rejected one program.
    #[error(
        "this kernel refuses the eBPF program {program}, which needs {}: {error}",
        needs(program)
    )]
    Program {
        /// Name of the program.
        program: String,
        /// Underlying error.
        error: ProgramError,
    },
    /// A link could not be replaced.
    #[error("eBPF link {program}: {error}")]
    Link {
        /// Name of the program.
        program: String,
        /// Underlying error.
        error: LinkError,
    },
    /// The interfaces of a pod's netns could not be read, or their filters not be removed.
    #[error("{netns}: cannot read or change its interfaces: {error}")]
    Interfaces {
        /// Path of the netns, or a description.
        netns: PathBuf,
        /// Underlying error.
        error: io::Error,
    },
    /// The embedded object does not match this code.
    #[error("the embedded eBPF object lacks {0}; rebuild with `cargo xtask build-ebpf`")]
    Missing(String),
}

pub(crate) fn map_error(map: &'static str) -> impl Fn(MapError) -> KernelError {
    move |error| KernelError::Map { map, error }
}

pub(crate) fn program_error(program: &str) -> impl Fn(ProgramError) -> KernelError {
    move |error| KernelError::Program {
        program: program.to_owned(),
        error,
    }
}

pub(crate) fn link_error(program: &str) -> impl Fn(LinkError) -> KernelError {
    move |error| KernelError::Link {
        program: program.to_owned(),
        error,
    }
}
