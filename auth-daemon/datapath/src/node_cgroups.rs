//! The cgroups that contain all pods of the node. By them, the kernel distinguishes the node's own processes from its pods.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use auth_common::{MAX_POD_ROOTS, PodRoot};

use super::cgroup_folders::nodes_subfolders;

/// Maximum depth at which the cgroups are searched for, below the one that the daemon is attached to. The kubelet creates
/// them in the root, or in its `--cgroup-root`.
const MAX_DEPTH: usize = 4;

/// Finds the cgroups (version 2) that contain pods, and their folders: those that the kubelet names `kubepods`
/// (cgroupfs driver) or `kubepods.slice` (systemd driver, with the names of parent slices before it). At most
/// [`MAX_POD_ROOTS`]. Leaves out cgroups that users have created.
///
/// `cgroup` is a folder of the cgroup file system, whose root is the root of all cgroups.
pub(super) fn pod_roots(cgroup: &Path) -> Vec<(PodRoot, PathBuf)> {
    let mut found = Vec::new();
    search(cgroup, level(cgroup), MAX_DEPTH, &mut found);
    found.sort_by_key(|(root, _)| (root.level, root.cgroup));
    found.truncate(MAX_POD_ROOTS);
    found
}

fn search(folder: &Path, level: u32, depth: usize, found: &mut Vec<(PodRoot, PathBuf)>) {
    for (name, path) in nodes_subfolders(folder) {
        if !is_pod_root(&name) {
            if depth > 1 {
                search(&path, level + 1, depth - 1, found);
            }
            continue;
        }
        // A cgroup's id is the number of its inode (kernfs, on 64-bit systems).
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            let root = PodRoot {
                cgroup: metadata.ino(),
                level: level + 1,
                padding: 0,
            };
            found.push((root, path));
        }
    }
}

fn is_pod_root(name: &str) -> bool {
    name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice")
}

/// The depth of `cgroup`. Only the root has no `cgroup.events`.
fn level(cgroup: &Path) -> u32 {
    let parents = cgroup.ancestors();
    let below_root = parents.take_while(|folder| folder.join("cgroup.events").exists());
    below_root.count() as u32
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    #[test]
    fn finds_the_pods_of_either_driver_and_no_cgroup_inside_them() {
        let root = tempfile::tempdir().unwrap();
        let folders = [
            "kubelet/kubepods/burstable/pod1/kubepods",
            "kubelet.slice/kubelet-kubepods.slice/x",
            "system.slice/kubepods.service",
            "a/b/c/d/kubepods",
        ];
        for folder in folders {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let inode = |path: &str| fs::metadata(root.path().join(path)).unwrap().ino();
        let expected = [
            ("kubelet/kubepods", 2),
            ("kubelet.slice/kubelet-kubepods.slice", 2),
        ];
        let mut expected = expected.map(|(path, level)| {
            let cgroup = PodRoot {
                cgroup: inode(path),
                level,
                padding: 0,
            };
            (cgroup, root.path().join(path))
        });
        expected.sort_by_key(|(root, _)| root.cgroup);
        assert_eq!(pod_roots(root.path()), expected);
    }

    #[test]
    fn what_a_user_calls_kubepods_contains_no_pods() {
        if crate::lacks_root("what_a_user_calls_kubepods_contains_no_pods") {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let user = root.path().join("user.slice/user@1000.service");
        let nodes = root.path().join("kubepods");
        for folder in [&user.join("kubepods"), &nodes] {
            fs::create_dir_all(folder).unwrap();
        }
        let found = || {
            let found = pod_roots(root.path()).into_iter();
            found.map(|(_, folder)| folder).collect::<Vec<_>>()
        };
        assert_eq!(found().len(), 2);
        chown(&user, Some(1000), None).unwrap();
        assert_eq!(found(), std::slice::from_ref(&nodes));
        chown(&nodes, Some(1000), None).unwrap();
        assert!(found().is_empty());
    }
}
