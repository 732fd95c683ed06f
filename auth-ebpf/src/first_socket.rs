//! cgroup/sock_create: reports sockets in network namespaces that are not enrolled, so that the daemon finds a new pod as
//! soon as the pod uses the network, and notes on the TCP sockets of pods there that the netns has no verdict yet: see
//! [`crate::gate`]. In those that are enrolled, refuses what [`crate::non_tcp`] says.
//!
//! This program runs for every IPv4 and IPv6 socket on the node. A socket of an enrolled pod costs one map lookup, one of the
//! node's own netns or of a pod outside the mesh two; any other origin is reported at most once a second, and those of one
//! container together [`REPORTS_PER_INTERVAL`] times.

use auth_common::{FirstSocket, REPORT_INTERVAL_NANOSECONDS, REPORTS_PER_INTERVAL, SocketOrigin};
use aya_ebpf::{
    helpers::{bpf_get_current_cgroup_id, bpf_get_netns_cookie},
    macros::cgroup_sock,
    programs::SockContext,
};

use crate::{
    context::{IPPROTO_TCP, PROCEED, REFUSE, SocketContext, now},
    gate,
    maps::{FIRST_SOCKETS, NODE, OUTSIDE, PODS, REPORTED},
    node_connect::is_in_a_pod,
    non_tcp,
};

#[cgroup_sock(sock_create)]
pub fn first_socket(ctx: SockContext) -> i32 {
    let cookie = ctx.netns_cookie();
    // SAFETY: the entry is not read, only whether there is one.
    let is_enrolled = unsafe { PODS.get(cookie) }.is_some();
    let refused = if is_enrolled {
        non_tcp::refuses_sockets(protocol(&ctx))
    // SAFETY: as above.
    } else if unsafe { OUTSIDE.get(cookie) }.is_none() {
        report(cookie);
        protocol(&ctx) == IPPROTO_TCP && !gate::created(&ctx, cookie)
    } else {
        false
    };
    if refused { REFUSE } else { PROCEED }
}

/// The socket's protocol.
#[inline(always)]
fn protocol(ctx: &SockContext) -> u32 {
    // SAFETY: the kernel passed this context to the program.
    unsafe { (*ctx.sock).protocol }
}

#[inline(always)]
fn report(cookie: u64) {
    // SAFETY: without a context the helper returns the cookie of the node's initial netns.
    let node_cookie = unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) };
    if cookie == node_cookie {
        return;
    }
    let origin = SocketOrigin {
        netns_cookie: cookie,
        // SAFETY: a helper without arguments.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
    };
    let now = now();
    if last(&origin).is_some_and(|last| now.wrapping_sub(last) < REPORT_INTERVAL_NANOSECONDS) {
        return;
    }
    let of_pod = NODE.get(0).is_some_and(is_in_a_pod);
    let of_cgroup = SocketOrigin {
        netns_cookie: 0,
        ..origin
    };
    let due = last(&of_cgroup).map_or(now, |due| due.max(now));
    if of_pod && due >= now + REPORT_INTERVAL_NANOSECONDS {
        return;
    }
    let event = FirstSocket {
        netns_cookie: cookie,
        at_nanoseconds: now,
        of_pod: of_pod.into(),
    };
    // If the ring is full, the daemon has events to read already, and the origin's next socket retries.
    if FIRST_SOCKETS.output(event, 0).is_err() {
        return;
    }
    let _ = REPORTED.insert(origin, now, 0);
    if of_pod {
        let due = due + REPORT_INTERVAL_NANOSECONDS / REPORTS_PER_INTERVAL;
        let _ = REPORTED.insert(of_cgroup, due, 0);
    }
}

/// The time in an entry of REPORTED.
#[inline(always)]
fn last(origin: &SocketOrigin) -> Option<u64> {
    // SAFETY: a single word. If the kernel reuses the entry meanwhile, one report is sent too many or too few.
    unsafe { REPORTED.get(origin) }.copied()
}
