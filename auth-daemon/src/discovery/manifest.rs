//! Conversion of Kubernetes objects to the model of the mesh. All sources share the same vocabulary and parser.

mod node;
mod slice;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString};
use serde::de::DeserializeOwned;
use serde_json::Value;

use auth_kubernetes::objects;
use auth_mesh::{
    HostPort, Identity, Membership, Node, ObjectName, Port, Service, Slice, TargetPort,
    TrustDomain, Workload, policy,
};

pub use node::{TUNNEL_ANNOTATION, node, service_cidr};
pub use slice::slice;

/// Annotation with the path of a pod's network namespace. Counts only with file discovery, where whoever writes the manifests
/// is trusted with the node, and where there may be no kubelet.
pub const NETNS_ANNOTATION: &str = "auth-daemon.io/netns";
/// Label of a pod or namespace, `enabled` or `disabled`, that sets whether pods are in the mesh. The pod's label takes
/// precedence. On a pod, an annotation works too.
pub const MESH_LABEL: &str = "auth-daemon.io/mesh";
/// Annotation that pins the service accounts that may run a service: names, or namespace/name, separated by commas.
pub const ACCOUNTS_ANNOTATION: &str = "auth-daemon.io/service-accounts";

/// An object that is relevant to the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A pod, whatever its phase.
    Pod(Arc<Workload>),
    /// A service with virtual addresses.
    Service(Arc<Service>),
    /// Endpoints of a service that selects no pods.
    Slice(Arc<Slice>),
    /// The membership that a namespace sets for its pods.
    Namespace(Option<Membership>),
    /// A node.
    Node(Arc<Node>),
    /// Networks that the cluster takes the virtual addresses of services from.
    ServiceNetworks(Arc<[IpNet]>),
    /// An AuthorizationPolicy or PeerAuthentication, readable or not.
    Policy(Arc<policy::api::Object>),
}

impl Object {
    /// Returns the kind's name in Kubernetes.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pod(_) => "Pod",
            Self::Service(_) => "Service",
            Self::Slice(_) => "EndpointSlice",
            Self::Namespace(_) => "Namespace",
            Self::Node(_) => "Node",
            Self::ServiceNetworks(_) => "ServiceCIDR",
            Self::Policy(policy) => policy.kind().as_str(),
        }
    }
}

/// Reads a document: a Pod, Service, EndpointSlice, Namespace, Node, ServiceCIDR, ServiceAccount, a policy, or a List of
/// them.
///
/// Skips objects of other kinds, because a folder may hold more than the mesh needs. Errors name the object and the
/// field.
pub fn read(
    document: Value,
    trust_domain: &TrustDomain,
) -> Result<Vec<(ObjectName, Object)>, String> {
    if document.is_null() {
        return Ok(Vec::new());
    }
    let text = |field: &str| document.get(field).and_then(Value::as_str);
    let (version, kind) = match (text("apiVersion"), text("kind")) {
        (Some(version), Some(kind)) => (version.to_owned(), kind.to_owned()),
        _ => return Err("not a Kubernetes object: apiVersion or kind is missing".into()),
    };
    if let Some(policy) = policy::api::Object::read(&document) {
        return Ok(vec![(
            policy.name().clone(),
            Object::Policy(Arc::new(policy)),
        )]);
    }
    match (version.as_str(), kind.as_str()) {
        ("v1", "Pod") => {
            let read: objects::Pod = typed(document)?;
            named("Pod", &read.metadata.clone(), pod(read, trust_domain))
        }
        ("v1", "Service") => {
            let read: objects::Service = typed(document)?;
            named(
                "Service",
                &read.metadata.clone(),
                service(read, trust_domain),
            )
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            let read: objects::EndpointSlice = typed(document)?;
            named("EndpointSlice", &read.metadata.clone(), slice(read))
        }
        ("v1", "Namespace") => {
            let read: objects::Namespace = typed(document)?;
            let name = ObjectName {
                namespace: String::new(),
                name: read.metadata.name.clone().unwrap_or_default(),
            };
            Ok(namespace(&read)?
                .map(|found| (name, found))
                .into_iter()
                .collect())
        }
        ("v1", "Node") => {
            let read: objects::Node = typed(document)?;
            let name = cluster_name("Node", &read.metadata)?;
            Ok(node(read)?.map(|found| (name, found)).into_iter().collect())
        }
        ("networking.k8s.io/v1", "ServiceCIDR") => {
            let read: objects::ServiceCidr = typed(document)?;
            let name = cluster_name("ServiceCIDR", &read.metadata)?;
            let found = service_cidr(read)?.map(|found| (name, found));
            Ok(found.into_iter().collect())
        }
        ("v1", "ServiceAccount") => {
            let account: objects::ServiceAccount = typed(document)?;
            let name = object_name("ServiceAccount", &account.metadata)?;
            trust_domain
                .identity(&name.namespace, &name.name)
                .map_err(|error| format!("ServiceAccount {name}: metadata.name: {error}"))?;
            Ok(Vec::new())
        }
        (
            version,
            "List"
            | "PodList"
            | "ServiceList"
            | "EndpointSliceList"
            | "NamespaceList"
            | "NodeList"
            | "ServiceCIDRList"
            | "ServiceAccountList"
            | "AuthorizationPolicyList"
            | "PeerAuthenticationList",
        ) => {
            let items = match document {
                Value::Object(mut list) => list.remove("items"),
                _ => None,
            };
            let Some(Value::Array(items)) = items else {
                return Err(format!("{kind}: items: is not a list"));
            };
            let item_kind = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
            let mut objects = Vec::new();
            for (index, mut item) in items.into_iter().enumerate() {
                // Items of a typed list omit what the list already specifies.
                if let (Some(item_kind), Value::Object(fields)) = (item_kind, &mut item) {
                    fields.entry("apiVersion").or_insert_with(|| version.into());
                    fields.entry("kind").or_insert_with(|| item_kind.into());
                }
                if item.get("items").is_some() {
                    return Err(format!("{kind}: items[{index}]: is a list itself"));
                }
                objects.extend(
                    read(item, trust_domain)
                        .map_err(|error| format!("{kind}: items[{index}]: {error}"))?,
                );
            }
            Ok(objects)
        }
        _ => Ok(Vec::new()),
    }
}

/// Returns `object`, or, if it is a policy that cannot be read, the readable version from `before`, if there is one.
/// Logs what is wrong with the policy in that case.
pub(super) fn keep_good_policy(object: Object, before: Option<&Object>) -> Object {
    let Object::Policy(policy) = &object else {
        return object;
    };
    if let policy::api::Object::Unreadable(unreadable) = &**policy {
        let good = before.filter(|before| {
            matches!(before, Object::Policy(before) if !matches!(**before, policy::api::Object::Unreadable(_)))
        });
        if let Some(good) = good {
            tracing::error!("{unreadable}; its last good version stays in force");
            return good.clone();
        }
    }
    object
}

fn named(
    kind: &str,
    metadata: &ObjectMeta,
    object: Result<Option<Object>, String>,
) -> Result<Vec<(ObjectName, Object)>, String> {
    let name = object_name(kind, metadata)?;
    Ok(object?.map(|object| (name, object)).into_iter().collect())
}

fn typed<T: DeserializeOwned>(document: Value) -> Result<T, String> {
    let kind = document["kind"].as_str().unwrap_or_default().to_owned();
    let name = document["metadata"]["name"]
        .as_str()
        .unwrap_or("?")
        .to_owned();
    serde_path_to_error::deserialize(document)
        .map_err(|error| format!("{kind} {name}: {}: {}", error.path(), error.inner()))
}

fn object_name(kind: &str, metadata: &ObjectMeta) -> Result<ObjectName, String> {
    let name = metadata.name.clone().unwrap_or_default();
    if name.is_empty() {
        return Err(format!("{kind}: metadata.name: is missing"));
    }
    let namespace = metadata
        .namespace
        .clone()
        .unwrap_or_else(|| "default".into());
    Ok(ObjectName { namespace, name })
}

/// Returns the name of an object that is in no namespace.
fn cluster_name(kind: &str, metadata: &ObjectMeta) -> Result<ObjectName, String> {
    let name = object_name(kind, metadata)?.name;
    Ok(ObjectName {
        namespace: String::new(),
        name,
    })
}

fn address(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is not an IP address"))?;
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
        return Err(format!(
            "{text:?} is not an address that a pod or service can have"
        ));
    }
    Ok(ip)
}

/// Reads the membership from `metadata`: the label first, then, on a pod, the annotation.
fn membership(metadata: &ObjectMeta) -> Result<Option<Membership>, String> {
    for (field, values) in [
        ("labels", &metadata.labels),
        ("annotations", &metadata.annotations),
    ] {
        if let Some(value) = values.as_ref().and_then(|values| values.get(MESH_LABEL)) {
            return match value.parse() {
                Ok(membership) => Ok(Some(membership)),
                Err(why) => Err(format!("metadata.{field}[{MESH_LABEL}]: {value:?} {why}")),
            };
        }
    }
    Ok(None)
}

/// Reads a namespace. Errors name the object and the field.
pub fn namespace(namespace: &objects::Namespace) -> Result<Option<Object>, String> {
    let labels = ObjectMeta {
        labels: namespace.metadata.labels.clone(),
        ..ObjectMeta::default()
    };
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    membership(&labels)
        .map(|membership| Some(Object::Namespace(membership)))
        .map_err(|error| format!("Namespace {name}: {error}"))
}

/// Reads a pod. Errors name the object and the field.
pub fn pod(pod: objects::Pod, trust_domain: &TrustDomain) -> Result<Option<Object>, String> {
    let name = object_name("Pod", &pod.metadata)?;
    let invalid = |field: &str, what: String| format!("Pod {name}: {field}: {what}");
    let (spec, status) = (pod.spec, pod.status);
    let membership = membership(&pod.metadata).map_err(|error| format!("Pod {name}: {error}"))?;
    let annotations = pod.metadata.annotations.unwrap_or_default();
    let account = spec
        .service_account_name
        .filter(|account| !account.is_empty())
        .unwrap_or_else(|| "default".into());
    let identity = trust_domain
        .identity(&name.namespace, &account)
        .map_err(|error| invalid("spec.serviceAccountName", error.to_string()))?;
    let ips = status.pod_ips.into_iter().map(|ip| ip.ip);
    let ips = status.pod_ip.into_iter().chain(ips);
    let host_network = spec.host_network == Some(true);
    let addresses = addresses(ips).map_err(|error| invalid("status.podIP", error))?;
    let netns = match annotations.get(NETNS_ANNOTATION) {
        Some(path) if path.starts_with('/') => Some(PathBuf::from(path)),
        Some(path) => {
            return Err(invalid(
                &format!("metadata.annotations[{NETNS_ANNOTATION}]"),
                format!("{path:?} is not an absolute path"),
            ));
        }
        None => None,
    };
    let mut named_ports = BTreeMap::new();
    let mut host_ports = Vec::new();
    let host_ips = status.host_ips.into_iter().map(|ip| ip.ip);
    let host_addresses = self::addresses(status.host_ip.into_iter().chain(host_ips))
        .map_err(|error| invalid("status.hostIP", error))?;
    // A sidecar is an init container (Kubernetes 1.29). Of two ports with the same name, the first is used.
    let containers = spec.containers.into_iter().chain(spec.init_containers);
    for port in containers.flat_map(|container| container.ports) {
        if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
            continue;
        }
        let number = port_number(port.container_port)
            .map_err(|error| invalid("spec.containers.ports.containerPort", error))?;
        if let Some(host_port) = port.host_port.filter(|port| *port != 0) {
            let host_port = port_number(host_port)
                .map_err(|error| invalid("spec.containers.ports.hostPort", error))?;
            let addresses = exposed_on(port.host_ip.as_deref(), &host_addresses)
                .map_err(|error| invalid("spec.containers.ports.hostIP", error))?;
            host_ports.push(HostPort {
                addresses,
                port: host_port,
                target: number,
            });
        }
        if let Some(name) = port.name {
            named_ports.entry(name).or_insert(number);
        }
    }
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Ready")
        .is_none_or(|condition| condition.status == "True");
    Ok(Some(Object::Pod(Arc::new(Workload {
        uid: pod.metadata.uid.unwrap_or_default(),
        addresses,
        node: spec.node_name.unwrap_or_default(),
        ready,
        terminating: pod.metadata.deletion_timestamp.is_some(),
        finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        host_network,
        membership,
        labels: pod.metadata.labels.unwrap_or_default(),
        named_ports,
        host_ports,
        netns,
        ..Workload::new(name, identity)
    }))))
}

/// Returns the addresses at which a node exposes a `hostPort` with this `hostIP`.
fn exposed_on(host_ip: Option<&str>, of_node: &[IpAddr]) -> Result<Vec<IpAddr>, String> {
    let text = host_ip.unwrap_or_default();
    if text.is_empty() {
        return Ok(of_node.to_vec());
    }
    let ip: IpAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is not an IP address"))?;
    let ip = ip.to_canonical();
    Ok(if ip.is_unspecified() {
        let same_family = of_node.iter().filter(|of| of.is_ipv4() == ip.is_ipv4());
        same_family.copied().collect()
    } else if ip.is_loopback() {
        // Only the node itself can dial it.
        Vec::new()
    } else {
        vec![ip]
    })
}

/// Parses addresses. Skips empty texts and duplicates.
fn addresses(texts: impl IntoIterator<Item = String>) -> Result<Vec<IpAddr>, String> {
    let mut addresses = Vec::new();
    for text in texts {
        if text.is_empty() {
            continue;
        }
        let ip = address(&text)?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    Ok(addresses)
}

/// Reads a service. Returns `None` for one without a virtual address: headless, or an ExternalName. Errors name the
/// object and the field.
pub fn service(
    service: objects::Service,
    trust_domain: &TrustDomain,
) -> Result<Option<Object>, String> {
    let name = object_name("Service", &service.metadata)?;
    let invalid = |field: &str, what: String| format!("Service {name}: {field}: {what}");
    let spec = service.spec;
    let ips = spec.cluster_ip.into_iter().chain(spec.cluster_ips);
    let addresses = addresses(ips.filter(|ip| ip != "None"))
        .map_err(|error| invalid("spec.clusterIP", error))?;
    let ingress = service.status.load_balancer.ingress.into_iter();
    let virtual_ips = ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    let load_balancers = self::addresses(virtual_ips.filter_map(|ingress| ingress.ip))
        .map_err(|error| invalid("status.loadBalancer.ingress", error))?;
    let mut external_addresses =
        self::addresses(spec.external_ips).map_err(|error| invalid("spec.externalIPs", error))?;
    external_addresses.extend(load_balancers);
    external_addresses.sort();
    external_addresses.dedup();
    let has_node_ports = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
    let mut node_ports = Vec::new();
    let mut ports = Vec::new();
    for (index, port) in spec.ports.into_iter().enumerate() {
        if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
            continue;
        }
        let number = port_number(port.port)
            .map_err(|error| invalid(&format!("spec.ports[{index}].port"), error))?;
        let target = match port.target_port {
            None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => TargetPort::Number(
                port_number(target)
                    .map_err(|error| invalid(&format!("spec.ports[{index}].targetPort"), error))?,
            ),
            Some(IntOrString::String(target)) => TargetPort::Name(target),
        };
        if let Some(node_port) = port.node_port.filter(|port| has_node_ports && *port != 0) {
            let node_port = port_number(node_port)
                .map_err(|error| invalid(&format!("spec.ports[{index}].nodePort"), error))?;
            node_ports.push((node_port, number));
        }
        ports.push(Port {
            name: port.name.unwrap_or_default(),
            port: number,
            target,
        });
    }
    let annotations = service.metadata.annotations.unwrap_or_default();
    let pinned_identities = annotations
        .get(ACCOUNTS_ANNOTATION)
        .map(|accounts| {
            pinned(accounts, &name.namespace, trust_domain).map_err(|error| {
                invalid(
                    &format!("metadata.annotations[{ACCOUNTS_ANNOTATION}]"),
                    error,
                )
            })
        })
        .transpose()?;
    if addresses.is_empty() || spec.type_.as_deref() == Some("ExternalName") {
        return Ok(None);
    }
    Ok(Some(Object::Service(Arc::new(Service {
        addresses,
        ports,
        node_ports,
        external_addresses,
        selector: spec.selector,
        pinned_identities,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        sticky: spec.session_affinity.as_deref() == Some("ClientIP"),
        local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        ..Service::new(name)
    }))))
}

fn pinned(
    accounts: &str,
    namespace: &str,
    trust_domain: &TrustDomain,
) -> Result<BTreeSet<Identity>, String> {
    let identities = accounts
        .split(',')
        .map(|account| {
            let account = account.trim();
            let (namespace, account) = account.split_once('/').unwrap_or((namespace, account));
            trust_domain
                .identity(namespace, account)
                .map_err(|error| format!("{account:?}: {error}"))
        })
        .collect::<Result<BTreeSet<_>, _>>()?;
    Ok(identities)
}

fn port_number(number: i32) -> Result<u16, String> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{number} is not a port"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    fn pod_object() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "web-1", "namespace": "shop", "uid": "u1", "labels": {"app": "web"},
                "annotations": {NETNS_ANNOTATION: "/run/netns/web-1"},
            },
            "spec": {
                "nodeName": "a", "serviceAccountName": "web",
                "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}],
            },
            "status": {"podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]},
        })
    }

    #[test]
    fn reads_a_pod() {
        let objects = read(pod_object(), &domain()).unwrap();
        let [(_, Object::Pod(pod))] = objects.as_slice() else {
            panic!("{objects:?}");
        };
        assert_eq!(pod.name.to_string(), "shop/web-1");
        assert_eq!(
            pod.identity.as_str(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(pod.addresses.len(), 2);
        assert_eq!(pod.named_ports["http"], 8080);
        assert!(pod.ready);
        assert_eq!(pod.netns, Some("/run/netns/web-1".into()));
    }

    #[test]
    fn reads_the_ports_that_a_node_exposes_for_a_pod() {
        let mut pod = pod_object();
        pod["status"]["hostIP"] = json!("192.0.2.1");
        pod["status"]["hostIPs"] = json!([{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}]);
        let ports =
            |host_ip: &str| json!([{"containerPort": 8080, "hostPort": 80, "hostIP": host_ip}]);
        let mut exposed = |host_ip: &str| {
            pod["spec"]["containers"][0]["ports"] = ports(host_ip);
            let (_, object) = read(pod.clone(), &domain()).unwrap().pop().unwrap();
            let Object::Pod(pod) = object else {
                panic!("no pod");
            };
            let [port] = pod.host_ports.as_slice() else {
                panic!("{:?}", pod.host_ports);
            };
            assert_eq!((port.port, port.target), (80, 8080));
            let addresses = port.addresses.iter();
            addresses.map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(exposed(""), ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(exposed("0.0.0.0"), ["192.0.2.1"]);
        assert_eq!(exposed("198.51.100.7"), ["198.51.100.7"]);
        assert_eq!(exposed("127.0.0.1"), [""; 0]);
        pod["spec"]["containers"][0]["ports"] =
            json!([{"containerPort": 8080, "hostPort": 80, "protocol": "UDP"}]);
        pod["spec"]["initContainers"] = json!([{"ports": [{"containerPort": 1, "hostPort": 81}]}]);
        let (_, Object::Pod(sidecar)) = read(pod, &domain()).unwrap().pop().unwrap() else {
            panic!("no pod");
        };
        assert_eq!(sidecar.host_ports.len(), 1, "TCP only");
        assert_eq!(sidecar.host_ports[0].port, 81);
    }

    #[test]
    fn reads_where_a_service_is_exposed() {
        let object = |kind: &str| {
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                "spec": {
                    "type": kind, "clusterIP": "10.96.0.1", "externalIPs": ["198.51.100.2"],
                    "ports": [
                        {"name": "http", "port": 80, "nodePort": 30080},
                        {"name": "dns", "port": 53, "nodePort": 30053, "protocol": "UDP"},
                    ],
                },
                "status": {"loadBalancer": {"ingress": [
                    {"ip": "198.51.100.1", "ipMode": "VIP"}, {"ip": "198.51.100.3", "ipMode": "Proxy"},
                    {"hostname": "lb.example"}, {"ip": "198.51.100.2"},
                ]}},
            })
        };
        for (kind, node_ports) in [
            ("LoadBalancer", vec![(30080, 80)]),
            ("NodePort", vec![(30080, 80)]),
            ("ClusterIP", vec![]),
        ] {
            let (_, object) = read(object(kind), &domain()).unwrap().pop().unwrap();
            let Object::Service(service) = object else {
                panic!("no service");
            };
            assert_eq!(service.node_ports, node_ports, "{kind}");
            let external = service.external_addresses.iter().map(ToString::to_string);
            assert_eq!(
                external.collect::<Vec<_>>(),
                ["198.51.100.1", "198.51.100.2"]
            );
        }
        for (pointer, value, expected) in [
            (
                "/spec/externalIPs/0",
                json!("lb"),
                "spec.externalIPs: \"lb\"",
            ),
            (
                "/spec/ports/0/nodePort",
                json!(70000),
                "spec.ports[0].nodePort: 70000",
            ),
            (
                "/status/loadBalancer/ingress/0/ip",
                json!("x"),
                "status.loadBalancer.ingress: \"x\"",
            ),
        ] {
            let mut object = object("NodePort");
            *object.pointer_mut(pointer).unwrap() = value;
            let error = read(object, &domain()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// Returns the pod with the field at `pointer` set to `value`.
    fn pod_with(pointer: &str, value: Value) -> Option<Arc<Workload>> {
        let mut pod = pod_object();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        pod.pointer_mut(parent).unwrap()[field] = value;
        match read(pod, &domain()).unwrap().pop() {
            Some((_, Object::Pod(pod))) => Some(pod),
            None => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pod_finishes_by_its_phase_alone() {
        for (phase, finished) in [
            ("Pending", false),
            ("Running", false),
            ("Unknown", false),
            ("Succeeded", true),
            ("Failed", true),
        ] {
            let pod = pod_with("/status/phase", json!(phase)).unwrap();
            assert_eq!(pod.finished, finished, "{phase}");
            assert_eq!(pod.addresses.len(), 2, "{phase}");
        }
        let starting = pod_with("/status", json!({"phase": "Pending"})).unwrap();
        assert!(starting.addresses.is_empty());
        assert!(
            pod_with("/spec/hostNetwork", json!(true))
                .unwrap()
                .host_network
        );
    }

    #[test]
    fn membership_of_pods_and_namespaces() {
        let disabled = || json!({MESH_LABEL: "disabled"});
        for (pointer, value, expected) in [
            ("/metadata/labels", disabled(), Some(Membership::Disabled)),
            (
                "/metadata/annotations",
                disabled(),
                Some(Membership::Disabled),
            ),
            (
                "/metadata/labels",
                json!({MESH_LABEL: "enabled"}),
                Some(Membership::Enabled),
            ),
            ("/metadata/labels", json!({}), None),
        ] {
            assert_eq!(
                pod_with(pointer, value).unwrap().membership,
                expected,
                "{pointer}"
            );
        }
        let namespace = |labels: Value| {
            let metadata = json!({"name": "shop", "labels": labels});
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
            read(object, &domain()).map(|mut objects| objects.pop().unwrap().1)
        };
        let found = namespace(disabled()).unwrap();
        assert_eq!(found, Object::Namespace(Some(Membership::Disabled)));
        assert_eq!(namespace(Value::Null).unwrap(), Object::Namespace(None));
        let error = namespace(json!({MESH_LABEL: "yes"})).unwrap_err();
        assert_eq!(
            error,
            "Namespace shop: metadata.labels[auth-daemon.io/mesh]: \"yes\" is neither enabled nor disabled"
        );
    }

    #[test]
    fn readiness() {
        let ready = |status: &str| json!([{"type": "Ready", "status": status}]);
        assert!(pod_with("/status/conditions", ready("True")).unwrap().ready);
        assert!(
            !pod_with("/status/conditions", ready("False"))
                .unwrap()
                .ready
        );
        let deleted = json!("2026-01-01T00:00:00Z");
        assert!(
            pod_with("/metadata/deletionTimestamp", deleted)
                .unwrap()
                .terminating
        );
    }

    #[test]
    fn reads_a_service_and_its_pins() {
        let objects = read(
            json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "web", "annotations": {ACCOUNTS_ANNOTATION: "web, other/api"}},
                "spec": {
                    "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd96::7"],
                    "selector": {"app": "web"},
                    "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local",
                    "ports": [
                        {"port": 80, "targetPort": "http"}, {"port": 81},
                        {"port": 53, "protocol": "UDP"}, {"port": 82, "targetPort": 8082},
                    ],
                },
            }),
            &domain(),
        )
        .unwrap();
        let [(_, Object::Service(service))] = objects.as_slice() else {
            panic!("{objects:?}");
        };
        assert_eq!(service.addresses.len(), 2);
        assert_eq!(service.ports.len(), 3);
        assert!(service.sticky && service.local);
        assert_eq!(service.ports[0].target, TargetPort::Name("http".into()));
        assert_eq!(service.ports[1].target, TargetPort::Number(81));
        let pinned: Vec<_> = service
            .pinned_identities
            .iter()
            .flatten()
            .map(Identity::as_str)
            .collect();
        assert_eq!(
            pinned,
            [
                "spiffe://cluster.local/ns/default/sa/web",
                "spiffe://cluster.local/ns/other/sa/api"
            ]
        );
    }

    #[test]
    fn faults_name_object_and_field() {
        for (pointer, value, expected) in [
            (
                "/status/podIP",
                json!("10.1.0.256"),
                "Pod shop/web-1: status.podIP: \"10.1.0.256\"",
            ),
            (
                "/status/podIP",
                json!("127.0.0.1"),
                "Pod shop/web-1: status.podIP",
            ),
            (
                "/status/podIP",
                json!(5),
                "Pod web-1: status.podIP: invalid type",
            ),
            (
                "/spec/serviceAccountName",
                json!("a/b"),
                "spec.serviceAccountName",
            ),
            (
                "/metadata/name",
                json!(""),
                "Pod: metadata.name: is missing",
            ),
            (
                "/metadata/labels",
                json!({MESH_LABEL: "off"}),
                "metadata.labels[auth-daemon.io/mesh]",
            ),
            (
                "/metadata/annotations",
                json!({NETNS_ANNOTATION: "x"}),
                "is not an absolute path",
            ),
            (
                "/spec/containers/0/ports/0/containerPort",
                json!(70000),
                "70000 is not a port",
            ),
            ("/kind", Value::Null, "apiVersion or kind is missing"),
        ] {
            let mut pod = pod_object();
            *pod.pointer_mut(pointer).unwrap_or(&mut Value::Null) = value.clone();
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            if !field.chars().all(char::is_numeric) {
                pod.pointer_mut(parent).unwrap()[field] = value;
            }
            let error = read(pod, &domain()).unwrap_err();
            assert!(error.contains(expected), "{pointer}: {error}");
        }
    }

    #[test]
    fn lists() {
        let mut item = pod_object();
        item.as_object_mut().unwrap().remove("kind");
        let list = json!({"apiVersion": "v1", "kind": "PodList", "items": [item]});
        assert_eq!(read(list, &domain()).unwrap().len(), 1);
        let nested = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "List", "items": []}]});
        assert!(
            read(nested, &domain())
                .unwrap_err()
                .contains("is a list itself")
        );
        let bad = json!({"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1"}]});
        assert!(read(bad, &domain()).unwrap_err().contains("items[0]"));
    }
}
