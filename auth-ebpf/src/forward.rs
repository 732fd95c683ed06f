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

use auth_common::{Address, FORWARD_MARK, FourTuple, mapped};
use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, bpf_hdr_start_off::BPF_HDR_START_NET},
    btf_maps::LruHashMap,
    helpers::generated::bpf_skb_load_bytes_relative,
    macros::{btf_map, classifier},
    programs::TcContext,
};

use crate::shared::is_recorded;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// The protocol's number (IANA, "Protocol Numbers").
const TCP: u8 = 6;
/// Flags in byte 13 of a TCP header (RFC 9293 §3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const IPV4_HEADER: usize = 20;
/// Length in bytes of an IPv6 header without extensions (RFC 8200 §3).
const IPV6_HEADER: usize = 40;
/// Maximum number of IPv6 extension headers that are read.
const MAX_EXTENSIONS: u32 = 8;
/// Maximum number of connections that are followed. Only a refused connection needs its entry, for the moment of its
/// handshake.
const MAX_FOLLOWED: usize = 8192;

/// Connections whose SYN was marked: so are their other packets. The value is always 1.
#[btf_map]
static FOLLOWED: LruHashMap<FourTuple, u32, MAX_FOLLOWED> = LruHashMap::new();

#[classifier]
pub fn forward(ctx: TcContext) -> i32 {
    let is_marked = match tcp(&ctx) {
        Ok(Some((connection, flags))) => is_judged(&connection, flags),
        Ok(None) => false,
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

/// The packet's headers end before what is read, or cannot be followed. Whatever it is, it may open a connection.
struct Unreadable;

/// Returns the connection and the flags of a TCP packet. `None` if it is none, or not the first fragment of one: without the
/// first one the others are useless.
#[inline(always)]
fn tcp(ctx: &TcContext) -> Result<Option<(FourTuple, u8)>, Unreadable> {
    // SAFETY: the kernel passed this context to the program.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    match u16::from_be(protocol as u16) {
        ETH_P_IP => tcp_over_ipv4(ctx),
        ETH_P_IPV6 => tcp_over_ipv6(ctx),
        _ => Ok(None),
    }
}

#[inline(always)]
fn tcp_over_ipv4(ctx: &TcContext) -> Result<Option<(FourTuple, u8)>, Unreadable> {
    let header: [u8; IPV4_HEADER] = load(ctx, 0)?;
    let is_later_fragment = (u16::from_be_bytes([header[6], header[7]]) & 0x1fff) != 0;
    if header[9] != TCP || is_later_fragment {
        return Ok(None);
    }
    let tcp: [u8; 14] = load(ctx, u32::from(header[0] & 0xf) * 4)?;
    let address = |at: usize| mapped([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    Ok(Some(connection(&tcp, address(12), address(16))))
}

#[inline(always)]
fn tcp_over_ipv6(ctx: &TcContext) -> Result<Option<(FourTuple, u8)>, Unreadable> {
    let header: [u8; IPV6_HEADER] = load(ctx, 0)?;
    let mut next = header[6];
    let mut offset = IPV6_HEADER as u32;
    for _ in 0..MAX_EXTENSIONS {
        let length = match next {
            TCP => {
                let tcp: [u8; 14] = load(ctx, offset)?;
                return Ok(Some(connection(&tcp, load(ctx, 8)?, load(ctx, 24)?)));
            }
            // Hop-by-hop options, routing, destination options, mobility.
            0 | 43 | 60 | 135 => {
                let extension: [u8; 2] = load(ctx, offset)?;
                next = extension[0];
                (u32::from(extension[1]) + 1) * 8
            }
            // Fragment.
            44 => {
                let fragment: [u8; 4] = load(ctx, offset)?;
                if u16::from_be_bytes([fragment[2], fragment[3]]) & 0xfff8 != 0 {
                    return Ok(None);
                }
                next = fragment[0];
                8
            }
            // Authentication (RFC 4302 §2.2).
            51 => {
                let extension: [u8; 2] = load(ctx, offset)?;
                next = extension[0];
                (u32::from(extension[1]) + 2) * 4
            }
            _ => return Ok(None),
        };
        offset += length;
    }
    Err(Unreadable)
}

/// The connection and the flags in the start of a TCP header.
#[inline(always)]
fn connection(tcp: &[u8; 14], client: Address, server: Address) -> (FourTuple, u8) {
    let port = |at: usize| u32::from(u16::from_be_bytes([tcp[at], tcp[at + 1]]));
    let connection = FourTuple {
        client,
        server,
        client_port: port(0),
        server_port: port(2),
    };
    (connection, tcp[13])
}

/// Reads from the packet, at `offset` bytes from its IP header.
#[inline(always)]
fn load<const N: usize>(ctx: &TcContext, offset: u32) -> Result<[u8; N], Unreadable> {
    let mut bytes = [0; N];
    // SAFETY: the kernel passed this context to the program, and `bytes` is writable for the length that is passed with it.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
            BPF_HDR_START_NET,
        )
    };
    if result == 0 {
        Ok(bytes)
    } else {
        Err(Unreadable)
    }
}
