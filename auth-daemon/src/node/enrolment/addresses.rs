//! Writes the addresses of the mesh to the kernel's MESH map.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use auth_common::MeshKind;
use ipnet::IpNet;

use super::Enrolment;
use auth_mesh::{AddressKind, Snapshot};

/// The sources of the mesh's addresses, as of the last write to the kernel.
#[derive(Default)]
pub(super) struct Told {
    /// `None` if nothing was written yet, or the write failed.
    snapshot: Option<Arc<Snapshot>>,
    pub(super) node_addresses: Vec<IpAddr>,
}

impl Enrolment {
    /// Writes the mesh's addresses to the kernel: the changes, or all of them if the node's own addresses changed.
    pub(super) fn tell_addresses(&mut self, snapshot: &Arc<Snapshot>) {
        let kernel = &self.node.kernel;
        let node_addresses = node_addresses();
        let told = match &self.told.snapshot {
            Some(before) if node_addresses == self.told.node_addresses => {
                if Arc::ptr_eq(before, snapshot) {
                    return;
                }
                let networks = &self.node.config.pod_networks;
                let changes = snapshot.addresses_since(before);
                let changes = changes
                    // The node's own addresses take precedence over any other kind.
                    .filter(|(address, _)| !node_addresses.contains(address))
                    .map(|(address, kind)| {
                        let network = IpNet::from(address);
                        let left = networks.contains(&network).then_some(MeshKind::PodNetwork);
                        (network, kind.map(mesh_kind).or(left))
                    });
                kernel.change_mesh(changes)
            }
            _ => kernel.set_mesh(&self.mesh_addresses(snapshot, &node_addresses)),
        };
        self.told = Told {
            snapshot: told.is_ok().then(|| snapshot.clone()),
            node_addresses,
        };
        if let Err(error) = told {
            tracing::error!(
                %error, "cannot tell the kernel's side the mesh's addresses; new ones are not captured"
            );
        }
    }

    fn mesh_addresses(
        &self,
        snapshot: &Snapshot,
        node_addresses: &[IpAddr],
    ) -> HashMap<IpNet, MeshKind> {
        let mut addresses = HashMap::new();
        for network in &self.node.config.pod_networks {
            addresses.insert(network.trunc(), MeshKind::PodNetwork);
        }
        for (address, kind) in snapshot.addresses() {
            addresses.insert(address.into(), mesh_kind(kind));
        }
        for address in node_addresses {
            addresses.insert((*address).into(), MeshKind::Node);
        }
        addresses
    }
}

/// Converts an address's kind to the kernel's [`MeshKind`].
fn mesh_kind(kind: AddressKind) -> MeshKind {
    match kind {
        AddressKind::Pod => MeshKind::Pod,
        AddressKind::Service => MeshKind::Service,
    }
}

/// Returns the addresses of this node, which probes come from, sorted.
fn node_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let mut addresses: Vec<_> = interfaces
        .filter_map(|interface| {
            let storage = interface.address?;
            let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let v6 = storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
            v4.or(v6)
        })
        .filter(|address| !address.is_loopback())
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}
