//! The Helm chart in `deploy/chart`, and `deploy/auth-daemon.yaml`, which is rendered from it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use aws_lc_rs::digest;

use crate::eventually::TIMEOUT;
use crate::kubernetes::{first_missing, program};
use crate::process::Process;

/// The namespace of everything in the chart.
pub const SYSTEM_NAMESPACE: &str = "auth-system";

/// The chart's folder.
pub fn folder() -> PathBuf {
    deploy().join("chart")
}

/// The file that is rendered from the chart with its default values.
pub fn rendered_file() -> PathBuf {
    deploy().join("auth-daemon.yaml")
}

/// The capabilities that the rendered file grants to the daemon, such as `CAP_NET_ADMIN`.
pub fn capabilities() -> Result<Vec<String>> {
    let rendered = fs::read_to_string(rendered_file())?;
    let added = rendered.lines().map(str::trim);
    let added = added.skip_while(|line| *line != "add:").skip(1);
    let names = added
        .filter(|line| !line.starts_with('#'))
        .map_while(|line| line.strip_prefix("- "));
    Ok(names.map(|name| format!("CAP_{name}")).collect())
}

/// The environment variable with the folder that holds them, instead of the workspace's `deploy`.
pub const FOLDER: &str = "DEPLOY_FOLDER";

fn deploy() -> PathBuf {
    env::var_os(FOLDER).map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy"),
        PathBuf::from,
    )
}

/// Why helm cannot run here.
pub fn helm_missing() -> Option<String> {
    first_missing(&["helm"], &[])
}

/// What helm prints, without a cluster. Fails if helm does, or if it warns.
pub fn helm<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<String> {
    let mut command = Command::new(program("helm"));
    command.args(arguments);
    let finished = Process::spawn(command)?.finish(TIMEOUT)?.ok()?;
    anyhow::ensure!(
        finished.stderr.is_empty(),
        "helm warns: {}",
        finished.stderr
    );
    Ok(finished.stdout)
}

/// The content that [`rendered_file`] should have.
pub fn render() -> Result<String> {
    let chart = folder();
    let objects = helm([
        OsStr::new("template"),
        OsStr::new("auth-daemon"),
        chart.as_os_str(),
        OsStr::new("--namespace"),
        OsStr::new(SYSTEM_NAMESPACE),
        OsStr::new("--set"),
        OsStr::new("namespace.create=true"),
        OsStr::new("--no-hooks"),
    ])?;
    Ok(format!("{HEADER}{}\n{objects}", digest()?))
}

/// The line in [`rendered_file`] with the digest of the chart that it was rendered from.
pub fn rendered_digest(rendered: &str) -> Option<&str> {
    rendered.strip_prefix(HEADER)?.lines().next()
}

/// A digest of all files of the chart.
pub fn digest() -> Result<String> {
    let chart = folder();
    let mut files = Vec::new();
    collect(&chart, &mut files)?;
    files.sort();
    let mut context = digest::Context::new(&digest::SHA256);
    for path in files {
        let name = path.strip_prefix(&chart).unwrap_or(&path);
        let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        // Lengths, so that no two sets of files give the same bytes.
        for part in [name.as_os_str().as_encoded_bytes(), &content] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
    }
    let bytes = context.finish();
    Ok(bytes
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

const HEADER: &str = "\
# Rendered from deploy/chart by `cargo xtask chart`, for `kubectl apply -f` on clusters without Helm. Do not edit.
# docs/KUBERNETES.md says how to install and remove it.
# Digest of the chart: ";
