//! The folders of cgroups, and which of them the node itself has made.
//!
//! A user may own a cgroup, as systemd gives one to each login, and create cgroups with any names in it. Those belong
//! to that user. Cgroups of the kubelet and the runtimes belong to the user who owns the whole hierarchy: root.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Names and paths of the cgroups in `folder`. Empty if it has been removed.
pub(super) fn subfolders(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, entry.path())
        })
        .collect()
}

/// As [`subfolders`], without those that belong to another user than `folder`. From the root of a hierarchy on, these are the
/// node's own.
pub(super) fn nodes_subfolders(folder: &Path) -> Vec<(String, PathBuf)> {
    let Some(owner) = owner_of(folder) else {
        return Vec::new();
    };
    let mut found = subfolders(folder);
    found.retain(|(_, path)| owner_of(path) == Some(owner));
    found
}

/// The user that `folder` belongs to. `None` if it has been removed.
pub(super) fn owner_of(folder: &Path) -> Option<u32> {
    let metadata = fs::symlink_metadata(folder).ok()?;
    Some(metadata.uid())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    #[test]
    fn what_belongs_to_another_user_is_not_the_nodes() {
        if crate::lacks_root("what_belongs_to_another_user_is_not_the_nodes") {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        assert_eq!(nodes_subfolders(root.path()).len(), 2);
        chown(root.path().join("b"), Some(1000), None).unwrap();
        let found = nodes_subfolders(root.path());
        assert_eq!(found, [("a".to_owned(), root.path().join("a"))]);
        assert_eq!(subfolders(root.path()).len(), 2);
        assert!(nodes_subfolders(&root.path().join("removed")).is_empty());
    }
}
