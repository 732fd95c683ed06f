//! Reads the TCP headers of packets, for programs that see packets.

use auth_common::{Address, FourTuple, mapped};
use aya_ebpf::{
    bindings::{__sk_buff, bpf_hdr_start_off::BPF_HDR_START_NET},
    helpers::generated::bpf_skb_load_bytes_relative,
};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// The protocol's number (IANA, "Protocol Numbers").
pub const TCP: u8 = 6;
/// Flags in byte 13 of a TCP header (RFC 9293 §3.1).
pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
const IPV4_HEADER: usize = 20;
/// Length in bytes of an IPv6 header without extensions (RFC 8200 §3).
const IPV6_HEADER: usize = 40;
/// Maximum number of IPv6 extension headers that are read.
const MAX_EXTENSIONS: u32 = 8;

/// The packet's headers end before what is read, or cannot be followed. Whatever it is, it may open a connection.
pub struct Unreadable;

/// What is read from a TCP packet.
pub struct TcpPacket {
    /// From the sender to the receiver.
    pub connection: FourTuple,
    pub flags: u8,
}

impl TcpPacket {
    /// For [`tcp`] to fill.
    pub const EMPTY: Self = Self {
        connection: FourTuple {
            client: [0; 16],
            server: [0; 16],
            client_port: 0,
            server_port: 0,
        },
        flags: 0,
    };
}

/// Reads a TCP packet, the program's context, into `tcp`. Returns false if it is none, or not the first fragment of one:
/// without the first one the others are useless.
///
/// The caller passes a `tcp` that is initialised: what a returned enum lacks in some of its variants, LLVM leaves undefined, and
/// the verifier refuses a register that no instruction has set.
#[inline(always)]
pub fn tcp(packet: *mut __sk_buff, tcp: &mut TcpPacket) -> Result<bool, Unreadable> {
    // SAFETY: the kernel passed this context to the program.
    let protocol = unsafe { (*packet).protocol };
    match u16::from_be(protocol as u16) {
        ETH_P_IP => tcp_over_ipv4(packet, tcp),
        ETH_P_IPV6 => tcp_over_ipv6(packet, tcp),
        _ => Ok(false),
    }
}

#[inline(always)]
fn tcp_over_ipv4(packet: *mut __sk_buff, into: &mut TcpPacket) -> Result<bool, Unreadable> {
    let header: [u8; IPV4_HEADER] = load(packet, 0)?;
    let is_later_fragment = (u16::from_be_bytes([header[6], header[7]]) & 0x1fff) != 0;
    if header[9] != TCP || is_later_fragment {
        return Ok(false);
    }
    let tcp: [u8; 14] = load(packet, u32::from(header[0] & 0xf) * 4)?;
    let address = |at: usize| mapped([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    fill(into, &tcp, address(12), address(16));
    Ok(true)
}

#[inline(always)]
fn tcp_over_ipv6(packet: *mut __sk_buff, into: &mut TcpPacket) -> Result<bool, Unreadable> {
    let header: [u8; IPV6_HEADER] = load(packet, 0)?;
    let mut next = header[6];
    let mut offset = IPV6_HEADER as u32;
    for _ in 0..MAX_EXTENSIONS {
        let length = match next {
            TCP => {
                let tcp: [u8; 14] = load(packet, offset)?;
                fill(into, &tcp, load(packet, 8)?, load(packet, 24)?);
                return Ok(true);
            }
            // Hop-by-hop options, routing, destination options, mobility.
            0 | 43 | 60 | 135 => {
                let extension: [u8; 2] = load(packet, offset)?;
                next = extension[0];
                (u32::from(extension[1]) + 1) * 8
            }
            // Fragment.
            44 => {
                let fragment: [u8; 4] = load(packet, offset)?;
                if u16::from_be_bytes([fragment[2], fragment[3]]) & 0xfff8 != 0 {
                    return Ok(false);
                }
                next = fragment[0];
                8
            }
            // Authentication (RFC 4302 §2.2).
            51 => {
                let extension: [u8; 2] = load(packet, offset)?;
                next = extension[0];
                (u32::from(extension[1]) + 2) * 4
            }
            _ => return Ok(false),
        };
        offset += length;
    }
    Err(Unreadable)
}

/// Fills in the connection and the flags from the start of a TCP header.
#[inline(always)]
fn fill(into: &mut TcpPacket, tcp: &[u8; 14], client: Address, server: Address) {
    let port = |at: usize| u32::from(u16::from_be_bytes([tcp[at], tcp[at + 1]]));
    into.connection = FourTuple {
        client,
        server,
        client_port: port(0),
        server_port: port(2),
    };
    into.flags = tcp[13];
}

/// Reads from the packet, at `offset` bytes from its IP header.
#[inline(always)]
fn load<const N: usize>(packet: *mut __sk_buff, offset: u32) -> Result<[u8; N], Unreadable> {
    let mut bytes = [0; N];
    // SAFETY: the kernel passed this context to the program, and `bytes` is writable for the length that is passed with it.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            packet.cast(),
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
