//! Decides what each address of the mesh is to the kernel, and writes the changes to the MESH map.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Instant,
};

use auth_common::{MAX_EXPOSED, MeshKind};
use ipnet::IpNet;

use super::Enrolment;
use crate::proxy::unclaimed::{Gone, GoneAddresses};
use auth_datapath::Kernel;
use auth_mesh::{AddressKind, Snapshot};

/// What the MESH map was last written from.
#[derive(Default)]
pub(super) struct Written {
    /// `None` before the first write.
    pub(super) snapshot: Option<Arc<Snapshot>>,
    node_addresses: Vec<IpAddr>,
    networks: HashMap<IpNet, MeshKind>,
    /// Whether the last write succeeded. If not, the next one writes everything.
    is_written: bool,
}

impl Enrolment {
    /// Writes the mesh's addresses to the kernel: the changes, or all of them the first time and after a failure.
    pub(super) fn tell_addresses(&mut self, snapshot: &Arc<Snapshot>) {
        let node = &self.node;
        let node_addresses = self.node_addresses.current().to_vec();
        let mut gone = node.unclaimed.gone();
        let expired = gone.expire(Instant::now());
        let before = self.written.snapshot.as_ref();
        let is_same = before.is_some_and(|before| Arc::ptr_eq(before, snapshot))
            && node_addresses == self.written.node_addresses
            && expired.is_empty();
        if is_same && self.written.is_written {
            return;
        }
        let mut changed: HashSet<IpAddr> = expired.into_iter().collect();
        match before {
            Some(before) => changed.extend(note_changes(&mut gone, before, snapshot)),
            None => adopt(&mut gone, &node.kernel, snapshot, &node_addresses),
        }
        changed.extend(self.written.node_addresses.iter().chain(&node_addresses));
        if let Some(before) = before {
            let exposed = snapshot.exposed_since(before);
            changed.extend(exposed.filter_map(|(at, _)| at.address));
        }
        let are_exposed = self.tell_exposed_ports(snapshot);
        let networks = self.networks(snapshot);
        if networks != self.written.networks {
            // Before the kernel captures anything in them.
            let refused = networks.iter().filter(|(_, kind)| {
                matches!(kind, MeshKind::PodNetwork | MeshKind::ServiceNetwork)
            });
            let refused = refused.map(|(net, kind)| (*net, *kind)).collect();
            node.unclaimed.set_networks(refused);
        }
        let sources = Sources {
            snapshot,
            node_addresses: &node_addresses,
            networks: &networks,
            gone: &gone,
        };
        let written = if self.written.is_written {
            let addresses = changed.into_iter().map(IpNet::from);
            let networks = self.written.networks.keys().chain(networks.keys()).copied();
            let changes = addresses.chain(networks);
            node.kernel
                .change_mesh(changes.map(|net| (net, sources.entry(net))))
        } else {
            node.kernel.set_mesh(&sources.all())
        };
        drop(gone);
        if let Err(error) = &written {
            tracing::error!(
                %error, "cannot write the mesh's addresses to the kernel; new ones are not captured"
            );
        }
        self.written = Written {
            snapshot: Some(snapshot.clone()),
            node_addresses,
            networks,
            is_written: written.is_ok() && are_exposed,
        };
    }

    /// Writes the ports at which pods and services of the mesh are exposed to the kernel, if they have changed. Returns
    /// whether they are written.
    fn tell_exposed_ports(&self, snapshot: &Snapshot) -> bool {
        let before = self
            .written
            .snapshot
            .as_ref()
            .filter(|_| self.written.is_written);
        if before.is_some_and(|before| snapshot.exposed_since(before).next().is_none()) {
            return true;
        }
        match self.node.kernel.exposed_ports.set(snapshot.exposed()) {
            Ok(0) => true,
            Ok(left_out) => {
                tracing::error!(
                    left_out,
                    most = MAX_EXPOSED,
                    "too many exposed ports of services and pods; connections to those left out are not captured, and \
                     servers in STRICT refuse them"
                );
                true
            }
            Err(error) => {
                tracing::error!(%error, "cannot write the exposed ports to the kernel; new ones are not captured");
                false
            }
        }
    }

    /// Returns what an address is to the kernel when it calls a pod of this node. `None` if the MESH map has no entry
    /// for it.
    pub(super) fn caller_kind(&self, snapshot: &Snapshot, address: IpAddr) -> Option<MeshKind> {
        let Written {
            node_addresses,
            networks,
            ..
        } = &self.written;
        let sources = Sources {
            snapshot,
            node_addresses,
            networks,
            gone: &self.node.unclaimed.gone(),
        };
        let containing = || {
            let networks = networks.iter().filter(|(net, _)| net.contains(&address));
            networks.max_by_key(|(net, _)| net.prefix_len())
        };
        let of_its_own = match sources.kind(address) {
            // Another node, and what runs in its netns, calls from outside the mesh.
            Some(MeshKind::Node) if node_addresses.binary_search(&address).is_err() => {
                Some(MeshKind::Outside)
            }
            kind => kind,
        };
        of_its_own.or_else(|| containing().map(|(_, kind)| *kind))
    }

    /// Returns the networks of pods and services: the configured ones, and those that discovery finds. With names on demand,
    /// any other address may be the mesh's, too.
    fn networks(&self, snapshot: &Snapshot) -> HashMap<IpNet, MeshKind> {
        let (config, found) = (&self.node.config, snapshot.networks());
        let services = config.service_networks.iter().chain(&found.services);
        let pods = config.pod_networks.iter().chain(&found.pods);
        let services = services.map(|net| (net.trunc(), MeshKind::ServiceNetwork));
        // A network that is listed as both counts as one of pods, which is safe: pods may call.
        let asked = self.node.lookups.iter().flat_map(|_| asked_networks());
        asked
            .chain(services)
            .chain(pods.map(|net| (net.trunc(), MeshKind::PodNetwork)))
            .collect()
    }
}

/// Returns all addresses as those that are asked for, and the networks of which none can be a pod's or service's: this host,
/// links, multicast, and whatever stands for no address.
fn asked_networks() -> impl Iterator<Item = (IpNet, MeshKind)> {
    let asked = [
        IpNet::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        IpNet::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    ];
    let outside = [
        (IpAddr::from([0, 0, 0, 0]), 8),
        (IpAddr::from([127, 0, 0, 0]), 8),
        (IpAddr::from([169, 254, 0, 0]), 16),
        (IpAddr::from([224, 0, 0, 0]), 4),
        (Ipv4Addr::BROADCAST.into(), 32),
        (Ipv6Addr::UNSPECIFIED.into(), 128),
        (Ipv6Addr::LOCALHOST.into(), 128),
        (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10),
        (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8),
    ]
    .map(|(address, length)| IpNet::new(address, length));
    let asked = asked.into_iter().map(|net| (net, MeshKind::Asked));
    let outside = outside.into_iter().map(|net| (net, MeshKind::Outside));
    asked
        .chain(outside)
        .filter_map(|(net, kind)| Some((net.ok()?, kind)))
}

/// Everything that decides what an address is to the kernel.
struct Sources<'a> {
    snapshot: &'a Snapshot,
    /// Sorted.
    node_addresses: &'a [IpAddr],
    networks: &'a HashMap<IpNet, MeshKind>,
    gone: &'a GoneAddresses,
}

impl Sources<'_> {
    /// Returns what `address` is by itself, regardless of the networks that contain it.
    ///
    /// This function decides which claim outranks which. A service outranks the node, because a pod that dials the service
    /// must be captured even where the node holds the address, too (IPVS mode of kube-proxy, a virtual address on the
    /// loopback). The address stays captured when the service is gone, because the node may still forward it. The node
    /// outranks everything else. Another node outranks what is outside the mesh, and exposed ports outrank nothing.
    fn kind(&self, address: IpAddr) -> Option<MeshKind> {
        let claim = self.snapshot.kind(address);
        let gone = self.gone.get(address).filter(|_| claim.is_none());
        if claim == Some(AddressKind::Service) {
            return Some(MeshKind::Service);
        }
        if gone.is_some_and(|gone| gone.is_service) {
            return Some(MeshKind::Gone);
        }
        if self.node_addresses.binary_search(&address).is_ok() {
            return Some(MeshKind::Node);
        }
        match claim {
            Some(AddressKind::Pod) => Some(MeshKind::Pod),
            Some(AddressKind::Service) => Some(MeshKind::Service),
            // Of another node. Pods in its own netns have its address, too.
            Some(AddressKind::Outside) if self.snapshot.node_at(address).is_some() => {
                Some(MeshKind::Node)
            }
            Some(AddressKind::Outside) => Some(MeshKind::Outside),
            None if gone.is_some() => Some(MeshKind::Gone),
            // Users may expose a service at any address: that takes none out of a network. A network may be a single
            // address.
            None if self.networks.keys().any(|net| net.contains(&address)) => {
                self.networks.get(&IpNet::from(address)).copied()
            }
            None => {
                let has_port = self.snapshot.has_exposed_port(address);
                has_port.then_some(MeshKind::Exposed)
            }
        }
    }

    /// Returns the map's entry for an address or a network.
    fn entry(&self, net: IpNet) -> Option<MeshKind> {
        if net.prefix_len() == net.max_prefix_len() {
            self.kind(net.addr())
        } else {
            self.networks.get(&net).copied()
        }
    }

    /// Returns all entries of the map.
    fn all(&self) -> HashMap<IpNet, MeshKind> {
        let claimed = self.snapshot.addresses().map(|(address, _)| address);
        let addresses = claimed
            .chain(self.snapshot.node_addresses())
            .chain(self.node_addresses.iter().copied())
            .chain(self.gone.addresses())
            .chain(self.snapshot.exposed().filter_map(|at| at.address))
            .map(IpNet::from);
        let nets = addresses.chain(self.networks.keys().copied());
        nets.filter_map(|net| Some((net, self.entry(net)?)))
            .collect()
    }
}

/// Notes which of the mesh's addresses no object claims any more, and which are claimed again. Returns all addresses that
/// have changed.
fn note_changes(gone: &mut GoneAddresses, before: &Snapshot, snapshot: &Snapshot) -> Vec<IpAddr> {
    let mut changed = Vec::new();
    let claims = snapshot.addresses_since(before).map(|(address, _)| address);
    for address in claims.chain(snapshot.node_addresses_since(before)) {
        changed.push(address);
        let was = before.kind(address).filter(|was| was.is_meshed());
        match (was, snapshot.kind(address)) {
            (_, Some(_)) => gone.claim(address),
            (Some(was), None) => changed.extend(gone.add(
                address,
                Gone {
                    was: before.describe(address),
                    is_service: was == AddressKind::Service,
                    since: Instant::now(),
                },
            )),
            (None, None) => {}
        }
    }
    changed
}

/// Notes which addresses that a previous daemon left in the map as the mesh's no object claims now.
fn adopt(
    gone: &mut GoneAddresses,
    kernel: &Kernel,
    snapshot: &Snapshot,
    node_addresses: &[IpAddr],
) {
    for kind in [MeshKind::Pod, MeshKind::Service, MeshKind::Gone] {
        for address in kernel.mesh_addresses(&[kind]) {
            if snapshot.kind(address).is_some() {
                continue;
            }
            let is_service = match kind {
                MeshKind::Service => true,
                // Of the node's addresses, only those that were a service's stay captured.
                MeshKind::Gone => node_addresses.binary_search(&address).is_ok(),
                _ => false,
            };
            gone.adopt(
                address,
                Gone {
                    was: None,
                    is_service,
                    since: Instant::now(),
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::{Edit, Inventory, Membership, Node, ObjectName, Service, Workload};

    use super::*;

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "default".into(),
            name: name.into(),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn pod(pod: &str, address: &str, membership: Membership) -> Workload {
        Workload {
            addresses: vec![ip(address)],
            membership: Some(membership),
            ..Workload::new(name(pod), "spiffe://a/ns/default/sa/x".parse().unwrap())
        }
    }

    fn service(service: &str, addresses: &[&str]) -> Service {
        Service {
            addresses: addresses.iter().map(|address| ip(address)).collect(),
            ..Service::new(name(service))
        }
    }

    fn snapshot() -> Snapshot {
        Snapshot::new(Inventory {
            workloads: vec![
                pod("web", "10.1.0.1", Membership::Enabled),
                pod("on-node", "192.0.2.1", Membership::Enabled),
                pod("out", "10.1.0.2", Membership::Disabled),
                pod("host", "192.0.2.2", Membership::Disabled),
            ],
            services: vec![service("web", &["10.96.0.1", "192.0.2.3"])],
        })
    }

    fn without(snapshot: &Snapshot, change: impl FnOnce(&mut Edit)) -> Snapshot {
        let mut edit = Edit::from(snapshot.clone());
        change(&mut edit);
        edit.finish()
    }

    /// Kinds of addresses on a node with 192.0.2.0/30.
    fn kind(snapshot: &Snapshot, gone: &GoneAddresses, address: &str) -> Option<MeshKind> {
        let networks = HashMap::from([
            ("10.1.0.0/16".parse().unwrap(), MeshKind::PodNetwork),
            ("10.96.0.9/32".parse().unwrap(), MeshKind::ServiceNetwork),
        ]);
        let node_addresses: Vec<_> = (1..5).map(|last| IpAddr::from([192, 0, 2, last])).collect();
        let sources = Sources {
            snapshot,
            node_addresses: &node_addresses,
            networks: &networks,
            gone,
        };
        let all = sources.all();
        let net = IpNet::from(ip(address));
        assert_eq!(all.get(&net).copied(), sources.entry(net), "{address}");
        sources.kind(ip(address))
    }

    #[test]
    fn with_names_on_demand_every_address_that_a_pod_or_service_can_have_is_asked_for() {
        let kind = |address: &str| {
            let address = ip(address);
            let networks = asked_networks().filter(|(net, _)| net.contains(&address));
            let longest = networks.max_by_key(|(net, _)| net.prefix_len());
            longest.map(|(_, kind)| kind)
        };
        for asked in [
            "192.0.2.1",
            "10.1.0.1",
            "240.240.0.1",
            "fd00::1",
            "2001:2::1",
        ] {
            assert_eq!(kind(asked), Some(MeshKind::Asked), "{asked}");
        }
        for outside in [
            "0.0.0.0",
            "127.0.0.53",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert_eq!(kind(outside), Some(MeshKind::Outside), "{outside}");
        }
    }

    #[test]
    fn a_service_outranks_the_node_and_the_node_all_others() {
        for (address, expected) in [
            ("10.1.0.1", Some(MeshKind::Pod)),
            ("10.1.0.2", Some(MeshKind::Outside)),
            ("10.96.0.1", Some(MeshKind::Service)),
            ("192.0.2.1", Some(MeshKind::Node)),
            ("192.0.2.2", Some(MeshKind::Node)),
            ("192.0.2.3", Some(MeshKind::Service)),
            ("192.0.2.4", Some(MeshKind::Node)),
            // Only its network has an entry.
            ("10.1.0.3", None),
            ("10.96.0.9", Some(MeshKind::ServiceNetwork)),
            ("192.0.2.9", None),
        ] {
            let kind = kind(&snapshot(), &GoneAddresses::default(), address);
            assert_eq!(kind, expected, "{address}");
        }
    }

    #[test]
    fn an_address_that_was_the_meshs_stays_captured_until_an_object_claims_it() {
        let mut gone = GoneAddresses::default();
        let before = snapshot();
        let after = without(&before, |edit| {
            for pod in ["web", "on-node", "out"] {
                edit.remove_pod(&name(pod));
            }
            edit.remove_service(&name("web"));
        });
        assert_eq!(note_changes(&mut gone, &before, &after).len(), 5);
        for (address, expected) in [
            ("10.1.0.1", Some(MeshKind::Gone)),
            ("10.96.0.1", Some(MeshKind::Gone)),
            // The node may forward what was a service's.
            ("192.0.2.3", Some(MeshKind::Gone)),
            ("192.0.2.1", Some(MeshKind::Node)),
            // It never was in the mesh.
            ("10.1.0.2", None),
        ] {
            assert_eq!(kind(&after, &gone, address), expected, "{address}");
        }
        let was = gone.get(ip("10.1.0.1")).unwrap().was.clone();
        assert_eq!(was.as_deref(), Some("pod default/web"));
        let again = without(&after, |edit| {
            edit.pod(pod("other", "10.1.0.1", Membership::Disabled));
        });
        note_changes(&mut gone, &after, &again);
        assert_eq!(
            kind(&again, &gone, "10.1.0.1"),
            Some(MeshKind::Outside),
            "claimed by a pod outside the mesh"
        );
        assert!(gone.get(ip("10.1.0.1")).is_none());
        let nothing = without(&again, |edit| edit.remove_pod(&name("other")));
        note_changes(&mut gone, &again, &nothing);
        assert_eq!(kind(&nothing, &gone, "10.1.0.1"), None);
    }

    #[test]
    fn an_address_of_another_node_is_known() {
        let mut gone = GoneAddresses::default();
        let before = snapshot();
        let after = without(&before, |edit| {
            edit.remove_pod(&name("web"));
            edit.node(Node {
                name: "b".into(),
                addresses: vec![ip("10.1.0.1"), ip("10.1.0.9")],
                ..Node::default()
            });
        });
        note_changes(&mut gone, &before, &after);
        for address in ["10.1.0.1", "10.1.0.9"] {
            let expected = Some(MeshKind::Node);
            assert_eq!(kind(&after, &gone, address), expected, "{address}");
            assert!(after.resolve((ip(address), 22).into()).is_ok());
        }
        let left = without(&after, |edit| edit.remove_node("b"));
        note_changes(&mut gone, &after, &left);
        assert_eq!((kind(&left, &gone, "10.1.0.9"), gone.len()), (None, 0));
    }

    #[test]
    fn a_pod_that_leaves_the_mesh_by_its_label_is_known() {
        let mut gone = GoneAddresses::default();
        let before = snapshot();
        let after = without(&before, |edit| {
            edit.pod(pod("web", "10.1.0.1", Membership::Disabled));
        });
        note_changes(&mut gone, &before, &after);
        assert_eq!(gone.len(), 0);
        assert_eq!(kind(&after, &gone, "10.1.0.1"), Some(MeshKind::Outside));
    }
}
