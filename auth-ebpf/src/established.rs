//! sockops: before a SYN leaves, tell the daemon what a captured connection was dialling, under a key that the daemon
//! sees too; and tell the inbound program which SYN is the daemon's own, on its way to a pod's app. Both are taken back
//! when the connection never comes to be.
//!
//! Once established, the entry is the daemon's to remove, when it accepts. The app may be gone by then: what it sent
//! before it closed must still arrive.

use auth_common::{Address, Delivery, OUTBOUND_PORT, SocketKey, mapped};
use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB},
    helpers::bpf_get_netns_cookie,
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    connect::words,
    maps::{DELIVERIES, PENDING, dialled, is_delivery},
};

const PROCEED: u32 = 1;
const AF_INET: u32 = 2;
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;

#[sock_ops]
pub fn established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(&ctx),
        _ => {}
    }
    PROCEED
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
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
        let _ = DELIVERIES.insert(delivery(ctx), 1, 0);
    } else {
        return;
    }
    // The flags belong to the socket, not to this program: keep what others have set.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    if ctx.arg(0) != TCP_SYN_SENT {
        return;
    }
    if !to_the_daemon(ctx) {
        // It stands, or never will: either way its SYN has done its work.
        let _ = DELIVERIES.remove(delivery(ctx));
    } else if ctx.arg(1) == TCP_CLOSE {
        let _ = PENDING.remove(key(ctx));
    }
}

#[inline(always)]
fn to_the_daemon(ctx: &SockOpsContext) -> bool {
    u32::from_be(ctx.remote_port()) == u32::from(OUTBOUND_PORT)
}

#[inline(always)]
fn delivery(ctx: &SockOpsContext) -> Delivery {
    Delivery {
        client: local_address(ctx),
        server: remote_address(ctx),
        client_port: ctx.local_port(),
        server_port: u32::from_be(ctx.remote_port()),
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
