//! Programs of others that our daemon meets or is compared with: Envoy, SPIRE, ztunnel, and HTTP/2 clients in Python.

mod envoy;
mod package;
mod spire;
pub mod ztunnel;

use std::fs;

use anyhow::{Context, Result};

use crate::place::Place;

pub use envoy::Envoy;
pub use package::Package;
pub use spire::{Spire, SpireOptions};
pub use ztunnel::Ztunnel;

/// Loads nftables rules into a pod's namespace, with which they are removed.
///
/// # Errors
/// If `nft` rejects them.
pub fn load_rules(pod: &Place, rules: &str) -> Result<()> {
    let path = pod.folder().join("redirect.nft");
    fs::write(&path, rules).with_context(|| format!("writing {}", path.display()))?;
    pod.run("nft", ["-f", &path.display().to_string()])?.ok()?;
    Ok(())
}

/// Requests a response from a server on a place's loopback address.
///
/// # Errors
/// If there is no response within 30 s, or its status is not a success.
fn ask(place: &Place, port: u16, path: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}{path}");
    let arguments = ["-sS", "--fail", "--max-time", "30", &url];
    Ok(place.run("curl", arguments)?.ok()?.stdout)
}
