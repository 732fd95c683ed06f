//! tcpdump on the link of a node.

use std::time::Duration;

use anyhow::Result;
use mesh_tests::{Node, Process, Wire, eventually};
use nix::sys::signal::Signal;

/// A running tcpdump, which prints each packet as text.
pub(super) struct Tcpdump(Process);

impl Tcpdump {
    /// Starts tcpdump on the link of `node`, with a filter in its language. Packets are seen from the moment this returns.
    pub(super) fn start(wire: &Wire, node: &Node, filter: &str) -> Result<Self> {
        let link = wire.link(node);
        let arguments = ["-nn", "-A", "-l", "-i", &link, filter];
        let process = wire.place().spawn("tcpdump", arguments)?;
        eventually(PATIENCE, "tcpdump to listen", || {
            process.stderr().contains("listening on").then_some(())
        })?;
        Ok(Self(process))
    }

    /// Ends tcpdump once it has printed `fence`, which is in the last packet that counts: then it has printed all earlier
    /// ones. Returns the packets as text.
    pub(super) fn stop(self, fence: &str) -> Result<String> {
        eventually(PATIENCE, "tcpdump to catch up", || {
            self.0.stdout().contains(fence).then_some(())
        })?;
        self.0.signal(Signal::SIGINT)?;
        Ok(self.0.finish(PATIENCE)?.ok()?.stdout)
    }
}

/// The header lines of the packets that contain `marker`.
pub(super) fn readable<'a>(text: &'a str, marker: &str) -> Vec<&'a str> {
    let mut readable = Vec::new();
    let mut header = "";
    for line in text.lines() {
        if is_header(line) {
            header = line;
        }
        if line.contains(marker) && readable.last() != Some(&header) {
            readable.push(header);
        }
    }
    readable
}

/// The number of packets in tcpdump's text.
pub(super) fn packets(text: &str) -> usize {
    text.lines().filter(|line| is_header(line)).count()
}

/// Whether a line begins a packet: `12:34:56.789012 IP …`.
fn is_header(line: &str) -> bool {
    let mut words = line.split(' ');
    let time = words.next().unwrap_or_default();
    time.matches(':').count() == 2 && matches!(words.next(), Some("IP" | "IP6"))
}

const PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_belongs_to_the_header_before_it() {
        let text = "10:00:00.000001 IP 10.0.0.1.5 > 10.0.0.2.80: Flags [P.]\nE..GET /secret\nsecret\n\
                    10:00:00.000002 IP6 fd00::1.5 > fd00::2.80: Flags [.]\n....\n";
        assert_eq!(packets(text), 2);
        let found = readable(text, "secret");
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("10.0.0.1.5"));
        assert!(readable(text, "other").is_empty());
    }
}
