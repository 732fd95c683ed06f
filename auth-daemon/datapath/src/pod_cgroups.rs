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
/// How much of a pod is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    /// Maximum depth of a cgroup below the pod's own. That of a container is at 1, and what a container creates is below.
    depth: usize,
    /// Maximum number of cgroups.
    cgroups: usize,
    /// Maximum number of processes in one cgroup, and in all.
    of_cgroup: usize,
    pub(super) processes: usize,
}

impl Reach {
    /// Enough to find the pod's netns, in which its first processes are.
    pub(super) const TO_FIND: Self = Self {
        depth: 4,
        cgroups: 64,
        of_cgroup: 64,
        processes: 64 * 64,
    };
    /// Enough to find the netns of a cluster or of builds within the pod, whose cgroups are deep, and some of whose containers
    /// may share one.
    pub(super) const NESTED: Self = Self {
        depth: 16,
        cgroups: 1024,
        of_cgroup: 4096,
        processes: 8192,
    };
}

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

    /// Returns the cgroups of the pods that `is_wanted` selects, from each hierarchy. Leaves out those that were
    /// created by a user instead of the node.
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

/// Returns the numbers of processes in a pod's cgroup and those below it, as far as `reach` goes. Of many processes in one cgroup,
/// these are the ones that entered it first (version 2), or those with the lowest numbers (version 1).
pub(super) fn members(cgroup: &Path, reach: Reach) -> Vec<u32> {
    let mut members = Vec::new();
    let (mut folders, mut next) = (vec![cgroup.to_owned()], Vec::new());
    let mut read = 0;
    // Containers before what they have created.
    for _ in 0..=reach.depth {
        for folder in folders.drain(..) {
            let left = reach.processes - members.len();
            if read == reach.cgroups || left == 0 {
                return members;
            }
            read += 1;
            // Fails if the cgroup has just been removed, or is a threaded one, whose processes are in the one above.
            let most = reach.of_cgroup.min(left);
            members.extend(first_lines(&folder.join("cgroup.procs"), most));
            next.extend(subfolders(&folder).into_iter().map(|(_, path)| path));
        }
        std::mem::swap(&mut folders, &mut next);
    }
    members
}

/// Reads the start of a file of numbers, one a line, at most so many.
fn first_lines(path: &Path, most: usize) -> Vec<u32> {
    let mut text = String::new();
    // A number has at most 10 digits. The last line may be incomplete.
    let limit = 11 * most as u64;
    let read = File::open(path).and_then(|file| file.take(limit).read_to_string(&mut text));
    if read.is_err() {
        return Vec::new();
    }
    let complete = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let numbers = complete.lines().filter_map(|line| line.parse().ok());
    numbers.take(most).collect()
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
        found[&pod]
            .iter()
            .flat_map(|path| members(path, Reach::TO_FIND))
            .collect()
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
        if crate::lacks_root("a_users_cgroup_is_no_pods") {
            return;
        }
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
        chown(&folder, Some(1000), None).unwrap();
        assert_eq!(found(), 0);
        chown(&folder, Some(0), None).unwrap();
        assert_eq!(found(), 1);
        chown(root.path().join("kubepods/burstable"), Some(1000), None).unwrap();
        assert_eq!(found(), 0);
    }

    #[test]
    fn many_processes_and_cgroups_are_not_all_read() {
        let Reach {
            cgroups, of_cgroup, ..
        } = Reach::TO_FIND;
        let root = tempfile::tempdir().unwrap();
        write(root.path(), 1..100_000);
        assert_eq!(
            members(root.path(), Reach::TO_FIND),
            (1..=of_cgroup as u32).collect::<Vec<_>>()
        );
        for number in 0..100 {
            write(&root.path().join(number.to_string()), [7]);
        }
        let found = members(root.path(), Reach::TO_FIND);
        assert_eq!(found.len(), of_cgroup + cgroups - 1);
    }
}
