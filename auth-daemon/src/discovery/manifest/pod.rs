//! Pods.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};

use super::{Object, membership, object_name, port_number};
use auth_kubernetes::objects;
use auth_mesh::{Hbone, HostPort, TrustDomain, Workload};

/// Annotation with the path of a pod's network namespace. Counts only with file discovery, where whoever writes the manifests
/// is trusted with the node, and where there may be no kubelet.
pub const NETNS_ANNOTATION: &str = "auth-daemon.io/netns";

/// What Istio sets on a pod that a ztunnel serves: an annotation of the node's agent, or a label of whoever installs another
/// HBONE server for the pod.
const REDIRECTION_ANNOTATION: (&str, &str) = ("ambient.istio.io/redirection", "enabled");
const TUNNEL_LABEL: (&str, &str) = ("networking.istio.io/tunnel", "http");

/// Reads a pod. Errors name the object and the field.
pub fn pod(pod: objects::Pod, trust_domain: &TrustDomain) -> Result<Option<Object>, String> {
    let name = object_name("Pod", &pod.metadata)?;
    let invalid = |field: &str, what: String| format!("Pod {name}: {field}: {what}");
    let (spec, status) = (pod.spec, pod.status);
    let membership = membership(&pod.metadata).map_err(|error| format!("Pod {name}: {error}"))?;
    let annotations = pod.metadata.annotations.unwrap_or_default();
    let labels = pod.metadata.labels.unwrap_or_default();
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
    let addresses = super::addresses(ips).map_err(|error| invalid("status.podIP", error))?;
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
    let mut host_addresses = super::addresses(status.host_ip.into_iter().chain(host_ips))
        .map_err(|error| invalid("status.hostIP", error))?;
    // Each port below has a copy of them.
    super::keep_one_of_each_family(&mut host_addresses);
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
        hbone: hbone(&annotations, &labels),
        labels,
        named_ports,
        host_ports,
        netns,
        ..Workload::new(name, identity)
    }))))
}

/// Reads whether Istio says that the pod is reached by HBONE.
fn hbone(annotations: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> Hbone {
    let is = |of: &BTreeMap<String, String>, (key, value): (&str, &str)| {
        of.get(key).is_some_and(|set| set == value)
    };
    match is(annotations, REDIRECTION_ANNOTATION) || is(labels, TUNNEL_LABEL) {
        true => Hbone::Offered,
        false => Hbone::No,
    }
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

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::discovery::manifest::read;

    pub(in super::super) fn domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    pub(in super::super) fn pod_object() -> Value {
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

    /// Returns the pod with the field at `pointer` set to `value`.
    pub(in super::super) fn pod_with(pointer: &str, value: Value) -> Option<Arc<Workload>> {
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
    fn a_node_exposes_ports_at_one_address_of_each_family() {
        let mut pod = pod_object();
        let all = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "192.0.2.3"];
        pod["status"]["hostIPs"] = all.map(|ip| json!({"ip": ip})).to_vec().into();
        pod["spec"]["containers"][0]["ports"] = json!([
            {"containerPort": 8080, "hostPort": 80},
            {"containerPort": 8080, "hostPort": 81, "hostIP": "0.0.0.0"},
        ]);
        let (_, Object::Pod(pod)) = read(pod, &domain()).unwrap().pop().unwrap() else {
            panic!("no pod");
        };
        let exposed = pod.host_ports.iter().map(|port| {
            let addresses = port.addresses.iter();
            addresses.map(ToString::to_string).collect::<Vec<_>>()
        });
        let expected = [vec!["192.0.2.1", "2001:db8::1"], vec!["192.0.2.1"]];
        assert_eq!(exposed.collect::<Vec<_>>(), expected);
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
    fn a_pod_is_reached_by_hbone_if_istio_says_so() {
        let with = |field: &str, value: Value| pod_with(field, value).unwrap().hbone;
        for (field, value, expected) in [
            ("/metadata/annotations", json!({}), Hbone::No),
            (
                "/metadata/annotations",
                json!({"ambient.istio.io/redirection": "enabled"}),
                Hbone::Offered,
            ),
            (
                "/metadata/annotations",
                json!({"ambient.istio.io/redirection": "disabled"}),
                Hbone::No,
            ),
            (
                "/metadata/labels",
                json!({"networking.istio.io/tunnel": "http"}),
                Hbone::Offered,
            ),
        ] {
            assert_eq!(with(field, value.clone()), expected, "{field} {value}");
        }
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
}
