//! The mounted hierarchies of cgroups, by which the path of a process's cgroup leads to a folder.

use std::{
    fs::{self, File},
    panic::resume_unwind,
    path::{Component, Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::{PodUid, cgroup_folders::owner_of};

/// The mounts of all hierarchies, as the thread sees them that has read them.
#[derive(Debug)]
pub(super) struct Hierarchies(Vec<Mount>);

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    folder: PathBuf,
    /// The cgroup that is mounted there.
    cgroup: PathBuf,
    /// The options of a hierarchy of version 1, which name its controllers. `None` for version 2.
    options: Option<String>,
}

impl Hierarchies {
    /// Reads the mounts.
    pub(super) fn mounted() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self(mounts.lines().filter_map(Mount::parse).collect())
    }

    /// Whether the cgroup of `pod` that a process with this /proc/PID/cgroup is in was made by the node: it and all above it
    /// belong to the user who owns the hierarchy.
    pub(super) fn is_the_nodes(&self, cgroups: &str, pod: PodUid) -> bool {
        cgroups.lines().any(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
                return false;
            };
            let mut mounts = self.0.iter().filter(|mount| mount.has(controllers));
            mounts.any(|mount| mount.is_the_nodes(path, pod))
        })
    }
}

impl Mount {
    /// Parses a line of /proc/PID/mountinfo (proc_pid_mountinfo(5)). `None` if it is no hierarchy of cgroups.
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (cgroup, folder) = (fields.next()?, fields.next()?);
        let mut fields = file_system.split(' ');
        let (kind, options) = (fields.next()?, fields.nth(1)?);
        let options = match kind {
            "cgroup2" => None,
            "cgroup" => Some(options.to_owned()),
            _ => return None,
        };
        Some(Self {
            folder: folder.into(),
            cgroup: cgroup.into(),
            options,
        })
    }

    /// Whether it is the hierarchy of these controllers, which are empty for version 2.
    fn has(&self, controllers: &str) -> bool {
        match &self.options {
            None => controllers.is_empty(),
            Some(options) => controllers
                .split(',')
                .all(|controller| options.split(',').any(|option| option == controller)),
        }
    }

    /// Whether the folders of the cgroup with this path, down to the pod's, belong to the user who owns the hierarchy.
    fn is_the_nodes(&self, path: &str, pod: PodUid) -> bool {
        let Ok(below) = Path::new(path).strip_prefix(&self.cgroup) else {
            return false;
        };
        let Some(owner) = owner_of(&self.folder) else {
            return false;
        };
        let mut folder = self.folder.clone();
        for name in below.components() {
            // Not below the mount, if it is `..`.
            let Component::Normal(name) = name else {
                return false;
            };
            folder.push(name);
            if owner_of(&folder) != Some(owner) {
                return false;
            }
            if PodUid::of_cgroup(&name.to_string_lossy()) == Some(pod) {
                return true;
            }
        }
        false
    }
}

/// Calls `action` on a thread that sees the paths of cgroups as the node's first process does. To a daemon in a container, a
/// path would begin where the container's own ends (cgroup_namespaces(7)), and name no folder.
pub(super) fn as_the_node_sees<T: Send>(action: impl FnOnce() -> T + Send) -> T {
    let enter = || {
        see_as_the_node();
        action()
    };
    let done = thread::scope(|scope| scope.spawn(enter).join());
    done.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Makes the current thread see the paths of cgroups as in [`as_the_node_sees`], for as long as it lives.
pub(super) fn see_as_the_node() {
    if let Ok(first) = File::open("/proc/1/ns/cgroup") {
        // Fails without CAP_SYS_ADMIN. A path that begins with `..` then belongs to no pod.
        let _ = setns(first, CloneFlags::CLONE_NEWCGROUP);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    const UID: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";

    fn pod() -> PodUid {
        UID.parse().unwrap()
    }

    /// Whether a process in the cgroup with this path is the pod's, where `cgroup` is mounted on `folder`.
    fn is_the_nodes(folder: &Path, cgroup: &str, path: &str) -> bool {
        let mount = Mount {
            folder: folder.to_owned(),
            cgroup: cgroup.into(),
            options: None,
        };
        Hierarchies(vec![mount]).is_the_nodes(&format!("0::{path}\n"), pod())
    }

    #[test]
    fn knows_the_mounts_of_both_versions() {
        let lines = [
            "24 30 0:22 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
            "25 30 0:23 /../.. /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct",
            "26 30 0:24 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd",
        ];
        let mounts: Vec<_> = lines.into_iter().filter_map(Mount::parse).collect();
        assert_eq!(mounts[0].folder, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(mounts[1].cgroup, Path::new("/../.."));
        for (index, controllers) in ["", "cpu,cpuacct", "name=systemd"].into_iter().enumerate() {
            for (other, mount) in mounts.iter().enumerate() {
                assert_eq!(mount.has(controllers), index == other, "{controllers:?}");
            }
        }
        assert!(!mounts[1].has("cpu,memory"));
        assert_eq!(Mount::parse("22 1 8:1 / / rw - ext4 /dev/sda1 rw"), None);
        assert_eq!(Mount::parse(""), None);
    }

    #[test]
    fn a_users_cgroup_is_no_pods_whatever_its_name() {
        if crate::lacks_root("a_users_cgroup_is_no_pods_whatever_its_name") {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let users = format!("user.slice/user@1000.service/kubepods/pod{UID}/x");
        let nodes = format!("system.slice/runtime.service/pod{UID}/x");
        for path in [&users, &nodes] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let check = |path: &str| is_the_nodes(root.path(), "/", &format!("/{path}"));
        assert!(check(&users) && check(&nodes));
        // A cgroup that root has created below a user's counts as little as one that the user has created.
        let delegated = root.path().join("user.slice/user@1000.service");
        chown(delegated, Some(1000), None).unwrap();
        assert!(!check(&users));
        assert!(check(&nodes));
        // A runtime gives a container's cgroup to the container's user.
        let container = root.path().join(&nodes);
        chown(container, Some(1000), None).unwrap();
        assert!(check(&nodes));
        let pods = root.path().join(nodes.strip_suffix("/x").unwrap());
        chown(pods, Some(1000), None).unwrap();
        assert!(!check(&nodes));
    }

    #[test]
    fn a_path_is_below_the_cgroup_that_is_mounted() {
        let root = tempfile::tempdir().unwrap();
        let path = format!("/kubepods/pod{UID}");
        fs::create_dir_all(root.path().join(&path[1..])).unwrap();
        for (cgroup, prefix) in [("/", ""), ("/docker/a", "/docker/a"), ("/../..", "/../..")] {
            assert!(is_the_nodes(
                root.path(),
                cgroup,
                &format!("{prefix}{path}/x")
            ));
        }
        for (cgroup, prefix) in [
            ("/docker/a", ""),
            ("/docker/a", "/docker/b"),
            ("/", "/../.."),
            ("/..", "/../.."),
            ("/", "/removed"),
        ] {
            let path = format!("{prefix}{path}/x");
            assert!(
                !is_the_nodes(root.path(), cgroup, &path),
                "{cgroup}: {path}"
            );
        }
        assert!(!is_the_nodes(root.path(), "/", "/kubepods/x"));
    }

    #[test]
    fn an_action_has_its_result_on_another_thread() {
        let here = thread::current().id();
        assert_ne!(as_the_node_sees(|| thread::current().id()), here);
    }
}
