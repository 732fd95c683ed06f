//! Reports of sockets in network namespaces that are not enrolled. They tell the daemon that a new pod is running.

/// Maximum number of origins whose last report is remembered. When the map is full, the least recently used is dropped.
pub const MAX_REPORTED: u32 = 8192;
/// Minimum time between two reports for one origin, in nanoseconds. A report is repeated because the daemon may have
/// scanned too early, or may not have been running.
pub const REPORT_INTERVAL_NANOSECONDS: u64 = 1_000_000_000;
/// Maximum number of reports in that time for all origins of one cgroup below the cgroup that contains all pods: a process that
/// creates network namespaces makes a new origin with each.
pub const REPORTS_PER_INTERVAL: u64 = 64;
/// Size of the ring buffer for [`FirstSocket`] events, in bytes: a power of two, and a multiple of every page size.
pub const FIRST_SOCKET_BYTES: u32 = 1 << 16;

/// Where a socket was created: the key of the REPORTED map, whose value is the time of the last report in nanoseconds of
/// `CLOCK_MONOTONIC`. The entry without a netns, of a pod's cgroup, is for all of its origins: its value is when the next report
/// would be due if they came at an even pace.
///
/// The cgroup is part of the key because a container runtime creates sockets in a pod's netns before the pod's own
/// processes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketOrigin {
    /// Cookie of the socket's netns. Zero for all netns.
    pub netns_cookie: u64,
    /// Id of the cgroup (version 2) of the process that created the socket.
    pub cgroup: u64,
}

/// Event in the FIRST_SOCKETS ring buffer: a socket was created in a netns that is not an enrolled pod's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FirstSocket {
    /// Cookie of the socket's netns.
    pub netns_cookie: u64,
    /// Time of the event, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_nanoseconds: u64,
    /// Non-zero if a process in a pod's cgroup created it. The netns is then closed: see [`crate::Node::gated`].
    pub of_pod: u64,
}
