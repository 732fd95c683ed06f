//! Removes everything that the daemon intentionally leaves in the kernel.

use std::fs;

use anyhow::Context;
use auth_common::LAYOUT;

use super::{PinLock, kernel::pinned_pods, netns, plumbing};

/// Removes the programs, maps, pins, rules, routes and sysctls of the daemon whose pins `lock` guards. Returns the
/// number of pods that were enrolled.
pub fn unload(lock: PinLock) -> anyhow::Result<usize> {
    let folder = lock.folder().to_owned();
    let pods = pinned_pods(&folder);
    let links = folder.join(LAYOUT);
    // Remove the links first. Without them connections are not captured at all, so none is captured halfway.
    for kind in ["links", "pods", "maps"] {
        let folder = links.join(kind);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
        }
    }
    let namespaces = netns::all();
    for (cookie, entry) in &pods {
        // A deleted netns took its routes with it.
        if let Some(netns) = namespaces.iter().find(|netns| netns.cookie() == *cookie) {
            plumbing::tear_down(netns, entry.switched_on)
                .with_context(|| format!("{}: cannot undo routes", netns.path().display()))?;
        }
    }
    fs::remove_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
    Ok(pods.len())
}
