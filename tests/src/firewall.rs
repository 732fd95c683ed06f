//! A packet filter on a node, between its pods and the wire, or in a pod.

use std::io::Write;
use std::net::{SocketAddrV4, SocketAddrV6};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::eventually::TIMEOUT;
use crate::node::Node;
use crate::place::Place;
use crate::pod::Pod;
use crate::process::Process;

/// Packet filter rules in a namespace, by nftables. They are removed when the value is dropped, or with the
/// mesh.
#[derive(Debug)]
pub struct Firewall {
    place: Place,
}

impl Firewall {
    /// Accepts pods' TCP to and from this one port and drops all other TCP that the node forwards, as a NetworkPolicy
    /// that names the port would.
    pub fn only_port(node: &Node, port: u16) -> Result<Self> {
        Self::install(
            node,
            &format!(
                "counter allowed {{}}\ncounter dropped {{}}\n\
                 chain forward {{\n  type filter hook forward priority 0; policy accept;\n\
                 \x20 tcp dport {port} counter name allowed accept\n\
                 \x20 tcp sport {port} counter name allowed accept\n\
                 \x20 meta l4proto tcp counter name dropped drop\n}}"
            ),
        )
    }

    /// Translates the node's `port`, in both families, to `port_of_pod` of `pod`, as kube-proxy does for a Service of type
    /// NodePort with `externalTrafficPolicy: Cluster`: the pod sees the node's address as the caller's. It says nothing
    /// about connections to the pod's own address.
    pub fn node_port(node: &Node, port: u16, pod: &Pod, port_of_pod: u16) -> Result<Self> {
        let (v4, v6) = (pod.ipv4(), pod.ipv6());
        Self::install(
            node,
            &format!(
                "chain prerouting {{\n  type nat hook prerouting priority dstnat;\n\
                 \x20 ip daddr {} tcp dport {port} dnat ip to {v4}:{port_of_pod}\n\
                 \x20 ip6 daddr {} tcp dport {port} dnat ip6 to [{v6}]:{port_of_pod}\n}}\n\
                 chain postrouting {{\n  type nat hook postrouting priority srcnat;\n\
                 \x20 ct status dnat masquerade\n}}",
                node.ipv4(),
                node.ipv6()
            ),
        )
    }

    /// Translates `port` of a pod, for connections from outside of it, to another address and port of each family, as a
    /// container engine in the pod does for a published port. Connections from there leave with the pod's address.
    pub fn published_port(
        pod: &Pod,
        port: u16,
        v4: SocketAddrV4,
        v6: SocketAddrV6,
    ) -> Result<Self> {
        Self::install(
            pod,
            &format!(
                "chain prerouting {{\n  type nat hook prerouting priority dstnat;\n\
                 \x20 iifname eth0 meta nfproto ipv4 tcp dport {port} dnat ip to {v4}\n\
                 \x20 iifname eth0 meta nfproto ipv6 tcp dport {port} dnat ip6 to {v6}\n}}\n\
                 chain postrouting {{\n  type nat hook postrouting priority srcnat;\n\
                 \x20 ip saddr {} oifname eth0 masquerade\n\
                 \x20 ip6 saddr {} oifname eth0 masquerade\n}}",
                v4.ip(),
                v6.ip()
            ),
        )
    }

    /// Replaces the contents of the table `inet mesh_tests`. Traffic between two pods of the node passes through it as
    /// well.
    pub fn install(place: &Place, contents: &str) -> Result<Self> {
        filter_bridges()?;
        let firewall = Self {
            place: place.clone(),
        };
        // Declaring and then deleting the table empties it, whether or not it existed.
        firewall.nft(&format!(
            "table {TABLE} {{}}\ndelete table {TABLE}\ntable {TABLE} {{\n{contents}\n}}\n"
        ))?;
        Ok(firewall)
    }

    /// The number of packets that a named counter has counted, such as `allowed` and `dropped` of
    /// [`Firewall::only_port`].
    pub fn packets(&self, counter: &str) -> Result<u64> {
        let listing = self
            .place
            .run("nft", ["list", "counter", "inet", "mesh_tests", counter])?
            .ok()?
            .stdout;
        let mut words = listing
            .split_ascii_whitespace()
            .skip_while(|word| *word != "packets")
            .skip(1);
        let count = words.next().and_then(|count| count.parse().ok());
        count.with_context(|| format!("no counter in {listing:?}"))
    }

    fn nft(&self, rules: &str) -> Result<()> {
        let mut command: Command = self.place.command("nft")?;
        let mut child = command
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the program `nft` (package nftables)")?;
        // A write error means that nft has exited early; its own message says why.
        let _ = child
            .stdin
            .take()
            .expect("stdin is piped")
            .write_all(rules.as_bytes());
        let output = child.wait_with_output().context("waiting for `nft`")?;
        if !output.status.success() {
            bail!(
                "`nft` in {} failed: {}\n{rules}",
                self.place.name(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}

impl Drop for Firewall {
    fn drop(&mut self) {
        // The mesh and its namespace may already be removed.
        let _ = self.nft(&format!("table {TABLE} {{}}\ndelete table {TABLE}\n"));
    }
}

/// Makes the kernel pass traffic that crosses a bridge to its packet filter, as on nodes of a cluster.
fn filter_bridges() -> Result<()> {
    if Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists() {
        return Ok(());
    }
    let mut load = Command::new("modprobe");
    load.arg("br_netfilter");
    Process::spawn(load)?.finish(TIMEOUT)?.ok()?;
    Ok(())
}

const TABLE: &str = "inet mesh_tests";
