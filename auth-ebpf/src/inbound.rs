//! sk_lookup, in each enrolled pod's netns: steers a SYN for any address and port of the netns to the pod's tunnel listener,
//! depending on who sent it.
//!
//! This is an object of its own, of which the daemon loads one instance for each enrolled netns, because an sk_lookup
//! program cannot tell which netns it runs in. The instance has two maps of its own, and shares the others. So every SYN is
//! judged by its netns, and not by its destination address, which a pod can have several of, and two pods may both have.
//!
//! The program runs when the kernel looks for a listener, never for an established connection. It leaves the choice to the
//! kernel for what arrives on the loopback, from the pod itself or from the daemon in the pod's netns; for connections that
//! the kernel has recorded as the node's own, or as the daemon's from another pod of the node; and for those that it has
//! recorded leaving another pod of the node under a verdict.

#![no_std]
#![no_main]

mod license;
mod shared;

use auth_common::{Address, FourTuple, Inbound, MeshKind, mapped};
use aya_ebpf::{
    btf_maps::{Array, SockMap},
    macros::{btf_map, sk_lookup},
    programs::SkLookupContext,
};

use shared::{AF_INET, IPPROTO_TCP, is_recorded, mesh_kind, read_address};

/// The pod's `Inbound` mode. It outlives the daemon.
#[btf_map]
static MODE: Array<u32, 1> = Array::new();

/// The pod's tunnel listener. It is removed with the listener's socket, so without a daemon the pod refuses.
#[btf_map]
static TUNNEL: SockMap<1> = SockMap::new();

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
    if local == remote || is_recorded(&connection(&ctx, local, remote)) {
        return SK_PASS;
    }
    let is_permissive = MODE
        .get(0)
        .is_some_and(|mode| *mode == Inbound::Permissive as u32);
    if is_permissive && !is_from_the_mesh(remote) {
        return SK_PASS;
    }
    // Without a listener no daemon is running: the connection is refused rather than passed to the app.
    match TUNNEL.redirect_sk_lookup(&ctx, 0, 0) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}

/// Whether a caller at `address` may be one that uses the tunnel.
#[inline(always)]
fn is_from_the_mesh(address: Address) -> bool {
    mesh_kind(address).is_some_and(MeshKind::may_call)
}

/// The connection that the packet opens.
#[inline(always)]
fn connection(ctx: &SkLookupContext, local: Address, remote: Address) -> FourTuple {
    // SAFETY: the kernel passed this context to the program.
    let (client_port, server_port) =
        unsafe { ((*ctx.lookup).remote_port, (*ctx.lookup).local_port) };
    FourTuple {
        client: remote,
        server: local,
        // In network byte order, unlike the local port.
        client_port: u32::from(u16::from_be(client_port)),
        server_port,
    }
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
