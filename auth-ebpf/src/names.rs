//! cgroup/getpeername and getsockname: an app whose connection was captured, or led to a service's pod on this node, sees
//! the addresses that it would see without us: the one it dialled, and its pod's own.

use auth_common::{Address, FLOW_SERVER, OUTBOUND_PORT, Pod, mapped};
use aya_ebpf::{
    bindings::bpf_sock_addr, helpers::bpf_get_netns_cookie, macros::cgroup_sock_addr,
    programs::SockAddrContext,
};

use crate::{
    connect::{LOOPBACK_V4, LOOPBACK_V6, set_user_ip6, user_ip6},
    maps::{PODS, dialled, flow},
};

const PROCEED: i32 = 1;
/// Of a pod that has begun to talk before anything said its address.
const UNKNOWN: Address = [0; 16];

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: the context and its socket are the kernel's; fields are accessed as the words the verifier asks for.
    unsafe {
        let peer = mapped((*sa).user_ip4.to_ne_bytes());
        if let Some((a, port)) = dialled_instead_of(sa, &peer) {
            (*sa).user_ip4 = u32::from_ne_bytes([a[12], a[13], a[14], a[15]]);
            (*sa).user_port = u32::from((port as u16).to_be());
        }
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: as in getpeername4.
    unsafe {
        if let Some((address, port)) = dialled_instead_of(sa, &user_ip6(sa)) {
            set_user_ip6(sa, address);
            (*sa).user_port = u32::from((port as u16).to_be());
        }
    }
    PROCEED
}

/// What the app dialled, where we led it to `peer` in its place.
#[inline(always)]
fn dialled_instead_of<'a>(sa: *const bpf_sock_addr, peer: &Address) -> Option<(&'a Address, u32)> {
    // SAFETY: as in getpeername4.
    unsafe {
        let sk = (*sa).__bindgen_anon_1.sk;
        let port = u32::from(u16::from_be((*sa).user_port as u16));
        if port == u32::from(OUTBOUND_PORT)
            && let Some(dialled) = dialled(sk)
        {
            return Some((&dialled.address, dialled.port));
        }
        let flow = flow(sk)?;
        let is_client = flow.role != FLOW_SERVER;
        if is_client && flow.endpoint_port == port && flow.endpoint == *peer {
            return Some((&flow.admitted.dialled, flow.admitted.dialled_port));
        }
    }
    None
}

#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: as in getpeername4.
    unsafe {
        if (*sa).user_ip4.to_ne_bytes() == LOOPBACK_V4
            && let Some(pod) = captured_in(&ctx)
            && pod.v4 != UNKNOWN
        {
            let a = &pod.v4;
            (*sa).user_ip4 = u32::from_ne_bytes([a[12], a[13], a[14], a[15]]);
        }
    }
    PROCEED
}

#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    const MAPPED_LOOPBACK: Address = mapped(LOOPBACK_V4);
    let sa = ctx.sock_addr;
    let address = user_ip6(sa);
    if (address == LOOPBACK_V6 || address == MAPPED_LOOPBACK)
        && let Some(pod) = captured_in(&ctx)
    {
        let own = if address == LOOPBACK_V6 {
            &pod.v6
        } else {
            &pod.v4
        };
        if *own != UNKNOWN {
            set_user_ip6(sa, own);
        }
    }
    PROCEED
}

/// The pod whose captured connection the context's socket is.
#[inline(always)]
fn captured_in<'a>(ctx: &SockAddrContext) -> Option<&'a Pod> {
    // SAFETY: the context's own socket; entries of pods are written once, at enrolment, and freed after a grace period.
    unsafe {
        dialled((*ctx.sock_addr).__bindgen_anon_1.sk)?;
        PODS.get(bpf_get_netns_cookie(ctx.sock_addr.cast()))
    }
}
