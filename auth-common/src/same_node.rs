//! Connections between two pods of one node that stay in the kernel: the daemon's verdicts, the kernel's record of each
//! connection under a verdict, and the event that it sends when an end closes.

use crate::Address;

/// Maximum number of verdicts on a node.
pub const MAX_VERDICTS: u32 = 131_072;
/// How long verdicts stay valid after the daemon last renewed their lease, in nanoseconds: long enough for a restart.
pub const LEASE_NANOSECONDS: u64 = 5_000_000_000;
/// Size of the ring buffer for [`Closed`] events, in bytes: a power of two, and a multiple of every page size.
pub const EVENT_BYTES: u32 = 1 << 20;

/// [`Admitted::verdict`] of a connection whose verdict the daemon has withdrawn: no pod admits it.
pub const WITHDRAWN: u64 = 0;

/// The daemon's decision that a client pod's connections to an address may stay in the kernel: the value of the VERDICTS
/// map. The key is a [`crate::SocketKey`] of the client's netns and the dialled address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Verdict {
    /// Address of the endpoint that the connections are redirected to.
    pub endpoint: Address,
    /// Cookie of the server's netns.
    pub server_cookie: u64,
    /// Identifies this verdict. The daemon never reuses an id. Not [`WITHDRAWN`].
    pub id: u64,
    /// The endpoint's port in host byte order.
    pub port: u32,
    /// Always zero.
    pub padding: u32,
}

/// A connection under a verdict, recorded in the client's netns before its SYN leaves: the value of the ADMITTED map. The
/// key is the connection's [`crate::FourTuple`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Admitted {
    /// The address that the app dialled.
    pub dialled: Address,
    /// Cookie of the client's netns.
    pub client_cookie: u64,
    /// Cookie of the server's netns.
    pub server_cookie: u64,
    /// [`Verdict::id`] of the verdict, or [`WITHDRAWN`].
    pub verdict: u64,
    /// Time of the `connect` call, in nanoseconds of `CLOCK_MONOTONIC`.
    pub started: u64,
    /// The port that the app dialled, in host byte order.
    pub dialled_port: u32,
    /// Always zero.
    pub padding: u32,
}

/// [`Flow::role`] of a client's socket that has been redirected and whose SYN has not left.
pub const FLOW_DIALLED: u32 = 0;
/// [`Flow::role`] of a client's socket whose connection has been entered in the ADMITTED map.
pub const FLOW_CLIENT: u32 = 1;
/// [`Flow::role`] of a server's socket.
pub const FLOW_SERVER: u32 = 2;
/// [`Flow::role`] of a socket whose connection has closed and whose [`Closed`] event has been sent.
pub const FLOW_CLOSED: u32 = 3;

/// State of one end of a connection under a verdict: the value of the FLOWS map, which is storage on the socket itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// The connection.
    pub admitted: Admitted,
    /// Address of the endpoint. Set on the client's socket only.
    pub endpoint: Address,
    /// The endpoint's port in host byte order. Set on the client's socket only.
    pub endpoint_port: u32,
    /// One of [`FLOW_DIALLED`], [`FLOW_CLIENT`], [`FLOW_SERVER`], [`FLOW_CLOSED`].
    pub role: u32,
    /// The socket's `segs_in` at the last valid segment that was not a RST. Updated once the socket sends its FIN.
    pub segments: u32,
    /// The sequence number after the peer's FIN, in host byte order, if that FIN arrived after the socket sent its own.
    pub fin: u32,
    /// Non-zero if `fin` is set.
    pub fin_seen: u32,
    /// Always zero.
    pub padding: u32,
}

/// Event in the EVENTS ring buffer: one end of a connection under a verdict has closed. The byte counts are TCP's own, which
/// count a SYN and a FIN as one byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Closed {
    /// The client's address.
    pub client: Address,
    /// The server's address.
    pub server: Address,
    /// The connection.
    pub admitted: Admitted,
    /// Time of the close, in nanoseconds of `CLOCK_MONOTONIC`.
    pub ended: u64,
    /// The socket's `bytes_acked`: bytes that it sent and the peer acknowledged.
    pub acked: u64,
    /// The socket's `bytes_received`.
    pub received: u64,
    /// The client's port in host byte order.
    pub client_port: u16,
    /// The server's port in host byte order.
    pub server_port: u16,
    /// The end that closed: [`FLOW_CLIENT`] or [`FLOW_SERVER`].
    pub role: u8,
    /// The socket's TCP state before it closed, as numbered in the kernel's `tcp_states.h`.
    pub state: u8,
    /// Bits of [`closed`].
    pub flags: u16,
}

/// Bits of [`Closed::flags`].
pub mod closed {
    /// The peer acknowledged everything that the socket sent.
    pub const ALL_ACKED: u16 = 1;
    /// The last segment received was valid and not a RST. Only meaningful once the socket has sent its FIN.
    pub const IN_ORDER: u16 = 2;
    /// The peer's FIN arrived after the socket sent its own.
    pub const FIN_RECEIVED: u16 = 4;
    /// At least one segment was received.
    pub const ANSWERED: u16 = 8;
    /// Client's end only: no socket in the server's netns accepted the connection.
    pub const UNCLAIMED: u16 = 16;
}
