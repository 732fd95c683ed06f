//! tc ingress, on the interfaces of a pod that lead out of it: marks what opens a connection to the pod, so that the pod does
//! not forward it.
//!
//! A pod may contain further network namespaces (a container engine, a virtual machine) and forward connections to them.
//! Those never look for a listener in the pod's netns, so the inbound program does not judge them. A rule in the pod's netns
//! refuses marked packets that are for no address of the netns.
//!
//! The program runs for every packet that arrives. For all but SYNs it only reads the flags of the TCP header. Connections
//! that the kernel has recorded, such as the node's probes, are not marked and may be forwarded.

use auth_common::{Address, FORWARD_MARK, FourTuple, mapped};
use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, bpf_hdr_start_off::BPF_HDR_START_NET},
    helpers::generated::bpf_skb_load_bytes_relative,
    macros::classifier,
    programs::TcContext,
};

use crate::shared::{IPPROTO_TCP, is_recorded};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// Flags in byte 13 of a TCP header (RFC 9293 §3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Length in bytes of an IPv6 header without extensions (RFC 8200 §3).
const IPV6_HEADER: u32 = 40;
/// Maximum number of IPv6 extension headers that are read.
const MAX_EXTENSIONS: u32 = 8;

#[classifier]
pub fn forward(ctx: TcContext) -> i32 {
    if opens_connection(&ctx).unwrap_or(true) {
        ctx.set_mark(FORWARD_MARK);
    }
    // Leave the packet to the programs and filters that follow.
    TC_ACT_UNSPEC
}

/// The packet's headers end before what is read, or cannot be followed. Whatever it is, it may open a connection.
struct Unreadable;

/// Whether the packet opens a TCP connection that the kernel has not recorded.
#[inline(always)]
fn opens_connection(ctx: &TcContext) -> Result<bool, Unreadable> {
    // SAFETY: the kernel passed this context to the program.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    match u16::from_be(protocol as u16) {
        ETH_P_IP => opens_over_ipv4(ctx),
        ETH_P_IPV6 => opens_over_ipv6(ctx),
        _ => Ok(false),
    }
}

#[inline(always)]
fn opens_over_ipv4(ctx: &TcContext) -> Result<bool, Unreadable> {
    let header: [u8; 20] = load(ctx, 0)?;
    // Fragments after the first one contain no flags. Without the first one they are useless.
    let is_later_fragment = (u16::from_be_bytes([header[6], header[7]]) & 0x1fff) != 0;
    if u32::from(header[9]) != IPPROTO_TCP || is_later_fragment {
        return Ok(false);
    }
    let tcp = Tcp::load(ctx, u32::from(header[0] & 0xf) * 4)?;
    Ok(tcp.is_syn() && {
        let address =
            |at: usize| mapped([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        !is_recorded(&tcp.connection(address(12), address(16)))
    })
}

#[inline(always)]
fn opens_over_ipv6(ctx: &TcContext) -> Result<bool, Unreadable> {
    let header: [u8; IPV6_HEADER as usize] = load(ctx, 0)?;
    let mut next = header[6];
    let mut offset = IPV6_HEADER;
    for _ in 0..MAX_EXTENSIONS {
        // The numbers are protocols (IANA, "Protocol Numbers").
        let length = match next {
            6 => {
                let tcp = Tcp::load(ctx, offset)?;
                if !tcp.is_syn() {
                    return Ok(false);
                }
                let (client, server) = (load(ctx, 8)?, load(ctx, 24)?);
                return Ok(!is_recorded(&tcp.connection(client, server)));
            }
            // Hop-by-hop options, routing, destination options, mobility.
            0 | 43 | 60 | 135 => {
                let extension: [u8; 2] = load(ctx, offset)?;
                next = extension[0];
                (u32::from(extension[1]) + 1) * 8
            }
            // Fragment. As for IPv4, only the first one has the flags.
            44 => {
                let fragment: [u8; 4] = load(ctx, offset)?;
                if u16::from_be_bytes([fragment[2], fragment[3]]) & 0xfff8 != 0 {
                    return Ok(false);
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
            _ => return Ok(false),
        };
        offset += length;
    }
    Err(Unreadable)
}

/// The start of a TCP header: all that tells a connection.
struct Tcp([u8; 14]);

impl Tcp {
    #[inline(always)]
    fn load(ctx: &TcContext, offset: u32) -> Result<Self, Unreadable> {
        load(ctx, offset).map(Self)
    }

    #[inline(always)]
    fn is_syn(&self) -> bool {
        self.0[13] & (SYN | ACK) == SYN
    }

    #[inline(always)]
    fn connection(&self, client: Address, server: Address) -> FourTuple {
        let port = |at: usize| u32::from(u16::from_be_bytes([self.0[at], self.0[at + 1]]));
        FourTuple {
            client,
            server,
            client_port: port(0),
            server_port: port(2),
        }
    }
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
