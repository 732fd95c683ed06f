//! Links, addresses and routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::PodNetwork;
use crate::ip::ip;
use crate::netns::Netns;

pub(crate) fn node_ipv4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 31, 0, 10 + node)
}

pub(crate) fn node_ipv6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(node))
}

/// The address of a node's pod; `pod` 1 is the node's own side.
pub(crate) fn pod_ipv4(node: u8, pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, node, pod)
}

/// The address of a node's pod; `pod` 1 is the node's own side.
pub(crate) fn pod_ipv6(node: u8, pod: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, u16::from(node), 0, 0, 0, 0, 0, u16::from(pod))
}

/// The IPv4 network of a node's pods.
pub(crate) fn pod_network(node: u8) -> String {
    format!("{}/24", pod_ipv4(node, 0))
}

/// The IPv6 network of a node's pods.
pub(crate) fn pod_network6(node: u8) -> String {
    format!("{}/64", pod_ipv6(node, 0))
}

/// The name of the interface on the wire that leads to a node.
pub(crate) fn node_link(node: u8) -> String {
    format!("n{node}")
}

/// Parameters to set before a namespace has any interface, so that addresses are usable at once and do not change.
pub(crate) fn prepare(netns: &Netns, forwards: bool) -> Result<()> {
    let mut parameters = vec![
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
    ];
    if forwards {
        parameters.extend([
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
        ]);
    }
    netns.set_parameters(&parameters)
}

/// Creates the bridge between the nodes, and attaches the nodes and the outside host to it.
pub(crate) fn wire(wire: &Netns, nodes: &[(u8, &Netns)], outside: &Netns) -> Result<()> {
    let mut commands = vec![
        "link set lo up".to_owned(),
        // Without a multicast querier, snooping may lose neighbour discovery.
        format!("link add {BRIDGE} type bridge mcast_snooping 0"),
        format!("link set {BRIDGE} up"),
    ];
    for (number, netns) in nodes {
        commands.extend(link_of_node(*number, netns));
    }
    commands.extend(link_to_wire(OUTSIDE_LINK, OUTSIDE_IPV4, outside));
    ip(Some(wire.name()), &commands)
}

/// Replaces the link between the bridge and a node whose namespace is new.
pub(crate) fn attach_again(wire: &Netns, number: u8, netns: &Netns) -> Result<()> {
    // The kernel removes the other end with the old namespace, but not at once.
    let _ = unplug(wire, &node_link(number));
    ip(Some(wire.name()), &link_of_node(number, netns))
}

fn link_of_node(number: u8, netns: &Netns) -> [String; 2] {
    link_to_wire(&node_link(number), node_ipv4(number), netns)
}

/// The commands that attach a namespace to the bridge. Its hardware address is derived from its address, so that
/// neighbour entries stay valid when the namespace is recreated.
fn link_to_wire(link: &str, address: Ipv4Addr, netns: &Netns) -> [String; 2] {
    [
        format!(
            "link add {link} type veth peer name eth0 address {} netns {}",
            hardware_address(address.octets()),
            netns.name()
        ),
        format!("link set {link} master {BRIDGE} up"),
    ]
}

/// Sets a node's addresses, its pods' bridge and its routes to the other nodes' pods.
pub(crate) fn node(netns: &Netns, number: u8, others: &[u8]) -> Result<()> {
    let mut commands = vec![
        "link set lo up".to_owned(),
        "link set eth0 up".to_owned(),
        format!("addr add {}/24 dev eth0", node_ipv4(number)),
        format!("addr add {}/64 dev eth0 nodad", node_ipv6(number)),
        // With an address of its own. Otherwise it takes the lowest address of its ports, which changes as pods come
        // and go.
        format!(
            "link add {POD_BRIDGE} address {} type bridge mcast_snooping 0",
            hardware_address(pod_ipv4(number, GATEWAY).octets())
        ),
        format!("link set {POD_BRIDGE} up"),
        format!("addr add {}/24 dev {POD_BRIDGE}", pod_ipv4(number, GATEWAY)),
        format!(
            "addr add {}/64 dev {POD_BRIDGE} nodad",
            pod_ipv6(number, GATEWAY)
        ),
        format!("route add {OUTSIDE_NETWORK4} dev eth0"),
        format!("route add {OUTSIDE_NETWORK6} dev eth0"),
    ];
    for other in others {
        commands.push(format!(
            "route add {}/24 via {}",
            pod_ipv4(*other, 0),
            node_ipv4(*other)
        ));
        commands.push(format!(
            "route add {}/64 via {}",
            pod_ipv6(*other, 0),
            node_ipv6(*other)
        ));
    }
    ip(Some(netns.name()), &commands)
}

/// Sets the outside host's addresses and its routes to all nodes and pods.
pub(crate) fn outside(netns: &Netns, nodes: &[u8]) -> Result<()> {
    let mut commands = vec![
        "link set lo up".to_owned(),
        "link set eth0 up".to_owned(),
        format!("addr add {OUTSIDE_IPV4}/24 dev eth0"),
        format!("addr add {OUTSIDE_IPV6}/64 dev eth0 nodad"),
        format!("route add {NODE_NETWORK4} dev eth0"),
        format!("route add {NODE_NETWORK6} dev eth0"),
    ];
    for node in nodes {
        commands.push(format!(
            "route add {}/24 via {}",
            pod_ipv4(*node, 0),
            node_ipv4(*node)
        ));
        commands.push(format!(
            "route add {}/64 via {}",
            pod_ipv6(*node, 0),
            node_ipv6(*node)
        ));
    }
    ip(Some(netns.name()), &commands)
}

/// Gives nodes a default route to the outside host. The kernel must have a route for an address before netfilter can
/// translate it.
pub(crate) fn outside_is_default_route<'a>(nodes: impl Iterator<Item = &'a Netns>) -> Result<()> {
    let commands = [
        format!("route add default via {OUTSIDE_IPV4} dev eth0"),
        format!("route add default via {OUTSIDE_IPV6} dev eth0"),
    ];
    nodes
        .into_iter()
        .try_for_each(|node| ip(Some(node.name()), &commands))
}

/// Creates a pod's link to its node, its addresses and its default routes.
///
/// The hardware address is derived from the first address, so that neighbour entries stay valid when a pod is recreated
/// with its old address.
pub(crate) fn pod(
    pod: &Netns,
    node: &Netns,
    node_number: u8,
    link: &str,
    addresses: &[IpAddr],
    network: PodNetwork,
) -> Result<()> {
    let hardware = match addresses.first() {
        Some(IpAddr::V4(address)) => hardware_address(address.octets()),
        Some(IpAddr::V6(address)) => {
            let [.., a, b, c, d] = address.octets();
            hardware_address([a ^ node_number, b, c, d])
        }
        None => hardware_address([node_number, 0, 0, 0]),
    };
    let (gateway4, gateway6) = (
        pod_ipv4(node_number, GATEWAY),
        pod_ipv6(node_number, GATEWAY),
    );
    let mut on_node = vec![format!(
        "link add {link} type veth peer name eth0 address {hardware} netns {}",
        pod.name()
    )];
    match network {
        PodNetwork::Bridge => on_node.push(format!("link set {link} master {POD_BRIDGE} up")),
        PodNetwork::Routed => on_node.extend([
            // That of the bridge, which has the gateway's address otherwise.
            format!(
                "link set {link} address {} up",
                hardware_address(gateway4.octets())
            ),
            format!("addr add {gateway4}/32 dev {link}"),
            format!("addr add {gateway6}/128 dev {link} nodad"),
        ]),
    }
    ip(Some(node.name()), &on_node)?;
    let mut commands = vec!["link set lo up".to_owned(), "link set eth0 up".to_owned()];
    for address in addresses {
        let (length, nodad, gateway) = match address {
            IpAddr::V4(_) => (24, "", IpAddr::V4(gateway4)),
            IpAddr::V6(_) => (64, " nodad", IpAddr::V6(gateway6)),
        };
        match network {
            PodNetwork::Bridge => {
                commands.push(format!("addr add {address}/{length} dev eth0{nodad}"));
            }
            // Only the gateway is on the link.
            PodNetwork::Routed => commands.extend([
                format!("addr add {address}/{length} dev eth0 noprefixroute{nodad}"),
                format!("route add {gateway} dev eth0"),
            ]),
        }
        commands.push(format!("route add default via {gateway}"));
    }
    ip(Some(pod.name()), &commands)?;
    addresses
        .iter()
        .try_for_each(|address| route_to_pod(node, node_number, link, *address, network))
}

/// Adds a node's route to an address of its pod with the interface `link`, if pods are routed. It replaces one to another
/// pod.
pub(crate) fn route_to_pod(
    node: &Netns,
    node_number: u8,
    link: &str,
    address: IpAddr,
    network: PodNetwork,
) -> Result<()> {
    let gateway = match address {
        _ if network == PodNetwork::Bridge => return Ok(()),
        IpAddr::V4(_) => IpAddr::V4(pod_ipv4(node_number, GATEWAY)),
        IpAddr::V6(_) => IpAddr::V6(pod_ipv6(node_number, GATEWAY)),
    };
    let route = format!("route replace {address} dev {link} src {gateway}");
    ip(Some(node.name()), &[route])
}

/// Connects a namespace nested in a pod to the pod, which forwards its traffic.
pub(crate) fn nested(nested: &Netns, pod: &Netns) -> Result<()> {
    let parameters = [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
    ];
    pod.set_parameters(&parameters)?;
    ip(
        Some(pod.name()),
        &[
            format!(
                "link add nested0 type veth peer name eth0 netns {}",
                nested.name()
            ),
            "link set nested0 up".to_owned(),
            format!("addr add {NESTED_GATEWAY4}/24 dev nested0"),
            format!("addr add {NESTED_GATEWAY6}/64 dev nested0 nodad"),
        ],
    )?;
    ip(
        Some(nested.name()),
        &[
            "link set lo up".to_owned(),
            "link set eth0 up".to_owned(),
            format!("addr add {NESTED_IPV4}/24 dev eth0"),
            format!("addr add {NESTED_IPV6}/64 dev eth0 nodad"),
            format!("route add default via {NESTED_GATEWAY4}"),
            format!("route add default via {NESTED_GATEWAY6}"),
        ],
    )
}

/// Disconnects a pod, as a CNI plugin does when a pod is removed: removes both ends of its link, even if its namespace
/// still exists.
pub(crate) fn unplug(node: &Netns, link: &str) -> Result<()> {
    ip(Some(node.name()), &[format!("link del {link}")])
}

fn hardware_address([a, b, c, d]: [u8; 4]) -> String {
    // The locally administered bit is set in the first byte.
    format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// The outside host's IPv4 address, from TEST-NET-1 (RFC 5737).
pub(crate) const OUTSIDE_IPV4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The outside host's IPv6 address, from the documentation prefix (RFC 3849).
pub(crate) const OUTSIDE_IPV6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
/// The network of all nodes' pods.
pub(crate) const POD_NETWORKS: &str = "10.77.0.0/16";
/// The IPv6 network of all nodes' pods.
pub(crate) const POD_NETWORKS6: &str = "fd77::/16";
/// The address of a namespace nested in a pod.
pub(crate) const NESTED_IPV4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
/// The address of a namespace nested in a pod.
pub(crate) const NESTED_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, 2);
const NESTED_GATEWAY4: &str = "172.18.0.1";
const NESTED_GATEWAY6: &str = "fd18::1";
const OUTSIDE_NETWORK4: &str = "192.0.2.0/24";
const OUTSIDE_NETWORK6: &str = "2001:db8::/64";
const NODE_NETWORK4: &str = "172.31.0.0/24";
const NODE_NETWORK6: &str = "fd31::/64";
pub(crate) const OUTSIDE_LINK: &str = "outside";
pub(crate) const BRIDGE: &str = "br0";
pub(crate) const POD_BRIDGE: &str = "cni0";
/// The interface of a node, a pod or the outside host that leads out of it.
pub(crate) const NODE_LINK: &str = "eth0";
const GATEWAY: u8 = 1;
