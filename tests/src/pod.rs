//! A running pod of a mesh.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::sync::Arc;

use anyhow::Result;
use serde_json::Value;

use crate::cgroup;
use crate::place::Place;
use crate::spec::PodSpec;

/// A pod: a [`Place`] with addresses, a name and a node. A clone refers to the same pod.
#[derive(Debug, Clone)]
pub struct Pod(Arc<State>);

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) spec: PodSpec,
    pub(crate) uid: String,
    pub(crate) node: String,
    /// Its interface's name on the node.
    pub(crate) link: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) place: Place,
}

impl Pod {
    pub(crate) fn new(state: State) -> Self {
        Self(Arc::new(state))
    }

    pub(crate) fn state(&self) -> &State {
        &self.0
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.spec.name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.0.spec.namespace
    }

    /// `namespace/name`, as in the daemon's status.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace(), self.name())
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        &self.0.node
    }

    /// The name of its link's end on the node.
    pub fn link(&self) -> &str {
        &self.0.link
    }

    /// Its UID, which is also in its cgroup's name.
    pub fn uid(&self) -> &str {
        &self.0.uid
    }

    /// The specification that it was created from.
    pub fn spec(&self) -> &PodSpec {
        &self.0.spec
    }

    /// Where its processes run.
    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.0.addresses
    }

    /// Its IPv4 address.
    ///
    /// # Panics
    /// If it has none.
    pub fn ipv4(&self) -> Ipv4Addr {
        let find = |address: &IpAddr| {
            if let IpAddr::V4(address) = address {
                Some(*address)
            } else {
                None
            }
        };
        self.0
            .addresses
            .iter()
            .find_map(find)
            .unwrap_or_else(|| panic!("pod {} has no IPv4 address", self.full_name()))
    }

    /// Its IPv6 address.
    ///
    /// # Panics
    /// If it has none.
    pub fn ipv6(&self) -> Ipv6Addr {
        let find = |address: &IpAddr| {
            if let IpAddr::V6(address) = address {
                Some(*address)
            } else {
                None
            }
        };
        self.0
            .addresses
            .iter()
            .find_map(find)
            .unwrap_or_else(|| panic!("pod {} has no IPv6 address", self.full_name()))
    }

    /// Its IPv4 address with a port.
    ///
    /// # Panics
    /// If it has none.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.ipv4(), port).into()
    }

    /// Its IPv6 address with a port.
    ///
    /// # Panics
    /// If it has none.
    pub fn at6(&self, port: u16) -> SocketAddr {
        (self.ipv6(), port).into()
    }

    /// Its manifest as first written.
    pub fn manifest(&self) -> Value {
        self.0.spec.manifest(
            &self.0.uid,
            &self.0.node,
            &self.0.addresses,
            &self.0.place.netns().path(),
        )
    }

    /// Creates a place for one of its containers: the pod's network, and a cgroup below the pod's own.
    pub fn container(&self, name: &str) -> Result<Place> {
        let place = self.place();
        Place::new(
            &format!("{}, {name}", place.name()),
            place.netns().clone(),
            place.cgroup().join(name),
            place.folder().to_owned(),
        )
    }

    /// Creates a place like [`Pod::container`] for a pod object whose UID another than the mesh assigns, such as an API server.
    pub fn container_of(&self, uid: &str) -> Result<Place> {
        let place = self.place();
        Place::new(
            &format!("{}, pod {uid}", place.name()),
            place.netns().clone(),
            place
                .cgroup()
                .with_file_name(format!("pod{uid}"))
                .join("app"),
            place.folder().to_owned(),
        )
    }

    /// Kills its processes and keeps its network.
    pub fn kill_processes(&self) -> Result<()> {
        cgroup::kill(self.0.place.cgroup())
    }
}

impl Deref for Pod {
    type Target = Place;

    fn deref(&self) -> &Place {
        self.place()
    }
}
