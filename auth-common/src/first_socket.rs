//! Sockets in network namespaces that no pod is known by: what tells the daemon that a pod has begun to talk.

/// Namespaces and cgroups that are remembered as told.
pub const MAX_TOLD: u32 = 8192;
/// After so long a further socket of the same origin is told of again, in nanoseconds: the daemon may have looked too
/// early, or not at all.
pub const TELL_AGAIN_NANOSECONDS: u64 = 1_000_000_000;
/// Size of the ring that [`FirstSocket`] events wait in: a power of two, and a multiple of every page size.
pub const FIRST_SOCKET_BYTES: u32 = 1 << 16;

/// Where sockets come from: the key of the TOLD map, whose value is when that was told, by `CLOCK_MONOTONIC`, in
/// nanoseconds. With the cgroup, because a runtime makes sockets in a pod's namespace before any process of the pod's
/// does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketOrigin {
    /// Cookie of the socket's netns.
    pub netns_cookie: u64,
    /// The cgroup v2 of the process that makes it.
    pub cgroup: u64,
}

/// A socket was made in a namespace that is no enrolled pod's: an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FirstSocket {
    /// Cookie of the socket's netns.
    pub netns_cookie: u64,
    /// When, by `CLOCK_MONOTONIC`, in nanoseconds.
    pub at_nanoseconds: u64,
}
