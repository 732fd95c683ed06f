//! Kubernetes objects into the mesh's model. One vocabulary and one parser, whatever source they come from.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use k8s_openapi::{
    api::core::v1,
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::mesh::{Identity, ObjectName, Port, Service, TargetPort, TrustDomain, Workload};

/// Says where a pod's network namespace is, for sources that have no container runtime to ask.
pub const NETNS_ANNOTATION: &str = "auth-daemon.io/netns";
/// `disabled` as a label or annotation leaves a pod out of the mesh.
pub const MESH_LABEL: &str = "auth-daemon.io/mesh";
/// Pins the service accounts that may run a service: names, or namespace/name, separated by commas.
pub const ACCOUNTS_ANNOTATION: &str = "auth-daemon.io/service-accounts";

/// An object of interest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A pod that the mesh may reach.
    Pod(Box<Workload>),
    /// A service with virtual addresses.
    Service(Box<Service>),
}

/// Reads one document: a Pod, Service, ServiceAccount, or a List of them.
///
/// Objects of other kinds are passed over: a folder may hold more than the mesh needs. Errors name the object and the
/// field.
pub fn read(document: Value, trust_domain: &TrustDomain) -> Result<Vec<Object>, String> {
    if document.is_null() {
        return Ok(Vec::new());
    }
    let text = |field: &str| document.get(field).and_then(Value::as_str);
    let (version, kind) = match (text("apiVersion"), text("kind")) {
        (Some(version), Some(kind)) => (version.to_owned(), kind.to_owned()),
        _ => return Err("not a Kubernetes object: apiVersion or kind is missing".into()),
    };
    match (version.as_str(), kind.as_str()) {
        ("v1", "Pod") => Ok(pod(typed(document)?, trust_domain)?.into_iter().collect()),
        ("v1", "Service") => Ok(service(typed(document)?, trust_domain)?
            .into_iter()
            .collect()),
        ("v1", "ServiceAccount") => {
            let account: v1::ServiceAccount = typed(document)?;
            let name = object_name("ServiceAccount", &account.metadata)?;
            trust_domain
                .identity(&name.namespace, &name.name)
                .map_err(|error| format!("ServiceAccount {name}: metadata.name: {error}"))?;
            Ok(Vec::new())
        }
        ("v1", "List" | "PodList" | "ServiceList" | "ServiceAccountList") => {
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
                // Items of a typed list leave out what the list already says.
                if let (Some(item_kind), Value::Object(fields)) = (item_kind, &mut item) {
                    fields.entry("apiVersion").or_insert_with(|| "v1".into());
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

/// Reads a pod; `None` for one that is no part of the mesh: finished, on the host's network, opted out. Errors name the object and the field.
pub fn pod(pod: v1::Pod, trust_domain: &TrustDomain) -> Result<Option<Object>, String> {
    let name = object_name("Pod", &pod.metadata)?;
    let fault = |field: &str, what: String| format!("Pod {name}: {field}: {what}");
    let spec = pod.spec.unwrap_or_default();
    let status = pod.status.unwrap_or_default();
    let annotations = pod.metadata.annotations.unwrap_or_default();
    let labels = pod.metadata.labels.unwrap_or_default();
    for (field, values) in [("labels", &labels), ("annotations", &annotations)] {
        match values.get(MESH_LABEL).map(String::as_str) {
            None | Some("enabled") => {}
            Some("disabled") => return Ok(None),
            Some(other) => {
                return Err(fault(
                    &format!("metadata.{field}[{MESH_LABEL}]"),
                    format!("{other:?} is neither enabled nor disabled"),
                ));
            }
        }
    }
    let account = spec
        .service_account_name
        .filter(|account| !account.is_empty())
        .unwrap_or_else(|| "default".into());
    let identity = trust_domain
        .identity(&name.namespace, &account)
        .map_err(|error| fault("spec.serviceAccountName", error.to_string()))?;
    let mut addresses = Vec::new();
    let ips = status
        .pod_ips
        .unwrap_or_default()
        .into_iter()
        .map(|ip| ip.ip);
    for ip in status
        .pod_ip
        .into_iter()
        .chain(ips)
        .filter(|ip| !ip.is_empty())
    {
        let ip = address(&ip).map_err(|error| fault("status.podIP", error))?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let netns = match annotations.get(NETNS_ANNOTATION) {
        Some(path) if path.starts_with('/') => Some(PathBuf::from(path)),
        Some(path) => {
            return Err(fault(
                &format!("metadata.annotations[{NETNS_ANNOTATION}]"),
                format!("{path:?} is not an absolute path"),
            ));
        }
        None => None,
    };
    let mut named_ports = BTreeMap::new();
    for port in spec
        .containers
        .iter()
        .flat_map(|c| c.ports.iter().flatten())
    {
        if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
            continue;
        }
        let number = port_number(port.container_port)
            .map_err(|error| fault("spec.containers.ports.containerPort", error))?;
        if let Some(name) = &port.name {
            named_ports.insert(name.clone(), number);
        }
    }
    let finished = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if finished || spec.host_network == Some(true) {
        return Ok(None);
    }
    let ready_condition = status
        .conditions
        .unwrap_or_default()
        .into_iter()
        .find(|condition| condition.type_ == "Ready")
        .is_none_or(|condition| condition.status == "True");
    Ok(Some(Object::Pod(Box::new(Workload {
        uid: pod.metadata.uid.unwrap_or_default(),
        identity,
        addresses,
        node: spec.node_name.unwrap_or_default(),
        ready: ready_condition && pod.metadata.deletion_timestamp.is_none(),
        labels,
        named_ports,
        netns,
        name,
    }))))
}

/// Reads a service; `None` for one without a virtual address: headless, or an ExternalName. Errors name the object and
/// the field.
pub fn service(service: v1::Service, trust_domain: &TrustDomain) -> Result<Option<Object>, String> {
    let name = object_name("Service", &service.metadata)?;
    let fault = |field: &str, what: String| format!("Service {name}: {field}: {what}");
    let spec = service.spec.unwrap_or_default();
    let mut addresses = Vec::new();
    let ips = spec.cluster_ips.unwrap_or_default();
    for ip in spec.cluster_ip.into_iter().chain(ips) {
        if ip.is_empty() || ip == "None" {
            continue;
        }
        let ip = address(&ip).map_err(|error| fault("spec.clusterIP", error))?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let mut ports = Vec::new();
    for (index, port) in spec.ports.unwrap_or_default().into_iter().enumerate() {
        if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
            continue;
        }
        let number = port_number(port.port)
            .map_err(|error| fault(&format!("spec.ports[{index}].port"), error))?;
        let target = match port.target_port {
            None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => TargetPort::Number(
                port_number(target)
                    .map_err(|error| fault(&format!("spec.ports[{index}].targetPort"), error))?,
            ),
            Some(IntOrString::String(target)) => TargetPort::Name(target),
        };
        ports.push(Port {
            port: number,
            target,
        });
    }
    let annotations = service.metadata.annotations.unwrap_or_default();
    let pinned_identities = annotations
        .get(ACCOUNTS_ANNOTATION)
        .map(|accounts| {
            pinned(accounts, &name.namespace, trust_domain).map_err(|error| {
                fault(
                    &format!("metadata.annotations[{ACCOUNTS_ANNOTATION}]"),
                    error,
                )
            })
        })
        .transpose()?;
    if addresses.is_empty() || spec.type_.as_deref() == Some("ExternalName") {
        return Ok(None);
    }
    Ok(Some(Object::Service(Box::new(Service {
        name,
        addresses,
        ports,
        selector: spec.selector.unwrap_or_default(),
        pinned_identities,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
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
        let [Object::Pod(pod)] = objects.as_slice() else {
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
    fn passes_over_pods_outside_the_mesh() {
        for (pointer, value) in [
            ("/spec/hostNetwork", json!(true)),
            ("/status/phase", json!("Succeeded")),
            ("/metadata/labels", json!({MESH_LABEL: "disabled"})),
            ("/metadata/annotations", json!({MESH_LABEL: "disabled"})),
        ] {
            let mut pod = pod_object();
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[field] = value;
            assert_eq!(read(pod, &domain()), Ok(vec![]), "{pointer}");
        }
    }

    #[test]
    fn readiness() {
        for (pointer, value, ready) in [
            (
                "/status/conditions",
                json!([{"type": "Ready", "status": "True"}]),
                true,
            ),
            (
                "/status/conditions",
                json!([{"type": "Ready", "status": "False"}]),
                false,
            ),
            (
                "/metadata/deletionTimestamp",
                json!("2026-01-01T00:00:00Z"),
                false,
            ),
        ] {
            let mut pod = pod_object();
            let (parent, field) = pointer.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[field] = value;
            let objects = read(pod, &domain()).unwrap();
            let [Object::Pod(pod)] = objects.as_slice() else {
                panic!("{objects:?}");
            };
            assert_eq!(pod.ready, ready, "{pointer}");
        }
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
                    "ports": [
                        {"port": 80, "targetPort": "http"}, {"port": 81},
                        {"port": 53, "protocol": "UDP"}, {"port": 82, "targetPort": 8082},
                    ],
                },
            }),
            &domain(),
        )
        .unwrap();
        let [Object::Service(service)] = objects.as_slice() else {
            panic!("{objects:?}");
        };
        assert_eq!(service.addresses.len(), 2);
        assert_eq!(service.ports.len(), 3);
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
