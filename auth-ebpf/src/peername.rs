//! cgroup/getpeername4 and getpeername6: an app whose connection was captured sees the address that it dialled.

use auth_common::OUTBOUND_PORT;
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{connect::set_user_ip6, maps::dialled};

const PROCEED: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: the context and its socket are the kernel's; fields are accessed as the words the verifier asks for.
    unsafe {
        if at_listener((*sa).user_port)
            && let Some(dialled) = dialled((*sa).__bindgen_anon_1.sk)
        {
            let a = &dialled.address;
            (*sa).user_ip4 = u32::from_ne_bytes([a[12], a[13], a[14], a[15]]);
            (*sa).user_port = u32::from((dialled.port as u16).to_be());
        }
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    // SAFETY: as in getpeername4.
    unsafe {
        if at_listener((*sa).user_port)
            && let Some(dialled) = dialled((*sa).__bindgen_anon_1.sk)
        {
            set_user_ip6(sa, &dialled.address);
            (*sa).user_port = u32::from((dialled.port as u16).to_be());
        }
    }
    PROCEED
}

#[inline(always)]
fn at_listener(user_port: u32) -> bool {
    user_port as u16 == OUTBOUND_PORT.to_be()
}
