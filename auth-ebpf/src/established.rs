//! sockops: records connections before their SYN leaves, and removes the records when the connections are established or fail.
//!
//! - A captured connection: what the app dialled goes to PENDING and, when the daemon's listener has the connection, from there
//!   to the socket that the daemon accepts. The app may have closed by then, but what it sent must still arrive.
//! - The daemon's connection to a pod's app from another pod of the node, and the node's own to a pod: the 4-tuple goes to
//!   DELIVERIES, so that the inbound program admits the SYN.
//! - A connection between two pods of this node that stays in the kernel: see [`crate::same_node`].
//!
//! Also notes on listeners that their netns has no verdict: see [`crate::gate`].

use auth_common::{Address, OUTBOUND_PORT, SocketKey};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PARSE_HDR_OPT_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    context::{
        SocketContext, TCP_CLOSE, enable_callbacks, four_tuple, local_address, remote_address,
        remote_port,
    },
    gate,
    maps::{DELIVERIES, PENDING, accepted_by_daemon, dialled, flow, is_admitted},
    same_node, shares,
};

/// Tells the kernel that the program succeeded. After 0 it would discard the program's `reply`.
const DONE: u32 = 1;

#[sock_ops]
pub fn established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => gate::listening(&ctx),
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
    let cookie = ctx.netns_cookie();
    // Without an entry the connection is refused.
    let is_recorded = if is_captured(ctx) {
        let Some(dialled) = dialled(ctx) else {
            return;
        };
        let key = pending_key(cookie, local_address(ctx), ctx.local_port());
        shares::insert(shares::connects(cookie), &PENDING, &key, dialled)
    } else if is_admitted(ctx) {
        let connection = four_tuple(ctx, false);
        shares::insert(
            shares::deliveries(cookie),
            &DELIVERIES,
            &connection,
            &cookie,
        )
    } else {
        return;
    };
    if is_recorded {
        enable_callbacks(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
    }
}

/// A client's socket changes its TCP state.
#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    // SAFETY: this program holds no other reference to the socket's entry.
    if let Some(flow) = unsafe { flow(ctx) } {
        return same_node::state_changed(ctx, flow);
    }
    if ctx.arg(1) != TCP_CLOSE {
        return;
    }
    let cookie = ctx.netns_cookie();
    // Usually `accepted` has removed it already.
    if is_captured(ctx) {
        let key = pending_key(cookie, local_address(ctx), ctx.local_port());
        shares::remove(|| shares::connects(cookie), &PENDING, &key);
    } else {
        let connection = four_tuple(ctx, false);
        shares::remove(|| shares::deliveries(cookie), &DELIVERIES, &connection);
    }
}

/// A server's socket is established: its record has served its purpose. It must stay until now because a server that
/// answers with SYN cookies looks for the listener again when the client's ACK arrives.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    if ctx.local_port() == u32::from(OUTBOUND_PORT) && accepted_captured(ctx) {
        return;
    }
    let connection = four_tuple(ctx, true);
    if same_node::accepted(ctx, &connection) {
        return;
    }
    // SAFETY: a single word, which does not change.
    if let Some(cookie) = unsafe { DELIVERIES.get(connection) } {
        let cookie = *cookie;
        shares::remove(|| shares::deliveries(cookie), &DELIVERIES, &connection);
    }
}

/// Moves what the app dialled from PENDING to the socket that the daemon will accept. Returns whether the listener is the
/// daemon's.
#[inline(always)]
fn accepted_captured(ctx: &SockOpsContext) -> bool {
    // SAFETY: nothing else refers to the entry before the socket is accepted.
    let Some(accepted) = (unsafe { accepted_by_daemon(ctx).as_mut() }) else {
        return false;
    };
    let cookie = ctx.netns_cookie();
    let key = pending_key(cookie, remote_address(ctx), remote_port(ctx));
    // SAFETY: an entry does not change while its connection exists.
    if let Some(dialled) = unsafe { PENDING.get(key) } {
        *accepted = *dialled;
        shares::remove(|| shares::connects(cookie), &PENDING, &key);
    }
    true
}

/// Whether the socket connects to the daemon's outbound listener.
#[inline(always)]
fn is_captured(ctx: &SockOpsContext) -> bool {
    remote_port(ctx) == u32::from(OUTBOUND_PORT)
}

/// Key in PENDING of a captured connection from `address` and `port`.
#[inline(always)]
fn pending_key(netns_cookie: u64, address: Address, port: u32) -> SocketKey {
    SocketKey {
        netns_cookie,
        address,
        port,
        padding: 0,
    }
}
