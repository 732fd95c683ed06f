//! Interfaces of network namespaces, and their addresses.

use std::{collections::HashSet, fs::File, io, net::IpAddr, os::fd::AsRawFd};

use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use super::netlink::{self, Netlink};

/// Maximum number of interfaces of a netns. It is far more than a pod needs; a pod with CAP_NET_ADMIN can add tens of thousands,
/// and the daemon lists them at each change.
const MAX_INTERFACES: usize = 1024;
/// Maximum number of addresses of a pod's netns, for the same reason.
const MAX_ADDRESSES: usize = 16_384;

/// Lists the addresses of the interfaces in the daemon's netns, however many.
fn node_addresses() -> io::Result<impl Iterator<Item = IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    Ok(interfaces.filter_map(|interface| {
        let storage = interface.address?;
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let v6 = storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
        v4.or(v6)
    }))
}

/// Lists the addresses of the interfaces in the current netns that are up.
pub(super) fn addresses_up() -> io::Result<impl Iterator<Item = IpAddr>> {
    let links = links()?.into_iter();
    let up = links.filter(|link| link.flags.contains(LinkFlags::Up));
    let up: HashSet<u32> = up.map(|link| link.index).collect();
    let held = held()?.into_iter();
    Ok(held.filter_map(move |(index, address)| up.contains(&index).then_some(address)))
}

/// The addresses of the node, which its probes come from: those of the daemon's netns, without the loopback's.
#[derive(Debug, Default)]
pub struct NodeAddresses {
    /// Reports changes. `None` until it is open: then the addresses are listed each time.
    changes: Option<Netlink>,
    /// Sorted.
    known: Vec<IpAddr>,
}

impl NodeAddresses {
    /// Returns the current addresses, sorted. Lists them only if they have changed since the last call.
    pub fn current(&mut self) -> &[IpAddr] {
        match self.changes.as_mut().map(Netlink::drain) {
            Some(false) => return &self.known,
            Some(true) => {}
            // Before the addresses are listed, so that no change is missed.
            None => self.changes = Netlink::watch_addresses().ok(),
        }
        match node_addresses() {
            Ok(addresses) => {
                self.known = addresses.filter(|address| !address.is_loopback()).collect();
                self.known.sort();
                self.known.dedup();
            }
            Err(error) => {
                tracing::error!(%error, "cannot list the node's addresses; retrying");
                self.changes = None;
            }
        }
        &self.known
    }
}

/// An interface that leads out of a netns.
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
}

/// The interfaces of a netns, without the loopback.
pub(super) struct Interfaces {
    /// Those that lead out of the netns: whose other end, or lower device, is in the node's netns; devices that are not
    /// virtual; and those with an address of the pod.
    pub(super) leading_out: Vec<Interface>,
    /// Whether there are others. They may lead to network namespaces or virtual machines nested in the pod.
    pub(super) has_nested: bool,
}

impl Interfaces {
    /// Lists the interfaces of the current netns. `nodes` are the node's netns, and `pod` the pod's addresses.
    pub(super) fn list(nodes: &[File], pod: &[IpAddr]) -> io::Result<Self> {
        let links = links()?;
        // The kernel assigns numbers to other namespaces when it lists the links.
        let of_the_node = numbers(nodes)?;
        let holders = holders(pod)?;
        let mut interfaces = Self {
            leading_out: Vec::new(),
            has_nested: false,
        };
        for link in links {
            if link.flags.contains(LinkFlags::Loopback) {
                continue;
            }
            let leads_out = !link.is_virtual
                || link.other.is_some_and(|other| of_the_node.contains(&other))
                || holders.contains(&link.index);
            if leads_out {
                let (index, name) = (link.index, link.name);
                interfaces.leading_out.push(Interface { index, name });
            } else {
                interfaces.has_nested = true;
            }
        }
        Ok(interfaces)
    }
}

/// What the kernel tells of an interface.
struct Link {
    index: u32,
    name: String,
    flags: LinkFlags,
    is_virtual: bool,
    /// The number of the netns that its other end, or lower device, is in, if that is not this one.
    other: Option<i32>,
}

/// Lists the interfaces of the current netns.
fn links() -> io::Result<Vec<Link>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    netlink::list(request, MAX_INTERFACES, "interfaces", link)
}

fn link(message: RouteNetlinkMessage) -> Option<Link> {
    let RouteNetlinkMessage::NewLink(message) = message else {
        return None;
    };
    let (mut name, mut is_virtual, mut other) = (None, false, None);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::LinkNetNsId(id) => other = Some(id),
            LinkAttribute::LinkInfo(info) => {
                is_virtual = info.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
            }
            _ => {}
        }
    }
    Some(Link {
        index: message.header.index,
        name: name?,
        flags: message.header.flags,
        is_virtual,
        other,
    })
}

/// Returns the indices of the interfaces of the current netns that have one of `addresses`.
fn holders(addresses: &[IpAddr]) -> io::Result<HashSet<u32>> {
    if addresses.is_empty() {
        return Ok(HashSet::new());
    }
    let held = held()?.into_iter();
    let held = held.filter(|(_, address)| addresses.contains(address));
    Ok(held.map(|(index, _)| index).collect())
}

/// Lists the addresses of the current netns, each with the index of its interface.
fn held() -> io::Result<Vec<(u32, IpAddr)>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    netlink::list(request, MAX_ADDRESSES, "addresses", held_address)
}

fn held_address(message: RouteNetlinkMessage) -> Option<(u32, IpAddr)> {
    let RouteNetlinkMessage::NewAddress(message) = message else {
        return None;
    };
    let (mut local, mut address) = (None, None);
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(held) => local = Some(held),
            // The peer's, if the interface has one.
            AddressAttribute::Address(held) => address = Some(held),
            _ => {}
        }
    }
    Some((message.header.index, local.or(address)?))
}

/// Returns the numbers by which the current netns knows others (`ip netns list-id`).
fn numbers(others: &[File]) -> io::Result<HashSet<i32>> {
    let mut netlink = Netlink::open()?;
    let mut numbers = HashSet::new();
    for other in others {
        let mut message = NsidMessage::default();
        message.attributes = vec![NsidAttribute::Fd(other.as_raw_fd() as u32)];
        let answer = netlink.ask(RouteNetlinkMessage::GetNsId(message))?;
        if let RouteNetlinkMessage::NewNsId(answer) = answer {
            numbers.extend(
                answer
                    .attributes
                    .into_iter()
                    .filter_map(|attribute| match attribute {
                        NsidAttribute::Id(id) if id >= 0 => Some(id),
                        _ => None,
                    }),
            );
        }
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
    use netlink_packet_route::link::InfoKind;

    use super::*;
    use crate::{Netns, plumbing};

    /// Adds `pairs` of interfaces to the current netns.
    fn add_interfaces(pairs: usize) -> io::Result<()> {
        let mut netlink = Netlink::open()?;
        for _ in 0..pairs {
            let mut message = LinkMessage::default();
            let kind = LinkInfo::Kind(InfoKind::Veth);
            message.attributes = vec![LinkAttribute::LinkInfo(vec![kind])];
            let message = RouteNetlinkMessage::NewLink(message);
            netlink.request(message, NLM_F_CREATE | NLM_F_EXCL)?;
        }
        Ok(())
    }

    #[test]
    fn more_interfaces_than_the_limit_are_an_error_that_names_it() {
        if crate::lacks_root("more_interfaces_than_the_limit_are_an_error_that_names_it") {
            return;
        }
        let netns = Netns::create().unwrap();
        let list = |pairs| {
            netns
                .enter(|| add_interfaces(pairs).and_then(|()| Interfaces::list(&[], &[])))
                .flatten()
        };
        let few = list(1).unwrap();
        assert!(few.leading_out.is_empty() && few.has_nested);
        let error = list(549).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
        assert_eq!(error.to_string(), "there are more than 1024 interfaces");
    }

    #[test]
    fn addresses_count_of_interfaces_that_are_up() {
        if crate::lacks_root("addresses_count_of_interfaces_that_are_up") {
            return;
        }
        let netns = Netns::create().unwrap();
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let has_loopback = || {
            let addresses = netns.enter(addresses_up).unwrap().unwrap();
            addresses.collect::<Vec<_>>().contains(&loopback)
        };
        assert!(!has_loopback());
        plumbing::set_up(&netns).unwrap();
        assert!(has_loopback());
    }

    #[test]
    fn addresses_of_the_node_are_sorted_and_without_the_loopback() {
        let mut node_addresses = NodeAddresses::default();
        let listed = node_addresses.current().to_vec();
        assert!(listed.is_sorted() && listed.iter().all(|address| !address.is_loopback()));
        assert_eq!(node_addresses.current(), listed);
    }
}
