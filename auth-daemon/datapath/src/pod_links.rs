//! Determines whether a pod's link is private: whether what others send to the pod, and what the pod sends, passes the
//! node's own routing and nobody else's interface. On a shared link (a bridge, macvlan) another pod can take the pod's
//! address by ARP.
//!
//! A link is private if each interface by which the pod's netns can be left is one end of a veth pair whose other end is in
//! the node's netns and not attached to another device. The node's side decides: a pod can change its own netns, but not the
//! node's end of its link. What is not known counts as shared.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::io::unix::AsyncFd;

use super::{
    Netns,
    interfaces::{Interfaces, NodeEnd, node_ends, numbers},
    netlink::Netlink,
    netns::open_the_nodes,
};

/// Time after which a pod's own netns is read again. The kernel reports changes of the node's end of a link, but not
/// changes in the pod.
const READ_AGAIN: Duration = Duration::from_secs(10);
/// The same while the pod's side is why the link is not private: its runtime may still be setting it up.
const READ_UNFINISHED: Duration = Duration::from_secs(1);
/// Maximum number of successive times that a private link may be unreadable. The kernel may lack memory for a moment, which is
/// no reason to end connections. No verdict is given meanwhile.
const MAX_UNREADABLE: u32 = 3;
/// Maximum number of times that the node's interfaces are listed because they changed meanwhile.
const MAX_LISTS: usize = 8;

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
    ends: Vec<NodeEnd>,
}

impl NodeLinks {
    /// Lists the node's ends of links.
    pub fn list() -> io::Result<Self> {
        Self::list_in(Netns::the_daemons()?)
    }

    fn list_in(node: Netns) -> io::Result<Self> {
        let ends = node.enter(node_ends)??;
        Ok(Self { node, ends })
    }

    /// Checks that the link of the pod with these addresses in `pod` is private.
    pub fn check(&self, pod: &Netns, addresses: &[IpAddr]) -> Result<(), SharedLink> {
        self.check_from(&self.ends_of(pod)?, pod, addresses)
    }

    /// The node's ends of the links to `pod`.
    fn ends_of(&self, pod: &Netns) -> io::Result<Vec<NodeEnd>> {
        let numbers = self.node.enter(|| numbers(&[pod]))??;
        let ends = self.ends.iter();
        let ends = ends.filter(|end| numbers.contains(&end.netns));
        Ok(ends.cloned().collect())
    }

    fn check_from(
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

/// Keeps track of which pods' links are private.
#[derive(Debug, Default)]
pub struct PodLinks {
    /// The node's netns, if it is not the daemon's own.
    #[cfg(test)]
    node_netns: Option<std::fs::File>,
    /// Reports changes of the node's interfaces.
    changes: Option<AsyncFd<Netlink>>,
    /// The node's ends of links since the last change, or why they are not known.
    node: Option<Result<NodeLinks, SharedLink>>,
    /// How often they were listed.
    lists: u64,
    /// By the cookie of the pod's netns.
    known: HashMap<u64, Known>,
}

#[derive(Debug)]
struct Known {
    addresses: Vec<IpAddr>,
    /// The node's ends of the pod's links.
    ends: Result<Vec<NodeEnd>, SharedLink>,
    /// The number of the list that they are from.
    list: u64,
    checked: Result<(), SharedLink>,
    /// How often it could not be read since it was found private.
    unreadable: u32,
    read: Instant,
}

impl Known {
    /// Whether the pod's own netns need not be read again.
    fn is_current(&self) -> bool {
        let for_long = match &self.checked {
            Ok(()) => self.unreadable == 0,
            Err(shared) => matches!(shared, SharedLink::Attached(_)),
        };
        let limit = if for_long {
            READ_AGAIN
        } else {
            READ_UNFINISHED
        };
        self.read.elapsed() < limit
    }

    /// Keeps what was found `before` if this could not be read, but not more than [`MAX_UNREADABLE`] times.
    fn after(self, before: &Self) -> Self {
        let is_kept = before.checked.is_ok() && before.unreadable < MAX_UNREADABLE;
        match self.checked {
            Err(SharedLink::Unreadable(_)) if is_kept => Self {
                checked: Ok(()),
                unreadable: before.unreadable + 1,
                ..self
            },
            _ => self,
        }
    }
}

impl PodLinks {
    /// Lists the node's ends of links again if they have changed. Forgets all pods but those whose cookie is `kept`.
    /// Must be called within the control plane's runtime.
    pub fn refresh(&mut self, kept: impl Fn(u64) -> bool) {
        self.known.retain(|cookie, _| kept(*cookie));
        for _ in 0..MAX_LISTS {
            match self.drain() {
                Ok(false) if matches!(self.node, Some(Ok(_))) => return,
                Ok(_) => {
                    self.lists += 1;
                    let listed = self.node_netns().and_then(NodeLinks::list_in);
                    self.node = Some(listed.map_err(SharedLink::from));
                }
                Err(error) => {
                    self.lists += 1;
                    self.node = Some(Err(error.into()));
                    return;
                }
            }
        }
        // The last change is reported by [`PodLinks::changed`], too.
    }

    /// Discards what was reported since the last call. Returns whether there was anything.
    fn drain(&mut self) -> io::Result<bool> {
        if let Some(changes) = &mut self.changes {
            return Ok(changes.get_mut().drain());
        }
        // Before the interfaces are listed, so that no change is missed.
        let netlink = self.node_netns()?.enter(Netlink::watch_links)??;
        // SAFETY: the socket owns its descriptor, always returns the same one, and closes it only when it is dropped.
        let changes = unsafe { AsyncFd::register(netlink) };
        self.changes = Some(changes.map_err(io::Error::from)?);
        Ok(true)
    }

    fn node_netns(&self) -> io::Result<Netns> {
        #[cfg(test)]
        if let Some(netns) = &self.node_netns {
            return Netns::nameless(netns.try_clone()?);
        }
        Netns::the_daemons()
    }

    /// Waits until the node's interfaces may have changed.
    pub async fn changed(&self) {
        match &self.changes {
            Some(changes) => {
                // An error of the descriptor is a reason to list the interfaces, too.
                if let Ok(mut ready) = changes.readable().await {
                    ready.clear_ready();
                }
            }
            None => std::future::pending().await,
        }
    }

    /// Whether the link of the pod with these addresses in `pod` is private, as of the last call of [`PodLinks::refresh`].
    pub fn is_private(&mut self, pod: &Netns, addresses: &[IpAddr]) -> bool {
        let before = self.known.remove(&pod.cookie());
        let before = before.filter(|known| known.addresses == addresses);
        let known = match before {
            Some(known) if known.list == self.lists && known.is_current() => known,
            before => self.read(pod, addresses, before),
        };
        let is_private = known.checked.is_ok();
        self.known.insert(pod.cookie(), known);
        is_private
    }

    fn read(&self, pod: &Netns, addresses: &[IpAddr], before: Option<Known>) -> Known {
        let ends = match &self.node {
            Some(Ok(node)) => node.ends_of(pod).map_err(SharedLink::from),
            Some(Err(error)) => Err(error.clone()),
            None => Err(SharedLink::Unreadable("they are not listed yet".into())),
        };
        let before = match before {
            Some(known) if known.ends == ends && known.is_current() => {
                let list = self.lists;
                return Known { list, ..known };
            }
            before => before,
        };
        let checked = match (&self.node, &ends) {
            (Some(Ok(node)), Ok(ends)) => node.check_from(ends, pod, addresses),
            (_, ends) => ends.clone().map(drop),
        };
        let known = Known {
            addresses: addresses.to_vec(),
            ends,
            list: self.lists,
            checked,
            unreadable: 0,
            read: Instant::now(),
        };
        match before {
            Some(before) => known.after(&before),
            None => known,
        }
    }

    /// Why the link of the pod in the netns with `cookie` is not private. `None` if it is, or if that was not asked yet.
    pub fn why_shared(&self, cookie: u64) -> Option<&SharedLink> {
        self.known.get(&cookie)?.checked.as_ref().err()
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, process::Command};

    use super::*;
    use crate::interfaces::Interface;

    const OWN: &str = "10.1.0.2";

    fn address(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    /// The node's end of a link to the interface of a pod with index `peer`.
    fn end(peer: u32, is_attached: bool) -> NodeEnd {
        NodeEnd {
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

    #[test]
    fn a_private_link_that_cannot_be_read_counts_as_private_for_a_few_times() {
        let known = |checked| Known {
            addresses: vec![],
            ends: Ok(vec![]),
            list: 0,
            checked,
            unreadable: 0,
            read: Instant::now(),
        };
        let unreadable = || known(Err(SharedLink::Unreadable("no memory".into())));
        let mut last = known(Ok(()));
        for _ in 0..MAX_UNREADABLE {
            last = unreadable().after(&last);
            assert_eq!(last.checked, Ok(()));
        }
        last = unreadable().after(&last);
        assert!(matches!(last.checked, Err(SharedLink::Unreadable(_))));
        assert!(unreadable().after(&last).checked.is_err());
        // A read that succeeds counts at once, and resets the count of failures.
        assert_eq!(known(Ok(())).after(&last).unreadable, 0);
        let shared = known(Err(SharedLink::NoInterface)).after(&known(Ok(())));
        assert_eq!(shared.checked, Err(SharedLink::NoInterface));
        assert!(unreadable().after(&shared).checked.is_err());
    }

    /// A node and a pod without interfaces. `None` if `test` is skipped, because it does not run as root.
    fn node_and_pod(test: &str) -> Option<(Netns, Netns)> {
        if crate::lacks_root(test) {
            return None;
        }
        Some((Netns::create().unwrap(), Netns::create().unwrap()))
    }

    /// Runs `ip` in `netns`. `POD` stands for `pod`, as a name of a network namespace.
    fn ip(netns: &Netns, pod: &Netns, arguments: &str) {
        assert!(try_ip(netns, pod, arguments), "ip {arguments}");
    }

    /// Like [`ip`], for a kind of device that the kernel may not know. Returns whether it does.
    fn try_ip(netns: &Netns, pod: &Netns, arguments: &str) -> bool {
        let file = pod.try_clone_file().unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let path = arguments.replace("POD", &path);
        let output = netns.enter(|| Command::new("ip").args(path.split(' ')).output());
        let output = output.unwrap().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        let is_unknown = error.contains("Unknown device type") || error.contains("not supported");
        assert!(
            output.status.success() || is_unknown,
            "ip {arguments}: {error}"
        );
        if is_unknown {
            println!("SKIPPED ip {arguments}: {error}");
        }
        !is_unknown
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

    #[tokio::test]
    async fn changes_of_the_nodes_interfaces_are_seen() {
        let name = "changes_of_the_nodes_interfaces_are_seen";
        let Some((node, pod)) = node_and_pod(name) else {
            return;
        };
        ip(
            &node,
            &pod,
            "link add p1 type veth peer name eth0 netns POD",
        );
        address_on(&pod, "eth0");
        let own = [address(OWN)];
        let mut links = PodLinks {
            node_netns: Some(node.try_clone_file().unwrap()),
            ..PodLinks::default()
        };
        assert!(!links.is_private(&pod, &own));
        links.refresh(|_| true);
        assert!(links.is_private(&pod, &own));
        ip(&node, &pod, "link add shared type bridge");
        ip(&node, &pod, "link set p1 master shared");
        links.changed().await;
        // Until the change is reported, the known state stays.
        assert!(links.is_private(&pod, &own));
        links.refresh(|_| true);
        assert!(!links.is_private(&pod, &own));
        assert!(
            links
                .why_shared(pod.cookie())
                .unwrap()
                .to_string()
                .contains("p1")
        );
        ip(&node, &pod, "link set p1 nomaster");
        links.changed().await;
        links.refresh(|_| true);
        assert!(links.is_private(&pod, &own));
        links.refresh(|_| false);
        assert_eq!(links.why_shared(pod.cookie()), None);
    }
}
