//! Resources that a daemon and its pods use at one moment, to find leaks by comparing two snapshots.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

use crate::daemon::Daemon;
use crate::place::Place;
use crate::sockets::SocketCount;
use crate::status::KernelStatus;

/// A daemon's file descriptors, memory and map entries, and the sockets of some places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Open file descriptors of the daemon.
    pub descriptors: usize,
    /// Resident memory of the daemon (VmRSS), in KiB.
    pub resident_kib: u64,
    /// Threads of the daemon.
    pub threads: usize,
    /// Connections that the daemon carries.
    pub connections: usize,
    /// Entries of the daemon's maps.
    pub kernel: KernelStatus,
    /// The TCP sockets of each place, by its name.
    pub sockets: BTreeMap<String, SocketCount>,
}

impl Snapshot {
    /// Takes a snapshot of the daemon and the places, one after the other.
    pub fn take(daemon: &Daemon, places: &[&Place]) -> Result<Self> {
        let pid = daemon.pid();
        let count = |folder: &str| {
            let path = format!("/proc/{pid}/{folder}");
            fs::read_dir(&path)
                .map(Iterator::count)
                .with_context(|| format!("reading {path}"))
        };
        let status = daemon.status()?;
        Ok(Self {
            descriptors: count("fd")?,
            resident_kib: resident_kib(pid)?,
            threads: count("task")?,
            connections: status.connections.len(),
            kernel: status.kernel,
            sockets: places
                .iter()
                .map(|place| Ok((place.name().to_owned(), place.sockets()?)))
                .collect::<Result<_>>()?,
        })
    }

    /// Describes what has grown since an earlier snapshot, one line each; empty if nothing leaked.
    ///
    /// `memory_kib` is the allowed growth of resident memory, `descriptors` that of descriptors and, in each place, of
    /// sockets, to allow for idle tunnels of a pool, for example. Sockets in TIME-WAIT are not counted.
    pub fn growth_since(&self, earlier: &Self, memory_kib: u64, descriptors: usize) -> Vec<String> {
        let mut growth = Vec::new();
        let mut compare = |what: &str, before: u64, now: u64, allowed: u64| {
            if now > before + allowed {
                growth.push(format!("{what}: {before}, now {now}"));
            }
        };
        let allowed = descriptors as u64;
        compare(
            "file descriptors",
            earlier.descriptors as u64,
            self.descriptors as u64,
            allowed,
        );
        compare(
            "resident KiB",
            earlier.resident_kib,
            self.resident_kib,
            memory_kib,
        );
        compare(
            "connections",
            earlier.connections as u64,
            self.connections as u64,
            0,
        );
        compare(
            "mesh addresses",
            earlier.kernel.mesh_addresses,
            self.kernel.mesh_addresses,
            LINK_LOCAL_ADDRESSES,
        );
        compare(
            "original destinations",
            earlier.kernel.originals,
            self.kernel.originals,
            allowed,
        );
        compare(
            "pods in the kernel",
            earlier.kernel.pods,
            self.kernel.pods,
            0,
        );
        for (place, count) in &self.sockets {
            let before = earlier.sockets.get(place).map_or(0, SocketCount::live);
            compare(
                &format!("sockets in {place}"),
                before as u64,
                count.live() as u64,
                allowed,
            );
        }
        growth
    }
}

/// Addresses that a node may get meanwhile: its own are among the mesh's, and an interface has a link-local one only some
/// time after its link is up.
const LINK_LOCAL_ADDRESSES: u64 = 8;

/// Resident memory of a process (VmRSS), in KiB.
fn resident_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()
        })
        .with_context(|| format!("{path} has no VmRSS"))
}
