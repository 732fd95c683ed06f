//! Looks for markers in plaintext: on the wire between the nodes, and on the links of all pods.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use mesh_tests::{Capture, Mesh, Recording, Result};

use crate::world::NODES;

/// Captures of all links.
#[derive(Debug)]
pub(crate) struct Observer {
    wire: Capture,
    links: [Capture; 2],
}

/// A marker that was readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sighting {
    pub(crate) id: u32,
    pub(crate) round: u8,
    /// Whether the caller sent it; otherwise it is the answer.
    pub(crate) to_server: bool,
    /// The node on whose pods' links it was seen; `None` for the wire between the nodes.
    pub(crate) node: Option<usize>,
    /// As the packets say.
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
}

impl Observer {
    pub(crate) fn start(mesh: &Mesh) -> Result<Self> {
        Ok(Self {
            wire: mesh.wire().capture()?,
            links: [
                mesh.node(NODES[0]).capture_pods()?,
                mesh.node(NODES[1]).capture_pods()?,
            ],
        })
    }

    /// Ends the captures, which must have lost nothing, and returns the markers in them.
    pub(crate) fn stop(self) -> Result<BTreeSet<Sighting>> {
        let mut sightings = BTreeSet::new();
        look(&self.wire.stop()?, None, &mut sightings);
        for (node, links) in self.links.into_iter().enumerate() {
            look(&links.stop()?, Some(node), &mut sightings);
        }
        Ok(sightings)
    }
}

/// Looks in each packet, and in each connection as its ends read it: a marker may be in two packets.
fn look(recording: &Recording, node: Option<usize>, sightings: &mut BTreeSet<Sighting>) {
    let mut add = |bytes: &[u8], from: SocketAddr, to: SocketAddr| {
        for (id, round, to_server) in markers(bytes) {
            let (client, server) = if to_server { (from, to) } else { (to, from) };
            sightings.insert(Sighting {
                id,
                round,
                to_server,
                node,
                client,
                server,
            });
        }
    };
    for packet in recording.packets() {
        add(&packet.payload, packet.source, packet.destination);
    }
    for stream in recording.streams() {
        add(&stream.to_server, stream.client, stream.server);
        add(&stream.to_client, stream.server, stream.client);
    }
}

/// The markers of `pod-app` in these bytes: connection, round, and whether the caller sent it.
fn markers(bytes: &[u8]) -> Vec<(u32, u8, bool)> {
    let starts = bytes
        .windows(MARKER)
        .filter(|marker| marker.starts_with(b"Mark"));
    let parse = |marker: &[u8]| {
        let digits = str::from_utf8(&marker[5..]).ok()?;
        let to_server = match marker[4] {
            b'>' => true,
            b'<' => false,
            _ => return None,
        };
        Some((
            digits[..9].parse().ok()?,
            digits[9..].parse().ok()?,
            to_server,
        ))
    };
    starts.filter_map(parse).collect()
}

/// In bytes.
const MARKER: usize = 16;

#[test]
fn markers_are_found_in_other_bytes() {
    let found = markers(b"xMark>00000001207Mark<00000001207Mark?00000001207Mark>0000000120");
    assert_eq!(found, [(12, 7, true), (12, 7, false)]);
}
