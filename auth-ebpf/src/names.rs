//! cgroup/getpeername and getsockname: after a connection was captured, or redirected to a service's pod on this node, show
//! the app the addresses that it would see without the mesh: the one that it dialled, and its pod's own.

use auth_common::{Address, FLOW_SERVER, OUTBOUND_PORT, Pod};
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{
        LOOPBACK_V4, LOOPBACK_V6, PROCEED, SocketContext, set_user_ip4, set_user_ip6,
        set_user_port, user_ip4, user_ip6, user_port,
    },
    maps::{PODS, dialled, flow},
};

/// The address of a pod that was enrolled before its address was known.
const UNKNOWN: Address = [0; 16];

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some((address, port)) = dialled_instead_of(&ctx, &user_ip4(&ctx)) {
        set_user_ip4(&ctx, address);
        set_user_port(&ctx, port);
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some((address, port)) = dialled_instead_of(&ctx, &user_ip6(&ctx)) {
        set_user_ip6(&ctx, address);
        set_user_port(&ctx, port);
    }
    PROCEED
}

/// The address and port that the app dialled, if the connection was redirected to `peer` and the port in the context.
#[inline(always)]
fn dialled_instead_of<'a>(ctx: &'a SockAddrContext, peer: &Address) -> Option<(&'a Address, u32)> {
    let port = user_port(ctx);
    if port == u32::from(OUTBOUND_PORT)
        && let Some(dialled) = dialled(ctx)
    {
        return Some((&dialled.address, dialled.port));
    }
    // SAFETY: this program holds no other reference to the socket's entry.
    let flow = unsafe { flow(ctx) }?;
    let is_client = flow.role != FLOW_SERVER;
    if is_client && flow.endpoint_port == port && flow.endpoint == *peer {
        return Some((&flow.admitted.dialled, flow.admitted.dialled_port));
    }
    None
}

#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    if user_ip4(&ctx) == LOOPBACK_V4
        && let Some(pod) = captured_in(&ctx)
        && pod.v4 != UNKNOWN
    {
        set_user_ip4(&ctx, &pod.v4);
    }
    PROCEED
}

#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    let address = user_ip6(&ctx);
    if (address == LOOPBACK_V6 || address == LOOPBACK_V4)
        && let Some(pod) = captured_in(&ctx)
    {
        let own = if address == LOOPBACK_V6 {
            &pod.v6
        } else {
            &pod.v4
        };
        if *own != UNKNOWN {
            set_user_ip6(&ctx, own);
        }
    }
    PROCEED
}

/// The pod that the context's socket belongs to, if its connection was captured.
#[inline(always)]
fn captured_in(ctx: &SockAddrContext) -> Option<&Pod> {
    dialled(ctx)?;
    // SAFETY: entries are replaced whole and freed after a grace period.
    unsafe { PODS.get(ctx.netns_cookie()) }
}
