//! sockops: records connections before their SYN leaves, and removes the records of those that fail.
//!
//! - A captured connection: what the app dialled goes to PENDING, under a key that the accepting daemon can compute. After
//!   the connection is established the daemon removes the entry when it accepts. The app may have closed by then, but
//!   what it sent must still arrive.
//! - The daemon's connection to a pod's app, and the node's own to a pod: the 4-tuple goes to DELIVERIES, so that the
//!   inbound program admits the SYN.
//! - A connection between two pods of this node that stays in the kernel: see [`crate::same_node`].

use auth_common::{OUTBOUND_PORT, SocketKey};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    context::{SocketContext, TCP_CLOSE, enable_callbacks, four_tuple, local_address, remote_port},
    maps::{DELIVERIES, PENDING, dialled, flow, is_admitted},
    same_node,
};

/// Tells the kernel that the program succeeded. After 0 it would discard the program's `reply`.
const DONE: u32 = 1;
const TCP_SYN_SENT: u32 = 2;

#[sock_ops]
pub fn established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(&ctx),
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB => {
            // SAFETY: this program holds no other reference to the socket's entry.
            if let Some(flow) = unsafe { flow(&ctx) } {
                same_node::segment(&ctx, flow);
            }
        }
        _ => {}
    }
    DONE
}

/// A client's socket is about to send its SYN.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    // SAFETY: this program holds no other reference to the socket's entry.
    if let Some(flow) = unsafe { flow(ctx) } {
        return same_node::connecting(ctx, flow);
    }
    // An insert fails if the map is full or memory is short. The connection then has no entry and is refused.
    if is_captured(ctx) {
        let Some(dialled) = dialled(ctx) else {
            return;
        };
        let _ = PENDING.insert(pending_key(ctx), dialled, 0);
    } else if is_admitted(ctx) {
        let _ = DELIVERIES.insert(four_tuple(ctx, false), 1, 0);
    } else {
        return;
    }
    enable_callbacks(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

/// A client's socket changes its TCP state.
#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    // SAFETY: this program holds no other reference to the socket's entry.
    if let Some(flow) = unsafe { flow(ctx) } {
        return same_node::state_changed(ctx, flow);
    }
    let (from, to) = (ctx.arg(0), ctx.arg(1));
    if to != TCP_CLOSE {
        return;
    }
    if !is_captured(ctx) {
        // Usually `accepted` has removed it already.
        let _ = DELIVERIES.remove(four_tuple(ctx, false));
    } else if from == TCP_SYN_SENT {
        let _ = PENDING.remove(pending_key(ctx));
    }
}

/// A server's socket is established: its record has served its purpose. It must stay until now because a server that
/// answers with SYN cookies looks for the listener again when the client's ACK arrives.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let connection = four_tuple(ctx, true);
    if !same_node::accepted(ctx, &connection) {
        let _ = DELIVERIES.remove(connection);
    }
}

/// Whether the socket connects to the daemon's outbound listener.
#[inline(always)]
fn is_captured(ctx: &SockOpsContext) -> bool {
    remote_port(ctx) == u32::from(OUTBOUND_PORT)
}

/// Key of a captured connection in PENDING.
#[inline(always)]
fn pending_key(ctx: &SockOpsContext) -> SocketKey {
    SocketKey {
        netns_cookie: ctx.netns_cookie(),
        address: local_address(ctx),
        port: ctx.local_port(),
        padding: 0,
    }
}
