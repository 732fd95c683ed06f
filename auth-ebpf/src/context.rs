//! What the programs share: constants of the kernel, and access to addresses, ports and sockets in a program's context.

use core::ptr::write_volatile;

use auth_common::{Address, FourTuple, mapped};
use aya_ebpf::{
    EbpfContext,
    bindings::bpf_sock,
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};

pub use crate::shared::{AF_INET, IPPROTO_TCP, read_address};

/// Return value of a cgroup program that lets the system call go on.
pub const PROCEED: i32 = 1;
/// Return value of a cgroup program that makes the system call fail with EPERM.
pub const REFUSE: i32 = 0;

/// A TCP state, as numbered in the kernel's `tcp_states.h`.
pub const TCP_CLOSE: u32 = 7;

/// Address of the outbound listener for IPv4, and for IPv4-mapped addresses.
pub const LOOPBACK_V4: Address = mapped([127, 0, 0, 1]);
/// Address of the outbound listener for IPv6.
pub const LOOPBACK_V6: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Whether `address` is IPv4-mapped (RFC 4291 §2.5.5.2).
#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    let mut zeros = true;
    let mut byte = 0;
    while byte < 10 {
        zeros &= address[byte] == 0;
        byte += 1;
    }
    zeros && address[10] == 0xff && address[11] == 0xff
}

/// Time now, in nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// A context that belongs to a socket.
pub trait SocketContext: EbpfContext {
    /// The socket. May be null.
    fn socket(&self) -> *mut bpf_sock;

    /// Cookie of the socket's netns.
    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the kernel passed this context to the program; the helper reads the context's socket.
        unsafe { bpf_get_netns_cookie(self.as_ptr()) }
    }
}

impl SocketContext for SockContext {
    #[inline(always)]
    fn socket(&self) -> *mut bpf_sock {
        self.sock
    }
}

impl SocketContext for SockAddrContext {
    #[inline(always)]
    fn socket(&self) -> *mut bpf_sock {
        // SAFETY: the kernel passed this context to the program.
        unsafe { (*self.sock_addr).__bindgen_anon_1.sk }
    }
}

impl SocketContext for SockOpsContext {
    #[inline(always)]
    fn socket(&self) -> *mut bpf_sock {
        // SAFETY: the kernel passed this context to the program.
        unsafe { (*self.ops).__bindgen_anon_2.sk }
    }
}

// === connect, getpeername, getsockname

/// The IPv4 address in the context, IPv4-mapped: the destination of a connect, or the result of getpeername or
/// getsockname.
#[inline(always)]
pub fn user_ip4(ctx: &SockAddrContext) -> Address {
    // SAFETY: the kernel passed this context to the program.
    mapped(unsafe { (*ctx.sock_addr).user_ip4 }.to_ne_bytes())
}

/// The IPv6 address in the context.
#[inline(always)]
pub fn user_ip6(ctx: &SockAddrContext) -> Address {
    // SAFETY: the kernel passed this context to the program.
    unsafe { read_address(&raw const (*ctx.sock_addr).user_ip6) }
}

/// The port in the context, in host byte order.
#[inline(always)]
pub fn user_port(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the kernel passed this context to the program.
    let port = unsafe { (*ctx.sock_addr).user_port };
    // The low half of the word is the port in network byte order.
    u32::from(u16::from_be(port as u16))
}

/// Replaces the IPv4 address in the context by the one in `address`, which is IPv4-mapped.
#[inline(always)]
pub fn set_user_ip4(ctx: &SockAddrContext, address: &Address) {
    let v4 = [address[12], address[13], address[14], address[15]];
    // SAFETY: the kernel passed this context to the program, and lets it write this field.
    unsafe { (*ctx.sock_addr).user_ip4 = u32::from_ne_bytes(v4) };
}

/// Replaces the IPv6 address in the context, word by word for the reason that [`read_address`] gives.
#[inline(always)]
pub fn set_user_ip6(ctx: &SockAddrContext, address: &Address) {
    for word in 0..4 {
        let value = u32::from_ne_bytes([
            address[4 * word],
            address[4 * word + 1],
            address[4 * word + 2],
            address[4 * word + 3],
        ]);
        // SAFETY: the kernel passed this context to the program, and lets it write this field.
        unsafe { write_volatile(&raw mut (*ctx.sock_addr).user_ip6[word], value) };
    }
}

/// Replaces the port in the context. `port` is in host byte order.
#[inline(always)]
pub fn set_user_port(ctx: &SockAddrContext, port: u32) {
    let port = u32::from((port as u16).to_be());
    // SAFETY: the kernel passed this context to the program, and lets it write this field.
    unsafe { (*ctx.sock_addr).user_port = port };
}

// === sockops

/// The connection's 4-tuple. `is_server` tells whether the context's socket is the server's.
#[inline(always)]
pub fn four_tuple(ctx: &SockOpsContext, is_server: bool) -> FourTuple {
    let (local, remote) = (local_address(ctx), remote_address(ctx));
    let (local_port, remote_port) = (ctx.local_port(), remote_port(ctx));
    let (client, server, client_port, server_port) = if is_server {
        (remote, local, remote_port, local_port)
    } else {
        (local, remote, local_port, remote_port)
    };
    FourTuple {
        client,
        server,
        client_port,
        server_port,
    }
}

/// The socket's own address.
#[inline(always)]
pub fn local_address(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.local_ip4().to_ne_bytes());
    }
    // SAFETY: the kernel passed this context to the program.
    unsafe { read_address(&raw const (*ctx.ops).local_ip6) }
}

/// The peer's address.
#[inline(always)]
pub fn remote_address(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.remote_ip4().to_ne_bytes());
    }
    // SAFETY: the kernel passed this context to the program.
    unsafe { read_address(&raw const (*ctx.ops).remote_ip6) }
}

/// The peer's port, in host byte order.
#[inline(always)]
pub fn remote_port(ctx: &SockOpsContext) -> u32 {
    u32::from_be(ctx.remote_port())
}

/// Enables callbacks of the sockops program for the context's socket: `flag` is one of `BPF_SOCK_OPS_*_CB_FLAG`.
#[inline(always)]
pub fn enable_callbacks(ctx: &SockOpsContext, flag: u32) {
    // The flags belong to the socket, and other programs may have set some of them: keep those.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | flag) as i32);
}
