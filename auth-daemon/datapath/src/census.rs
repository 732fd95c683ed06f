//! Lists the netns in which pods have processes, from the cgroups of all pods.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use auth_common::PodRoot;

use super::{
    Netns, PodUid,
    containers::pods_around,
    netns::the_nodes,
    processes::{Folder, Process, leads_to_node, processor_time, prove},
};

/// The netns in which pods have processes, without the node's own.
#[derive(Debug, Default)]
pub struct Census {
    /// The netns.
    pub netns: Vec<PodNetns>,
    /// Whether there are cgroups of pods. Without them no pod is found, and none is closed.
    pub has_cgroups: bool,
    /// CPU time that the census used.
    pub effort: Duration,
}

impl Census {
    /// Maximum duration.
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

/// Takes a census of the pods below `roots`.
pub(super) fn take(roots: &[(PodRoot, PathBuf)]) -> io::Result<Census> {
    let before = processor_time();
    let first = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
    let around = pods_around(&first);
    let nodes = the_nodes();
    let started = Instant::now();
    let mut buffer = Vec::new();
    let mut processes: HashMap<PodUid, Vec<Process>> = HashMap::new();
    // Kept open until the end, because a netns keeps its inode number only while it is held.
    let mut files: HashMap<u64, File> = HashMap::new();
    for (_, root) in roots {
        let mut folders = vec![(root.clone(), None)];
        while let Some((folder, pod)) = folders.pop() {
            if started.elapsed() > Census::LIMIT {
                let why = format!("not through with all pods after {:?}", Census::LIMIT);
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            for (name, path) in subfolders(&folder) {
                let inner = PodUid::of_cgroup(&name).filter(|pod| !around.contains(pod));
                folders.push((path, pod.or(inner)));
            }
            let Some(pod) = pod else {
                continue;
            };
            // Cannot be read if it has just been removed, or is a threaded cgroup, whose processes are in the one above.
            let members = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            for pid in members.lines().filter_map(|pid| pid.parse().ok()) {
                let Some(process) = Folder::open(Path::new(&format!("/proc/{pid}"))) else {
                    continue;
                };
                // Of a process whose netns cannot be read nothing is known, so its netns stays closed.
                if let Ok(Some((file, process))) = process.look(pid, pod, &around, &mut buffer)
                    && !nodes.contains(&process.netns)
                {
                    files.entry(process.netns).or_insert(file);
                    processes.entry(pod).or_default().push(process);
                }
            }
        }
    }
    let mut found: HashMap<u64, BTreeMap<PodUid, bool>> = HashMap::new();
    for (pod, processes) in &processes {
        let proof = prove(processes, |netns| leads_to_node(&files, netns));
        let own = proof.map(|(process, _)| process.netns);
        for process in processes {
            let pods = found.entry(process.netns).or_default();
            pods.insert(*pod, own == Some(process.netns));
        }
    }
    let netns = found.into_iter().filter_map(|(inode, pods)| {
        let cookie = Netns::nameless(files.remove(&inode)?).ok()?.cookie();
        Some(PodNetns { cookie, pods })
    });
    let mut netns: Vec<_> = netns.collect();
    netns.sort_by_key(|netns| netns.cookie);
    Ok(Census {
        netns,
        has_cgroups: !roots.is_empty(),
        effort: processor_time().saturating_sub(before),
    })
}

/// Names and paths of the cgroups in `folder`. Empty if it has been removed.
fn subfolders(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders
        .map(|entry| {
            (
                entry.file_name().to_string_lossy().into_owned(),
                entry.path(),
            )
        })
        .collect()
}
