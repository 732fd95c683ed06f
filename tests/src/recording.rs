//! The packets of a capture, and queries on them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use crate::packet::Packet;
use crate::reassembly::{self, Stream};

/// The packets of a capture, in order.
#[derive(Debug, Clone, Default)]
pub struct Recording {
    packets: Vec<Packet>,
}

impl Recording {
    pub(crate) fn new(packets: Vec<Packet>) -> Self {
        Self { packets }
    }

    /// All packets.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// The packets that the predicate accepts.
    pub fn only(&self, mut accept: impl FnMut(&Packet) -> bool) -> Self {
        Self {
            packets: self
                .packets
                .iter()
                .filter(|packet| accept(packet))
                .cloned()
                .collect(),
        }
    }

    /// The TCP packets between two addresses, in both directions.
    pub fn tcp_between(&self, one: IpAddr, other: IpAddr) -> Self {
        self.only(|packet| packet.is_tcp() && packet.touches(one) && packet.touches(other))
    }

    /// The packets that open connections; a retransmitted SYN counts again.
    pub fn syns(&self) -> Self {
        self.only(Packet::is_syn)
    }

    /// The openers and destinations of connections, without the opener's port.
    pub fn connections(&self) -> BTreeSet<(IpAddr, SocketAddr)> {
        let syns = self.packets.iter().filter(|packet| packet.is_syn());
        syns.map(|packet| (packet.source.ip(), packet.destination))
            .collect()
    }

    /// Whether the bytes are readable anywhere: in one packet, or in a TCP stream reassembled from its packets.
    ///
    /// # Panics
    /// If `marker` is empty.
    pub fn contains(&self, marker: &[u8]) -> bool {
        assert!(!marker.is_empty(), "an empty marker is everywhere");
        let within = |bytes: &[u8]| bytes.windows(marker.len()).any(|window| window == marker);
        self.packets.iter().any(|packet| within(&packet.payload))
            || self
                .streams()
                .iter()
                .any(|stream| within(&stream.to_server) || within(&stream.to_client))
    }

    /// The TCP connections, reassembled from their packets, in the order of their first packets.
    pub fn streams(&self) -> Vec<Stream> {
        reassembly::streams(&self.packets)
    }

    /// The number of payload bytes of TCP and UDP, including retransmissions.
    pub fn payload_bytes(&self) -> usize {
        self.packets.iter().map(|packet| packet.length).sum()
    }
}
