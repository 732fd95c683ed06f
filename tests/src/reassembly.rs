//! Reassembles TCP connections from captured packets.

use std::net::SocketAddr;

use crate::packet::{Packet, Transport};
use crate::tls_records::{NotTls, TlsRecord, tls_records};

/// The bytes of one TCP connection, up to the first gap in the capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// The side that opened it, or the sender of the first packet if the opening was not captured.
    pub client: SocketAddr,
    /// The other side.
    pub server: SocketAddr,
    /// The bytes that the client sent.
    pub to_server: Vec<u8>,
    /// The bytes that the server sent.
    pub to_client: Vec<u8>,
    /// Whether bytes are missing after these: a packet was not captured, or only its start was kept.
    pub gap: bool,
    /// Whether each side sent a FIN: client, server.
    pub finished: (bool, bool),
    /// Whether either side sent a RST.
    pub reset: bool,
}

impl Stream {
    /// The TLS records of both directions, the client's first. Returns an error if either direction contains anything
    /// else.
    pub fn tls_records(&self) -> Result<(Vec<TlsRecord>, Vec<TlsRecord>), NotTls> {
        Ok((tls_records(&self.to_server)?, tls_records(&self.to_client)?))
    }
}

pub(crate) fn streams(packets: &[Packet]) -> Vec<Stream> {
    let mut connections: Vec<Connection> = Vec::new();
    let mut latest = std::collections::HashMap::new();
    for packet in packets {
        let Transport::Tcp {
            sequence,
            syn,
            fin,
            rst,
            ..
        } = packet.transport
        else {
            continue;
        };
        let key = (
            packet.source.min(packet.destination),
            packet.source.max(packet.destination),
        );
        let known = latest.get(&key).copied().filter(|number: &usize| {
            // A later connection may use the same addresses and ports.
            let connection = &connections[*number];
            !packet.is_syn() || connection.to_server.first == Some(sequence.wrapping_add(1))
        });
        let number = known.unwrap_or_else(|| {
            connections.push(Connection::new(packet));
            connections.len() - 1
        });
        latest.insert(key, number);
        let connection = &mut connections[number];
        connection.reset |= rst;
        let from_client = packet.source == connection.client;
        let direction = if from_client {
            &mut connection.to_server
        } else {
            &mut connection.to_client
        };
        direction.add(sequence, syn, fin, packet);
    }
    connections.into_iter().map(Connection::finish).collect()
}

struct Connection<'a> {
    client: SocketAddr,
    server: SocketAddr,
    to_server: Direction<'a>,
    to_client: Direction<'a>,
    reset: bool,
}

impl<'a> Connection<'a> {
    fn new(packet: &'a Packet) -> Self {
        // A reply to a SYN that was not captured comes from the server.
        let answer = matches!(
            packet.transport,
            Transport::Tcp {
                syn: true,
                ack: true,
                ..
            }
        );
        let (client, server) = if answer {
            (packet.destination, packet.source)
        } else {
            (packet.source, packet.destination)
        };
        Self {
            client,
            server,
            to_server: Direction::default(),
            to_client: Direction::default(),
            reset: false,
        }
    }

    fn finish(self) -> Stream {
        let finished = (self.to_server.finished, self.to_client.finished);
        let (to_server, gap) = self.to_server.finish();
        let (to_client, other_gap) = self.to_client.finish();
        Stream {
            client: self.client,
            server: self.server,
            to_server,
            to_client,
            gap: gap || other_gap,
            finished,
            reset: self.reset,
        }
    }
}

/// The segments of one direction, by their offset from its first byte.
#[derive(Default)]
struct Direction<'a> {
    first: Option<u32>,
    segments: Vec<(u32, &'a Packet)>,
    finished: bool,
}

impl<'a> Direction<'a> {
    fn add(&mut self, sequence: u32, syn: bool, fin: bool, packet: &'a Packet) {
        // The SYN itself takes one sequence number (RFC 9293, section 3.4).
        let start = if syn {
            sequence.wrapping_add(1)
        } else {
            sequence
        };
        let first = *self.first.get_or_insert(start);
        self.finished |= fin;
        let distance = start.wrapping_sub(first);
        // A keep-alive probe repeats the previous byte. Skip it and anything else from before the first byte.
        if packet.length > 0 && distance < u32::MAX / 2 {
            self.segments.push((distance, packet));
        }
    }

    fn finish(mut self) -> (Vec<u8>, bool) {
        self.segments.sort_by_key(|(distance, _)| *distance);
        let mut bytes = Vec::new();
        for (distance, packet) in self.segments {
            let distance = distance as usize;
            if distance > bytes.len() {
                return (bytes, true);
            }
            let known = bytes.len() - distance;
            if let Some(news) = packet.payload.get(known..) {
                bytes.extend_from_slice(news);
            }
            if packet.payload.len() < packet.length && bytes.len() < distance + packet.length {
                return (bytes, true);
            }
        }
        (bytes, false)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn segments_are_put_in_order_and_repeated_ones_left_out() {
        let packets = [
            tcp(true, u32::MAX - 1, true, b""),
            tcp(false, 100, true, b""),
            tcp(true, 2, false, b"cdef"),
            tcp(true, u32::MAX, false, b"!ab"),
            tcp(true, u32::MAX, false, b"!abc"),
            tcp(false, 101, false, b"yes"),
        ];
        let streams = streams(&packets);
        assert_eq!(streams.len(), 1);
        assert_eq!(streams[0].to_server, b"!abcdef");
        assert_eq!(streams[0].to_client, b"yes");
        assert!(!streams[0].gap);
    }

    #[test]
    fn a_gap_is_reported() {
        let packets = [
            tcp(true, 0, true, b""),
            tcp(true, 1, false, b"ab"),
            tcp(true, 4, false, b"d"),
        ];
        let streams = streams(&packets);
        assert_eq!(
            (streams[0].to_server.as_slice(), streams[0].gap),
            (b"ab".as_slice(), true)
        );
    }

    #[test]
    fn a_reused_port_is_another_stream() {
        let packets = [
            tcp(true, 0, true, b""),
            tcp(true, 1, false, b"one"),
            tcp(true, 7000, true, b""),
            tcp(true, 7001, false, b"two"),
        ];
        let sent: Vec<_> = streams(&packets)
            .into_iter()
            .map(|stream| stream.to_server)
            .collect();
        assert_eq!(sent, [b"one".to_vec(), b"two".to_vec()]);
    }

    fn tcp(from_client: bool, sequence: u32, syn: bool, payload: &[u8]) -> Packet {
        let client = "10.0.0.1:1000".parse().expect("an address");
        let server = "10.0.0.2:80".parse().expect("an address");
        let (source, destination) = if from_client {
            (client, server)
        } else {
            (server, client)
        };
        Packet {
            at: Duration::ZERO,
            source,
            destination,
            transport: Transport::Tcp {
                sequence,
                acknowledgment: 0,
                syn,
                ack: !from_client,
                fin: false,
                rst: false,
            },
            payload: payload.to_vec(),
            length: payload.len(),
        }
    }
}
