//! Removes everything that the daemon intentionally leaves in the kernel.

use std::{collections::HashMap, fs};

use anyhow::Context;

use super::{
    PinLock,
    kernel::{layouts, pinned_pods, remove_layout},
    netns, plumbing,
};

/// Removes the programs, maps, pins, rules, routes and sysctls of the daemon whose pins `lock` guards. Returns the
/// number of pods that were enrolled.
pub fn unload(lock: PinLock) -> anyhow::Result<usize> {
    let folder = lock.folder().to_owned();
    let layouts = layouts(&folder);
    let pods: HashMap<_, _> = layouts
        .iter()
        .flat_map(|layout| pinned_pods(layout))
        .collect();
    for layout in layouts {
        remove_layout(&layout).with_context(|| format!("{}", layout.display()))?;
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
