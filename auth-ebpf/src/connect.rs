//! cgroup/connect4 and connect6: redirect a pod's connection to a mesh address to the daemon's listener on the pod's
//! loopback or, under a verdict of the daemon, straight to a pod of the same node.
//!
//! These programs run for every connect on the node, so the cheap checks come first: not TCP, not an enrolled pod, not a
//! mesh address. Such a connect takes the kernel's own path and leaves no entry in any map.

use auth_common::{Address, Dialled, NEIGHBOUR, OUTBOUND_PORT, Verdict};
use aya_ebpf::{helpers::bpf_setsockopt, macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{
    context::{
        IPPROTO_TCP, LOOPBACK_V4, LOOPBACK_V6, PROCEED, REFUSE, SocketContext, is_mapped,
        set_user_ip4, set_user_ip6, set_user_port, user_ip4, user_ip6, user_port,
    },
    exposed, gate,
    maps::{BYPASS, DIALLED, FLOWS, PODS, dialled, flow_or_closed, mesh_kind},
    node_connect, non_tcp, same_node, shares,
};

const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let (address, port) = match route(&ctx, &user_ip4(&ctx)) {
        Route::Ignore => return PROCEED,
        Route::Refuse => return REFUSE,
        Route::Capture => (LOOPBACK_V4, u32::from(OUTBOUND_PORT)),
        Route::SameNode(verdict) => (verdict.endpoint, verdict.port),
    };
    set_user_ip4(&ctx, &address);
    set_user_port(&ctx, port);
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let destination = user_ip6(&ctx);
    let (address, port) = match route(&ctx, &destination) {
        Route::Ignore => return PROCEED,
        Route::Refuse => return REFUSE,
        Route::Capture if is_mapped(&destination) => (LOOPBACK_V4, u32::from(OUTBOUND_PORT)),
        Route::Capture => (LOOPBACK_V6, u32::from(OUTBOUND_PORT)),
        Route::SameNode(verdict) => (verdict.endpoint, verdict.port),
    };
    set_user_ip6(&ctx, &address);
    set_user_port(&ctx, port);
    PROCEED
}

enum Route {
    /// Not a connection of the mesh: takes the kernel's own path.
    Ignore,
    /// A connection of the mesh that cannot be captured, or that exceeds the pod's share: fails, and is never sent in plaintext.
    Refuse,
    /// Goes to the daemon's listener.
    Capture,
    /// Goes to the verdict's endpoint, a pod of this node, without the daemon.
    SameNode(&'static Verdict),
}

#[inline(always)]
fn route(ctx: &SockAddrContext, destination: &Address) -> Route {
    // SAFETY: the kernel passed this context to the program.
    if unsafe { (*ctx.sock_addr).protocol } != IPPROTO_TCP {
        return match non_tcp::refuses_datagrams(ctx, destination) {
            true => Route::Refuse,
            false => Route::Ignore,
        };
    }
    let cookie = ctx.netns_cookie();
    // SAFETY: entries are replaced whole and freed after a grace period.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        if gate::refuses_connect(cookie, destination, user_port(ctx)) {
            return Route::Refuse;
        }
        node_connect::record(ctx, cookie, destination);
        return Route::Ignore;
    };
    let port = user_port(ctx);
    // SAFETY: the kernel passed this context to the program. The entry is a single word.
    if let Some(kind) = unsafe { BYPASS.get_ptr_mut(ctx).as_ref() } {
        if *kind == NEIGHBOUR && !shares::admits(shares::deliveries(cookie)) {
            return Route::Refuse;
        }
        return Route::Ignore;
    }
    // An app may dial again on a socket whose connect failed: drop what the socket holds from the previous attempt.
    if dialled(ctx).is_some() {
        // SAFETY: the context's socket, which is not null since it has storage.
        let _ = unsafe { DIALLED.delete(ctx.socket()) };
    }
    // SAFETY: this program holds no other reference to the socket's entry.
    if let Some(flow) = unsafe { flow_or_closed(ctx) } {
        // During a takeover the programs of both daemons run: the other one may have redirected this connect already.
        if let Some(verdict) = same_node::already_redirected(flow, cookie, destination, port) {
            return Route::SameNode(verdict);
        }
        // SAFETY: the context's socket, which is not null since it has storage.
        let _ = unsafe { FLOWS.delete(ctx.socket()) };
    }
    let captured = match mesh_kind(*destination) {
        Some(kind) => exposed::is_captured(kind, destination, port),
        None => false,
    };
    if !captured || *destination == pod.v4 || *destination == pod.v6 {
        return Route::Ignore;
    }
    if pod.refused != 0 || !shares::admits(shares::connects(cookie)) {
        return Route::Refuse;
    }
    if let Some(verdict) = same_node::redirect(ctx, cookie, pod, destination, port) {
        return Route::SameNode(verdict);
    }
    let mut entry = Dialled {
        address: *destination,
        port,
    };
    // SAFETY: the kernel passed this context to the program, and `entry` has the map's value type.
    if unsafe { DIALLED.get_or_insert_ptr_mut(ctx, Some(&mut entry)) }.is_null() {
        return Route::Refuse;
    }
    match unbind_interface(ctx) {
        Ok(()) => Route::Capture,
        Err(()) => Route::Refuse,
    }
}

/// Clears SO_BINDTODEVICE of the app's socket, if it is set: the daemon's listener is on another interface. A captured
/// connection sends no packets through the interface that the app chose.
#[inline(always)]
fn unbind_interface(ctx: &SockAddrContext) -> Result<(), ()> {
    // SAFETY: the kernel passed this context to the program, and its socket is never null in this hook.
    let bound = unsafe { (*ctx.socket()).bound_dev_if };
    if bound == 0 {
        return Ok(());
    }
    let mut no_name = [0_u8; 4];
    // SAFETY: `no_name` is readable for the length that is passed with it.
    let result = unsafe {
        bpf_setsockopt(
            ctx.sock_addr.cast(),
            SOL_SOCKET,
            SO_BINDTODEVICE,
            (&raw mut no_name).cast(),
            size_of_val(&no_name) as i32,
        )
    };
    if result == 0 { Ok(()) } else { Err(()) }
}
