//! Finds pods' network namespaces by their processes.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
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
    netns::the_nodes,
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

/// Result of one scan of all processes.
#[derive(Debug, Default)]
pub struct Scan {
    /// Requested pods that have processes.
    pub pods: HashMap<PodUid, NetnsLocation>,
    /// Processes in or of each held netns that has any, by its inode number.
    pub residents: HashMap<u64, Residents>,
    /// Whether the netns of any pod's process could not be read while residents were counted: it may be a held one.
    pub is_partial: bool,
    /// Number of processes on the node.
    pub processes: usize,
    /// Number of processes that belong to any pod, requested or not.
    pub of_pods: usize,
    /// CPU time that the scan used.
    pub effort: Duration,
}

/// Processes that keep a netns enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residents {
    /// Number of processes.
    pub processes: usize,
    /// The pods that they belong to.
    pub pods: BTreeSet<PodUid>,
}

/// Scans for the processes of the pods in `sought`, and their netns. Each pod may come with the netns in which it was
/// found before. A netns shared by two pods is detected only if both are sought.
///
/// Also counts the processes of the netns in `held`, which are given by inode number: those that are in the netns, and
/// those of the given pod, wherever they are. The caller keeps these netns open.
///
/// Uses about 20 ms of CPU time per 1,000 processes, and takes at most `limit`.
pub fn find(
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    held: &HashMap<u64, Option<PodUid>>,
    limit: Duration,
) -> io::Result<Scan> {
    let before = processor_time();
    let mut scan = find_in(Path::new("/proc"), sought, held, limit)?;
    scan.effort = processor_time().saturating_sub(before);
    Ok(scan)
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

/// Returns the process whose netns is the pod's, from `processes`, which all belong to one pod.
///
/// A runtime starts the first process of each container in the sandbox's netns. If the container later unshares its
/// netns or runs containers of its own, it does so in younger processes. Therefore only the oldest process of each
/// container votes. If two netns have the same number of votes, the one with the oldest process wins, because that is
/// the sandbox's own. A process that survived its sandbox is outvoted by the containers of the new sandbox.
pub(super) fn spokesman(processes: &[Process]) -> Option<&Process> {
    let mut firsts: BTreeMap<&str, &Process> = BTreeMap::new();
    for process in processes {
        let first = firsts.entry(&process.container).or_insert(process);
        if process.age() < first.age() {
            *first = process;
        }
    }
    let mut voices: HashMap<u64, (usize, &Process)> = HashMap::new();
    for first in firsts.into_values() {
        let (count, oldest) = voices.entry(first.netns).or_insert((0, first));
        *count += 1;
        if first.age() < oldest.age() {
            *oldest = first;
        }
    }
    voices
        .into_values()
        .max_by(|(count, oldest), (other_count, other)| {
            count
                .cmp(other_count)
                .then_with(|| other.age().cmp(&oldest.age()))
        })
        .map(|(_, oldest)| oldest)
}

/// CPU time that the current thread has used.
pub(super) fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn find_in(
    proc: &Path,
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    held: &HashMap<u64, Option<PodUid>>,
    limit: Duration,
) -> io::Result<Scan> {
    let started = Instant::now();
    let first = fs::read_to_string(proc.join("1/cgroup")).unwrap_or_default();
    let around = pods_around(&first);
    let nodes = the_nodes();
    let mut scan = Scan::default();
    let mut processes: HashMap<PodUid, Vec<Process>> = HashMap::new();
    // Kept open until the end, because a netns keeps its inode number only while it is held.
    let mut files: HashMap<u64, File> = HashMap::new();
    let mut buffer = Vec::new();
    let processes_folder = File::open(proc)?;
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if started.elapsed() > limit {
            let seen = scan.processes;
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("not through with all processes after {limit:?}, but only with {seen}"),
            ));
        }
        scan.processes += 1;
        // Most processes belong to no sought pod, so this is all that is read of them.
        let Ok(cgroups) = read_at(&processes_folder, &format!("{pid}/cgroup"), &mut buffer) else {
            continue;
        };
        let pod = container(&cgroups, &around).map(|(pod, _)| pod);
        // The daemon enters pods' netns for moments.
        if !held.is_empty() && pid != std::process::id() {
            count_resident(&mut scan, held, &proc.join(&name), pod);
        }
        let Some(pod) = pod else {
            continue;
        };
        scan.of_pods += 1;
        if !sought.contains_key(&pod) {
            continue;
        }
        let Some(folder) = Folder::open(&proc.join(&name)) else {
            continue;
        };
        match folder.look(pid, pod, &around, &mut buffer) {
            Ok(Some((file, process))) if !nodes.contains(&process.netns) => {
                files.entry(process.netns).or_insert(file);
                processes.entry(pod).or_default().push(process);
            }
            Ok(Some(_)) => {
                scan.pods.entry(pod).or_insert(NetnsLocation::Node);
            }
            Ok(None) => {}
            Err(error) => {
                let error = Arc::new(error);
                scan.pods.insert(pod, NetnsLocation::Hidden { pid, error });
            }
        }
    }
    settle(&mut scan, &processes, sought, &mut files);
    Ok(scan)
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

/// Determines the location of each pod in `processes`.
fn settle(
    scan: &mut Scan,
    processes: &HashMap<PodUid, Vec<Process>>,
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    files: &mut HashMap<u64, File>,
) {
    let mut residents: BTreeMap<u64, Vec<(PodUid, &Process)>> = BTreeMap::new();
    for (pod, processes) in processes {
        if let Some(process) = spokesman(processes) {
            residents
                .entry(process.netns)
                .or_default()
                .push((*pod, process));
        }
    }
    for (inode, mut residents) in residents {
        residents.sort_by_key(|(pod, _)| *pod);
        let held = residents
            .iter()
            .filter_map(|(pod, _)| sought.get(pod)?.as_ref())
            .find(|netns| netns.inode() == inode);
        let netns = match (held, files.remove(&inode)) {
            (Some(netns), _) => Ok(netns.clone()),
            (None, Some(file)) => Netns::nameless(file).map(Arc::new),
            (None, None) => Err(io::ErrorKind::NotFound.into()),
        };
        let netns = netns.map_err(Arc::new);
        for (pod, process) in &residents {
            let other = residents.iter().find(|(other, _)| other != pod);
            let found = match (&netns, other) {
                (Ok(netns), None) => NetnsLocation::In(netns.clone()),
                (Ok(netns), Some((other, _))) => NetnsLocation::Shared(netns.clone(), *other),
                (Err(error), _) => NetnsLocation::Hidden {
                    pid: process.pid,
                    error: error.clone(),
                },
            };
            scan.pods.insert(*pod, found);
        }
    }
}

/// A process's folder in /proc. It refers to that process only: after the process has exited, nothing can be opened in
/// it, even if its PID is reused.
pub(super) struct Folder(OwnedFd);

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

fn open_at(folder: &impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

/// Reads a file of a process. Names in it may be invalid UTF-8, but those never come from the kubelet.
fn read_at<'a>(
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

    fn netns_of(processes: &[Process]) -> Option<u64> {
        spokesman(processes).map(|process| process.netns)
    }

    #[test]
    fn the_sandbox_tells_whose_namespace_it_is() {
        const SANDBOX: u64 = 1;
        const OWN: u64 = 2;
        const NEW: u64 = 3;
        let pause = process("pause", 10, SANDBOX);
        for (processes, expected) in [
            (vec![], None),
            (vec![pause.clone()], Some(SANDBOX)),
            // An app that unshares its netns, once or in many children.
            (vec![process("app", 20, OWN), pause.clone()], Some(SANDBOX)),
            (
                (0..50)
                    .map(|n| process("app", 30 + n, OWN + n))
                    .chain([process("app", 20, SANDBOX), pause.clone()])
                    .collect(),
                Some(SANDBOX),
            ),
            // Two apps that unshare, each on its own.
            (
                vec![
                    process("app", 20, OWN),
                    process("side", 21, OWN + 1),
                    pause.clone(),
                ],
                Some(SANDBOX),
            ),
            // No process of the sandbox's own, as with CRI-O.
            (
                vec![
                    process("app", 20, SANDBOX),
                    process("side", 21, SANDBOX),
                    process("side", 22, OWN),
                ],
                Some(SANDBOX),
            ),
            // The sandbox was recreated, and one process of the old sandbox survived.
            (
                vec![
                    process("old", 5, OWN),
                    process("pause", 30, NEW),
                    process("app", 31, NEW),
                ],
                Some(NEW),
            ),
        ] {
            assert_eq!(netns_of(&processes), expected, "{processes:?}");
        }
    }

    #[test]
    fn finds_nobody_who_has_no_process() {
        let sought = HashMap::from([(uid(UID), None)]);
        let scan = find(&sought, &HashMap::new(), Duration::from_secs(60)).unwrap();
        assert!(scan.pods.is_empty());
        assert!(scan.processes >= 1, "there is this one");
    }

    #[test]
    fn counts_the_processes_in_a_netns() {
        let here = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let held = HashMap::from([(here, None), (0, None)]);
        let count = || {
            let scan = find(&HashMap::new(), &held, Duration::from_secs(60)).unwrap();
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
        // Until it is waited for it is a zombie, which counts no more.
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
    fn a_look_has_an_end() {
        let error = find(&HashMap::new(), &HashMap::new(), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_process_that_has_ended_is_nobodys_whoever_has_its_number() {
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
        fn younger_processes_have_no_voice(
            mut processes in prop::collection::vec(
                (0..4_usize, 100..200_u64, 2..9_u64).prop_map(|(container, start, netns)| {
                    process(["pause", "a", "b", "c"][container], start, netns)
                }),
                0..20,
            ),
            rotate in 0..20_usize,
        ) {
            for (start, name) in (10..).zip(["pause", "a", "b", "c"]) {
                processes.push(process(name, start, 1));
            }
            let places = processes.len();
            processes.rotate_left(rotate % places);
            prop_assert_eq!(netns_of(&processes), Some(1));
        }
    }
}
