//! The contract between the eBPF programs and the daemon: map keys and values, ports and marks.
//!
//! Both sides compile this crate, one for the kernel and one for userspace, so a layout cannot drift between them.
//! Addresses are 16 bytes in network byte order, IPv4 as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2), so that one map serves
//! both families. Every struct is padded by hand: the kernel compares keys byte by byte.
#![no_std]

mod first_socket;
mod same_node;

pub use first_socket::{
    FIRST_SOCKET_BYTES, FirstSocket, MAX_TOLD, SocketOrigin, TELL_AGAIN_NANOSECONDS,
};
pub use same_node::{
    Admitted, Closed, EVENT_BYTES, FLOW_CLIENT, FLOW_CLOSED, FLOW_DIALLED, FLOW_SERVER, Flow,
    LEASE_NANOSECONDS, MAX_VERDICTS, Verdict, closed,
};

/// The layout's version. Pins live in a folder of this name: a daemon never adopts maps of another layout.
pub const LAYOUT: &str = "v1";

/// Where captured connections arrive, on the loopback of the client pod's netns.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where the tunnel listens in each enrolled pod's netns. `sk_lookup` brings every other port there too.
pub const TUNNEL_PORT: u16 = 15008;

/// Firewall mark of the daemon's connections to a pod's own server. A route rule in the pod's netns sends replies that
/// carry it to the loopback, so that the daemon can speak from the client's address.
pub const ORIGINAL_SOURCE_MARK: u32 = 0x6d54_4c53;
/// Route table that [`ORIGINAL_SOURCE_MARK`] selects in a pod's netns, and the preference of its rule.
pub const ORIGINAL_SOURCE_TABLE: u32 = 15006;

/// Pods that one node may have enrolled at once.
pub const MAX_PODS: u32 = 4096;
/// Addresses and networks of the mesh: pods, services, nodes.
pub const MAX_MESH_ADDRESSES: u32 = 1_000_000;
/// Captured connections between their `connect` and the daemon's `accept`.
pub const MAX_PENDING: u32 = 131_072;

/// An IPv4-mapped or IPv6 address in network byte order.
pub type Address = [u8; 16];

/// Key of the zero address in [`Inbound`]'s map: what holds for local addresses that no pod is known by.
pub const ANY_ADDRESS: Address = [0; 16];

/// Wraps an IPv4 address (network byte order) as IPv4-mapped IPv6.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> Address {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3],
    ]
}

/// What an address of the mesh is. The value of the MESH map, as a `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MeshKind {
    /// A pod that the mesh reaches through the tunnel.
    Pod = 1,
    /// A service's virtual address.
    Service = 2,
    /// A network that pods live in. Not captured; PERMISSIVE servers await the tunnel from it.
    PodNetwork = 3,
    /// This node's own address: probes come from it. Never captured, never asked for TLS.
    Node = 4,
}

/// An enrolled pod, keyed by its netns cookie (`SO_NETNS_COOKIE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Pod {
    /// The pod's IPv4 address, IPv4-mapped; zero if it has none.
    pub v4: Address,
    /// The pod's IPv6 address; zero if it has none.
    pub v6: Address,
    /// Which of the sysctls that enrolment switches on were off before, and are to be off again after it: a bit each, in
    /// the order of the daemon's list.
    pub switched_on: u32,
    /// Non-zero for a pod that cannot be served (yet): its connections to the mesh are refused, not captured.
    pub refused: u32,
}

/// Names a client's socket from both of its ends: the netns it lives in and its local address there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketKey {
    /// Cookie of the socket's netns.
    pub netns_cookie: u64,
    /// Local address.
    pub address: Address,
    /// Local port, host byte order.
    pub port: u32,
    /// Zero.
    pub padding: u32,
}

/// What an app dialled before its connection was turned to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Dialled {
    /// Destination address.
    pub address: Address,
    /// When, by `CLOCK_MONOTONIC`, in nanoseconds.
    pub at_nanoseconds: u64,
    /// Destination port, host byte order.
    pub port: u32,
    /// Zero.
    pub padding: u32,
}

/// A connection from the daemon to a pod's own app, on its way: the key of the DELIVERIES map. The kernel records it for
/// sockets that the daemon marked as [`DELIVERY`], before their SYN leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Delivery {
    /// The client's address, which the daemon speaks from.
    pub client: Address,
    /// The pod's address.
    pub server: Address,
    /// The client's port, host byte order.
    pub client_port: u32,
    /// The app's port, host byte order.
    pub server_port: u32,
}

/// Value in the BYPASS map of a socket that the daemon makes to the world outside the pod.
pub const DIAL: u32 = 1;
/// Value in the BYPASS map of a socket that the daemon makes to the pod's own app.
pub const DELIVERY: u32 = 2;

/// What a pod admits, keyed by the pod's address. The value of the INBOUND map, as a `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Inbound {
    /// Only the tunnel, and this node's own probes.
    Strict = 1,
    /// The tunnel from the pod networks; everybody else as the kernel would have it.
    Permissive = 2,
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: repr(C) structs of integers and byte arrays with their padding written out: every byte pattern is valid
    // and no byte is uninitialised.
    unsafe impl aya::Pod for super::Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::SocketKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Dialled {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Delivery {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Verdict {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Admitted {}
}
