//! Finds pods' network namespaces by their processes' cgroups.
//!
//! Whatever the container runtime and the cgroup driver, the kubelet names a pod's cgroup after the pod's UID, and all of
//! the pod's processes are in it or below. No pod can choose that name, nor move its processes to another pod's, so what
//! /proc/PID/cgroup says of a process is the node's word on whose it is.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    time::{ClockId, clock_gettime},
};

use super::{Netns, netns::the_nodes};

/// What a pod's cgroup is named after: the UID that the API server gave it, or, of a static pod, the hash of its manifest
/// (`kubernetes.io/config.hash` on the pod that mirrors it).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid {
    bits: u128,
    /// A hash is written without dashes, and is never the UID that has the same digits.
    is_hash: bool,
}

/// Text that no pod's cgroup is named after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is neither a UUID nor a static pod's hash of 32 hexadecimal digits")]
pub struct NoPodUid;

impl PodUid {
    /// Reads a UUID (RFC 9562 §4) with `dash` between its parts, or 32 hexadecimal digits.
    fn parse(text: &str, dash: u8) -> Option<Self> {
        let is_hash = text.len() == 32;
        if !is_hash && text.len() != 36 {
            return None;
        }
        let mut bits = 0;
        for (place, byte) in text.bytes().enumerate() {
            if !is_hash && matches!(place, 8 | 13 | 18 | 23) {
                if byte != dash {
                    return None;
                }
            } else {
                bits = bits << 4 | u128::from(char::from(byte).to_digit(16)?);
            }
        }
        Some(Self { bits, is_hash })
    }

    /// The pod that a cgroup of this name is of: `pod<uid>` (cgroupfs), or a slice whose last part is that, with `_` in the
    /// UID where `-` would separate slices (systemd). A runtime that is told of slices and does not know them makes
    /// `<slice>:<prefix>:<container>`.
    fn of_cgroup(name: &str) -> Option<Self> {
        let slice = name.split_once(':').map_or(name, |(slice, _)| slice);
        let (name, dash) = match slice.strip_suffix(".slice") {
            Some(slices) => (slices.rsplit('-').next()?, b'_'),
            None => (name, b'-'),
        };
        Self::parse(name.strip_prefix("pod")?, dash)
    }
}

impl FromStr for PodUid {
    type Err = NoPodUid;

    fn from_str(text: &str) -> Result<Self, NoPodUid> {
        Self::parse(text, b'-').ok_or(NoPodUid)
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.bits);
        if self.is_hash {
            return f.write_str(&digits);
        }
        let [a, b, c, d] = [0..8, 8..12, 12..16, 16..20].map(|part| &digits[part]);
        write!(f, "{a}-{b}-{c}-{d}-{}", &digits[20..])
    }
}

/// All pods that a process with this /proc/PID/cgroup lies in, however deep.
fn pods_around(cgroups: &str) -> HashSet<PodUid> {
    paths(cgroups)
        .flat_map(|path| path.split('/').filter_map(PodUid::of_cgroup))
        .collect()
}

/// The pod that a process with this /proc/PID/cgroup is of, and the name of its container's cgroup, empty where it lies in
/// the pod's own.
///
/// `around` are pods that the node itself lies in, as a node of kind does that runs in a pod. Of the others the outermost
/// counts: what is further in was made by somebody in the pod. A process whose hierarchies (cgroup v1) name different pods
/// is nobody's.
fn container<'a>(cgroups: &'a str, around: &HashSet<PodUid>) -> Option<(PodUid, &'a str)> {
    let mut found: Option<(PodUid, &str)> = None;
    for path in paths(cgroups) {
        let mut names = path.split('/');
        let pod = names.by_ref().find_map(|name| {
            let pod = PodUid::of_cgroup(name)?;
            (!around.contains(&pod)).then_some((pod, name))
        });
        let Some((pod, name)) = pod else {
            continue;
        };
        match found {
            Some((other, _)) if other != pod => return None,
            Some(_) => {}
            None if name.contains(':') => found = Some((pod, name)),
            None => found = Some((pod, names.next().unwrap_or_default())),
        }
    }
    found
}

/// The paths of cgroups(7)'s `hierarchy:controllers:path` lines.
fn paths(cgroups: &str) -> impl Iterator<Item = &str> {
    cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
}

/// A pod's process in a namespace that is not the node's.
#[derive(Clone, Debug)]
struct Process {
    pid: u32,
    /// When it began, in clock ticks since boot (proc_pid_stat(5)).
    start: u64,
    /// Its container's cgroup.
    container: String,
    /// Its network namespace's inode.
    netns: u64,
}

impl Process {
    fn age(&self) -> (u64, u32) {
        (self.start, self.pid)
    }
}

/// The process that tells which namespace is the pod's: one of those that `processes`, all of one pod, are in.
///
/// A runtime starts each container's first process in the sandbox's namespace; what the container does afterwards, to
/// unshare or to run containers of its own, it does in younger processes. So the oldest process of each container has a
/// voice; where two namespaces have as many, the one with the oldest process of all counts, which is the sandbox's own. A
/// process that did not die with its sandbox is outvoted by the containers of the new one.
fn spokesman(processes: &[Process]) -> Option<&Process> {
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

/// Where a pod's processes are.
#[derive(Clone, Debug)]
pub enum Whereabouts {
    /// In this namespace.
    In(Arc<Netns>),
    /// In this one, as another pod's are: neither can be believed.
    Shared(Arc<Netns>, PodUid),
    /// In the node's own, all of them: on their way into the pod's, or helpers of the runtime.
    Node,
    /// Not to be seen.
    Hidden {
        /// One of them.
        pid: u32,
        /// What happened.
        error: Arc<io::Error>,
    },
}

/// What one look at all processes has shown.
#[derive(Debug, Default)]
pub struct Scan {
    /// Of the pods that were looked for, those that have processes.
    pub pods: HashMap<PodUid, Whereabouts>,
    /// How many processes there are.
    pub processes: usize,
    /// How many of them are pods', looked for or not.
    pub of_pods: usize,
    /// How long a processor was busy with it.
    pub effort: Duration,
}

/// Looks for the processes of the pods in `sought`, and for their namespaces; each may come with the one that it was found
/// in before. Two pods are found out to share one only if both are sought.
///
/// Keeps a processor busy for some twenty milliseconds with each thousand processes, and takes `limit` at most.
pub fn find(sought: &HashMap<PodUid, Option<Arc<Netns>>>, limit: Duration) -> io::Result<Scan> {
    let before = processor_time();
    let mut scan = find_in(Path::new("/proc"), sought, limit)?;
    scan.effort = processor_time().saturating_sub(before);
    Ok(scan)
}

/// What this thread has used.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn find_in(
    proc: &Path,
    sought: &HashMap<PodUid, Option<Arc<Netns>>>,
    limit: Duration,
) -> io::Result<Scan> {
    let started = Instant::now();
    let first = fs::read_to_string(proc.join("1/cgroup")).unwrap_or_default();
    let around = pods_around(&first);
    let nodes = the_nodes();
    let mut scan = Scan::default();
    let mut processes: HashMap<PodUid, Vec<Process>> = HashMap::new();
    // Held until the end: a namespace that is held keeps its inode.
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
        // Most are nobody's that is sought: to those, no more than this.
        let Ok(cgroups) = read_at(&processes_folder, &format!("{pid}/cgroup"), &mut buffer) else {
            continue;
        };
        let Some((pod, _)) = container(&cgroups, &around) else {
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
                scan.pods.entry(pod).or_insert(Whereabouts::Node);
            }
            Ok(None) => {}
            Err(error) => {
                let error = Arc::new(error);
                scan.pods.insert(pod, Whereabouts::Hidden { pid, error });
            }
        }
    }
    settle(&mut scan, &processes, sought, &mut files);
    Ok(scan)
}

/// Decides on the pods whose `processes` were seen.
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
                (Ok(netns), None) => Whereabouts::In(netns.clone()),
                (Ok(netns), Some((other, _))) => Whereabouts::Shared(netns.clone(), *other),
                (Err(error), _) => Whereabouts::Hidden {
                    pid: process.pid,
                    error: error.clone(),
                },
            };
            scan.pods.insert(*pod, found);
        }
    }
}

/// A process's folder in /proc. It stays that process's: when the process has ended nothing can be opened in it any more,
/// whoever has its number then.
struct Folder(OwnedFd);

impl Folder {
    /// `None` when the process has ended.
    fn open(path: &Path) -> Option<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        nix::fcntl::open(path, flags, Mode::empty()).ok().map(Self)
    }

    /// Whose it is, see [`container`]. A process that has ended is nobody's.
    fn container(
        &self,
        around: &HashSet<PodUid>,
        buffer: &mut Vec<u8>,
    ) -> Option<(PodUid, String)> {
        let cgroups = read_at(&self.0, "cgroup", buffer).ok()?;
        let (pod, name) = container(&cgroups, around)?;
        Some((pod, name.to_owned()))
    }

    /// Opens the namespace of the process, if it is `pod`'s. `None` when it has ended, or is not.
    fn look(
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
        // It was the pod's process all the while, and so the namespace is one that it has been in.
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

/// What stands in a file of a process. Names in there may be no text, and are not the kubelet's then.
fn read_at<'a>(
    folder: &impl AsFd,
    name: &str,
    buffer: &'a mut Vec<u8>,
) -> io::Result<Cow<'a, str>> {
    let file = open_at(folder, name)?;
    buffer.resize(MAX_FILE_BYTES, 0);
    let mut length = 0;
    // Not by way of `File`, which asks for the size first: these have none.
    while length < MAX_FILE_BYTES {
        match nix::unistd::read(&file, &mut buffer[length..])? {
            0 => break,
            count => length += count,
        }
    }
    Ok(String::from_utf8_lossy(&buffer[..length]))
}

/// Of a process that has ended, or is about to, nothing is there.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The time in /proc/PID/stat at which the process began: field 22 (proc_pid_stat(5)). The second field is the program's
/// name in parentheses, and may hold anything.
fn started(stat: &str) -> io::Result<u64> {
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    fields
        .and_then(|fields| fields.split_ascii_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "stat: no time of start"))
}

/// A path has 4095 bytes at most, and cgroup v1 no more than a dozen hierarchies.
const MAX_FILE_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";
    const OTHER: &str = "11111111-2222-4333-8444-555555555555";
    const HASH: &str = "8f3e2d1c0b9a87654321fedcba098765";

    fn uid(text: &str) -> PodUid {
        text.parse().unwrap()
    }

    fn whose(cgroups: &str) -> Option<(PodUid, &str)> {
        container(cgroups, &HashSet::new())
    }

    #[test]
    fn knows_the_layouts_of_runtimes_and_drivers() {
        let slice = UID.replace('-', "_");
        let id = "7c1fe4b0a6f8d2e35b9a8c4d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f";
        for (cgroups, name) in [
            // cgroup v2, systemd driver: containerd, CRI-O, cri-dockerd; burstable, besteffort, guaranteed.
            (
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (
                format!(
                    "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/crio-{id}.scope/container\n"
                ),
                format!("crio-{id}.scope"),
            ),
            (
                format!("0::/kubepods.slice/kubepods-pod{slice}.slice/docker-{id}.scope\n"),
                format!("docker-{id}.scope"),
            ),
            // A systemd in the container.
            (
                format!(
                    "0::/kubepods.slice/kubepods-pod{slice}.slice/crio-{id}.scope/init.scope\n"
                ),
                format!("crio-{id}.scope"),
            ),
            // cgroupfs driver.
            (
                format!("0::/kubepods/burstable/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            (format!("0::/kubepods/pod{UID}\n"), String::new()),
            // kubelet --cgroup-root.
            (
                format!("0::/custom/kubepods/besteffort/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            // kind, both drivers.
            (
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (
                format!("0::/docker/{id}/kubelet/kubepods/besteffort/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            (
                format!("0::/docker/{id}/kubepods/besteffort/pod{UID}/{id}\n"),
                id.to_owned(),
            ),
            // Seen from a cgroup namespace further in (cgroup_namespaces(7)).
            (
                format!(
                    "0::/../../kubelet-kubepods-burstable-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (
                format!(
                    "0::/../../kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{slice}.slice/cri-containerd-{id}.scope\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            (format!("0::/../../pod{UID}/{id}\n"), id.to_owned()),
            // cgroup v1, and both at once, some hierarchies of which know nothing of pods.
            (
                format!(
                    "12:rdma:/\n11:memory:/kubepods/burstable/pod{UID}/{id}\n10:cpu,cpuacct:/kubepods/burstable/pod{UID}/{id}\n1:name=systemd:/kubepods/burstable/pod{UID}/{id}\n0::/system.slice/containerd.service\n"
                ),
                id.to_owned(),
            ),
            (
                format!(
                    "5:devices:/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{id}.scope\n1:name=systemd:/kubepods.slice/kubepods-pod{slice}.slice/cri-containerd-{id}.scope\n0::/\n"
                ),
                format!("cri-containerd-{id}.scope"),
            ),
            // The kubelet's driver is systemd, the runtime's is not.
            (
                format!(
                    "0::/system.slice/containerd.service/kubepods-burstable-pod{slice}.slice:cri-containerd:{id}\n"
                ),
                format!("kubepods-burstable-pod{slice}.slice:cri-containerd:{id}"),
            ),
            // Its cgroup is gone already.
            (
                format!("0::/kubepods/pod{UID}/{id} (deleted)\n"),
                format!("{id} (deleted)"),
            ),
        ] {
            let found = whose(&cgroups);
            assert_eq!(found, Some((uid(UID), name.as_str())), "{cgroups}");
        }
        let static_pod = format!("0::/kubepods/burstable/pod{HASH}/{id}\n");
        assert_eq!(whose(&static_pod), Some((uid(HASH), id)));
        let static_slice = format!("0::/kubepods.slice/kubepods-burstable-pod{HASH}.slice/x.scope");
        assert_eq!(whose(&static_slice), Some((uid(HASH), "x.scope")));
    }

    #[test]
    fn what_is_no_pods_is_nobodys() {
        let slice = UID.replace('-', "_");
        for cgroups in [
            "",
            "0::/\n",
            "0::/system.slice/containerd.service\n",
            "0::/kubepods.slice/kubepods-burstable.slice\n",
            "0::/podruntime.slice/kubelet.service\n",
            "0::/machine.slice/podman-1234.scope\n",
            "0::/user.slice/user-libpod_pod_8f3e2d1c0b9a87654321fedcba098765.slice\n",
            "nothing of the kind",
            &format!("0::/kubepods/{UID}/x"),
            &format!("0::/kubepods/pod{UID}0/x"),
            &format!("0::/kubepods/pod{slice}/x"),
            &format!("0::/kubepods-pod{UID}.slice/x"),
            &format!("0::/kubepods/xpod{UID}/x"),
            &format!("0::/kubepods/pod{}/x", &UID[1..]),
            &format!("0::/kubepods/pod{}g/x", &UID[1..]),
            &format!("pod{UID}"),
            // Different pods in different hierarchies.
            &format!("2:cpu:/kubepods/pod{UID}/x\n1:memory:/kubepods/pod{OTHER}/x\n"),
        ] {
            assert_eq!(whose(cgroups), None, "{cgroups}");
        }
    }

    #[test]
    fn a_pod_that_makes_cgroups_of_its_own_takes_nobodys_name() {
        let nested = format!("0::/kubepods/pod{UID}/a/docker/b/kubepods/pod{OTHER}/c\n");
        assert_eq!(whose(&nested), Some((uid(UID), "a")));
    }

    #[test]
    fn a_node_in_a_pod_has_pods_of_its_own() {
        let outer = format!("1:memory:/kubepods/pod{UID}/a/docker/b");
        let around = pods_around(&format!("{outer}/init.scope\n"));
        assert_eq!(around, HashSet::from([uid(UID)]));
        let inner = format!("{outer}/kubelet/kubepods/pod{OTHER}/c\n");
        assert_eq!(container(&inner, &around), Some((uid(OTHER), "c")));
        assert_eq!(container(&outer, &around), None);
    }

    #[test]
    fn a_hash_is_not_the_uid_of_the_same_digits() {
        let (with, without) = (uid(UID), uid(&UID.replace('-', "")));
        assert_ne!(with, without);
        assert_eq!(with.to_string(), UID);
        assert_eq!(without.to_string(), UID.replace('-', ""));
        assert_eq!("u1".parse::<PodUid>(), Err(NoPodUid));
        assert_eq!(
            "é".repeat(18).parse::<PodUid>(),
            Err(NoPodUid),
            "36 bytes, none a digit"
        );
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
            // An app that unshares, at once or in many children.
            (vec![process("app", 20, OWN), pause.clone()], Some(SANDBOX)),
            (
                (0..50)
                    .map(|n| process("app", 30 + n, OWN + n))
                    .chain([process("app", 20, SANDBOX), pause.clone()])
                    .collect(),
                Some(SANDBOX),
            ),
            // Two that do, each for itself.
            (
                vec![
                    process("app", 20, OWN),
                    process("side", 21, OWN + 1),
                    pause.clone(),
                ],
                Some(SANDBOX),
            ),
            // Without a process of the sandbox's own, as with CRI-O.
            (
                vec![
                    process("app", 20, SANDBOX),
                    process("side", 21, SANDBOX),
                    process("side", 22, OWN),
                ],
                Some(SANDBOX),
            ),
            // The sandbox was made anew, and one process of the old one does not die.
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
        let scan = find(&sought, Duration::from_secs(60)).unwrap();
        assert!(scan.pods.is_empty());
        assert!(scan.processes >= 1, "there is this one");
    }

    #[test]
    fn a_look_has_an_end() {
        let error = find(&HashMap::new(), Duration::ZERO).unwrap_err();
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
        #[test]
        fn anything_may_stand_in_a_cgroup(cgroups in any::<String>()) {
            let _ = whose(&cgroups);
            let _ = pods_around(&cgroups);
        }

        #[test]
        fn uids_are_read_as_they_are_written(bits: u128, is_hash: bool) {
            let uid = PodUid { bits, is_hash };
            let text = uid.to_string();
            prop_assert_eq!(text.parse(), Ok(uid));
            let cgroupfs = format!("pod{text}");
            prop_assert_eq!(PodUid::of_cgroup(&cgroupfs), Some(uid));
            let slice = format!("kubelet-kubepods-burstable-pod{}.slice", text.replace('-', "_"));
            prop_assert_eq!(PodUid::of_cgroup(&slice), Some(uid));
        }

        /// Wherever the pod's cgroup lies, and whatever lies in it.
        #[test]
        fn the_outermost_pod_counts(
            before in prop::collection::vec("[a-z.-]{1,9}|\\.\\.", 0..5),
            within in prop::collection::vec("[a-z.-]{1,9}", 0..3),
            hierarchies in 1..4_usize,
        ) {
            let path: String = before
                .iter()
                .chain([&format!("pod{UID}"), &"a:b".to_owned()])
                .chain(&within)
                .chain([&format!("pod{OTHER}")])
                .map(|name| format!("/{name}"))
                .collect();
            let cgroups: String = (0..hierarchies).map(|n| format!("{n}:c{n}:{path}\n")).collect();
            prop_assert_eq!(whose(&cgroups), Some((uid(UID), "a:b")));
        }

        /// In whatever order they are seen, and whoever else is there beside the sandbox and its containers.
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
