//! The Debian package of the daemon: what is in it, what its unit allows the daemon, and a machine with systemd that
//! installs, runs and removes it.

mod contents;
mod machine;
mod service;
mod unit;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_tests::auth_daemon;
use xtask_support::deb::{self, Compression};
use xtask_support::step::{output, which, workspace};

/// A package of the daemon under test, in a folder that is removed with this value.
struct Package {
    folder: PathBuf,
    path: PathBuf,
}

impl Package {
    /// Packs the daemon under test. Reports the test `name` as skipped if this machine has no cargo-deb.
    fn pack(name: &str) -> Option<Self> {
        for program in ["cargo-deb", "dpkg-deb", "dpkg-shlibdeps", "strip"] {
            if which(program).is_none() {
                println!("SKIPPED {name}: no {program} (`cargo xtask test` installs it)");
                return None;
            }
        }
        let folder = env::temp_dir().join(format!("auth-daemon-deb-{}", std::process::id()));
        let path = deb::pack(&auth_daemon().unwrap(), &folder, Compression::Fast).unwrap();
        Some(Self { folder, path })
    }

    /// The answer of dpkg-deb to a question about the package.
    fn ask(&self, question: &str) -> String {
        dpkg_deb(&[question.as_ref(), self.path.as_ref()])
    }

    /// The file of the package with this absolute path.
    fn read(&self, path: &str) -> String {
        let root = self.folder.join("root");
        if !root.exists() {
            dpkg_deb(&["--raw-extract".as_ref(), self.path.as_ref(), root.as_ref()]);
        }
        fs::read_to_string(root.join(path.trim_start_matches('/'))).unwrap()
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn dpkg_deb(arguments: &[&Path]) -> String {
    let said = output(Command::new("dpkg-deb").args(arguments));
    said.unwrap_or_else(|| panic!("dpkg-deb {arguments:?}"))
}

/// A file of the sources.
fn source(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).unwrap()
}
