//! tc ingress, on the interfaces of a pod that lead out of it: marks connections to the pod from outside, so that the pod does
//! not forward them.
//!
//! A pod may contain further network namespaces (a container engine, a virtual machine) and forward connections to them.
//! Those never look for a listener in the pod's netns, so the inbound program would not judge them. A rule in the pod's netns
//! delivers marked packets that are for no address of the netns to the netns itself: there the inbound program judges them
//! like all others, and the daemon refuses them.
//!
//! The program runs for every packet that arrives, but only in pods that have interfaces to nested namespaces. Connections that
//! the kernel has recorded, such as the node's probes, are not marked and may be forwarded. Neither are packets of connections
//! whose SYN the program has not seen: they may be answers to what a nested namespace has opened.

use auth_common::{FORWARD_MARK, FourTuple};
use aya_ebpf::{
    bindings::TC_ACT_UNSPEC,
    btf_maps::LruHashMap,
    macros::{btf_map, classifier},
    programs::TcContext,
};

use crate::{
    packet::{ACK, SYN, TcpPacket, Unreadable, tcp},
    shared::is_recorded,
};

/// Maximum number of connections that are followed. Only a refused connection needs its entry, for the moment of its
/// handshake.
const MAX_FOLLOWED: usize = 8192;

/// Connections whose SYN was marked: so are their other packets. The value is always 1.
#[btf_map]
static FOLLOWED: LruHashMap<FourTuple, u32, MAX_FOLLOWED> = LruHashMap::new();

#[classifier]
pub fn forward(ctx: TcContext) -> i32 {
    let mut packet = TcpPacket::EMPTY;
    let is_marked = match tcp(ctx.skb.skb, &mut packet) {
        Ok(true) => is_judged(&packet.connection, packet.flags),
        Ok(false) => false,
        Err(Unreadable) => true,
    };
    if is_marked {
        ctx.set_mark(FORWARD_MARK);
    }
    // Leave the packet to the programs and filters that follow.
    TC_ACT_UNSPEC
}

/// Whether a packet of `connection` is for the pod's inbound program to judge.
#[inline(always)]
fn is_judged(connection: &FourTuple, flags: u8) -> bool {
    if flags & (SYN | ACK) != SYN {
        return FOLLOWED.get_ptr(connection).is_some();
    }
    if is_recorded(connection) {
        // The same addresses and ports may have been refused before.
        let _ = FOLLOWED.remove(connection);
        return false;
    }
    // If this fails, the connection is not established: its next packet is forwarded to a socket that does not know it.
    let _ = FOLLOWED.insert(connection, 1, 0);
    true
}
