//! The declared contents of a mesh, and their manifests.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use serde_json::{Value, json};

/// The specification of a pod.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: Option<String>,
    pub(crate) ipv4: Family<Ipv4Addr>,
    pub(crate) ipv6: Family<Ipv6Addr>,
    service_account: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    ports: Vec<(String, u16)>,
    ready: bool,
    pub(crate) by_uid: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Family<A> {
    Chosen,
    Given(A),
    None,
}

impl PodSpec {
    /// A ready pod in namespace `default` with service account `default`, on the mesh's first node, with an IPv4 and an
    /// IPv6 address of its node's networks.
    pub fn new(name: &str) -> Self {
        Self {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            node: None,
            ipv4: Family::Chosen,
            ipv6: Family::Chosen,
            service_account: "default".to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            ports: Vec::new(),
            ready: true,
            by_uid: false,
        }
    }

    /// Sets its node.
    pub fn on(mut self, node: &str) -> Self {
        self.node = Some(node.to_owned());
        self
    }

    /// Sets its namespace.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.to_owned();
        self
    }

    /// Sets its service account.
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = name.to_owned();
        self
    }

    /// Adds a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds an annotation. `auth-daemon.io/netns` is present by default, except after [`PodSpec::by_uid`].
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Omits the annotation `auth-daemon.io/netns`: the daemon must find the pod by its UID, through the processes in
    /// its cgroup, which is where the kubelet creates those of pods.
    pub fn by_uid(mut self) -> Self {
        self.by_uid = true;
        self
    }

    /// Adds a named container port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), port));
        self
    }

    /// Sets an address instead of the next free one. To be routed, it must be in its node's network, 10.77.N.0/24 or
    /// fd77:N::/64. No other pod of the node may have it: addresses are allocated from 2 upwards.
    pub fn address(mut self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.ipv4 = Family::Given(address),
            IpAddr::V6(address) => self.ipv6 = Family::Given(address),
        }
        self
    }

    /// Omits the IPv6 address.
    pub fn ipv4_only(mut self) -> Self {
        self.ipv6 = Family::None;
        self
    }

    /// Omits the IPv4 address.
    pub fn ipv6_only(mut self) -> Self {
        self.ipv4 = Family::None;
        self
    }

    /// Sets the condition Ready to `False` at first.
    pub fn not_ready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Whether it is created as a pod of the mesh.
    pub(crate) fn is_meshed(&self) -> bool {
        let set = [&self.labels, &self.annotations].map(|of| of.get("auth-daemon.io/mesh"));
        !set.into_iter().flatten().any(|set| set == "disabled")
    }

    pub(crate) fn manifest(
        &self,
        uid: &str,
        node: &str,
        addresses: &[IpAddr],
        netns: &Path,
    ) -> Value {
        let mut annotations = self.annotations.clone();
        if !self.by_uid {
            annotations
                .entry("auth-daemon.io/netns".to_owned())
                .or_insert_with(|| netns.display().to_string());
        }
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|(name, port)| json!({"name": name, "containerPort": port}))
            .collect();
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "uid": uid,
                "labels": self.labels,
                "annotations": annotations,
            },
            "spec": {
                "nodeName": node,
                "serviceAccountName": self.service_account,
                "containers": [{"name": "app", "image": "app", "ports": ports}],
            },
            "status": {
                "phase": "Running",
                "podIP": addresses.first(),
                "podIPs": addresses.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
                "conditions": [{"type": "Ready", "status": if self.ready { "True" } else { "False" }}],
            },
        })
    }

    /// The name of its service account.
    pub fn account(&self) -> &str {
        &self.service_account
    }

    pub(crate) fn service_account_manifest(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": self.service_account, "namespace": self.namespace},
        })
    }
}

/// The specification of a service, which exists only as its manifest.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    namespace: String,
    name: String,
    selector: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    addresses: Vec<IpAddr>,
    ports: Vec<Value>,
}

impl ServiceSpec {
    /// A service in namespace `default` without addresses, ports and selector.
    pub fn new(name: &str) -> Self {
        Self {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            selector: BTreeMap::new(),
            annotations: BTreeMap::new(),
            addresses: Vec::new(),
            ports: Vec::new(),
        }
    }

    /// Sets its namespace.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.to_owned();
        self
    }

    /// Adds a label to its selector.
    pub fn selector(mut self, key: &str, value: &str) -> Self {
        self.selector.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds an address, by convention from 10.96.0.0/16 or fd96::/112. The first is `clusterIP`.
    ///
    /// # Panics
    /// If the text is not an IP address.
    pub fn address(mut self, address: &str) -> Self {
        self.addresses.push(address.parse().expect("an IP address"));
        self
    }

    /// Adds a TCP port and the pods' target port.
    pub fn port(mut self, port: u16, target: u16) -> Self {
        self.ports.push(json!({"name": format!("p{port}"), "port": port, "targetPort": target, "protocol": "TCP"}));
        self
    }

    /// Adds a TCP port and the name of the pods' target port.
    pub fn named_port(mut self, port: u16, target: &str) -> Self {
        self.ports.push(json!({"name": format!("p{port}"), "port": port, "targetPort": target, "protocol": "TCP"}));
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Pins the service accounts that may run it, as in `"web,other-namespace/web"`.
    pub fn service_accounts(self, accounts: &str) -> Self {
        self.annotation("auth-daemon.io/service-accounts", accounts)
    }

    /// Its manifest, for [`crate::Manifests::apply`].
    pub fn manifest(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": self.namespace, "annotations": self.annotations},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": self.addresses.first(),
                "clusterIPs": self.addresses,
                "selector": self.selector,
                "ports": self.ports,
            },
        })
    }
}
