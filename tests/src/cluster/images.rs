//! The container images of a cluster's pods.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use super::node::PAUSE;
use super::oci::Image;
use crate::architecture::Architecture;
use crate::process::Process;

/// The reference of the daemon's image, as in deploy/.
pub const AUTH_DAEMON_IMAGE: &str =
    concat!("docker.io/library/auth-daemon:", env!("CARGO_PKG_VERSION"));
/// An image with busybox and curl that every node of a [`crate::Cluster`] has. Its command sleeps.
pub const TOOLS: &str = "docker.io/library/tools:1";

/// The content of the daemon's image.
#[derive(Debug, Clone)]
pub struct AuthDaemonImage<'a> {
    /// The daemon's program.
    pub program: &'a Path,
    /// The program's architecture.
    pub architecture: Architecture,
    /// What the program is made of, in the CycloneDX format. Goes where scanners of images look for it.
    pub sbom: Option<String>,
}

impl AuthDaemonImage<'_> {
    /// Writes it to `output` as an OCI archive that contains the program and the shared libraries it needs. Returns the
    /// digest of the image's manifest. The same content gives the same digest.
    ///
    /// # Errors
    /// If a library is missing, or a file cannot be read or written.
    pub fn write(&self, reference: &str, output: &Path) -> Result<String> {
        let config = json!({
            "Entrypoint": ["/usr/bin/auth-daemon"],
            "Env": ["PATH=/usr/bin"],
            // The daemon's pod runs as root by its security context; the CA does not.
            "User": "65532:65532",
            "Labels": {
                "org.opencontainers.image.title": "auth-daemon",
                "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                "org.opencontainers.image.licenses": "Apache-2.0",
            },
        });
        let mut image = Image::new(self.architecture, config);
        let files = &mut image.files;
        files.program_for(self.architecture, "/usr/bin/auth-daemon", self.program)?;
        if let Some(sbom) = &self.sbom {
            files.bytes(SBOM, sbom.clone().into_bytes())?;
        }
        image.write(reference, output)
    }
}

/// Scanners know such files by the end of their name.
const SBOM: &str = "/usr/share/sbom/auth-daemon.cdx.json";

/// Writes the image of a build of this machine to `output`, without the program's debug information.
///
/// # Errors
/// If `strip` fails, or as [`AuthDaemonImage::write`].
pub fn auth_daemon_image(program: &Path, output: &Path) -> Result<()> {
    let stripped = output.with_extension("stripped");
    let mut command = Command::new("strip");
    command
        .arg("--strip-debug")
        .arg("-o")
        .arg(&stripped)
        .arg(program);
    Process::spawn(command)?.finish(super::START)?.ok()?;
    let image = AuthDaemonImage {
        program: &stripped,
        architecture: Architecture::native()?,
        sbom: None,
    };
    let written = image.write(AUTH_DAEMON_IMAGE, output);
    let _ = fs::remove_file(&stripped);
    written.map(drop)
}

/// Writes the image [`TOOLS`] and returns its path.
pub(super) fn tools(folder: &Path) -> Result<PathBuf> {
    let config = json!({
        "Cmd": ["/bin/sleep", "2147483647"],
        "Env": ["PATH=/usr/bin:/bin"],
    });
    let mut image = Image::new(Architecture::native()?, config);
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
    let config = json!({"Cmd": ["/bin/sleep", "2147483647"]});
    let mut image = Image::new(Architecture::native()?, config);
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
