//! The link between the nodes.

use anyhow::Result;

use crate::capture::Capture;
use crate::node::Node;
use crate::place::Place;
use crate::plumbing;

/// The bridge that the nodes and the outside host are attached to.
#[derive(Debug)]
pub struct Wire(Place);

impl Wire {
    pub(crate) fn new(place: Place) -> Self {
        Self(place)
    }

    /// Its place, for programs such as `tc` or `tcpdump`.
    pub fn place(&self) -> &Place {
        &self.0
    }

    /// The name of the interface here that leads to the node.
    pub fn link(&self, node: &Node) -> String {
        plumbing::node_link(node.number())
    }

    /// Captures all traffic on the wire from now on: each TCP and UDP packet once, in full.
    pub fn capture(&self) -> Result<Capture> {
        Capture::of_wire(self.0.netns(), usize::MAX)
    }

    /// Like [`Wire::capture`], but keeps at most `kept` bytes of each packet's payload; for heavy traffic.
    pub fn capture_start_of_packets(&self, kept: usize) -> Result<Capture> {
        Capture::of_wire(self.0.netns(), kept)
    }
}
