//! What is pinned: a folder for each layout of the maps, with the maps, and the links of the programs.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use auth_common::{LAYOUT, Pod};
use aya::{
    maps::{HashMap, Map, MapData},
    programs::links::{FdLink, PinnedLink},
};

use super::KernelError;

/// The folders of a layout in which links are pinned.
const LINKS: [&str; 3] = ["links", "pods", "interfaces"];
/// Suffix of a new link's pin while the old link is still pinned. A link's pin has the name of its program.
const NEW: &str = "new";

/// The folders of all layouts below `pins`.
pub(crate) fn layouts(pins: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pins).into_iter().flatten().flatten();
    let is_layout = |name: &std::ffi::OsStr| {
        let version = name.to_str().and_then(|name| name.strip_prefix('v'));
        version.is_some_and(|version| version.parse::<u32>().is_ok())
    };
    entries
        .filter(|entry| is_layout(&entry.file_name()))
        .map(|entry| entry.path())
        .collect()
}

pub(super) fn other_layouts(pins: &Path) -> Vec<PathBuf> {
    let mut layouts = layouts(pins);
    layouts.retain(|layout| !layout.ends_with(LAYOUT));
    layouts
}

/// Removes the pins of a layout. The links come first: without them connections are not captured at all, so none is
/// captured halfway.
pub(crate) fn remove_layout(layout: &Path) -> io::Result<()> {
    for kind in LINKS.into_iter().chain(["maps"]) {
        match fs::remove_dir_all(layout.join(kind)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir(layout)
}

/// IDs of the programs that the links of a layout attach.
pub(crate) fn attached_programs(layout: &Path) -> BTreeSet<u32> {
    let pins = LINKS
        .iter()
        .flat_map(|kind| fs::read_dir(layout.join(kind)));
    let links = pins.flatten().flatten().filter_map(|pin| {
        let link = PinnedLink::from_pin(pin.path()).ok()?;
        FdLink::from(link).info().ok()
    });
    links.map(|link| link.program_id()).collect()
}

/// Pins `link` as `name` in `folder`. The link that was pinned there stays attached until it is replaced.
pub(crate) fn replace_pin(folder: &Path, name: &str, link: FdLink) -> Result<(), KernelError> {
    let (path, draft) = (folder.join(name), folder.join(format!("{name}-{NEW}")));
    let pin = |path: &Path, error| KernelError::Pin {
        path: path.to_owned(),
        error,
    };
    if draft.exists() {
        // Left behind by a daemon that died between the two steps below.
        fs::remove_file(&draft).map_err(|error| pin(&draft, error))?;
    }
    let _pinned: PinnedLink = link
        .pin(&draft)
        .map_err(|error| pin(&draft, io::Error::other(error)))?;
    // A rename on bpffs replaces an existing pin, which drops the old link.
    fs::rename(&draft, &path).map_err(|error| pin(&path, error))
}

/// Entries of the PODS map of a layout. Empty if none is pinned.
pub(crate) fn pinned_pods(layout: &Path) -> Vec<(u64, Pod)> {
    let path = layout.join("maps/PODS");
    let Ok(map) = MapData::from_pin(path) else {
        return Vec::new();
    };
    match HashMap::<_, u64, Pod>::try_from(Map::HashMap(map)) {
        Ok(pods) => pods.iter().flatten().collect(),
        Err(_) => Vec::new(),
    }
}
