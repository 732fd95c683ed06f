//! Lists the netns in which pods have processes, from the cgroups of all pods.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use auth_common::PodRoot;

use super::{
    Netns, PodUid,
    cgroup_folders::nodes_subfolders,
    containers::pods_around,
    netns::the_nodes,
    pod_cgroups::{Reach, members},
    processes::{Folder, leads_to_node, processor_time, prove},
};

/// The netns in which pods have processes, without the node's own.
#[derive(Debug, Default)]
pub struct Census {
    /// The netns.
    pub netns: Vec<PodNetns>,
    /// Whether there are cgroups of pods. Without them no pod is found, and none is closed.
    pub has_cgroups: bool,
    /// Whether the time limit passed before all pods were read. A netns that was not read stays as it is: closed, if it
    /// is new.
    pub is_partial: bool,
    /// CPU time that the census used.
    pub effort: Duration,
}

impl Census {
    /// Time after which no further pod is read.
    pub const LIMIT: Duration = Duration::from_secs(5);
}

/// A netns in which pods have processes.
#[derive(Debug, PartialEq, Eq)]
pub struct PodNetns {
    /// The netns' cookie.
    pub cookie: u64,
    /// The pods with processes in it, and whether it is their own netns. A pod has one netns of its own, and may have created
    /// others, or entered them.
    pub pods: BTreeMap<PodUid, bool>,
}

/// Takes a census of the pods below `roots`, in not much more than `limit`. Reads a limited number of processes of each pod, and
/// begins with the pods that have the fewest, so no pod delays one with less.
pub(super) fn take(roots: &[(PodRoot, PathBuf)], limit: Duration) -> Census {
    let before = processor_time();
    let started = Instant::now();
    let first = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
    let around = pods_around(&first);
    let folders = roots.iter().map(|(_, root)| root.clone()).collect();
    let pods = processes_below(folders, &around);
    let mut reading = Reading::new(around);
    let mut is_partial = false;
    for (pod, pids) in pods {
        // Not within a pod: all of its processes are needed to tell its own netns from others.
        is_partial = started.elapsed() > limit;
        if is_partial {
            break;
        }
        reading.read(pod, &pids);
    }
    Census {
        netns: reading.netns(),
        has_cgroups: !roots.is_empty(),
        is_partial,
        effort: processor_time().saturating_sub(before),
    }
}

/// Returns the pods below these folders and the numbers of their processes, the fewest first.
fn processes_below(folders: Vec<PathBuf>, around: &HashSet<PodUid>) -> Vec<(PodUid, Vec<u32>)> {
    let mut found: HashMap<PodUid, Vec<u32>> = HashMap::new();
    for (pod, cgroup) in pods_below(folders, around) {
        found
            .entry(pod)
            .or_default()
            .extend(members(&cgroup, Reach::NESTED));
    }
    let mut found: Vec<_> = found.into_iter().collect();
    found.sort_by_key(|(_, pids)| pids.len());
    found
}

/// Returns the pods below these folders, and their cgroups.
fn pods_below(mut folders: Vec<PathBuf>, around: &HashSet<PodUid>) -> Vec<(PodUid, PathBuf)> {
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for (name, path) in nodes_subfolders(&folder) {
            match PodUid::of_cgroup(&name).filter(|pod| !around.contains(pod)) {
                Some(pod) => found.push((pod, path)),
                None => folders.push(path),
            }
        }
    }
    found
}

/// A census under way.
struct Reading {
    /// The pods that the node itself runs in.
    around: HashSet<PodUid>,
    /// Inode numbers of the node's netns.
    nodes: Vec<u64>,
    /// Kept open until the end, because a netns keeps its inode number only while it is held.
    files: HashMap<u64, File>,
    /// The pods in each netns, by its inode number. See [`PodNetns::pods`].
    found: HashMap<u64, BTreeMap<PodUid, bool>>,
    buffer: Vec<u8>,
}

impl Reading {
    fn new(around: HashSet<PodUid>) -> Self {
        Self {
            around,
            nodes: the_nodes(),
            files: HashMap::new(),
            found: HashMap::new(),
            buffer: Vec::new(),
        }
    }

    /// Reads in which netns these processes of a pod are.
    fn read(&mut self, pod: PodUid, pids: &[u32]) {
        let mut processes = Vec::new();
        for pid in pids {
            let Some(folder) = Folder::open(Path::new(&format!("/proc/{pid}"))) else {
                continue;
            };
            // Of a process whose netns cannot be read nothing is known, so its netns stays closed.
            if let Ok(Some((file, process))) =
                folder.look(*pid, pod, &self.around, &mut self.buffer)
                && !self.nodes.contains(&process.netns)
            {
                self.files.entry(process.netns).or_insert(file);
                processes.push(process);
            }
        }
        let proof = prove(&processes, |netns| leads_to_node(&self.files, netns));
        // Without it, which of them the pod has created is unknown, so none is opened.
        let Some((own, _)) = proof else { return };
        let own = own.netns;
        for process in &processes {
            let pods = self.found.entry(process.netns).or_default();
            pods.insert(pod, own == process.netns);
        }
    }

    /// The netns that were found.
    fn netns(mut self) -> Vec<PodNetns> {
        let found = self.found.into_iter().filter_map(|(inode, pods)| {
            let cookie = Netns::nameless(self.files.remove(&inode)?).ok()?.cookie();
            Some(PodNetns { cookie, pods })
        });
        let mut found: Vec<_> = found.collect();
        found.sort_by_key(|netns| netns.cookie);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEW: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";
    const MANY: &str = "11111111-2222-4333-8444-555555555555";

    fn uid(text: &str) -> PodUid {
        text.parse().unwrap()
    }

    /// Adds a cgroup with these processes.
    fn add(folder: &Path, pids: impl Iterator<Item = u32>) {
        fs::create_dir_all(folder).unwrap();
        let lines: String = pids.map(|pid| format!("{pid}\n")).collect();
        fs::write(folder.join("cgroup.procs"), lines).unwrap();
    }

    #[test]
    fn a_pod_with_very_many_processes_comes_last_and_is_not_read_entirely() {
        let root = tempfile::tempdir().unwrap();
        let many = root.path().join(format!("burstable/pod{MANY}"));
        for container in 0..100 {
            add(&many.join(container.to_string()), 1..10_000);
        }
        add(&root.path().join(format!("pod{FEW}/c1")), 7..9);
        let found = processes_below(vec![root.path().to_owned()], &HashSet::new());
        assert_eq!(found[0], (uid(FEW), vec![7, 8]));
        assert_eq!(found[1].0, uid(MANY));
        assert_eq!(found[1].1.len(), Reach::NESTED.processes);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn the_processes_of_a_cluster_within_a_pod_are_read() {
        let root = tempfile::tempdir().unwrap();
        let container = root.path().join(format!("pod{FEW}/c1"));
        add(&container, 1..100);
        add(
            &container.join("docker/id/kubelet.slice/1.slice/2.slice/3.slice/x.scope"),
            200..201,
        );
        let found = processes_below(vec![root.path().to_owned()], &HashSet::new());
        let expected: Vec<u32> = (1..100).chain([200]).collect();
        assert_eq!(found, [(uid(FEW), expected)]);
    }

    #[test]
    fn a_pod_around_the_node_has_no_processes_of_its_own_here() {
        let root = tempfile::tempdir().unwrap();
        let outer = root.path().join(format!("pod{MANY}"));
        add(&outer, 1..3);
        add(&outer.join(format!("c/kubepods/pod{FEW}")), 3..5);
        let around = HashSet::from([uid(MANY)]);
        let found = processes_below(vec![root.path().to_owned()], &around);
        assert_eq!(found, [(uid(FEW), vec![3, 4])]);
    }

    #[test]
    fn a_census_that_is_out_of_time_says_so() {
        let root = tempfile::tempdir().unwrap();
        let roots = [(PodRoot::default(), root.path().to_owned())];
        let empty = take(&roots, Duration::ZERO);
        assert!(!empty.is_partial, "there is nothing to read");
        add(&root.path().join(format!("pod{FEW}")), 1..2);
        let census = take(&roots, Duration::ZERO);
        assert!(census.is_partial && census.has_cgroups);
        assert!(!take(&roots, Census::LIMIT).is_partial);
    }
}
