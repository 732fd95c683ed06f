//! sockops: before a SYN leaves, tell the daemon what a captured connection was dialling, under a key that the daemon
//! sees too; and tell the inbound program which SYN is the daemon's own, on its way to a pod's app. Both are taken back
//! when the connection never comes to be. What stays in the kernel, between two pods of this node, is `same_node`'s.
//!
//! Once established, the entry is the daemon's to remove, when it accepts. The app may be gone by then: what it sent
//! before it closed must still arrive.

use auth_common::{Address, Delivery, OUTBOUND_PORT, SocketKey, mapped};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::bpf_get_netns_cookie,
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    connect::words,
    maps::{DELIVERIES, PENDING, dialled, is_delivery},
    same_node::{self, flow_of},
};

const PROCEED: u32 = 1;
const AF_INET: u32 = 2;
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;

#[sock_ops]
pub fn established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(&ctx),
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB => {
            if let Some(flow) = flow_of(&ctx) {
                same_node::segment(&ctx, flow);
            }
        }
        _ => {}
    }
    PROCEED
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    if let Some(flow) = flow_of(ctx) {
        return same_node::connecting(ctx, flow);
    }
    // SAFETY: the context's own socket.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    // A map that is full, or no memory: the connection finds no entry and is refused.
    if to_the_daemon(ctx) {
        // SAFETY: as above.
        let Some(dialled) = (unsafe { dialled(sk) }) else {
            return;
        };
        let _ = PENDING.insert(key(ctx), dialled, 0);
    // SAFETY: as above.
    } else if unsafe { is_delivery(sk) } {
        let _ = DELIVERIES.insert(four(ctx, false), 1, 0);
    } else {
        return;
    }
    watch(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/// Has this program called for more of the socket.
#[inline(always)]
pub fn watch(ctx: &SockOpsContext, flag: u32) {
    // The flags belong to the socket, not to this program: keep what others have set.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | flag) as i32);
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    if let Some(flow) = flow_of(ctx) {
        return same_node::state_changed(ctx, flow);
    }
    if ctx.arg(1) != TCP_CLOSE {
        return;
    }
    if !to_the_daemon(ctx) {
        // Most are gone already, see `accepted`.
        let _ = DELIVERIES.remove(four(ctx, false));
    } else if ctx.arg(0) == TCP_SYN_SENT {
        let _ = PENDING.remove(key(ctx));
    }
}

/// A server's socket stands: what let it come about is not needed any more. Until then it is, for the client's ACK asks
/// for the listener again where the server's kernel answered with a SYN cookie.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let four = four(ctx, true);
    if !same_node::accepted(ctx, &four) {
        let _ = DELIVERIES.remove(four);
    }
}

#[inline(always)]
fn to_the_daemon(ctx: &SockOpsContext) -> bool {
    u32::from_be(ctx.remote_port()) == u32::from(OUTBOUND_PORT)
}

/// A connection's four, from its server's socket or its client's.
#[inline(always)]
pub fn four(ctx: &SockOpsContext, is_server: bool) -> Delivery {
    let (local, remote) = (local_address(ctx), remote_address(ctx));
    let (local_port, remote_port) = (ctx.local_port(), u32::from_be(ctx.remote_port()));
    let (client, server, client_port, server_port) = if is_server {
        (remote, local, remote_port, local_port)
    } else {
        (local, remote, local_port, remote_port)
    };
    Delivery {
        client,
        server,
        client_port,
        server_port,
    }
}

#[inline(always)]
fn remote_address(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.remote_ip4().to_ne_bytes());
    }
    // SAFETY: the context is the kernel's.
    words(unsafe { &raw const (*ctx.ops).remote_ip6 })
}

#[inline(always)]
fn key(ctx: &SockOpsContext) -> SocketKey {
    SocketKey {
        // SAFETY: the helper reads the socket of this context.
        netns_cookie: unsafe { bpf_get_netns_cookie(ctx.ops.cast()) },
        address: local_address(ctx),
        port: ctx.local_port(),
        padding: 0,
    }
}

#[inline(always)]
fn local_address(ctx: &SockOpsContext) -> Address {
    if ctx.family() == AF_INET {
        return mapped(ctx.local_ip4().to_ne_bytes());
    }
    // SAFETY: the context is the kernel's.
    words(unsafe { &raw const (*ctx.ops).local_ip6 })
}
