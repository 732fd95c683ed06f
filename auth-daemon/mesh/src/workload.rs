//! Pods in the model of the mesh.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use super::{HostPort, Identity, Membership, Waypoint, policy::suggest::workload_name};

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: String,
    /// Name within the namespace.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Whether a pod is reached by HBONE, the protocol of Istio's ambient mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hbone {
    /// It is not.
    #[default]
    No,
    /// It is, unless its node is known to have a ready daemon of ours.
    Offered,
}

/// A pod, in the mesh or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Namespace and name.
    pub name: ObjectName,
    /// `metadata.uid`, which distinguishes a recreated pod from its predecessor of the same name. Empty if the source
    /// has none.
    pub uid: String,
    /// Identity of the pod's service account.
    pub identity: Identity,
    /// The first reading of the remote cluster that the pod is of: a number that grows, because another cluster may get the
    /// name of a former one. 0 for a pod of the snapshot's own cluster.
    pub generation: u64,
    /// The pod's addresses, most preferred first. IPv4 addresses are never IPv4-mapped.
    pub addresses: Vec<IpAddr>,
    /// The node that runs the pod.
    pub node: String,
    /// Whether the pod is ready to accept connections.
    pub ready: bool,
    /// Whether the pod is being deleted. A terminating pod receives new connections only if there is no other pod, and
    /// yields its address to another pod that claims it.
    pub terminating: bool,
    /// Whether the pod's phase is Succeeded or Failed. Its processes may still run: the kubelet evicts a pod, or the node
    /// shuts down, before they have ended. A finished pod is no endpoint of a service. It yields its address to any other
    /// pod or service, because Kubernetes may assign the address again.
    pub finished: bool,
    /// Whether the pod uses the node's network namespace. Such a pod cannot be distinguished from its node.
    pub host_network: bool,
    /// Whether the pod has no service account, or is a mirror pod: a kubelet alone may have written it. Such a pod is outside
    /// the mesh, and no endpoint of a service that has pods of the mesh.
    pub without_identity: bool,
    /// The pod's own setting of its membership. `None`: the namespace's setting or the mesh's default applies.
    pub membership: Option<Membership>,
    /// `metadata.labels`, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Named ports of the pod's containers.
    pub named_ports: BTreeMap<String, u16>,
    /// Ports of the pod that its node exposes.
    pub host_ports: Vec<HostPort>,
    /// Whether another daemon, which speaks HBONE, serves the pod.
    pub hbone: Hbone,
    /// Path of the pod's network namespace, if the source provides it.
    pub netns: Option<PathBuf>,
    /// The waypoint that connections to the pod's own address go through.
    pub waypoint: Option<Arc<Waypoint>>,
    /// See [`Workload::full_name`].
    pub full_name: Cached<FullName>,
}

/// The names of a pod and of the workload that it belongs to, each as `namespace/name`. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct FullName {
    /// The pod's, which begins with the workload's.
    pod: Arc<str>,
    workload_length: usize,
}

/// What follows from the other fields of a value, computed when it is first needed. It is no part of what the value is: a
/// copy, which may be changed, computes its own.
#[derive(Debug)]
pub struct Cached<T>(OnceLock<T>);

impl<T> Default for Cached<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T> Clone for Cached<T> {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl<T> PartialEq for Cached<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Cached<T> {}

impl FullName {
    /// Returns the pod's name.
    pub fn pod(&self) -> &Arc<str> {
        &self.pod
    }

    /// Returns the workload's name.
    pub fn workload(&self) -> &str {
        &self.pod[..self.workload_length]
    }
}

impl Workload {
    /// Creates a ready pod that has no address and is not scheduled to a node yet.
    pub fn new(name: ObjectName, identity: Identity) -> Self {
        Self {
            name,
            uid: String::new(),
            identity,
            generation: 0,
            without_identity: false,
            addresses: Vec::new(),
            node: String::new(),
            ready: true,
            terminating: false,
            finished: false,
            host_network: false,
            membership: None,
            labels: BTreeMap::new(),
            named_ports: BTreeMap::new(),
            host_ports: Vec::new(),
            hbone: Hbone::No,
            netns: None,
            waypoint: None,
            full_name: Cached::default(),
        }
    }

    /// Returns the names of the pod and of its workload, which are made once.
    pub fn full_name(&self) -> &FullName {
        self.full_name.0.get_or_init(|| {
            let workload = workload_name(self).len();
            FullName {
                workload_length: self.name.namespace.len() + "/".len() + workload,
                pod: self.name.to_string().into(),
            }
        })
    }

    /// Returns the pod's first address of the same family as `like`.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter();
        addresses.find(|ip| ip.is_ipv4() == like.is_ipv4()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_changed_has_names_of_its_own() {
        let name = ObjectName {
            namespace: "shop".into(),
            name: "cart-6d-x2".into(),
        };
        let identity = "spiffe://cluster.local/ns/shop/sa/cart";
        let pod = Workload::new(name, identity.parse().unwrap());
        let names = |pod: &Workload| {
            let names = pod.full_name();
            (names.pod().to_string(), names.workload().to_owned())
        };
        let expected = |workload: &str| ("shop/cart-6d-x2".to_owned(), workload.to_owned());
        assert_eq!(names(&pod), expected("shop/cart-6d-x2"));
        let mut copy = pod.clone();
        assert_eq!(copy, pod);
        copy.labels.insert("pod-template-hash".into(), "6d".into());
        assert_eq!(names(&copy), expected("shop/cart"));
    }
}
