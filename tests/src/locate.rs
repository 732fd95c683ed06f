//! Finds the programs under test.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The daemon: environment variable `AUTH_DAEMON`, or the release build of this workspace.
pub fn auth_daemon() -> Result<PathBuf> {
    find(
        "AUTH_DAEMON",
        &["release/auth-daemon"],
        "cargo build --release -p auth-daemon",
    )
}

/// The program that acts as clients and servers in pods: environment variable `POD_APP`, or this workspace's build, the
/// release build first.
///
/// `cargo test -p mesh-tests` builds it; other users of this library build it themselves.
pub fn pod_app() -> Result<PathBuf> {
    find(
        "POD_APP",
        &["pod-app", "release/pod-app", "debug/pod-app"],
        "cargo build --release -p mesh-tests",
    )
}

/// The first process of a cluster's node: environment variable `KUBE_NODE`, or this workspace's build.
pub(crate) fn kube_node() -> Result<PathBuf> {
    find(
        "KUBE_NODE",
        &["kube-node", "release/kube-node", "debug/kube-node"],
        "cargo build --release -p mesh-tests",
    )
}

fn find(variable: &str, candidates: &[&str], how: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("{variable} is {}, which is not a file", path.display());
        }
        return path
            .canonicalize()
            .with_context(|| format!("finding {}", path.display()));
    }
    // The running program is below the target folder: target/debug/deps/x or target/release/x.
    let running = env::current_exe().context("finding the running program")?;
    let here = env::current_dir()
        .context("finding the current folder")?
        .join("target");
    let folders = running
        .ancestors()
        .skip(1)
        .take(3)
        .map(PathBuf::from)
        .chain([here]);
    for folder in folders {
        for candidate in candidates {
            let path = folder.join(candidate);
            if path.is_file() {
                return Ok(path);
            }
        }
    }
    bail!(
        "no {} was found: build it (`{how}`) or set {variable}",
        candidates[0]
    )
}
