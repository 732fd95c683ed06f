//! The contract between the eBPF programs and the daemon: map keys and values, ports and marks.
//!
//! Both sides compile this crate, one for the kernel and one for userspace, so a layout cannot drift between them.
//!
//! Conventions forevery type here:
//! - An [`Address`] is 16 bytes in network byte order. IPv4 is stored as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2), so that one
//!   map serves both families.
//! - A port is a number in host byte order, whatever its width.
//! - A netns cookie is the kernel's number for a network namespace (`SO_NETNS_COOKIE`), in host byte order. The kernel
//!   never reuses one before it reboots.
//! - A time is in nanoseconds of `CLOCK_MONOTONIC`, which is what `bpf_ktime_get_ns` returns.
//! - Padding is an explicit field that is always zero, because the kernel compares keys byte by byte.
#![no_std]

mod first_socket;
mod same_node;
mod share;
mod unread;

pub use first_socket::{
    FIRST_SOCKET_BYTES, FirstSocket, MAX_REPORTED, REPORT_INTERVAL_NANOSECONDS,
    REPORTS_PER_INTERVAL, SocketOrigin,
};
pub use same_node::{
    Admitted, Closed, EVENT_BYTES, FLOW_CLIENT, FLOW_CLOSED, FLOW_DIALLED, FLOW_SERVER, Flow,
    LEASE_NANOSECONDS, MAX_VERDICTS, Verdict, WITHDRAWN, closed,
};
pub use share::{MAX_PENDING, SHARE, SHARES, Share, Usage};
pub use unread::Unread;

/// Version of the maps' layout, and the name of the folder that holds their pins. A daemon never adopts maps of another
/// layout.
pub const LAYOUT: &str = "v2";

/// Port of the listener that accepts captured connections, on the loopback of the client pod's netns.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of the tunnel listener in each enrolled pod's netns. `sk_lookup` steers connections forevery other port to the
/// same listener.
pub const TUNNEL_PORT: u16 = 15008;

/// Firewall mark (`SO_MARK`) of the daemon's connections to a pod's own app. A routing rule in the pod's netns sends
/// replies with this mark to the loopback, so that the daemon can connect from the client's address.
pub const ORIGINAL_SOURCE_MARK: u32 = 0x6d54_4c53;
/// Number of the routing table that the rule for [`ORIGINAL_SOURCE_MARK`] selects in a pod's netns.
pub const ORIGINAL_SOURCE_TABLE: u32 = 15006;
/// Firewall mark of packets to a STRICT pod from outside. A routing rule in the pod's netns keeps the pod from forwarding them
/// to a netns nested in it.
pub const FORWARD_MARK: u32 = 0x6d54_4c46;

/// Maximum number of enrolled pods on a node.
pub const MAX_PODS: u32 = 4096;
/// Maximum number of netns in the OUTSIDE map. Pods beyond stay closed.
pub const MAX_OUTSIDE: u32 = 16_384;
/// Maximum number of entries in the MESH map: addresses and networks of pods, services and nodes.
pub const MAX_MESH_ADDRESSES: u32 = 1_000_000;
/// Maximum number of nodes that are remembered to have had a ready daemon.
pub const MAX_PROVEN_NODES: u32 = 65_536;
/// Maximum number of addresses and ports at which pods and services of the mesh are exposed. Those beyond are not captured.
pub const MAX_EXPOSED: u32 = 65_536;

/// An IPv4-mapped or IPv6 address in network byte order.
pub type Address = [u8; 16];

/// Converts an IPv4 address in network byte order to IPv4-mapped IPv6.
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> Address {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3],
    ]
}

/// Kind of an address or network of the mesh: the value of the MESH map, stored as a `u32`.
///
/// Connections to an address in the map are captured unless it is a [`MeshKind::Outside`] address, or a [`MeshKind::Node`] or
/// [`MeshKind::Exposed`] address whose port is not exposed: the programs capture any kind that they do not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MeshKind {
    /// A pod that is reached through the tunnel.
    Pod = 1,
    /// The virtual address of a service.
    Service = 2,
    /// A network that contains pod addresses. Captured where no longer prefix says otherwise: the daemon refuses an address
    /// that no object claims. Connections from it go to the tunnel listener of a PERMISSIVE pod.
    PodNetwork = 3,
    /// An address of a node, which no service claims. Connections to ports in the EXPOSED map are captured, no others. A
    /// connection from it is judged like any other, unless the kernel has recorded that a process of this node itself made
    /// it.
    Node = 4,
    /// An address of a known pod or service outside the mesh. Never captured. As a caller, it is treated like an address
    /// that is not in the map.
    Outside = 5,
    /// A network that contains virtual addresses of services. As a [`MeshKind::PodNetwork`], except that connections from
    /// it are treated like those from an address that is not in the map.
    ServiceNetwork = 6,
    /// An address that was a pod's or service's of the mesh, and that no object claims any more. Captured, and refused by
    /// the daemon. As a caller, it is treated like a [`MeshKind::Pod`].
    Gone = 7,
    /// An address at which a port of a pod or service of the mesh is exposed (`externalIPs`, a load balancer), and that is
    /// no node's. Connections to ports in the EXPOSED map are captured. As a caller, it is treated like an address that is
    /// not in the map.
    Exposed = 8,
    /// A network of which the daemon asks what has an address once a pod dials it. Captured where no longer prefix says
    /// otherwise. As a caller, it is treated like an address that is not in the map.
    Asked = 9,
}

/// What the programs ask about a kind. They ask about the value of the MESH map, because a daemon may write kinds that its
/// predecessor's programs do not know: such a kind is treated like a [`MeshKind::Pod`].
impl MeshKind {
    /// Whether the address belongs to the mesh with all its ports: connections to it are captured.
    #[inline(always)]
    pub const fn is_mesh(kind: u32) -> bool {
        kind != Self::Node as u32 && kind != Self::Outside as u32 && kind != Self::Exposed as u32
    }

    /// Whether connections to those ports of the address that are in the EXPOSED map are captured.
    #[inline(always)]
    pub const fn has_exposed_ports(kind: u32) -> bool {
        kind == Self::Node as u32 || kind == Self::Exposed as u32
    }

    /// Whether a caller at the address may use the tunnel.
    #[inline(always)]
    pub const fn may_call(kind: u32) -> bool {
        Self::is_mesh(kind) && kind != Self::ServiceNetwork as u32 && kind != Self::Asked as u32
    }

    /// Whether the address may be a pod's, in the mesh or not.
    #[inline(always)]
    pub const fn may_be_a_pod(kind: u32) -> bool {
        kind == Self::Outside as u32
            || kind == Self::Asked as u32
            || (Self::may_call(kind) && kind != Self::Service as u32)
    }
}

/// An address and port at which a pod or service of the mesh is exposed: the key of the EXPOSED map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Exposed {
    /// The address. All zeros forevery address of every node ([`MeshKind::Node`]).
    pub address: Address,
    /// The port in host byte order.
    pub port: u32,
}

/// An enrolled pod: the value of the PODS map, whose key is the pod's netns cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Pod {
    /// The pod's IPv4 address, IPv4-mapped. All zeros if it has none, or if it is not known yet.
    pub v4: Address,
    /// The pod's IPv6 address. All zeros if it has none, or if it is not known yet.
    pub v6: Address,
    /// Bit mask of the sysctls that enrolment switched on and release must switch off again. Bit 0 is the first sysctl of
    /// the daemon's list.
    pub switched_on: u32,
    /// Non-zero if the daemon cannot serve the pod (yet): its connections to the mesh are refused instead of captured.
    pub refused: u32,
}

/// Identifies a client's socket, or a destination as seen from a client: a netns, an address and a port. The key of the
/// PENDING map, with the socket's local address, and of the VERDICTS map, with the address that an app dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketKey {
    /// Cookie of the client's netns.
    pub netns_cookie: u64,
    /// Local address, or dialled address.
    pub address: Address,
    /// Local port, or dialled port, in host byte order.
    pub port: u32,
    /// Always zero.
    pub padding: u32,
}

/// The destination that an app dialled before the connection was captured: the value of the PENDING, DIALLED and OWN maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Dialled {
    /// Destination address.
    pub address: Address,
    /// Destination port in host byte order.
    pub port: u32,
}

/// Addresses and ports of a TCP connection, the same from both ends: the key of the DELIVERIES and ADMITTED maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FourTuple {
    /// The client's address.
    pub client: Address,
    /// The server's address.
    pub server: Address,
    /// The client's port in host byte order.
    pub client_port: u32,
    /// The server's port in host byte order.
    pub server_port: u32,
}

/// Value in the BYPASS map for a socket that the daemon opens to a destination outside the pod. It is not captured.
pub const DIAL: u32 = 1;
/// Value in the BYPASS map for a socket that the daemon opens to the app of the pod whose netns it is in, through the loopback.
/// It is not captured. Its 4-tuple is not recorded: somebody outside could use it first.
pub const DELIVERY: u32 = 2;
/// Value in the BYPASS map for a socket that the daemon opens to the app of another pod of this node. It is not captured, and
/// its 4-tuple is entered in the DELIVERIES map before its SYN leaves.
pub const NEIGHBOUR: u32 = 4;
/// Value in the BYPASS map for a socket with which a process of the node itself connects to a pod. Its 4-tuple is entered
/// in the DELIVERIES map before its SYN leaves.
pub const NODE_CONNECT: u32 = 3;

/// Maximum number of cgroups in [`Node::pod_roots`].
pub const MAX_POD_ROOTS: usize = 4;

/// Settings of the node, and what tells its own processes from its pods: the value of the NODE map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Node {
    /// Cookie of the node's own netns.
    pub netns_cookie: u64,
    /// The cgroups (version 2) that contain all pods, such as `kubepods.slice`. Unused entries are all zeros.
    pub pod_roots: [PodRoot; MAX_POD_ROOTS],
    /// Non-zero if pods may not send anything but TCP to the mesh.
    pub non_tcp_denied: u32,
    /// Non-zero if the netns of a pod is closed until there is a verdict on it. Zero until the first daemon has written the
    /// OUTSIDE map.
    pub gated: u32,
}

/// A cgroup that contains pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PodRoot {
    /// Id of the cgroup.
    pub cgroup: u64,
    /// Its depth in the tree of cgroups. The root of the tree has depth 0.
    pub level: u32,
    /// Always zero.
    pub padding: u32,
}

/// What a pod admits: the value of the MODE map of its inbound program, stored as a `u32`. Any other value counts as
/// [`Inbound::Strict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Inbound {
    /// All connections go to the tunnel listener, except those that the kernel has recorded: see the DELIVERIES and
    /// ADMITTED maps.
    Strict = 1,
    /// Connections from pods, services and pod networks in the MESH map go to the tunnel listener, except those that the
    /// kernel has recorded. All others go to the app's own listener.
    Permissive = 2,
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: a repr(C) struct of integers and byte arrays with explicit padding, so every byte pattern is valid and no
    // byte is uninitialised.
    unsafe impl aya::Pod for super::Pod {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Exposed {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::SocketKey {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Dialled {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::FourTuple {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Share {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Unread {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Node {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Verdict {}
    // SAFETY: as for `Pod`.
    unsafe impl aya::Pod for super::Admitted {}
}

#[cfg(test)]
mod tests {
    use super::MeshKind;

    #[test]
    fn programs_treat_each_kind_as_documented() {
        const UNKNOWN: u32 = 99;
        for (kind, is_mesh, has_exposed_ports, may_call, may_be_a_pod) in [
            (MeshKind::Pod as u32, true, false, true, true),
            (MeshKind::Service as u32, true, false, true, false),
            (MeshKind::PodNetwork as u32, true, false, true, true),
            (MeshKind::Node as u32, false, true, false, false),
            (MeshKind::Outside as u32, false, false, false, true),
            (MeshKind::ServiceNetwork as u32, true, false, false, false),
            (MeshKind::Gone as u32, true, false, true, true),
            (MeshKind::Exposed as u32, false, true, false, false),
            (MeshKind::Asked as u32, true, false, false, true),
            (UNKNOWN, true, false, true, true),
        ] {
            assert_eq!(MeshKind::is_mesh(kind), is_mesh, "{kind}");
            assert_eq!(
                MeshKind::has_exposed_ports(kind),
                has_exposed_ports,
                "{kind}"
            );
            assert_eq!(MeshKind::may_call(kind), may_call, "{kind}");
            assert_eq!(MeshKind::may_be_a_pod(kind), may_be_a_pod, "{kind}");
        }
    }
}
