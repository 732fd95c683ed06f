//! Finds pods' network namespaces by their processes.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    time::{ClockId, clock_gettime},
};

use super::{
    Netns, PodUid,
    containers::{container, pods_around},
    hierarchies::{Hierarchies, as_the_node_sees},
    interfaces::Interfaces,
    netns::{open_the_nodes, the_nodes},
    pod_cgroups::{PodCgroups, Reach, members},
};

/// Where a pod's processes are.
#[derive(Clone, Debug)]
pub enum NetnsLocation {
    /// In this netns.
    In(Arc<Netns>),
    /// In this netns, together with processes of the given other pod. Neither pod can be identified by it.
    Shared(Arc<Netns>, PodUid),
    /// All in the node's netns: they have yet to enter the pod's, or are helpers of the runtime.
    Node,
    /// Unknown, because the netns of a process could not be read.
    Hidden {
        /// ID of that process.
        pid: u32,
        /// Why the read failed.
        error: Arc<io::Error>,
    },
}

/// Result of one scan.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Requested pods that have processes.
    pub pods: HashMap<PodUid, NetnsLocation>,
    /// Why the netns that was found is a pod's own.
    pub proofs: HashMap<PodUid, Proof>,
    /// Processes in or of each held netns that has any, by its inode number.
    pub residents: HashMap<u64, Residents>,
    /// Whether the netns of any pod's process could not be read while residents were counted: it may be a held one.
    pub is_partial: bool,
    /// Number of processes that were examined.
    pub processes: usize,
    /// Number of those that belong to any pod, requested or not.
    pub of_pods: usize,
    /// CPU time that the scan used.
    pub effort: Duration,
}

/// Why a netns is a pod's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    /// ID of the pod's oldest process in it.
    pub pid: u32,
    /// Name of the cgroup of that process's container.
    pub container: String,
    /// What distinguishes it from other netns that the pod's processes are in.
    pub why: Why,
}

/// See [`Proof`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// There is no other one.
    Only,
    /// An interface leads from it to the node. Only the node can create one: those of namespaces that a pod creates lead to the
    /// pod.
    Linked,
    /// No interface of any leads to the node, and its process is the oldest of the pod, as the sandbox's is.
    Oldest,
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            container,
            why,
        } = self;
        write!(f, "process {pid} of container {container:?}: ")?;
        f.write_str(match why {
            Why::Only => "all processes of the pod are in its network namespace",
            Why::Linked => "an interface leads from its network namespace to the node",
            Why::Oldest => "the oldest process of the pod; none is in a network namespace with an interface to the node",
        })
    }
}

/// Processes that keep a netns enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residents {
    /// Number of processes.
    pub processes: usize,
    /// The pods that they belong to.
    pub pods: BTreeSet<PodUid>,
}

/// Finds the netns of the pods in `sought` by the processes in their cgroups. Each pod may come with the netns in which it was
/// found before. A netns shared by two pods is detected only if both are sought.
///
/// Reads only the names of other pods' cgroups, and a limited number of processes of each pod, so no pod delays
/// another. Takes at most `limit`.
pub(super) fn find(
    cgroups: &PodCgroups,
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    limit: Duration,
) -> io::Result<Scan> {
    let mut search = Search::new(limit);
    let found = cgroups.of(|pod| sought.contains_key(&pod), &search.around);
    for (pod, folders) in found {
        let pids: BTreeSet<u32> = folders
            .iter()
            .flat_map(|folder| members(folder, Reach::TO_FIND))
            .collect();
        for pid in pids {
            search.count()?;
            search.scan.of_pods += 1;
            search.examine(pid, pod);
        }
    }
    Ok(search.settle(sought))
}

/// Scans all processes of the node, for what no pod's cgroup shows: counts the processes of the netns in `held`, which
/// are given by inode number: those that are in the netns, and those of the given pod, wherever they are. The caller keeps
/// these netns open.
///
/// Also finds the pods in `sought`: those whose runtime has not put them below the kubelet's cgroup, as one that is
/// configured for another cgroup driver than the kubelet. A process in a cgroup that a user has created belongs to no
/// pod, whatever the cgroup's name.
///
/// Uses about 20 ms of CPU time per 1,000 processes, and takes at most `limit`.
pub(super) fn walk(
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    held: &HashMap<u64, Option<PodUid>>,
    limit: Duration,
) -> io::Result<Scan> {
    as_the_node_sees(|| walk_here(sought, held, limit))
}

/// See [`walk`].
fn walk_here(
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    held: &HashMap<u64, Option<PodUid>>,
    limit: Duration,
) -> io::Result<Scan> {
    let mut search = Search::new(limit);
    let hierarchies = Hierarchies::mounted();
    let proc = Path::new("/proc");
    let processes_folder = File::open(proc)?;
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        search.count()?;
        // Most processes belong to no sought pod, so this is all that is read of them.
        let path = format!("{pid}/cgroup");
        let Ok(cgroups) = read_at(&processes_folder, &path, &mut search.buffer) else {
            continue;
        };
        let pod = container(&cgroups, &search.around).map(|(pod, _)| pod);
        let pod = pod.filter(|pod| hierarchies.is_the_nodes(&cgroups, *pod));
        // The daemon enters pods' netns for moments.
        if !held.is_empty() && pid != std::process::id() {
            count_resident(&mut search.scan, held, &proc.join(&name), pod);
        }
        let Some(pod) = pod else {
            continue;
        };
        search.scan.of_pods += 1;
        if sought.contains_key(&pod) {
            search.examine(pid, pod);
        }
    }
    Ok(search.settle(sought))
}

/// A scan under way.
struct Search {
    scan: Scan,
    started: Instant,
    limit: Duration,
    /// CPU time of the thread when the scan started.
    before: Duration,
    /// The pods that the node itself runs in.
    around: HashSet<PodUid>,
    /// Inode numbers of the node's netns.
    nodes: Vec<u64>,
    processes: HashMap<PodUid, Vec<Process>>,
    /// Kept open until the end, because a netns keeps its inode number only while it is held.
    files: HashMap<u64, File>,
    buffer: Vec<u8>,
}

impl Search {
    fn new(limit: Duration) -> Self {
        let first = fs::read_to_string("/proc/1/cgroup").unwrap_or_default();
        Self {
            scan: Scan::default(),
            started: Instant::now(),
            limit,
            before: processor_time(),
            around: pods_around(&first),
            nodes: the_nodes(),
            processes: HashMap::new(),
            files: HashMap::new(),
            buffer: Vec::new(),
        }
    }

    /// Counts a process. Fails if the time is over.
    fn count(&mut self) -> io::Result<()> {
        let (limit, seen) = (self.limit, self.scan.processes);
        if self.started.elapsed() > limit {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("only {seen} processes were read within {limit:?}"),
            ));
        }
        self.scan.processes += 1;
        Ok(())
    }

    /// Notes the netns of a process, if it belongs to `pod`.
    fn examine(&mut self, pid: u32, pod: PodUid) {
        let Some(folder) = Folder::open(Path::new(&format!("/proc/{pid}"))) else {
            return;
        };
        match folder.look(pid, pod, &self.around, &mut self.buffer) {
            Ok(Some((file, process))) if !self.nodes.contains(&process.netns) => {
                self.files.entry(process.netns).or_insert(file);
                self.processes.entry(pod).or_default().push(process);
            }
            Ok(Some(_)) => {
                let pods = &mut self.scan.pods;
                pods.entry(pod).or_insert(NetnsLocation::Node);
            }
            Ok(None) => {}
            Err(error) => {
                let error = Arc::new(error);
                let hidden = NetnsLocation::Hidden { pid, error };
                self.scan.pods.insert(pod, hidden);
            }
        }
    }

    /// Determines the location of each pod.
    fn settle(mut self, sought: &HashMap<PodUid, Option<Arc<Netns>>>) -> Scan {
        let mut residents: BTreeMap<u64, Vec<(PodUid, u32)>> = BTreeMap::new();
        for (pod, processes) in &self.processes {
            if let Some((process, why)) =
                prove(processes, |netns| leads_to_node(&self.files, netns))
            {
                let of_netns = residents.entry(process.netns).or_default();
                of_netns.push((*pod, process.pid));
                let proof = Proof {
                    pid: process.pid,
                    container: process.container.clone(),
                    why,
                };
                self.scan.proofs.insert(*pod, proof);
            }
        }
        for (inode, mut residents) in residents {
            residents.sort();
            let held = residents
                .iter()
                .filter_map(|(pod, _)| sought.get(pod)?.as_ref())
                .find(|netns| netns.inode() == inode);
            let netns = match (held, self.files.remove(&inode)) {
                (Some(netns), _) => Ok(netns.clone()),
                (None, Some(file)) => Netns::nameless(file).map(Arc::new),
                (None, None) => Err(io::ErrorKind::NotFound.into()),
            };
            let netns = netns.map_err(Arc::new);
            for (pod, pid) in &residents {
                let other = residents.iter().find(|(other, _)| other != pod);
                let found = match (&netns, other) {
                    (Ok(netns), None) => NetnsLocation::In(netns.clone()),
                    (Ok(netns), Some((other, _))) => NetnsLocation::Shared(netns.clone(), *other),
                    (Err(error), _) => NetnsLocation::Hidden {
                        pid: *pid,
                        error: error.clone(),
                    },
                };
                self.scan.pods.insert(*pod, found);
            }
        }
        self.scan.effort = processor_time().saturating_sub(self.before);
        self.scan
    }
}

/// A pod's process in a netns other than the node's.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Start time, in clock ticks since boot (proc_pid_stat(5)).
    start: u64,
    /// Name of its container's cgroup.
    container: String,
    /// Inode number of its netns.
    pub(super) netns: u64,
}

impl Process {
    fn age(&self) -> (u64, u32) {
        (self.start, self.pid)
    }
}

/// Returns the process whose netns is the pod's own, from `processes`, which all belong to one pod, and why it is.
/// `leads_to_node` says whether an interface leads from the netns with an inode number to the node. If this is unknown
/// for one, and no other leads to the node, none is the pod's.
///
/// A runtime starts a pod's first processes in the netns that the node has connected. A container may create others and enter
/// them, but it cannot connect them to the node, and the netns of a sandbox that was removed is no longer connected.
pub(super) fn prove(
    processes: &[Process],
    leads_to_node: impl Fn(u64) -> Option<bool>,
) -> Option<(&Process, Why)> {
    let mut by_age: Vec<&Process> = processes.iter().collect();
    by_age.sort_by_key(|process| process.age());
    let mut known = HashSet::new();
    by_age.retain(|process| known.insert(process.netns));
    match by_age.as_slice() {
        [] => None,
        [only] => Some((only, Why::Only)),
        [oldest, ..] => {
            let mut all_known = true;
            let linked = by_age.iter().find(|process| {
                let leads = leads_to_node(process.netns);
                all_known &= leads.is_some();
                leads == Some(true)
            });
            match linked {
                Some(process) => Some((process, Why::Linked)),
                None => all_known.then_some((oldest, Why::Oldest)),
            }
        }
    }
}

/// Whether an interface leads from the netns with this inode number, one of `files`, to the node. `None` if it has too many
/// interfaces to tell.
pub(super) fn leads_to_node(files: &HashMap<u64, File>, inode: u64) -> Option<bool> {
    let nodes = open_the_nodes();
    let file = files.get(&inode).and_then(|file| file.try_clone().ok());
    let Some(netns) = file.and_then(|file| Netns::nameless(file).ok()) else {
        return Some(false);
    };
    match netns.enter(|| Interfaces::list(&nodes, &[])).flatten() {
        Ok(interfaces) => Some(!interfaces.leading_out.is_empty()),
        // The pod could add interfaces to have another netns taken for its own.
        Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => None,
        Err(_) => Some(false),
    }
}

/// CPU time that the current thread has used.
pub(super) fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Counts the process with this `folder` in /proc, and the pod of its cgroup, for each netns that it keeps enrolled.
fn count_resident(
    scan: &mut Scan,
    held: &HashMap<u64, Option<PodUid>>,
    folder: &Path,
    pod: Option<PodUid>,
) {
    let netns = match fs::metadata(folder.join("ns/net")) {
        Ok(netns) => Some(netns.ino()),
        // A zombie has no netns any more.
        Err(error) if has_ended(&error) => return,
        Err(_) => {
            scan.is_partial |= pod.is_some();
            None
        }
    };
    for (inode, of) in held {
        if netns == Some(*inode) || (pod.is_some() && *of == pod) {
            let residents = scan.residents.entry(*inode).or_default();
            residents.processes += 1;
            residents.pods.extend(pod);
        }
    }
}

/// A process's folder in /proc. It refers to that process only: after the process has exited, nothing can be opened in
/// it, even if its PID is reused.
pub(super) struct Folder(pub(super) OwnedFd);

impl Folder {
    /// Returns `None` if the process has exited.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::fcntl::open(path, flags, Mode::empty()).ok().map(Self)
    }

    /// Returns the pod of the process, see [`container`]. `None` if the process has exited.
    fn container(
        &self,
        around: &HashSet<PodUid>,
        buffer: &mut Vec<u8>,
    ) -> Option<(PodUid, String)> {
        let cgroups = read_at(&self.0, "cgroup", buffer).ok()?;
        let (pod, name) = container(&cgroups, around)?;
        Some((pod, name.to_owned()))
    }

    /// Opens the netns of the process. `None` if the process has exited or does not belong to `pod`.
    pub(super) fn look(
        &self,
        pid: u32,
        pod: PodUid,
        around: &HashSet<PodUid>,
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<(File, Process)>> {
        let before = self.container(around, buffer);
        let Some((_, container)) = before.clone().filter(|(owner, _)| *owner == pod) else {
            return Ok(None);
        };
        let opened = (|| {
            let file = File::from(open_at(&self.0, "ns/net")?);
            let netns = file.metadata()?.ino();
            let start = started(&read_at(&self.0, "stat", buffer)?)?;
            Ok((file, netns, start))
        })();
        let (file, netns, start) = match opened {
            Ok(opened) => opened,
            Err(error) if has_ended(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        // The process belonged to the pod throughout, so the netns is one that it has been in.
        if self.container(around, buffer) != before {
            return Ok(None);
        }
        let process = Process {
            pid,
            start,
            container,
            netns,
        };
        Ok(Some((file, process)))
    }
}

pub(super) fn open_at(folder: &impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

/// Reads a file of a process. Names in it may be invalid UTF-8, but those never come from the kubelet.
pub(super) fn read_at<'a>(
    folder: &impl AsFd,
    name: &str,
    buffer: &'a mut Vec<u8>,
) -> io::Result<Cow<'a, str>> {
    let file = open_at(folder, name)?;
    buffer.resize(MAX_FILE_BYTES, 0);
    let mut length = 0;
    // Avoids `File`, which queries the size first: these files report none.
    while length < MAX_FILE_BYTES {
        match nix::unistd::read(&file, &mut buffer[length..])? {
            0 => break,
            count => length += count,
        }
    }
    Ok(String::from_utf8_lossy(&buffer[..length]))
}

/// Whether the error means that the process has exited or is about to.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Extracts the start time of a process from /proc/PID/stat: field 22 (proc_pid_stat(5)). The second field is the
/// program's name in parentheses, which may contain any character.
fn started(stat: &str) -> io::Result<u64> {
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    fields
        .and_then(|fields| fields.split_ascii_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "stat: no time of start"))
}

/// Maximum number of bytes to read. A path has at most 4095 bytes, and cgroup v1 has at most a dozen hierarchies.
const MAX_FILE_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";

    fn uid(text: &str) -> PodUid {
        text.parse().unwrap()
    }

    #[test]
    fn a_program_may_be_called_anything() {
        let rest = "S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        for name in ["sleep", "a b) S 1 2 3", "((", ""] {
            assert_eq!(started(&format!("9 ({name}) {rest}\n")).unwrap(), 4711);
        }
        assert!(started("9 (x").is_err());
        assert!(started("9 (x) S 1").is_err());
    }

    fn process(container: &str, start: u64, netns: u64) -> Process {
        Process {
            pid: start as u32,
            start,
            container: container.into(),
            netns,
        }
    }

    #[test]
    fn the_netns_that_the_node_has_connected_is_the_pods() {
        const SANDBOX: u64 = 1;
        const OWN: u64 = 2;
        let netns_of = |processes: &[Process]| {
            prove(processes, |netns| Some(netns == SANDBOX))
                .map(|(process, why)| (process.netns, why))
        };
        let pause = process("pause", 10, SANDBOX);
        for (processes, expected) in [
            (vec![], None),
            (vec![pause.clone()], Some((SANDBOX, Why::Only))),
            // An app that unshares its netns, once or in many children.
            (
                vec![process("app", 20, OWN), pause.clone()],
                Some((SANDBOX, Why::Linked)),
            ),
            (
                (0..50)
                    .map(|n| process("app", 30 + n, OWN + n))
                    .chain([process("app", 20, SANDBOX), pause.clone()])
                    .collect(),
                Some((SANDBOX, Why::Linked)),
            ),
            // No process of the sandbox's own, as with CRI-O, and most containers' first processes are elsewhere.
            (
                vec![
                    process("a", 20, OWN),
                    process("b", 21, OWN),
                    process("c", 22, SANDBOX),
                ],
                Some((SANDBOX, Why::Linked)),
            ),
            // The sandbox was recreated, and processes of the old one survived.
            (
                vec![
                    process("old", 5, OWN),
                    process("older", 4, OWN),
                    process("pause", 30, SANDBOX),
                ],
                Some((SANDBOX, Why::Linked)),
            ),
            // Nothing leads to the node.
            (
                vec![process("b", 21, OWN + 1), process("a", 20, OWN)],
                Some((OWN, Why::Oldest)),
            ),
        ] {
            assert_eq!(netns_of(&processes), expected, "{processes:?}");
        }
    }

    #[test]
    fn finds_nobody_who_has_no_process() {
        let sought = HashMap::from([(uid(UID), None)]);
        let scan = walk(&sought, &HashMap::new(), Duration::from_secs(60)).unwrap();
        assert!(scan.pods.is_empty());
        assert!(scan.processes >= 1, "there is this one");
    }

    #[test]
    fn counts_the_processes_in_a_netns() {
        let here = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let held = HashMap::from([(here, None), (0, None)]);
        let count = || {
            let scan = walk(&HashMap::new(), &held, Duration::from_secs(60)).unwrap();
            assert_eq!(scan.residents.get(&0), None);
            scan.residents.get(&here).cloned().unwrap_or_default()
        };
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        assert!(count().processes >= 1, "there is the child");
        let mut scan = Scan::default();
        let folder = format!("/proc/{}", child.id());
        count_resident(&mut scan, &held, Path::new(&folder), None);
        assert_eq!(scan.residents[&here].processes, 1);
        child.kill().unwrap();
        // Until it is waited for, it is a zombie, which does not count.
        let died = || fs::read_to_string(format!("{folder}/stat")).is_ok_and(|s| s.contains(") Z"));
        while !died() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut scan = Scan::default();
        count_resident(&mut scan, &held, Path::new(&folder), None);
        assert!(scan.residents.is_empty());
        child.wait().unwrap();
    }

    #[test]
    fn counts_the_processes_of_a_pod_wherever_they_are() {
        let mut scan = Scan::default();
        let held = HashMap::from([(0, Some(uid(UID)))]);
        count_resident(&mut scan, &held, Path::new("/proc/self"), None);
        assert!(scan.residents.is_empty());
        count_resident(&mut scan, &held, Path::new("/proc/self"), Some(uid(UID)));
        let expected = Residents {
            processes: 1,
            pods: [uid(UID)].into(),
        };
        assert_eq!(scan.residents[&0], expected);
    }

    #[test]
    fn a_scan_has_a_time_limit() {
        let error = walk(&HashMap::new(), &HashMap::new(), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_process_that_has_ended_belongs_to_no_pod_even_if_its_id_is_reused() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let path = format!("/proc/{}", child.id());
        let folder = Folder::open(Path::new(&path)).unwrap();
        let mut buffer = Vec::new();
        assert!(read_at(&folder.0, "cgroup", &mut buffer).is_ok());
        let own = open_at(&folder.0, "ns/net").unwrap();
        let here = fs::metadata("/proc/self/ns/net").unwrap().ino();
        assert_eq!(File::from(own).metadata().unwrap().ino(), here);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&open_at(&folder.0, "ns/net").unwrap_err()));
        assert!(has_ended(
            &read_at(&folder.0, "cgroup", &mut buffer).unwrap_err()
        ));
        let looked = folder.look(child.id(), uid(UID), &HashSet::new(), &mut buffer);
        assert!(looked.unwrap().is_none());
    }

    proptest! {
        /// In any order of the processes, and with any other processes beside the sandbox and its containers.
        #[test]
        fn the_oldest_process_in_the_connected_netns_proves_it(
            mut processes in prop::collection::vec(
                (0..4_usize, 0..200_u64, 1..9_u64).prop_map(|(container, start, netns)| {
                    process(["pause", "a", "b", "c"][container], start, netns)
                }),
                0..20,
            ),
            rotate in 0..20_usize,
        ) {
            processes.push(process("pause", 100, 1));
            let places = processes.len();
            processes.rotate_left(rotate % places);
            let (proof, _) = prove(&processes, |netns| Some(netns == 1)).unwrap();
            prop_assert_eq!(proof.netns, 1);
            prop_assert!(processes.iter().all(|other| other.netns != 1 || other.age() >= proof.age()));
        }
    }
}
