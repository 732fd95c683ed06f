//! sk_lookup, in each enrolled pod's netns: a SYN for any port of the pod goes to its tunnel listener, by who sends it.
//!
//! Runs when a SYN looks for a listener, never on an established connection. What the pod sends to itself passes, and so
//! do the daemon on its way to the app, and whom the kernel itself has seen dial from another pod of this node.

use auth_common::{ANY_ADDRESS, Address, Delivery, Inbound, MeshKind, mapped};
use aya_ebpf::{bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};

use crate::{
    connect::words,
    maps::{ADMITTED, DELIVERIES, INBOUND, TUNNELS, mesh_kind},
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
/// The loopback is the first interface of every netns.
const LOOPBACK_IFINDEX: u32 = 1;

#[sk_lookup]
pub fn inbound(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: the context is the kernel's; fields are read as the words the verifier asks for.
    let (protocol, ifindex) = unsafe { ((*lookup).protocol, (*lookup).ingress_ifindex) };
    if protocol != IPPROTO_TCP || ifindex == LOOPBACK_IFINDEX {
        return SK_PASS;
    }
    let (local, remote) = addresses(lookup);
    // The kernel gives what a pod sends to its own address for what came by the address's interface (ip_route_output,
    // ip6_rcv_core). From outside nobody gets an answer there: it goes to the pod itself.
    if local == remote || is_expected(lookup, local, remote) {
        return SK_PASS;
    }
    // SAFETY: plain words, replaced whole.
    let mode = unsafe { INBOUND.get(local).or_else(|| INBOUND.get(ANY_ADDRESS)) };
    let Some(mode) = mode else {
        return SK_DROP;
    };
    match mesh_kind(remote) {
        Some(kind) if kind == MeshKind::Node as u32 => return SK_PASS,
        Some(_) => {}
        None if *mode == Inbound::Permissive as u32 => return SK_PASS,
        None => {}
    }
    // No listener: the daemon is gone, and nothing passes in its place.
    match TUNNELS.redirect_sk_lookup(&ctx, local, 0) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}

/// Whether this SYN is the daemon's, on its way to the app, or of a connection that stays in the kernel.
#[inline(always)]
fn is_expected(lookup: *const bpf_sk_lookup, local: Address, remote: Address) -> bool {
    // SAFETY: the context is the kernel's.
    let (client_port, server_port) = unsafe { ((*lookup).remote_port, (*lookup).local_port) };
    let key = Delivery {
        client: remote,
        server: local,
        client_port: u32::from(u16::from_be(client_port)),
        server_port,
    };
    DELIVERIES.get_ptr(key).is_some() || ADMITTED.get_ptr(key).is_some()
}

#[inline(always)]
fn addresses(lookup: *const bpf_sk_lookup) -> (Address, Address) {
    // SAFETY: the context is the kernel's; fields are read as the words the verifier asks for.
    unsafe {
        if (*lookup).family == AF_INET {
            (
                mapped((*lookup).local_ip4.to_ne_bytes()),
                mapped((*lookup).remote_ip4.to_ne_bytes()),
            )
        } else {
            (
                words(&raw const (*lookup).local_ip6),
                words(&raw const (*lookup).remote_ip6),
            )
        }
    }
}
