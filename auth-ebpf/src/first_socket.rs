//! cgroup/sock_create: tells the daemon of sockets in namespaces that it does not know, so that it finds a new pod when the
//! pod begins to talk.
//!
//! On the way of every socket of IPv4 and IPv6 on the node. The machine's own and those of enrolled pods cost a lookup at
//! most; any other origin is told of once a second at most.

use auth_common::{FirstSocket, SocketOrigin, TELL_AGAIN_NANOSECONDS};
use aya_ebpf::{
    bindings::bpf_sock,
    helpers::{bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_ktime_get_ns},
    macros::cgroup_sock,
    programs::SockContext,
};

use crate::maps::{FIRST_SOCKETS, PODS, TOLD};

const PROCEED: i32 = 1;

#[cgroup_sock(sock_create)]
pub fn first_socket(ctx: SockContext) -> i32 {
    tell(ctx.sock);
    PROCEED
}

#[inline(always)]
fn tell(sk: *mut bpf_sock) {
    // SAFETY: the helper reads the socket of this context; without one it gives the cookie of the machine's first
    // namespace.
    let (cookie, machines) = unsafe {
        (
            bpf_get_netns_cookie(sk.cast()),
            bpf_get_netns_cookie(core::ptr::null_mut()),
        )
    };
    // SAFETY: entries are replaced whole and freed after a grace period; this asks only whether there is one.
    if cookie == machines || unsafe { PODS.get(cookie) }.is_some() {
        return;
    }
    let origin = SocketOrigin {
        netns_cookie: cookie,
        // SAFETY: a helper without arguments.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
    };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a plain word; an entry that is reused meanwhile costs or saves an event.
    if let Some(told) = unsafe { TOLD.get(origin) }
        && now.wrapping_sub(*told) < TELL_AGAIN_NANOSECONDS
    {
        return;
    }
    let event = FirstSocket {
        netns_cookie: cookie,
        at_nanoseconds: now,
    };
    // A ring that is full: the daemon is woken already, and the next socket tries again.
    if FIRST_SOCKETS.output(event, 0).is_ok() {
        let _ = TOLD.insert(origin, now, 0);
    }
}
