//! `cargo xtask build-ebpf`: compiles the eBPF programs to the objects that the daemon embeds.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::step::{self, step, workspace};
use crate::toolchain::{self, Kind, TARGET};

/// Options of the commands that compile eBPF programs.
#[derive(Debug, Default, clap::Args)]
pub struct Arguments {
    /// Use this compiler. Defaults to the first that is there and that bpf-linker can follow
    #[arg(long)]
    toolchain: Option<Kind>,
}

impl Arguments {
    /// The requested compiler.
    pub fn wanted(&self) -> Option<Kind> {
        self.toolchain
    }
}

/// The objects: the programs of the cgroup root, and the one that each enrolled netns gets.
const OBJECTS: [&str; 2] = ["auth-ebpf", "auth-ebpf-inbound"];

/// Builds the objects into `target/bpf`.
///
/// # Errors
/// If there is no toolchain and none can be installed, or the programs do not compile.
pub fn run(arguments: &Arguments) -> Result<()> {
    step("build the eBPF objects", || {
        let toolchain = toolchain::ensure(arguments.wanted())?;
        step::run(
            toolchain
                .cargo(None)
                .args(["--package", "auth-ebpf", "--bins"]),
        )?;
        for name in OBJECTS {
            let built = toolchain::target_directory()
                .join(TARGET)
                .join("release")
                .join(name);
            let object = workspace().join("target/bpf").join(name);
            let copied = copy_if_changed(&built, &object)?;
            eprintln!(
                "    {} {}",
                object.display(),
                if copied { "written" } else { "is up to date" }
            );
        }
        Ok(())
    })
}

/// Writes a file unless its content is already equal, so that cargo does not rebuild the daemon that embeds it. Returns
/// whether it wrote.
fn copy_if_changed(from: &Path, to: &Path) -> Result<bool> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(false);
    }
    let folder = to.parent().context("an object lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Replace the file atomically: another build may be reading it.
    let partial = to.with_extension("partial");
    fs::write(&partial, new).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_object_is_not_written_again() {
        let folder = std::env::temp_dir().join(format!("xtask-copy-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (from, to) = (folder.join("from"), folder.join("deep/er/to"));
        fs::write(&from, b"one").unwrap();
        assert!(copy_if_changed(&from, &to).unwrap());
        assert!(!copy_if_changed(&from, &to).unwrap());
        fs::write(&from, b"two").unwrap();
        assert!(copy_if_changed(&from, &to).unwrap());
        assert_eq!(fs::read(&to).unwrap(), b"two");
        assert!(copy_if_changed(&folder.join("absent"), &to).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }
}
