//! What a daemon leaves in the kernel: programs, maps, pins, rules, routes, sysctls.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use mesh_tests::{Daemon, Node, Place, TIMEOUT, eventually_ok};
use nix::libc;

/// Rules, routes and the sysctl of a namespace, for comparison with a later state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Routing(BTreeMap<&'static str, Vec<String>>);

impl Routing {
    pub(crate) fn of(place: &Place) -> Self {
        let mut all = BTreeMap::new();
        for what in [
            "-4 rule",
            "-6 rule",
            "-4 route show table all",
            "-6 route show table all",
        ] {
            let text = place
                .run("ip", what.split(' '))
                .unwrap()
                .ok()
                .unwrap()
                .stdout;
            let mut lines: Vec<_> = text.lines().map(|line| line.trim().to_owned()).collect();
            lines.sort();
            all.insert(what, lines);
        }
        for sysctl in SYSCTLS {
            let path = format!("/proc/sys/{}", sysctl.replace('.', "/"));
            let value = place.enter(|| fs::read_to_string(path)).unwrap().unwrap();
            all.insert(sysctl, vec![value.trim().to_owned()]);
        }
        Self(all)
    }

    /// Whether anything of the daemon is present.
    pub(crate) fn is_prepared(&self) -> bool {
        let lines = |what: &str| self.0[what].join("\n");
        lines("-4 rule").contains("0x6d544c53") && lines("net.ipv4.tcp_fwmark_accept") == "1"
    }
}

/// The files below a folder, sorted; empty if the folder does not exist.
pub(crate) fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path()));
        } else {
            found.insert(entry.path());
        }
    }
    found
}

/// The numeric fields of `/proc/self/fdinfo` for a pinned map.
pub(crate) fn pinned_map(path: &Path) -> BTreeMap<String, u64> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    let descriptor = bpf(BPF_OBJ_GET, &mut [name.as_ptr() as u64, 0]).unwrap();
    // SAFETY: the kernel has just created this descriptor for us, and nothing else uses it.
    let map = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let info = format!("/proc/self/fdinfo/{}", map.as_raw_fd());
    numbers(&fs::read_to_string(info).unwrap())
}

/// The number of programs attached to a node's cgroup, by hook.
pub(crate) fn attached_to_node(node: &Node) -> BTreeMap<&'static str, u32> {
    let hooks = [
        ("sock_create", 2),
        ("sockops", 3),
        ("connect4", 10),
        ("connect6", 11),
        ("getpeername4", 29),
        ("getpeername6", 30),
    ];
    let cgroup = File::open(node.cgroup()).unwrap();
    hooks
        .into_iter()
        .map(|(name, hook)| (name, attached(&cgroup, hook)))
        .collect()
}

/// Waits until these programs, and no others, are attached to a node's cgroup: the kernel detaches a program soon after its
/// link's pin is replaced.
pub(crate) fn wait_attached_to_node(node: &Node, programs: &BTreeMap<&'static str, u32>) {
    eventually_ok(TIMEOUT, "the programs of a node", || {
        let attached = attached_to_node(node);
        anyhow::ensure!(attached == *programs, "{attached:?}, not {programs:?}");
        Ok(())
    })
    .unwrap();
}

/// Waits until `count` sk_lookup programs are attached to a pod's network namespace: the kernel detaches a program soon
/// after its link's pin is removed.
pub(crate) fn wait_attached_to_netns(place: &Place, count: u32) {
    eventually_ok(TIMEOUT, "the programs of a netns", || {
        let attached = attached_to_netns(place);
        anyhow::ensure!(attached == count, "{attached} are attached, not {count}");
        Ok(())
    })
    .unwrap();
}

/// The number of sk_lookup programs attached to a pod's network namespace.
pub(crate) fn attached_to_netns(place: &Place) -> u32 {
    const SK_LOOKUP: u32 = 36;
    let netns = place.enter(|| File::open("/proc/thread-self/ns/net"));
    attached(&netns.unwrap().unwrap(), SK_LOOKUP)
}

/// The IDs of all programs and maps that a daemon holds.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) programs: BTreeSet<u32>,
    pub(crate) maps: BTreeSet<u32>,
}

impl Held {
    pub(crate) fn by(daemon: &Daemon) -> Self {
        let mut held = Self {
            programs: BTreeSet::new(),
            maps: BTreeSet::new(),
        };
        for fields in descriptors(daemon) {
            held.programs
                .extend(fields.get("prog_id").map(|id| *id as u32));
            held.maps.extend(fields.get("map_id").map(|id| *id as u32));
        }
        held
    }

    /// The number of them that still exist in the kernel.
    pub(crate) fn alive(&self) -> usize {
        let alive = |command, ids: &BTreeSet<u32>| {
            ids.iter()
                .filter(|id| by_id(command, **id).is_some())
                .count()
        };
        alive(BPF_PROG_GET_FD_BY_ID, &self.programs) + alive(BPF_MAP_GET_FD_BY_ID, &self.maps)
    }
}

/// The numeric fields of `/proc/PID/fdinfo` forevery descriptor.
pub(crate) fn descriptors(daemon: &Daemon) -> Vec<BTreeMap<String, u64>> {
    let folder = format!("/proc/{}/fdinfo", daemon.pid());
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        // The descriptor may have been closed meanwhile.
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        all.push(numbers(&text));
    }
    all
}

fn numbers(text: &str) -> BTreeMap<String, u64> {
    let fields = text.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    });
    fields.collect()
}

/// `BPF_PROG_QUERY` (Linux 4.15; for network namespaces 5.8): the number of programs on a hook.
fn attached(target: &File, hook: u32) -> u32 {
    let mut query = Query {
        target: target.as_raw_fd() as u32,
        hook,
        ..Query::default()
    };
    bpf(BPF_PROG_QUERY, &mut query).unwrap();
    query.count
}

/// A descriptor of the program or map with this ID, if it exists.
fn by_id(command: libc::c_long, id: u32) -> Option<OwnedFd> {
    let descriptor = bpf(command, &mut [id, 0, 0]).ok()?;
    // SAFETY: the kernel has just created this descriptor for us, and nothing else uses it.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The part of `union bpf_attr` that a query uses (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    hook: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is plain data, readable and writable for its size, and the kernel accesses no more than
    // that.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}

/// The sysctls that the daemon changes in a pod.
const SYSCTLS: [&str; 3] = [
    "net.ipv4.tcp_fwmark_accept",
    "net.ipv4.fwmark_reflect",
    "net.ipv6.fwmark_reflect",
];
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_MAP_GET_FD_BY_ID: libc::c_long = 14;
const BPF_PROG_QUERY: libc::c_long = 16;
