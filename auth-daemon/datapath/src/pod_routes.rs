//! Tells whether the node's routes lead packets between two of its pods from the link of one straight to the link of the other.
//! Some networks send them out of the node and back instead (GKE's intranode visibility, AWS's security groups for pods), and
//! there others may read and change them.
//!
//! The kernel is asked what it would do with a packet that arrives by the pod's link (RTM_GETROUTE with RTA_IIF), so that
//! policy routing counts too. Packets with marks, and programs that redirect packets past the routes, are not considered.

use std::{collections::HashSet, io, net::IpAddr};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

use super::{Netns, netlink::Netlink};

/// Maximum number of different destinations of changed routes that are kept apart.
const MAX_DESTINATIONS: usize = 64;

/// A pod, to the node's routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEnd {
    /// The indices, in the node's netns, of the node's ends of the pod's links.
    pub links: Vec<u32>,
    /// The pod's address.
    pub address: IpAddr,
}

/// Why packets between two pods of the node may not stay on their links.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Diverted {
    /// They leave by another interface than the link of the pod that has the address.
    #[error(
        "the node's route from {from} to {to} leads to {interface}, and not to the pod's own link"
    )]
    Elsewhere {
        /// Source of the packets.
        from: IpAddr,
        /// Their destination.
        to: IpAddr,
        /// Name of the interface.
        interface: String,
    },
    /// The route is more than an interface.
    #[error(
        "the node's route from {from} to {to} has a gateway, several next hops or an encapsulation"
    )]
    Indirect {
        /// Source of the packets.
        from: IpAddr,
        /// Their destination.
        to: IpAddr,
    },
    /// The node forwards no packet that comes from any of the pod's links.
    #[error("the node forwards no packets from {from} to {to}: {why}")]
    NotForwarded {
        /// Source of the packets.
        from: IpAddr,
        /// Their destination.
        to: IpAddr,
        /// The kernel's error.
        why: String,
    },
    /// The kernel could not be asked for some time.
    #[error("the node's route from {from} to {to} cannot be read: {why}")]
    Unread {
        /// Source of the packets.
        from: IpAddr,
        /// Their destination.
        to: IpAddr,
        /// The error.
        why: String,
    },
}

/// Checks each pair of pods whether packets from each to the other stay on their links. Takes some ten microseconds for each
/// link of the pods.
///
/// # Errors
/// If the kernel cannot be asked at this moment.
pub fn check_routes<'a>(
    pairs: impl IntoIterator<Item = (&'a PodEnd, &'a PodEnd)>,
) -> io::Result<Vec<Result<(), Diverted>>> {
    let node = Netns::the_daemons()?;
    node.enter(|| check_here(pairs))?
}

/// Likewise, by the routes of the current netns.
fn check_here<'a>(
    pairs: impl IntoIterator<Item = (&'a PodEnd, &'a PodEnd)>,
) -> io::Result<Vec<Result<(), Diverted>>> {
    let mut netlink = Netlink::open()?;
    let mut both = |one, other| match one_way(&mut netlink, one, other)? {
        Ok(()) => one_way(&mut netlink, other, one),
        diverted => Ok(diverted),
    };
    let pairs = pairs.into_iter();
    pairs.map(|(one, other)| both(one, other)).collect()
}

/// Checks the way of packets from `source` to `destination`, by whichever link of its pod they come.
fn one_way(
    netlink: &mut Netlink,
    source: &PodEnd,
    destination: &PodEnd,
) -> io::Result<Result<(), Diverted>> {
    let (from, to) = (source.address, destination.address);
    let not_forwarded = |why| Diverted::NotForwarded { from, to, why };
    let mut result = Err(not_forwarded("the pod's link is not known".into()));
    let mut is_direct = false;
    for link in &source.links {
        match netlink.forwarding_route(from, to, *link) {
            Ok(route) => match leads_to(&route, from, to, &destination.links) {
                Ok(()) => is_direct = true,
                diverted => return Ok(diverted),
            },
            Err(error) if is_lack(&error) => return Err(error),
            // What is not forwarded goes nowhere.
            Err(error) => result = Err(not_forwarded(error.to_string())),
        }
    }
    Ok(if is_direct { Ok(()) } else { result })
}

/// Whether the kernel lacks something for the moment.
fn is_lack(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw);
    matches!(
        code,
        Some(
            Errno::ENOMEM
                | Errno::ENOBUFS
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::EAGAIN
                | Errno::EINTR
        )
    )
}

fn leads_to(route: &RouteMessage, from: IpAddr, to: IpAddr, links: &[u32]) -> Result<(), Diverted> {
    let mut interface = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::MultiPath(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::EncapType(_)
            | RouteAttribute::NewDestination(_) => return Err(Diverted::Indirect { from, to }),
            _ => {}
        }
    }
    match interface {
        Some(index) if route.header.kind == RouteType::Unicast && links.contains(&index) => Ok(()),
        _ => Err(Diverted::Elsewhere {
            from,
            to,
            interface: name_of(interface),
        }),
    }
}

/// The name of an interface of the current netns.
fn name_of(index: Option<u32>) -> String {
    let name = index.map(|index| {
        let name = nix::net::if_::if_indextoname(index);
        name.map_or_else(
            |_| format!("interface {index}"),
            |name| name.to_string_lossy().into_owned(),
        )
    });
    name.unwrap_or_else(|| "no interface".into())
}

/// Changes that may concern where the node sends packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteChanges {
    /// All packets may be concerned.
    all: bool,
    /// The packets to these networks may be: an address, and the number of bits that count.
    destinations: HashSet<(IpAddr, u8)>,
}

impl RouteChanges {
    /// Changes that concern all packets.
    pub fn all() -> Self {
        Self {
            all: true,
            destinations: HashSet::new(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        !self.all && self.destinations.is_empty()
    }

    /// Whether packets to `address` may be concerned.
    pub fn concern(&self, address: IpAddr) -> bool {
        let mut destinations = self.destinations.iter();
        self.all || destinations.any(|(network, length)| contains(*network, *length, address))
    }

    /// Adds changes.
    pub fn add(&mut self, other: Self) {
        self.all |= other.all;
        self.destinations.extend(other.destinations);
        if self.all || self.destinations.len() > MAX_DESTINATIONS {
            *self = Self::all();
        }
    }

    /// Adds what was reported; `None` if that is not known.
    fn add_report(&mut self, reported: Option<RouteNetlinkMessage>) {
        let changes = match reported {
            Some(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
                Self::of_route(&route)
            }
            Some(RouteNetlinkMessage::NewLink(link)) => Self {
                all: !carries(&link),
                ..Self::default()
            },
            // Addresses that are added are reported with their routes.
            Some(RouteNetlinkMessage::NewAddress(_)) => Self::default(),
            // Rules, next hops, and interfaces and addresses that are removed.
            _ => Self::all(),
        };
        self.add(changes);
    }

    fn of_route(route: &RouteMessage) -> Self {
        let length = route.header.destination_prefix_length;
        let mut attributes = route.attributes.iter();
        let destination = attributes.find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
            _ => None,
        });
        match destination {
            Some(network) => Self {
                all: false,
                destinations: [(network, length)].into(),
            },
            // A default route, for example.
            None => Self::all(),
        }
    }
}

/// Whether the kernel keeps the routes of an interface: it is up and has a carrier.
fn carries(link: &LinkMessage) -> bool {
    link.header
        .flags
        .contains(LinkFlags::Up | LinkFlags::LowerUp)
}

fn contains(network: IpAddr, length: u8, address: IpAddr) -> bool {
    let length = u32::from(length);
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let differing = network.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= length.min(32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let differing = network.to_bits() ^ address.to_bits();
            differing.leading_zeros() >= length.min(128)
        }
        _ => false,
    }
}

/// Reports changes that may concern where the node sends packets.
#[derive(Debug)]
pub struct RouteWatch(AsyncFd<Netlink>);

impl RouteWatch {
    /// Opens a watch of the node's netns. Must be called within a runtime.
    pub fn open() -> io::Result<Self> {
        Self::open_in(&Netns::the_daemons()?)
    }

    fn open_in(node: &Netns) -> io::Result<Self> {
        let netlink = node.enter(Netlink::watch_routes)??;
        // SAFETY: the socket owns its descriptor, always returns the same one, and closes it only when it is dropped.
        let watch = unsafe { AsyncFd::register(netlink) };
        Ok(Self(watch.map_err(io::Error::from)?))
    }

    /// Waits for reports, and returns the changes; none if no report is of interest.
    pub async fn changed(&mut self) -> io::Result<RouteChanges> {
        let mut ready = self.0.readable_mut().await?;
        let mut changes = RouteChanges::default();
        let is_all = ready
            .get_inner_mut()
            .reports(|reported| changes.add_report(reported));
        if is_all {
            ready.clear_ready();
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_links::{ip, node_and_pod};

    fn address(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[test]
    fn changes_concern_the_networks_that_they_name() {
        let mut changes = RouteChanges::default();
        assert!(changes.is_empty() && !changes.concern(address("10.0.0.1")));
        for (network, length) in [("10.1.0.0", 16), ("fd00:1::", 32), ("10.9.0.7", 32)] {
            changes.add(RouteChanges {
                all: false,
                destinations: [(address(network), length)].into(),
            });
        }
        for (concerned, expected) in [
            ("10.1.255.255", true),
            ("10.2.0.0", false),
            ("10.9.0.7", true),
            ("10.9.0.6", false),
            ("fd00:1:ffff::1", true),
            ("fd00:2::1", false),
            // The same bits as an IPv4 network's.
            ("a01::", false),
        ] {
            assert_eq!(changes.concern(address(concerned)), expected, "{concerned}");
        }
        let more = (0..=MAX_DESTINATIONS as u8).map(|last| (IpAddr::from([192, 0, 2, last]), 32));
        changes.add(RouteChanges {
            all: false,
            destinations: more.collect(),
        });
        assert_eq!(changes, RouteChanges::all());
        assert!(changes.concern(address("10.2.0.0")));
    }

    /// A node that routes between two pods, and has a third interface that leads elsewhere. `None` if `test` is skipped.
    fn routed(test: &str) -> Option<(Netns, Netns, [PodEnd; 2], [PodEnd; 2])> {
        let (node, pod) = node_and_pod(test)?;
        for setup in [
            "link add p1 type veth peer name eth0 netns POD",
            "link add p2 type veth peer name eth1 netns POD",
            "link add out type veth peer name eth2 netns POD",
            "link set p1 up",
            "link set p2 up",
            "link set out up",
            "addr add 192.0.2.1/24 dev out",
            "addr add fd02::1/64 dev out nodad",
            "route add 10.1.0.1 dev p1",
            "route add 10.1.0.2 dev p2",
            "route add fd00::1 dev p1",
            "route add fd00::2 dev p2",
        ] {
            ip(&node, &pod, setup);
        }
        for (parameter, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            // Otherwise the kernel may refuse packets for where answers to them would go.
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/p1/rp_filter", "0"),
            ("ipv4/conf/p2/rp_filter", "0"),
        ] {
            let path = format!("/proc/sys/net/{parameter}");
            node.enter(|| std::fs::write(path, value)).unwrap().unwrap();
        }
        // A route is used only if its interface has a carrier, on some systems.
        for interface in ["eth0", "eth1", "eth2"] {
            ip(&pod, &pod, &format!("link set {interface} up"));
        }
        let index = |name: &str| node.enter(|| nix::net::if_::if_nametoindex(name));
        let end = |link: &str, own: &str| PodEnd {
            links: vec![index(link).unwrap().unwrap()],
            address: address(own),
        };
        let v4 = [end("p1", "10.1.0.1"), end("p2", "10.1.0.2")];
        let v6 = [end("p1", "fd00::1"), end("p2", "fd00::2")];
        Some((node, pod, v4, v6))
    }

    fn checked(node: &Netns, [one, other]: &[PodEnd; 2]) -> Result<(), Diverted> {
        let checked = node.enter(|| check_here([(one, other)])).unwrap();
        checked.unwrap().remove(0)
    }

    #[test]
    fn routes_that_lead_out_of_the_node_are_found_in_either_direction() {
        let name = "routes_that_lead_out_of_the_node_are_found_in_either_direction";
        let Some((node, pod, v4, v6)) = routed(name) else {
            return;
        };
        assert_eq!(checked(&node, &v4), Ok(()));
        assert_eq!(checked(&node, &v6), Ok(()));
        let reversed = |[one, other]: &[PodEnd; 2]| [other.clone(), one.clone()];
        ip(&node, &pod, "route add default via 192.0.2.9 table 7");
        ip(&node, &pod, "-6 route add default via fd02::9 table 7");
        for (rule, pair) in [
            // By the link that the packets come from, as with security groups for pods.
            ("rule add iif p1 lookup 7", &v4),
            ("rule add iif p2 lookup 7", &v4),
            ("-6 rule add iif p1 lookup 7", &v6),
            ("-6 rule add iif p2 lookup 7", &v6),
            // Whatever does not come from outside, as with intranode visibility.
            ("rule add not iif out lookup 7", &v4),
            ("-6 rule add not iif out lookup 7", &v6),
            ("rule add from 10.1.0.2 lookup 7", &v4),
            ("rule add ipproto tcp lookup 7", &v4),
        ] {
            ip(&node, &pod, rule);
            for pair in [pair, &reversed(pair)] {
                let diverted = checked(&node, pair).unwrap_err();
                assert!(
                    matches!(diverted, Diverted::Indirect { .. }),
                    "{rule}: {diverted}"
                );
            }
            ip(&node, &pod, &rule.replace(" add ", " del "));
            assert_eq!(checked(&node, pair), Ok(()), "{rule}");
        }
        for (route, expected) in [
            ("10.1.0.2 dev out", "leads to out"),
            ("10.1.0.2 via 192.0.2.9", "a gateway"),
            (
                "10.1.0.2 nexthop dev p2 nexthop dev out",
                "several next hops",
            ),
            ("10.1.0.2 dev p1", "leads to p1"),
        ] {
            ip(&node, &pod, &format!("route replace {route}"));
            let diverted = checked(&node, &v4).unwrap_err().to_string();
            assert!(diverted.contains(expected), "{route}: {diverted}");
        }
        for kind in ["blackhole", "unreachable"] {
            ip(&node, &pod, "route del 10.1.0.2");
            ip(&node, &pod, &format!("route add {kind} 10.1.0.2"));
            let diverted = checked(&node, &v4).unwrap_err();
            assert!(
                matches!(diverted, Diverted::NotForwarded { .. }),
                "{diverted}"
            );
        }
        // The kernel forgets the route, and reports the interface alone.
        ip(&node, &pod, "route add default via fd02::9");
        ip(&node, &pod, "link set p2 down");
        let diverted = checked(&node, &v6).unwrap_err();
        assert!(matches!(diverted, Diverted::Indirect { .. }), "{diverted}");
        // A pod without a link.
        let nowhere = PodEnd {
            links: vec![],
            ..v4[0].clone()
        };
        assert!(checked(&node, &[nowhere, v4[1].clone()]).is_err());
    }

    #[tokio::test]
    async fn changes_of_routes_are_reported() {
        let Some((node, pod, _, _)) = routed("changes_of_routes_are_reported") else {
            return;
        };
        let mut watch = RouteWatch::open_in(&node).unwrap();
        for (change, concerned) in [
            ("route add 10.7.0.0/16 dev out", vec!["10.7.0.1"]),
            ("route del 10.7.0.0/16 dev out", vec!["10.7.0.1"]),
            ("route add fd07::/64 dev out", vec!["fd07::1"]),
            ("rule add iif p1 lookup 7", vec!["10.9.0.1", "fd09::1"]),
            ("-6 rule add iif p1 lookup 7", vec!["10.9.0.1", "fd09::1"]),
            ("link set p2 down", vec!["10.1.0.2", "fd00::2"]),
            ("addr del 192.0.2.1/24 dev out", vec!["10.1.0.2"]),
        ] {
            ip(&node, &pod, change);
            let mut changes = RouteChanges::default();
            while !concerned.iter().all(|one| changes.concern(address(one))) {
                changes.add(watch.changed().await.unwrap());
            }
        }
    }
}
