//! The container images of a cluster's pods.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::node::PAUSE;
use super::oci::Image;
use crate::process::Process;

/// The reference of the daemon's image, as in deploy/.
pub const AUTH_DAEMON_IMAGE: &str =
    concat!("docker.io/library/auth-daemon:", env!("CARGO_PKG_VERSION"));
/// An image with busybox and curl that every node of a [`crate::Cluster`] has. Its command sleeps.
pub const TOOLS: &str = "docker.io/library/tools:1";

/// Writes the daemon's image as an OCI archive that contains the program without its debug information and the shared
/// libraries it needs. Returns the digest of the image's manifest.
pub fn auth_daemon_image(program: &Path, reference: &str, output: &Path) -> Result<String> {
    let stripped = output.with_extension("stripped");
    let mut command = Command::new("strip");
    command
        .arg("--strip-debug")
        .arg("-o")
        .arg(&stripped)
        .arg(program);
    Process::spawn(command)?.finish(super::START)?.ok()?;
    let mut image = Image::new(json!({
        "Entrypoint": ["/usr/bin/auth-daemon"],
        "Env": ["PATH=/usr/bin"],
        // The daemon's pod runs as root by its security context; the CA does not.
        "User": "65532:65532",
        "Labels": {
            "org.opencontainers.image.title": "auth-daemon",
            "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.image.licenses": "Apache-2.0",
        },
    }));
    let written = image
        .files
        .program("/usr/bin/auth-daemon", &stripped)
        .and_then(|()| image.write(reference, output));
    let _ = fs::remove_file(&stripped);
    written
}

/// Writes the image [`TOOLS`] and returns its path.
pub(super) fn tools(folder: &Path) -> Result<PathBuf> {
    let mut image = Image::new(json!({
        "Cmd": ["/bin/sleep", "2147483647"],
        "Env": ["PATH=/usr/bin:/bin"],
    }));
    image.files.folder("/tmp", Some(0o1777))?;
    let busybox = find("busybox")?;
    image.files.program("/bin/busybox", &busybox)?;
    let mut command = Command::new(&busybox);
    command.arg("--list");
    let applets = Process::spawn(command)?.finish(super::START)?.ok()?.stdout;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        image
            .files
            .link(Path::new("/bin").join(applet), "busybox")?;
    }
    image.files.program("/usr/bin/curl", &find("curl")?)?;
    let archive = folder.join("tools.tar");
    image.write(TOOLS, &archive)?;
    Ok(archive)
}

/// Writes the image [`PAUSE`] and returns its path.
pub(super) fn pause(folder: &Path) -> Result<PathBuf> {
    let mut image = Image::new(json!({"Cmd": ["/bin/sleep", "2147483647"]}));
    image.files.program("/bin/busybox", &find("busybox")?)?;
    image.files.link("/bin/sleep", "busybox")?;
    let archive = folder.join("pause.tar");
    image.write(PAUSE, &archive)?;
    Ok(archive)
}

fn find(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not in PATH"))
}
