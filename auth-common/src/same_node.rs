//! Two pods of one node: what the daemon decides once, and what the kernel does and tells of each connection after that.

use crate::Address;

/// Verdicts that one node may hold at once, and connections that may be on their way by them.
pub const MAX_VERDICTS: u32 = 131_072;
/// How long verdicts hold after the daemon has last renewed their lease, in nanoseconds: over a restart, and no longer.
pub const LEASE_NANOSECONDS: u64 = 5_000_000_000;
/// Size of the ring that [`Closed`] events wait in.
pub const EVENT_BYTES: u32 = 1 << 20;

/// What the daemon has decided for a client pod and an address that it dials: the value of the VERDICTS map. The key is a
/// [`crate::SocketKey`] of the client's netns and what is dialled there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Verdict {
    /// Where such connections go.
    pub endpoint: Address,
    /// Cookie of the server's netns.
    pub server_cookie: u64,
    /// The daemon's name for this verdict, never used again.
    pub id: u64,
    /// The endpoint's port, host byte order.
    pub port: u32,
    /// Zero.
    pub padding: u32,
}

/// A connection that the kernel has seen leave the client's pod under a verdict: the value of the ADMITTED map, whose key
/// is the [`crate::Delivery`] of its four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Admitted {
    /// What the app dialled.
    pub dialled: Address,
    /// Cookie of the client's netns.
    pub client_cookie: u64,
    /// Cookie of the server's netns.
    pub server_cookie: u64,
    /// The verdict's id.
    pub verdict: u64,
    /// When it was dialled, by `CLOCK_MONOTONIC`, in nanoseconds.
    pub started: u64,
    /// The port that the app dialled, host byte order.
    pub dialled_port: u32,
    /// Zero.
    pub padding: u32,
}

/// [`Flow::role`] of a client's socket that has dialled and whose SYN has not left.
pub const FLOW_DIALLED: u32 = 0;
/// [`Flow::role`] of a client's socket whose connection is in ADMITTED, or was.
pub const FLOW_CLIENT: u32 = 1;
/// [`Flow::role`] of a server's socket.
pub const FLOW_SERVER: u32 = 2;
/// [`Flow::role`] of a socket whose connection has closed, and is told of.
pub const FLOW_CLOSED: u32 = 3;

/// What a socket of such a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// The connection.
    pub admitted: Admitted,
    /// Where it goes.
    pub endpoint: Address,
    /// The endpoint's port, host byte order.
    pub endpoint_port: u32,
    /// One of [`FLOW_DIALLED`], [`FLOW_CLIENT`], [`FLOW_SERVER`], [`FLOW_CLOSED`].
    pub role: u32,
    /// Segments that had come in with the last one that was valid and no RST. Kept once the own FIN is on its way.
    pub segments: u32,
    /// The sequence number behind the peer's FIN, where one came after the own FIN was acknowledged.
    pub fin: u32,
    /// Whether `fin` is set.
    pub fin_seen: u32,
    /// Zero.
    pub padding: u32,
}

/// One end of such a connection has closed: an event. What TCP counts is told as TCP counts it, SYNs and FINs included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Closed {
    /// The client's address.
    pub client: Address,
    /// The server's address.
    pub server: Address,
    /// The connection.
    pub admitted: Admitted,
    /// When it closed, as [`Admitted::started`].
    pub ended: u64,
    /// The socket's `bytes_acked`.
    pub acked: u64,
    /// The socket's `bytes_received`.
    pub received: u64,
    /// The client's port, host byte order.
    pub client_port: u16,
    /// The server's port, host byte order.
    pub server_port: u16,
    /// [`FLOW_CLIENT`] or [`FLOW_SERVER`]: whose end it is.
    pub role: u8,
    /// The TCP state that it closed from, as in the kernel's `tcp_states.h`.
    pub state: u8,
    /// Bits of [`closed`].
    pub flags: u16,
}

/// Bits of [`Closed::flags`].
pub mod closed {
    /// All that was sent is acknowledged.
    pub const ALL_ACKED: u16 = 1;
    /// The last segment that came in was valid and no RST. Known once the own FIN is on its way.
    pub const IN_ORDER: u16 = 2;
    /// The peer's FIN came, after the own FIN was acknowledged.
    pub const FIN_RECEIVED: u16 = 4;
    /// A segment has come in.
    pub const ANSWERED: u16 = 8;
    /// On the client's end: no socket of the server's namespace has taken the connection.
    pub const UNCLAIMED: u16 = 16;
}
