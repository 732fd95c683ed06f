//! Conversion of Kubernetes objects to the model of the mesh. All sources share the same vocabulary and parser.

mod node;
mod pod;
mod service;
mod slice;

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use auth_kubernetes::objects;
use auth_mesh::{Membership, Node, ObjectName, Service, Slice, TrustDomain, Workload, policy};

pub use node::{TUNNEL_ANNOTATION, node, service_cidr};
pub use pod::{NETNS_ANNOTATION, pod};
pub use service::{ACCOUNTS_ANNOTATION, service};
pub use slice::slice;

/// Label of a pod or namespace, `enabled` or `disabled`, that sets whether pods are in the mesh. The pod's label takes
/// precedence. On a pod, an annotation works too.
pub const MESH_LABEL: &str = "auth-daemon.io/mesh";

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

/// Returns `object`, or, if it is a policy that cannot be read, the readable version from `before`, if there is one. Its
/// warnings then say what is wrong with the policy.
pub(super) fn keep_good_policy(object: Object, before: Option<&Object>) -> Object {
    use policy::api::Object::Unreadable;
    let (Object::Policy(policy), Some(Object::Policy(good))) = (&object, before) else {
        return object;
    };
    match (&**policy, &**good) {
        (Unreadable(_), Unreadable(_)) => object,
        (Unreadable(error), good) => Object::Policy(Arc::new(good.kept_in_place_of(error))),
        _ => object,
    }
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

/// Parses addresses. Skips empty texts and duplicates.
fn addresses(texts: impl IntoIterator<Item = String>) -> Result<Vec<IpAddr>, String> {
    // There may be very many in an object of a remote cluster.
    let (mut addresses, mut known) = (Vec::new(), HashSet::new());
    for text in texts {
        if text.is_empty() {
            continue;
        }
        let ip = address(&text)?;
        if known.insert(ip) {
            addresses.push(ip);
        }
    }
    Ok(addresses)
}

/// Leaves the first address of each family: Kubernetes gives pods, and their nodes, no more.
pub(super) fn keep_one_of_each_family(addresses: &mut Vec<IpAddr>) {
    let first = [true, false].map(|is_ipv4| {
        let mut all = addresses.iter().copied();
        all.find(|address| address.is_ipv4() == is_ipv4)
    });
    addresses.retain(|address| first.contains(&Some(*address)));
    addresses.shrink_to_fit();
}

fn port_number(number: i32) -> Result<u16, String> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{number} is not a port"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::{
        pod::tests::{domain, pod_object, pod_with},
        *,
    };

    #[test]
    fn very_many_addresses_take_no_long_time() {
        let first = 0x0a00_0000_u32; // 10.0.0.0
        let all = (first..first + 100_000).map(|number| IpAddr::from(number.to_be_bytes()));
        let texts = || all.clone().map(|address| address.to_string());
        let start = Instant::now();
        let read = addresses(texts().chain(texts()).chain([String::new()])).unwrap();
        assert!(read.iter().copied().eq(all.clone()), "each once, in order");
        assert!(start.elapsed() < Duration::from_secs(5));
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
    fn errors_name_object_and_field() {
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
