//! sk_lookup, in each enrolled pod's netns: steers a SYN for any port of the pod to its tunnel listener, depending on who
//! sent it.
//!
//! The program runs when the kernel looks for a listener, never for an established connection. It leaves the choice to the
//! kernel for what the pod sends to itself, for the daemon's connections to the app, and for connections that the kernel
//! has recorded leaving another pod of this node under a verdict.

use auth_common::{ANY_ADDRESS, Address, FourTuple, Inbound, MeshKind, mapped};
use aya_ebpf::{macros::sk_lookup, programs::SkLookupContext};

use crate::{
    context::{AF_INET, IPPROTO_TCP, read_address},
    maps::{ADMITTED, DELIVERIES, INBOUND, TUNNELS, mesh_kind},
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
/// The loopback is the first interface of every netns.
const LOOPBACK_IFINDEX: u32 = 1;

#[sk_lookup]
pub fn inbound(ctx: SkLookupContext) -> u32 {
    // SAFETY: the kernel passed this context to the program.
    let (protocol, ifindex) = unsafe { ((*ctx.lookup).protocol, (*ctx.lookup).ingress_ifindex) };
    if protocol != IPPROTO_TCP || ifindex == LOOPBACK_IFINDEX {
        return SK_PASS;
    }
    let (local, remote) = addresses(&ctx);
    // A packet from the pod to its own address may arrive with the interface of that address instead of the loopback
    // (ip_route_output, ip6_rcv_core). Someone else who forges that source gets no answer: replies stay in the pod.
    if local == remote || is_recorded(&ctx, local, remote) {
        return SK_PASS;
    }
    // SAFETY: single words, which are replaced whole.
    let mode = unsafe { INBOUND.get(local).or_else(|| INBOUND.get(ANY_ADDRESS)) };
    let Some(mode) = mode else {
        return SK_DROP;
    };
    match mesh_kind(remote) {
        Some(kind) if kind == MeshKind::Node as u32 => return SK_PASS,
        Some(kind)
            if kind != MeshKind::Outside as u32 && kind != MeshKind::ServiceNetwork as u32 => {}
        // Of no mesh pod.
        _ if *mode == Inbound::Permissive as u32 => return SK_PASS,
        _ => {}
    }
    // Without a listener no daemon is running: the connection is refused rather than passed to the app.
    match TUNNELS.redirect_sk_lookup(&ctx, local, 0) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}

/// Whether the connection is the daemon's to the app, or one between two pods of this node under a verdict.
#[inline(always)]
fn is_recorded(ctx: &SkLookupContext, local: Address, remote: Address) -> bool {
    // SAFETY: the kernel passed this context to the program.
    let (client_port, server_port) =
        unsafe { ((*ctx.lookup).remote_port, (*ctx.lookup).local_port) };
    let connection = FourTuple {
        client: remote,
        server: local,
        // In network byte order, unlike the local port.
        client_port: u32::from(u16::from_be(client_port)),
        server_port,
    };
    DELIVERIES.get_ptr(connection).is_some() || ADMITTED.get_ptr(connection).is_some()
}

/// The local and the remote address.
#[inline(always)]
fn addresses(ctx: &SkLookupContext) -> (Address, Address) {
    let lookup = ctx.lookup;
    // SAFETY: the kernel passed this context to the program.
    unsafe {
        if (*lookup).family == AF_INET {
            (
                mapped((*lookup).local_ip4.to_ne_bytes()),
                mapped((*lookup).remote_ip4.to_ne_bytes()),
            )
        } else {
            (
                read_address(&raw const (*lookup).local_ip6),
                read_address(&raw const (*lookup).remote_ip6),
            )
        }
    }
}
