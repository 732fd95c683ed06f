//! What both peers need: rules that lead connections to them, and answers of their operators' ports.

use std::fs;

use anyhow::{Context, Result};
use mesh_tests::Place;

/// Loads nftables rules into a pod's namespace. They go with it.
///
/// # Errors
/// When `nft` refuses them.
pub(super) fn load(pod: &Place, rules: &str) -> Result<()> {
    let path = pod.folder().join("redirect.nft");
    fs::write(&path, rules).with_context(|| format!("writing {}", path.display()))?;
    pod.run("nft", ["-f", &path.display().to_string()])?.ok()?;
    Ok(())
}

/// What a server on a place's loopback answers.
///
/// # Errors
/// When it does not, within 5 s, or with a status that is no success.
pub(super) fn ask(place: &Place, port: u16, path: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}{path}");
    let arguments = ["-sS", "--fail", "--max-time", "5", &url];
    Ok(place.run("curl", arguments)?.ok()?.stdout)
}
