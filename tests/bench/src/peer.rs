//! Helpers for both peers: nftables rules that redirect connections to them, and requests to their admin ports.

use std::fs;

use anyhow::{Context, Result};
use mesh_tests::Place;

/// Loads nftables rules into a pod's namespace, with which they are removed.
///
/// # Errors
/// If `nft` rejects them.
pub(super) fn load(pod: &Place, rules: &str) -> Result<()> {
    let path = pod.folder().join("redirect.nft");
    fs::write(&path, rules).with_context(|| format!("writing {}", path.display()))?;
    pod.run("nft", ["-f", &path.display().to_string()])?.ok()?;
    Ok(())
}

/// Requests a response from a server on a place's loopback address.
///
/// # Errors
/// If there is no response within 5 s, or its status is not a success.
pub(super) fn ask(place: &Place, port: u16, path: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}{path}");
    let arguments = ["-sS", "--fail", "--max-time", "5", &url];
    Ok(place.run("curl", arguments)?.ok()?.stdout)
}
