//! The pods' own cgroups, by which their processes are found without reading those of others.
//!
//! The kubelet creates a cgroup for each pod, below its cgroup for all pods and, for most, a cgroup for their quality of
//! service. It does so in all hierarchies that it uses: that of cgroup version 2, and those of version 1.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    PodUid,
    cgroup_folders::{nodes_subfolders, subfolders},
    node_cgroups::pod_roots,
};

/// Interval at which the kubelet's cgroups for all pods are searched for. It creates them once, when it starts.
const SEARCH: Duration = Duration::from_secs(10);
/// Maximum depth of a cgroup below the pod's own. That of a container is at 1, and what a container creates is below.
const MAX_DEPTH: usize = 4;
/// Maximum number of cgroups of one pod that are read, and of processes in each.
const MAX_CGROUPS: usize = 64;
const MAX_PROCESSES: usize = 64;

/// The hierarchies of cgroups, and where the kubelet has its pods in each.
#[derive(Debug)]
pub(super) struct PodCgroups {
    hierarchies: Vec<PathBuf>,
    roots: Mutex<Roots>,
}

#[derive(Debug, Default)]
struct Roots {
    searched: Option<Instant>,
    folders: Vec<PathBuf>,
}

impl PodCgroups {
    /// `cgroup` is the folder of version 2 that contains all pods. The hierarchies of version 1 are found in /proc/mounts.
    pub(super) fn new(cgroup: &Path) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let version_1 = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup").then(|| PathBuf::from(path))
        });
        Self {
            hierarchies: [cgroup.to_owned()].into_iter().chain(version_1).collect(),
            roots: Mutex::default(),
        }
    }

    /// Returns the cgroups of the pods that `is_wanted` selects, from each hierarchy. Leaves out those that the node has not
    /// made, but a user.
    pub(super) fn of(
        &self,
        is_wanted: impl Fn(PodUid) -> bool,
        around: &HashSet<PodUid>,
    ) -> HashMap<PodUid, Vec<PathBuf>> {
        let mut found: HashMap<PodUid, Vec<PathBuf>> = HashMap::new();
        let mut add = |(name, path): (String, PathBuf)| match PodUid::of_cgroup(&name) {
            Some(pod) if !around.contains(&pod) => {
                if is_wanted(pod) {
                    found.entry(pod).or_default().push(path);
                }
                None
            }
            _ => Some(path),
        };
        for root in self.roots() {
            let classes = nodes_subfolders(&root).into_iter();
            let classes: Vec<_> = classes.filter_map(&mut add).collect();
            for class in classes {
                nodes_subfolders(&class).into_iter().for_each(|folder| {
                    add(folder);
                });
            }
        }
        found
    }

    fn roots(&self) -> Vec<PathBuf> {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if roots.searched.is_none_or(|at| at.elapsed() >= SEARCH) {
            roots.searched = Some(Instant::now());
            let hierarchies = self.hierarchies.iter();
            let found = hierarchies.flat_map(|hierarchy| pod_roots(hierarchy));
            roots.folders = found.map(|(_, folder)| folder).collect();
        }
        roots.folders.clone()
    }
}

/// Returns the numbers of processes in a pod's cgroup and those below it. Of many processes in one cgroup, these are the ones
/// that entered it first (version 2), or those with the lowest numbers (version 1).
pub(super) fn members(cgroup: &Path) -> Vec<u32> {
    let mut members = Vec::new();
    let (mut folders, mut next) = (vec![cgroup.to_owned()], Vec::new());
    let mut read = 0;
    // Containers before what they have created.
    for _ in 0..=MAX_DEPTH {
        for folder in folders.drain(..) {
            if read == MAX_CGROUPS {
                return members;
            }
            read += 1;
            // Fails if the cgroup has just been removed, or is a threaded one, whose processes are in the one above.
            members.extend(first_lines(&folder.join("cgroup.procs")));
            next.extend(subfolders(&folder).into_iter().map(|(_, path)| path));
        }
        std::mem::swap(&mut folders, &mut next);
    }
    members
}

/// Reads the start of a file of numbers, one a line.
fn first_lines(path: &Path) -> Vec<u32> {
    let mut text = String::new();
    // A number has at most 10 digits. The last line may be incomplete.
    let limit = 11 * MAX_PROCESSES as u64;
    let read = File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text));
    if read.is_err() {
        return Vec::new();
    }
    let complete = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let numbers = complete.lines().filter_map(|line| line.parse().ok());
    numbers.take(MAX_PROCESSES).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    const UID: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";
    const OTHER: &str = "11111111-2222-4333-8444-555555555555";

    fn write(folder: &Path, processes: impl IntoIterator<Item = u32>) {
        fs::create_dir_all(folder).unwrap();
        let lines: String = processes
            .into_iter()
            .map(|pid| format!("{pid}\n"))
            .collect();
        fs::write(folder.join("cgroup.procs"), lines).unwrap();
    }

    /// A hierarchy with the cgroups of two pods and their processes.
    fn found(folder: &str) -> Vec<u32> {
        let root = tempfile::tempdir().unwrap();
        write(&root.path().join(folder), [1]);
        write(&root.path().join(folder).join("c1"), [2, 3]);
        // A pod may name its own cgroups as it likes.
        write(
            &root.path().join(folder).join(format!("c1/pod{OTHER}/x")),
            [4],
        );
        let cgroups = PodCgroups {
            hierarchies: vec![root.path().to_owned()],
            roots: Mutex::default(),
        };
        let pod: PodUid = UID.parse().unwrap();
        assert!(cgroups.of(|uid| uid != pod, &HashSet::new()).is_empty());
        assert!(cgroups.of(|_| true, &HashSet::from([pod])).is_empty());
        let found = cgroups.of(|_| true, &HashSet::new());
        found[&pod].iter().flat_map(|path| members(path)).collect()
    }

    #[test]
    fn finds_the_processes_of_either_driver_and_every_quality_of_service() {
        let slice = UID.replace('-', "_");
        for folder in [
            format!("kubepods/pod{UID}"),
            format!("kubelet/kubepods/burstable/pod{UID}"),
            format!("kubepods.slice/kubepods-pod{slice}.slice"),
            format!(
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"
            ),
            format!("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{slice}.slice"),
        ] {
            assert_eq!(found(&folder), [1, 2, 3, 4], "{folder}");
        }
    }

    #[test]
    fn a_users_cgroup_is_no_pods() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(format!("kubepods/burstable/pod{UID}"));
        write(&folder, [1]);
        let found = || {
            let cgroups = PodCgroups {
                hierarchies: vec![root.path().to_owned()],
                roots: Mutex::default(),
            };
            cgroups.of(|_| true, &HashSet::new()).len()
        };
        assert_eq!(found(), 1);
        // Needs root.
        chown(&folder, Some(1000), None).unwrap();
        assert_eq!(found(), 0);
        chown(&folder, Some(0), None).unwrap();
        assert_eq!(found(), 1);
        chown(root.path().join("kubepods/burstable"), Some(1000), None).unwrap();
        assert_eq!(found(), 0);
    }

    #[test]
    fn many_processes_and_cgroups_are_not_all_read() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), 1..100_000);
        assert_eq!(
            members(root.path()),
            (1..=MAX_PROCESSES as u32).collect::<Vec<_>>()
        );
        for number in 0..100 {
            write(&root.path().join(number.to_string()), [7]);
        }
        assert_eq!(members(root.path()).len(), MAX_PROCESSES + MAX_CGROUPS - 1);
    }
}
