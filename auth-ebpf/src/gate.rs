//! Keeps the netns of a pod closed until the daemon has decided on it, whether a daemon runs or not: until the netns is
//! enrolled (PODS), or known as outside the mesh (OUTSIDE).
//!
//! - Inbound, cgroup_skb/ingress on the cgroups that contain all pods: drops SYNs that come from another netns, except for
//!   connections that the kernel has recorded, such as the kubelet's probes. A SYN is dropped and not answered with a RST,
//!   because callers repeat it (after 1 s, 3 s, 7 s): a connect that comes too early succeeds after the decision instead of
//!   failing.
//! - Outbound, asked by the connect hooks: refuses what goes to the mesh.
//!
//! A cgroup_skb program cannot tell which netns it runs in (before Linux 6.15), so the sockets of undecided netns carry the
//! netns' cookie: [`created`] and [`listening`] store it. A listener from before the first daemon has none, and passes.
//!
//! The inbound program runs for every packet that a pod's socket receives. For all but SYNs it only reads the flags of the TCP
//! header.

use auth_common::{Address, Node};
use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{bpf_sk_fullsock, bpf_sk_storage_get},
    macros::cgroup_skb,
    programs::{SkBuffContext, SockContext, SockOpsContext},
};

use crate::{
    context::{PROCEED, SocketContext},
    exposed,
    maps::{NODE, OUTSIDE, PODS, UNDECIDED, mesh_kind, storage},
    node_connect::is_in_a_pod,
    packet::{ACK, SYN, TCP, TcpPacket, Unreadable, tcp},
    shared::is_recorded,
};

/// Return value that drops the packet.
const DROP: i32 = 0;
/// The loopback is the first interface of every netns.
const LOOPBACK_IFINDEX: u32 = 1;

#[cgroup_skb(ingress)]
pub fn gate(ctx: SkBuffContext) -> i32 {
    if opens_nothing(&ctx) {
        return PROCEED;
    }
    let packet = ctx.skb.skb;
    // SAFETY: the kernel passed this context to the program.
    let (ifindex, socket) = unsafe { ((*packet).ifindex, (*packet).__bindgen_anon_2.sk) };
    if ifindex == LOOPBACK_IFINDEX || socket.is_null() {
        return PROCEED;
    }
    let mut read = TcpPacket::EMPTY;
    let is_readable = match tcp(packet, &mut read) {
        Ok(true) if read.flags & (SYN | ACK) == SYN => true,
        Ok(_) => return PROCEED,
        Err(Unreadable) => false,
    };
    // SAFETY: the socket is the context's, and not null.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return PROCEED;
    }
    let map = (&raw const UNDECIDED).cast_mut();
    // SAFETY: the socket is the context's, and not null; nothing is created.
    let cookie: *const u64 =
        unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), 0).cast() };
    // SAFETY: a single word, which does not change after it was stored.
    let Some(cookie) = (unsafe { cookie.as_ref() }) else {
        return PROCEED;
    };
    let Some(node) = NODE.get(0) else {
        return PROCEED;
    };
    let passes = !is_closed(node, *cookie) || is_readable && is_recorded(&read.connection);
    if passes { PROCEED } else { DROP }
}

/// Whether the first bytes of the packet already tell that it opens no TCP connection.
#[inline(always)]
fn opens_nothing(ctx: &SkBuffContext) -> bool {
    // SAFETY: the kernel passed this context to the program, which reads the packet only up to its end.
    unsafe {
        let packet = ctx.skb.skb;
        let start = (*packet).data as usize as *const u8;
        let end = (*packet).data_end as usize as *const u8;
        // An IPv4 header without options, or an IPv6 header without extensions, and the flags of the TCP header after it.
        if start.add(34) <= end && *start == 0x45 {
            *start.add(9) != TCP || *start.add(33) & (SYN | ACK) != SYN
        } else if start.add(54) <= end && *start >> 4 == 6 && *start.add(6) == TCP {
            *start.add(53) & (SYN | ACK) != SYN
        } else {
            false
        }
    }
}

/// Whether the netns with `cookie` has no verdict yet, and is not the node's own.
#[inline(always)]
fn is_closed(node: &Node, cookie: u64) -> bool {
    node.gated != 0 && cookie != node.netns_cookie && !is_decided(cookie)
}

/// Whether there is a verdict on the netns with `cookie`.
#[inline(always)]
fn is_decided(cookie: u64) -> bool {
    // SAFETY: the entries are not read, only whether there are any.
    unsafe { PODS.get(cookie).is_some() || OUTSIDE.get(cookie).is_some() }
}

/// Whether a connect from the netns `cookie`, which is not enrolled, to `destination` is refused.
#[inline(always)]
pub fn refuses_connect(cookie: u64, destination: &Address, port: u32) -> bool {
    let Some(node) = NODE.get(0) else {
        return false;
    };
    if !is_closed(node, cookie) {
        return false;
    }
    let is_mesh =
        mesh_kind(*destination).is_some_and(|kind| exposed::is_captured(kind, destination, port));
    is_mesh && is_in_a_pod(node)
}

/// Notes on a new socket that its netns `cookie` has no verdict. Returns false if memory is short: the socket must not be used
/// then.
#[inline(always)]
pub fn created(ctx: &SockContext, cookie: u64) -> bool {
    let Some(node) = NODE.get(0) else {
        return true;
    };
    if cookie == node.netns_cookie || !is_in_a_pod(node) {
        return true;
    }
    note(ctx, cookie)
}

/// As [`created`], for a socket that starts to listen. The kernel's own sockets, such as the one below a listener of Multipath
/// TCP, are not reported when they are created.
#[inline(always)]
pub fn listening(ctx: &SockOpsContext) {
    let cookie = ctx.netns_cookie();
    let Some(node) = NODE.get(0) else {
        return;
    };
    if cookie != node.netns_cookie && !is_decided(cookie) {
        note(ctx, cookie);
    }
}

#[inline(always)]
fn note(ctx: &impl SocketContext, cookie: u64) -> bool {
    let noted = storage(&UNDECIDED, ctx, BPF_SK_STORAGE_GET_F_CREATE.into());
    // SAFETY: either null, or an entry of the context's socket, whose owner alone uses it now.
    match unsafe { noted.as_mut() } {
        Some(noted) => {
            *noted = cookie;
            true
        }
        None => false,
    }
}
