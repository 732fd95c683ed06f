//! Determines whether a pod's link is private: whether what others send to the pod, and what the pod sends, passes the
//! node's own routing and nobody else's interface. On a shared link (a bridge, macvlan) another pod can take the pod's
//! address by ARP.
//!
//! A link is private if each interface by which the pod's netns can be left is one end of a veth pair whose other end is in
//! the node's netns and not attached to another device. The node's side decides: a pod can change its own netns, but not the
//! node's end of its link. What is not known counts as shared.

use std::{collections::BTreeMap, io, net::IpAddr};

use netlink_packet_route::RouteNetlinkMessage;

use super::{
    Netns,
    interfaces::{Interfaces, NodeEnd, Report, node_ends, numbers},
    netns::open_the_nodes,
};

/// Why a pod's link is not private.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SharedLink {
    /// The node's end is attached to a bridge, Open vSwitch or a VRF.
    #[error(
        "the node's end of the pod's link, {0}, is attached to another device, such as a bridge"
    )]
    Attached(String),
    /// The pod leaves its netns by something else than a veth pair with the node.
    #[error("the pod's interface {0} is not one of a veth pair with the node's network namespace")]
    NotAPair(String),
    /// No interface that leads out of the pod's netns has this address.
    #[error("the pod's address {0} is on none of its interfaces that lead to the node")]
    AddressNotHeld(IpAddr),
    /// Nothing leads out of the pod's netns.
    #[error("no interface leads out of the pod's network namespace")]
    NoInterface,
    /// The interfaces of the pod, or of the node, cannot be read.
    #[error("cannot read the interfaces of the pod's link: {0}")]
    Unreadable(String),
}

impl From<io::Error> for SharedLink {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(error.to_string())
    }
}

/// The node's ends of links, at one moment.
#[derive(Debug)]
pub struct NodeLinks {
    node: Netns,
    /// By their index.
    ends: BTreeMap<u32, NodeEnd>,
}

impl NodeLinks {
    /// Lists the node's ends of links.
    pub fn list() -> io::Result<Self> {
        Self::list_in(Netns::the_daemons()?)
    }

    pub(super) fn list_in(node: Netns) -> io::Result<Self> {
        let ends = node.enter(node_ends)??.into_iter();
        Ok(Self {
            node,
            ends: ends.map(|end| (end.index, end)).collect(),
        })
    }

    /// Takes over what the kernel has reported of the node's interfaces. Returns whether that has changed any end of a link.
    ///
    /// # Errors
    /// [`Unclear`] if the report leaves open what has changed.
    pub(super) fn learn(&mut self, reported: RouteNetlinkMessage) -> Result<bool, Unclear> {
        match Report::of(reported) {
            Report::End(end) if self.ends.get(&end.index) == Some(&end) => Ok(false),
            Report::End(end) => {
                self.ends.insert(end.index, end);
                Ok(true)
            }
            Report::NoEnd(index) => Ok(self.ends.remove(&index).is_some()),
            Report::Partial(index) if self.ends.contains_key(&index) => Err(Unclear),
            Report::Partial(_) | Report::Other => Ok(false),
        }
    }

    /// Whether the node's ends of links are the same as in `other`.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.ends == other.ends
    }

    /// Checks that the link of the pod with these addresses in `pod` is private.
    pub fn check(&self, pod: &Netns, addresses: &[IpAddr]) -> Result<(), SharedLink> {
        self.check_from(&self.ends_of(pod)?, pod, addresses)
    }

    /// Lists the node's ends of the links to the pod in `pod`, by their indices in the node's netns.
    pub fn indices(&self, pod: &Netns) -> io::Result<Vec<u32>> {
        Ok(self.ends_of(pod)?.iter().map(|end| end.index).collect())
    }

    /// The node's ends of the links to `pod`.
    pub(super) fn ends_of(&self, pod: &Netns) -> io::Result<Vec<NodeEnd>> {
        let numbers = self.node.enter(|| numbers(&[pod]))??;
        let ends = self.ends.values();
        let ends = ends.filter(|end| numbers.contains(&end.netns));
        Ok(ends.cloned().collect())
    }

    pub(super) fn check_from(
        &self,
        ends: &[NodeEnd],
        pod: &Netns,
        addresses: &[IpAddr],
    ) -> Result<(), SharedLink> {
        let nodes = [self.node.try_clone_file()?];
        let nodes: Vec<_> = nodes.into_iter().chain(open_the_nodes()).collect();
        let interfaces = pod.enter(|| Interfaces::list(&nodes, addresses))??;
        check(ends, &interfaces, addresses)
    }
}

/// A report does not say what has changed.
#[derive(Debug)]
pub(super) struct Unclear;

/// Decides by the node's `ends` of the links to a pod, and by the `interfaces` of the pod's netns.
fn check(
    ends: &[NodeEnd],
    interfaces: &Interfaces,
    addresses: &[IpAddr],
) -> Result<(), SharedLink> {
    if let Some(end) = ends.iter().find(|end| end.is_attached) {
        return Err(SharedLink::Attached(end.name.clone()));
    }
    let mut leading_out = interfaces.leading_out.iter();
    let stranger = leading_out.find(|own| !ends.iter().any(|end| end.peer == own.index));
    if let Some(stranger) = stranger {
        return Err(SharedLink::NotAPair(stranger.name.clone()));
    }
    if interfaces.leading_out.is_empty() {
        return Err(SharedLink::NoInterface);
    }
    let mut addresses = addresses.iter();
    match addresses.find(|address| !interfaces.held.contains(address)) {
        Some(missing) => Err(SharedLink::AddressNotHeld(*missing)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        interfaces::Interface,
        test_links::{ip, node_and_pod, try_ip},
    };

    const OWN: &str = "10.1.0.2";

    fn address(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    /// The node's end of a link to the interface of a pod with index `peer`.
    fn end(peer: u32, is_attached: bool) -> NodeEnd {
        NodeEnd {
            index: peer,
            name: format!("p{peer}"),
            netns: 1,
            peer,
            is_attached,
        }
    }

    /// Interfaces of a pod that lead out of it, by index, and the addresses that they have.
    fn interfaces(leading_out: &[u32], held: &[&str]) -> Interfaces {
        let leading_out = leading_out.iter().map(|index| Interface {
            index: *index,
            name: format!("eth{index}"),
        });
        Interfaces {
            leading_out: leading_out.collect(),
            has_nested: true,
            held: held.iter().map(|held| address(held)).collect(),
        }
    }

    #[test]
    fn only_bare_pairs_with_the_node_that_have_the_pods_addresses_are_private() {
        let (v6, other) = ("fd00::2", "10.1.0.9");
        let attached = |name: &str| Err(SharedLink::Attached(name.into()));
        let no_pair = |name: &str| Err(SharedLink::NotAPair(name.into()));
        let not_held = |held: &str| Err(SharedLink::AddressNotHeld(address(held)));
        for (ends, own, addresses, expected) in [
            (
                vec![end(2, false)],
                interfaces(&[2], &[OWN]),
                vec![OWN],
                Ok(()),
            ),
            (
                vec![end(2, false)],
                interfaces(&[2], &[OWN, v6]),
                vec![OWN, v6],
                Ok(()),
            ),
            // The pod's addresses are not known yet.
            (vec![end(2, false)], interfaces(&[2], &[]), vec![], Ok(())),
            // Two links.
            (
                vec![end(2, false), end(3, false)],
                interfaces(&[2, 3], &[OWN]),
                vec![OWN],
                Ok(()),
            ),
            // A link that is attached to a bridge, alone or beside another one.
            (
                vec![end(2, true)],
                interfaces(&[2], &[OWN]),
                vec![OWN],
                attached("p2"),
            ),
            (
                vec![end(2, false), end(3, true)],
                interfaces(&[2, 3], &[OWN]),
                vec![OWN],
                attached("p3"),
            ),
            // The pod hides the interface whose other end is attached.
            (
                vec![end(2, false), end(3, true)],
                interfaces(&[2], &[OWN]),
                vec![OWN],
                attached("p3"),
            ),
            // Something that is no pair with the node, alone or beside one.
            (vec![], interfaces(&[2], &[OWN]), vec![OWN], no_pair("eth2")),
            (
                vec![end(2, false)],
                interfaces(&[2, 3], &[OWN]),
                vec![OWN],
                no_pair("eth3"),
            ),
            (
                vec![end(3, false)],
                interfaces(&[2], &[OWN]),
                vec![OWN],
                no_pair("eth2"),
            ),
            (
                vec![],
                interfaces(&[], &[]),
                vec![OWN],
                Err(SharedLink::NoInterface),
            ),
            (
                vec![end(2, false)],
                interfaces(&[], &[]),
                vec![],
                Err(SharedLink::NoInterface),
            ),
            // Another address, or only one of two.
            (
                vec![end(2, false)],
                interfaces(&[2], &[other]),
                vec![OWN],
                not_held(OWN),
            ),
            (
                vec![end(2, false)],
                interfaces(&[2], &[OWN]),
                vec![OWN, v6],
                not_held(v6),
            ),
        ] {
            let addresses: Vec<_> = addresses.into_iter().map(address).collect();
            let checked = check(&ends, &own, &addresses);
            assert_eq!(checked, expected, "{ends:?} {own:?} {addresses:?}");
        }
    }

    fn asked(node: &Netns, pod: &Netns) -> Result<(), SharedLink> {
        let node = Netns::nameless(node.try_clone_file().unwrap()).unwrap();
        NodeLinks::list_in(node)
            .unwrap()
            .check(pod, &[address(OWN)])
    }

    /// Gives `interface` of `pod` the pod's address.
    fn address_on(pod: &Netns, interface: &str) {
        ip(pod, pod, &format!("addr add {OWN}/24 dev {interface}"));
    }

    #[test]
    fn a_pair_with_the_node_is_private_until_it_is_attached_to_a_bridge() {
        let name = "a_pair_with_the_node_is_private_until_it_is_attached_to_a_bridge";
        let Some((node, pod)) = node_and_pod(name) else {
            return;
        };
        assert_eq!(asked(&node, &pod), Err(SharedLink::NoInterface));
        ip(
            &node,
            &pod,
            "link add p1 type veth peer name eth0 netns POD",
        );
        let not_held = SharedLink::AddressNotHeld(address(OWN));
        assert_eq!(asked(&node, &pod), Err(not_held));
        address_on(&pod, "eth0");
        assert_eq!(asked(&node, &pod), Ok(()));
        // What the pod nests in itself is its own business.
        ip(&pod, &pod, "link add inner type bridge");
        ip(&pod, &pod, "link add one type veth peer name two");
        ip(&pod, &pod, "link set one master inner");
        assert_eq!(asked(&node, &pod), Ok(()));
        let attached = Err(SharedLink::Attached("p1".into()));
        for kind in ["bridge", "vrf table 7"] {
            if !try_ip(&node, &pod, &format!("link add shared type {kind}")) {
                continue;
            }
            ip(&node, &pod, "link set p1 master shared");
            assert_eq!(asked(&node, &pod), attached, "{kind}");
            ip(&node, &pod, "link del shared");
            assert_eq!(asked(&node, &pod), Ok(()));
        }
        // A second network, such as of Multus.
        ip(&node, &pod, "link add shared type bridge");
        ip(
            &node,
            &pod,
            "link add p2 type veth peer name net1 netns POD",
        );
        assert_eq!(asked(&node, &pod), Ok(()));
        ip(&node, &pod, "link set p2 master shared");
        assert_eq!(asked(&node, &pod), Err(SharedLink::Attached("p2".into())));
    }

    #[test]
    fn a_pair_that_does_not_end_in_the_node_and_other_devices_are_shared() {
        let name = "a_pair_that_does_not_end_in_the_node_and_other_devices_are_shared";
        let Some((node, pod)) = node_and_pod(name) else {
            return;
        };
        // With another netns than the node's, where the pair would look the same.
        let switch = Netns::create().unwrap();
        ip(
            &switch,
            &pod,
            "link add p1 type veth peer name eth0 netns POD",
        );
        address_on(&pod, "eth0");
        let no_pair = Err(SharedLink::NotAPair("eth0".into()));
        assert_eq!(asked(&node, &pod), no_pair);
        ip(&pod, &pod, "link del eth0");
        ip(&node, &pod, "link add lower type veth peer name upper");
        for kind in ["macvlan mode bridge", "ipvlan"] {
            let add = format!("link add link lower name eth0 netns POD type {kind}");
            if !try_ip(&node, &pod, &add) {
                continue;
            }
            address_on(&pod, "eth0");
            assert_eq!(asked(&node, &pod), no_pair, "{kind}");
            // A pair beside it does not help.
            ip(
                &node,
                &pod,
                "link add p1 type veth peer name eth1 netns POD",
            );
            assert_eq!(asked(&node, &pod), no_pair, "{kind}");
            ip(&node, &pod, "link del p1");
            ip(&pod, &pod, "link del eth0");
        }
        // A pair with the node that is attached to a bridge in the pod, as of a virtual machine: another device has the
        // pod's address.
        ip(
            &node,
            &pod,
            "link add p1 type veth peer name eth0 netns POD",
        );
        ip(&pod, &pod, "link add inner type bridge");
        ip(&pod, &pod, "link set eth0 master inner");
        address_on(&pod, "inner");
        assert_eq!(
            asked(&node, &pod),
            Err(SharedLink::NotAPair("inner".into()))
        );
        ip(&pod, &pod, "link del inner");
        // A device without another end or a lower device.
        ip(&node, &pod, "link add other type ifb");
        ip(&node, &pod, "link set other netns POD");
        address_on(&pod, "other");
        assert_eq!(
            asked(&node, &pod),
            Err(SharedLink::NotAPair("other".into()))
        );
    }
}
