//! cgroup/sendmsg4 and sendmsg6, and what connect and sock_create ask: with `nonTcp: deny`, an enrolled pod sends the mesh
//! nothing but TCP, because nothing else is encrypted.
//!
//! A UDP socket is refused when it names a destination of the mesh: on connect, or on each unconnected send. Transports that no
//! hook sees there (SCTP, DCCP, and UDP-Lite when it connects) are refused when the pod creates the socket. ICMP and raw sockets
//! pass.

use auth_common::{Address, MeshKind};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{PROCEED, REFUSE, SocketContext, user_ip4, user_ip6},
    maps::{NODE, PODS, mesh_kind},
};

const IPPROTO_UDP: u32 = 17;
const IPPROTO_DCCP: u32 = 33;
const IPPROTO_SCTP: u32 = 132;
const IPPROTO_UDPLITE: u32 = 136;

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    verdict(&ctx, &user_ip4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    verdict(&ctx, &user_ip6(&ctx))
}

#[inline(always)]
fn verdict(ctx: &SockAddrContext, destination: &Address) -> i32 {
    if refuses_datagrams(ctx, destination) {
        REFUSE
    } else {
        PROCEED
    }
}

/// Whether the context's socket may not send to `destination`. False for a socket of a protocol that other checks cover.
#[inline(always)]
pub fn refuses_datagrams(ctx: &SockAddrContext, destination: &Address) -> bool {
    // SAFETY: the kernel passed this context to the program.
    let protocol = unsafe { (*ctx.sock_addr).protocol };
    if protocol != IPPROTO_UDP || !is_denied() {
        return false;
    }
    // SAFETY: entries are replaced whole and freed after a grace period.
    let Some(pod) = (unsafe { PODS.get(ctx.netns_cookie()) }) else {
        return false;
    };
    let is_mesh = mesh_kind(*destination).is_some_and(MeshKind::is_mesh);
    is_mesh && *destination != pod.v4 && *destination != pod.v6
}

/// Whether a pod may not create sockets of `protocol`.
#[inline(always)]
pub fn refuses_sockets(protocol: u32) -> bool {
    matches!(protocol, IPPROTO_SCTP | IPPROTO_DCCP | IPPROTO_UDPLITE) && is_denied()
}

#[inline(always)]
fn is_denied() -> bool {
    NODE.get(0).is_some_and(|node| node.non_tcp_denied != 0)
}
