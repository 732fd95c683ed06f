//! One captured packet.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

/// A TCP or UDP packet as it crossed the wire. Checksums are not looked at: the kernel leaves them to hardware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Since the capture began.
    pub at: Duration,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// TCP with its header's fields, or UDP.
    pub transport: Transport,
    /// What it carries, possibly many segments at once, and possibly cut off: see [`crate::Wire::capture_start_of_packets`].
    pub payload: Vec<u8>,
    /// How many bytes it carried.
    pub length: usize,
}

/// What is above IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of RFC 9293")]
pub enum Transport {
    Tcp {
        sequence: u32,
        acknowledgment: u32,
        syn: bool,
        ack: bool,
        fin: bool,
        rst: bool,
    },
    Udp,
}

impl Packet {
    /// Reads an Ethernet frame, possibly cut off behind its headers; none when it holds no TCP and no UDP.
    pub(crate) fn parse(frame: &[u8], at: Duration, kept: usize) -> Option<Self> {
        let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
        // What IP carries, by its own word: the rest of the frame may be missing.
        let (source, destination, carried): (IpAddr, IpAddr, usize) = match packet.net? {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header();
                let carried = usize::from(header.total_len()).checked_sub(header.slice().len())?;
                (
                    header.source_addr().into(),
                    header.destination_addr().into(),
                    carried,
                )
            }
            LaxNetSlice::Ipv6(ip) => {
                let header = ip.header();
                let extensions = ip.extensions().slice().len();
                let carried = usize::from(header.payload_length()).checked_sub(extensions)?;
                (
                    header.source_addr().into(),
                    header.destination_addr().into(),
                    carried,
                )
            }
            LaxNetSlice::Arp(_) => return None,
        };
        let (source_port, destination_port, transport, header, payload) = match packet.transport? {
            TransportSlice::Tcp(tcp) => {
                let transport = Transport::Tcp {
                    sequence: tcp.sequence_number(),
                    acknowledgment: tcp.acknowledgment_number(),
                    syn: tcp.syn(),
                    ack: tcp.ack(),
                    fin: tcp.fin(),
                    rst: tcp.rst(),
                };
                (
                    tcp.source_port(),
                    tcp.destination_port(),
                    transport,
                    tcp.header_slice().len(),
                    tcp.payload(),
                )
            }
            TransportSlice::Udp(udp) => (
                udp.source_port(),
                udp.destination_port(),
                Transport::Udp,
                udp.header_slice().len(),
                udp.payload(),
            ),
            _ => return None,
        };
        Some(Self {
            at,
            source: (source, source_port).into(),
            destination: (destination, destination_port).into(),
            transport,
            payload: payload[..payload.len().min(kept)].to_vec(),
            length: carried.checked_sub(header)?,
        })
    }

    /// Whether it is TCP.
    pub fn is_tcp(&self) -> bool {
        matches!(self.transport, Transport::Tcp { .. })
    }

    /// Whether it opens a connection: SYN without ACK.
    pub fn is_syn(&self) -> bool {
        matches!(
            self.transport,
            Transport::Tcp {
                syn: true,
                ack: false,
                ..
            }
        )
    }

    /// Whether it is a TCP reset.
    pub fn is_rst(&self) -> bool {
        matches!(self.transport, Transport::Tcp { rst: true, .. })
    }

    /// Whether it goes from or to the address.
    pub fn touches(&self, address: IpAddr) -> bool {
        self.source.ip() == address || self.destination.ip() == address
    }
}
