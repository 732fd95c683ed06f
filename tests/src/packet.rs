//! One captured packet.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

/// A TCP or UDP packet captured on the wire. Checksums are not verified, because the kernel leaves them to hardware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Time since the capture began.
    pub at: Duration,
    /// The source address and port.
    pub source: SocketAddr,
    /// The destination address and port.
    pub destination: SocketAddr,
    /// TCP with its header's fields, or UDP.
    pub transport: Transport,
    /// The payload, possibly of many segments at once, and possibly truncated: see
    /// [`crate::Wire::capture_start_of_packets`].
    pub payload: Vec<u8>,
    /// The payload's original length, in bytes.
    pub length: usize,
}

/// The transport protocol.
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
    /// Parses an Ethernet frame, possibly truncated after its headers. Returns `None` if it contains neither TCP nor
    /// UDP.
    pub(crate) fn parse(frame: &[u8], at: Duration, kept: usize) -> Option<Self> {
        let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
        // The length according to the IP header: the rest of the frame may be missing.
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

    /// Whether it opens a connection (SYN without ACK).
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

    /// Whether the address is its source or destination.
    pub fn touches(&self, address: IpAddr) -> bool {
        self.source.ip() == address || self.destination.ip() == address
    }
}
