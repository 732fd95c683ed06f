//! Interfaces of network namespaces, and their addresses.

use std::{
    collections::HashSet,
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use super::netlink::{self, Netlink};

/// Maximum number of interfaces of a netns. It is far more than a pod needs; a pod with CAP_NET_ADMIN can add tens of thousands,
/// and the daemon lists them at each change.
const MAX_INTERFACES: usize = 1024;
/// Maximum number of interfaces of the node's netns, which has one for each pod and those that only an administrator adds.
const MAX_NODE_INTERFACES: usize = 65_536;
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
#[derive(Debug)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
}

/// The interfaces of a netns, without the loopback.
#[derive(Debug)]
pub(super) struct Interfaces {
    /// Those that lead out of the netns: whose other end, or lower device, is in the node's netns; devices that are not
    /// virtual; and those with an address of the pod.
    pub(super) leading_out: Vec<Interface>,
    /// Whether there are others. They may lead to network namespaces or virtual machines nested in the pod.
    pub(super) has_nested: bool,
    /// The pod's addresses that those that lead out have.
    pub(super) held: HashSet<IpAddr>,
}

impl Interfaces {
    /// Lists the interfaces of the current netns. `nodes` are the node's netns, and `pod` the pod's addresses.
    pub(super) fn list(nodes: &[File], pod: &[IpAddr]) -> io::Result<Self> {
        let links = links()?;
        // The kernel assigns numbers to other namespaces when it lists the links.
        let of_the_node = numbers(nodes)?;
        let held = held_of(pod)?;
        let mut interfaces = Self {
            leading_out: Vec::new(),
            has_nested: false,
            held: HashSet::new(),
        };
        for link in links {
            if link.flags.contains(LinkFlags::Loopback) {
                continue;
            }
            let own = held.iter().filter(|(index, _)| *index == link.index);
            let own: Vec<IpAddr> = own.map(|(_, address)| *address).collect();
            let leads_out = !link.is_virtual()
                || link.other.is_some_and(|other| of_the_node.contains(&other))
                || !own.is_empty();
            if leads_out {
                interfaces.held.extend(own);
                let (index, name) = (link.index, link.name);
                interfaces.leading_out.push(Interface { index, name });
            } else {
                interfaces.has_nested = true;
            }
        }
        Ok(interfaces)
    }
}

/// The node's end of a veth pair whose other end is in another netns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeEnd {
    /// Its own index, in the node's netns.
    pub(super) index: u32,
    pub(super) name: String,
    /// The number by which the node's netns knows the other end's.
    pub(super) netns: i32,
    /// The other end's index there.
    pub(super) peer: u32,
    /// Whether it is attached to another device, such as a bridge, Open vSwitch or a VRF.
    pub(super) is_attached: bool,
}

/// Lists the node's ends of veth pairs. Must be called in the node's netns.
pub(super) fn node_ends() -> io::Result<Vec<NodeEnd>> {
    // The kernel leaves out others (NLM_F_DUMP_FILTERED).
    let mut request = LinkMessage::default();
    let kind = LinkInfo::Kind(InfoKind::Veth);
    request.attributes = vec![LinkAttribute::LinkInfo(vec![kind])];
    let request = RouteNetlinkMessage::GetLink(request);
    netlink::list(request, MAX_NODE_INTERFACES, "interfaces", node_end)
}

/// Returns the node's end of a veth pair that the kernel describes, if it is one.
fn node_end(message: RouteNetlinkMessage) -> Option<NodeEnd> {
    let link = link(message)?;
    let (netns, peer) = (link.other?, link.lower?);
    (link.kind == Some(InfoKind::Veth)).then_some(NodeEnd {
        index: link.index,
        name: link.name,
        netns,
        peer,
        is_attached: link.is_attached,
    })
}

/// What a report of the kernel means to the node's ends of veth pairs.
pub(super) enum Report {
    /// It is such an end, as it is now.
    End(NodeEnd),
    /// The interface with this index is none.
    NoEnd(u32),
    /// Something has changed of the interface with this index, such as its membership in a bridge.
    Partial(u32),
    /// It is no report of an interface.
    Other,
}

impl Report {
    pub(super) fn of(reported: RouteNetlinkMessage) -> Self {
        let (message, is_gone) = match reported {
            RouteNetlinkMessage::NewLink(message) => (message, false),
            RouteNetlinkMessage::DelLink(message) => (message, true),
            _ => return Self::Other,
        };
        let index = message.header.index;
        let has_name = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(_));
        // A bridge reports its ports as those of its own family, and that one leaves it as if the interface were gone.
        if message.header.interface_family != AddressFamily::Unspec
            || !message.attributes.iter().any(has_name)
        {
            return Self::Partial(index);
        }
        if is_gone {
            return Self::NoEnd(index);
        }
        node_end(RouteNetlinkMessage::NewLink(message)).map_or(Self::NoEnd(index), Self::End)
    }
}

/// What the kernel reports about an interface.
struct Link {
    index: u32,
    name: String,
    flags: LinkFlags,
    /// What kind of virtual device it is, if it is one.
    kind: Option<InfoKind>,
    /// The index of its other end, or lower device.
    lower: Option<u32>,
    /// The number of the netns that its other end, or lower device, is in, if that is not this one.
    other: Option<i32>,
    /// Whether it has a master, such as a bridge.
    is_attached: bool,
}

impl Link {
    fn is_virtual(&self) -> bool {
        self.kind.is_some()
    }
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
    let (mut name, mut kind, mut lower, mut other) = (None, None, None, None);
    let mut is_attached = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::Link(index) => lower = Some(index),
            LinkAttribute::LinkNetNsId(id) => other = Some(id),
            LinkAttribute::Controller(_) => is_attached = true,
            LinkAttribute::LinkInfo(info) => {
                kind = info.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(Link {
        index: message.header.index,
        name: name?,
        flags: message.header.flags,
        kind,
        lower,
        other,
        is_attached,
    })
}

/// Returns those of `addresses` that the current netns has, each with the index of its interface.
fn held_of(addresses: &[IpAddr]) -> io::Result<Vec<(u32, IpAddr)>> {
    if addresses.is_empty() {
        return Ok(Vec::new());
    }
    let held = held()?.into_iter();
    let held = held.filter(|(_, address)| addresses.contains(address));
    Ok(held.collect())
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
pub(super) fn numbers(others: &[impl AsFd]) -> io::Result<HashSet<i32>> {
    let mut netlink = Netlink::open()?;
    let mut numbers = HashSet::new();
    for other in others {
        let mut message = NsidMessage::default();
        message.attributes = vec![NsidAttribute::Fd(other.as_fd().as_raw_fd() as u32)];
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
    use super::*;
    use crate::{Netns, plumbing};
    use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};

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
