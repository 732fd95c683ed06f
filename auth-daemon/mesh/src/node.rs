//! Nodes of the cluster, and the networks that the cluster takes addresses from.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use imbl::{OrdMap, OrdSet, ordmap::DiffItem};
use ipnet::IpNet;

use super::{Edit, Snapshot};

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Name, unique in the cluster.
    pub name: String,
    /// Addresses, internal and external. IPv4 addresses are never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Networks that the node's pods take their addresses from.
    pub pod_networks: Vec<IpNet>,
    /// Whether an administrator has disabled the tunnel of the node's pods.
    pub tunnel_disabled: bool,
}

/// The networks that the cluster takes addresses of pods and services from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// Networks that contain pods.
    pub pods: BTreeSet<IpNet>,
    /// Networks that contain virtual addresses of services.
    pub services: BTreeSet<IpNet>,
}

impl Networks {
    /// Reports whether `address` is in one of the networks.
    pub fn contain(&self, address: IpAddr) -> bool {
        let mut all = self.pods.iter().chain(&self.services);
        all.any(|network| network.contains(&address))
    }
}

/// The nodes and networks of a snapshot.
#[derive(Clone, Debug, Default)]
pub(super) struct Cluster {
    /// By name.
    nodes: OrdMap<String, Arc<Node>>,
    /// Names of the nodes that have an address.
    by_address: OrdMap<IpAddr, OrdSet<String>>,
    /// Networks of services, by the name of the object that defines them.
    service_networks: OrdMap<String, Arc<[IpNet]>>,
    networks: Arc<Networks>,
}

impl Snapshot {
    /// Returns the nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.cluster.nodes.values()
    }

    /// Returns the node `name`.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.cluster.nodes.get(name)
    }

    /// Returns the node that has `address`: the first by name, if more than one claims it.
    pub fn node_at(&self, address: IpAddr) -> Option<&Arc<Node>> {
        let names = self.cluster.by_address.get(&address)?;
        self.node(names.get_min()?)
    }

    /// Returns the addresses of all nodes, sorted.
    pub fn node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster.by_address.keys().copied()
    }

    /// Returns the addresses that have become a node's since `before`, or are no node's any more. The cost depends on the
    /// number of changes.
    pub fn node_addresses_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = IpAddr> {
        let changes = before.cluster.by_address.diff(&self.cluster.by_address);
        changes.filter_map(|change| match change {
            DiffItem::Add(address, _) | DiffItem::Remove(address, _) => Some(*address),
            DiffItem::Update { .. } => None,
        })
    }

    /// Returns the networks that the cluster takes addresses of pods and services from, as far as its objects say.
    pub fn networks(&self) -> &Arc<Networks> {
        &self.cluster.networks
    }
}

impl Edit {
    /// Adds `node`, or replaces the node of the same name.
    pub fn node(&mut self, node: impl Into<Arc<Node>>) {
        let node = node.into();
        self.remove_node(&node.name);
        let cluster = &mut self.next.cluster;
        for address in &node.addresses {
            let names = cluster.by_address.entry(*address).or_default();
            names.insert(node.name.clone());
        }
        self.networks_changed |= !node.pod_networks.is_empty();
        cluster.nodes.insert(node.name.clone(), node.clone());
        self.disable_tunnel(&node.name, node.tunnel_disabled);
    }

    /// Removes the node.
    pub fn remove_node(&mut self, name: &str) {
        let cluster = &mut self.next.cluster;
        let Some(node) = cluster.nodes.remove(name) else {
            return;
        };
        for address in &node.addresses {
            if let Some(names) = cluster.by_address.get_mut(address) {
                names.remove(name);
                if names.is_empty() {
                    cluster.by_address.remove(address);
                }
            }
        }
        self.networks_changed |= !node.pod_networks.is_empty();
        self.disable_tunnel(name, false);
    }

    /// Sets the networks of services that the object `name` defines. An empty list removes the object.
    pub fn service_networks(&mut self, name: &str, networks: Arc<[IpNet]>) {
        let known = &mut self.next.cluster.service_networks;
        if networks.is_empty() {
            known.remove(name);
        } else {
            known.insert(name.to_owned(), networks);
        }
        self.networks_changed = true;
    }

    /// Collects the networks of all objects, if any has changed.
    pub(super) fn collect_networks(&mut self) {
        if !std::mem::take(&mut self.networks_changed) {
            return;
        }
        let cluster = &mut self.next.cluster;
        let pods = cluster.nodes.values().flat_map(|node| &node.pod_networks);
        let services = cluster.service_networks.values();
        let networks = Networks {
            pods: pods.copied().collect(),
            services: services.flat_map(|found| found.iter().copied()).collect(),
        };
        if *cluster.networks != networks {
            cluster.networks = Arc::new(networks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, addresses: &[&str], networks: &[&str]) -> Node {
        Node {
            name: name.into(),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            pod_networks: networks.iter().map(|net| net.parse().unwrap()).collect(),
            tunnel_disabled: false,
        }
    }

    fn changed(before: &Snapshot, change: impl FnOnce(&mut Edit)) -> Snapshot {
        let mut edit = Edit::from(before.clone());
        change(&mut edit);
        edit.finish()
    }

    #[test]
    fn a_node_is_found_by_each_of_its_addresses() {
        let one = changed(&Snapshot::default(), |edit| {
            edit.node(node("b", &["192.0.2.1", "2001:db8::1"], &[]));
            edit.node(node("a", &["192.0.2.1"], &[]));
        });
        let at = |snapshot: &Snapshot, ip: &str| {
            let node = snapshot.node_at(ip.parse().unwrap());
            node.map(|node| node.name.clone())
        };
        assert_eq!(at(&one, "192.0.2.1").as_deref(), Some("a"));
        assert_eq!(at(&one, "2001:db8::1").as_deref(), Some("b"));
        let two = changed(&one, |edit| edit.remove_node("a"));
        assert_eq!(at(&two, "192.0.2.1").as_deref(), Some("b"));
        assert_eq!(two.node_addresses_since(&one).count(), 0, "still a node's");
        let three = changed(&two, |edit| edit.node(node("b", &["192.0.2.2"], &[])));
        let changes: Vec<_> = three.node_addresses_since(&two).collect();
        let expected = ["192.0.2.1", "192.0.2.2", "2001:db8::1"];
        assert_eq!(changes, expected.map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(at(&three, "192.0.2.1"), None);
    }

    #[test]
    fn networks_are_those_of_all_objects() {
        let services = |net: &str| Arc::from([net.parse::<IpNet>().unwrap()]);
        let one = changed(&Snapshot::default(), |edit| {
            edit.node(node("a", &[], &["10.1.0.0/24", "2001:db8:1::/64"]));
            edit.node(node("b", &[], &["10.1.1.0/24"]));
            edit.service_networks("kubernetes", services("10.96.0.0/16"));
            edit.service_networks("more", services("10.97.0.0/16"));
        });
        assert_eq!(one.networks().pods.len(), 3);
        assert_eq!(one.networks().services.len(), 2);
        assert!(one.networks().contain("10.1.1.9".parse().unwrap()));
        assert!(!one.networks().contain("10.1.2.9".parse().unwrap()));
        let two = changed(&one, |edit| {
            edit.remove_node("a");
            edit.service_networks("more", Arc::from([]));
        });
        assert_eq!(two.networks().pods.len(), 1);
        assert!(!two.networks().contain("10.97.0.1".parse().unwrap()));
        assert!(two.networks().contain("10.96.0.1".parse().unwrap()));
        let ready = changed(&two, |edit| edit.node(node("c", &["192.0.2.1"], &[])));
        assert!(Arc::ptr_eq(ready.networks(), two.networks()));
    }
}
