//! Taking away what a mesh made: at its end, or for one whose process can no longer do it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cgroup::Hierarchy;
use crate::id::MeshId;
use crate::netns::Netns;
use crate::{cgroup, mounts};

/// Removes all that meshes of dead processes left, and says which they were.
pub fn remove_dead() -> Result<Vec<MeshId>> {
    remove_where(MeshId::owner_is_dead)
}

/// Removes all meshes of this process, running or not; for a handler of SIGINT.
pub fn remove_own() -> Result<Vec<MeshId>> {
    remove_where(|id| id.pid() == std::process::id())
}

/// What of a mesh there is: namespaces, cgroup, pins, temporary folder. Nothing after it was dropped.
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

/// Removes everything that carries the id. It goes on after an error and gives the first.
pub(crate) fn remove(id: MeshId) -> Result<()> {
    let folder = id.folder_name();
    let mut results = Vec::new();
    results.push(mounts::cgroup2().and_then(|mount| cgroup::remove(&mount.join(&folder))));
    // What ran in these was in that one, too.
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

/// The ids that anything on this machine carries.
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
    // Two that remove the same leftovers would stumble over each other.
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
