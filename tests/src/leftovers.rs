//! Removes what a mesh created: when it is dropped, or later if its process has died.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cgroup::Hierarchy;
use crate::id::MeshId;
use crate::netns::Netns;
use crate::{cgroup, mounts};

/// Removes everything that meshes of dead processes left behind, and returns their IDs.
pub fn remove_dead() -> Result<Vec<MeshId>> {
    remove_where(MeshId::owner_is_dead)
}

/// Removes all meshes of this process, running or not; for a handler of SIGINT.
pub fn remove_own() -> Result<Vec<MeshId>> {
    remove_where(|id| id.pid() == std::process::id())
}

/// Returns what exists of a mesh: namespaces, cgroup, pins, temporary folder. Empty after the mesh was dropped.
pub fn traces(id: MeshId) -> Result<Vec<PathBuf>> {
    let folder = id.folder_name();
    let mut folders = vec![
        mounts::cgroup2()?.join(&folder),
        Path::new(mounts::BPFFS).join(&folder),
        id.temporary_folder(),
    ];
    let hierarchies = Hierarchy::all()?.into_iter();
    folders.extend(hierarchies.map(|one| one.mount.join(&folder)));
    let names = Netns::names()
        .into_iter()
        .filter(|name| MeshId::of_netns_name(name) == Some(id));
    Ok(names
        .map(|name| Netns::path_of(&name))
        .chain(folders.into_iter().filter(|path| path.exists()))
        .collect())
}

/// Removes everything that carries the ID. Continues after an error and returns the first one.
pub(crate) fn remove(id: MeshId) -> Result<()> {
    let folder = id.folder_name();
    let mut results = Vec::new();
    results.push(mounts::cgroup2().and_then(|mount| cgroup::remove(&mount.join(&folder))));
    // The processes in these cgroups were in the cgroup above as well, and have exited.
    for hierarchy in Hierarchy::all()? {
        results.push(hierarchy.remove(Path::new(&folder)));
    }
    for name in Netns::names() {
        if MeshId::of_netns_name(&name) == Some(id) {
            results.push(Netns::remove(&name));
        }
    }
    results.push(remove_folder(&Path::new(mounts::BPFFS).join(&folder)));
    results.push(remove_folder(&id.temporary_folder()));
    results.into_iter().collect::<Result<Vec<()>>>().map(drop)
}

/// The IDs of everything on this machine.
fn present() -> Result<BTreeSet<MeshId>> {
    let mut ids: BTreeSet<MeshId> = Netns::names()
        .iter()
        .filter_map(|name| MeshId::of_netns_name(name))
        .collect();
    let mut parents = vec![
        mounts::cgroup2()?,
        mounts::BPFFS.into(),
        std::env::temp_dir(),
    ];
    parents.extend(Hierarchy::all()?.into_iter().map(|one| one.mount));
    for parent in parents {
        let Ok(entries) = fs::read_dir(parent) else {
            continue;
        };
        ids.extend(
            entries
                .flatten()
                .filter_map(|entry| MeshId::of_folder_name(entry.file_name().to_str()?)),
        );
    }
    Ok(ids)
}

fn remove_where(chosen: impl Fn(MeshId) -> bool) -> Result<Vec<MeshId>> {
    // Only one process at a time may remove leftovers.
    let path = std::env::temp_dir().join("auth-mesh.lock");
    let lock = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
    lock.lock()
        .with_context(|| format!("locking {}", path.display()))?;
    let ids: Vec<MeshId> = present()?.into_iter().filter(|id| chosen(*id)).collect();
    for id in &ids {
        remove(*id).with_context(|| format!("removing the leftovers of mesh {id}"))?;
    }
    Ok(ids)
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
