//! Nodes, and the networks of the cluster.

use std::{net::IpAddr, sync::Arc};

use auth_kubernetes::objects;
use auth_mesh::Node;
use ipnet::IpNet;

use super::{Object, addresses, cluster_name};

/// Annotation of a node, `enabled` or `disabled`, that sets whether other nodes may use the tunnel to reach its pods.
pub const TUNNEL_ANNOTATION: &str = "auth-daemon.io/tunnel";

/// Reads a node. Errors name the object and the field.
pub fn node(node: objects::Node) -> Result<Option<Object>, String> {
    let name = cluster_name("Node", &node.metadata)?.name;
    let invalid = |field: &str, what: String| format!("Node {name}: {field}: {what}");
    let annotations = node.metadata.annotations.unwrap_or_default();
    let tunnel_disabled = match annotations.get(TUNNEL_ANNOTATION).map(String::as_str) {
        None | Some("enabled") => false,
        Some("disabled") => true,
        Some(value) => {
            return Err(invalid(
                &format!("metadata.annotations[{TUNNEL_ANNOTATION}]"),
                format!("{value:?} is neither enabled nor disabled"),
            ));
        }
    };
    let found = node.status.addresses.into_iter();
    // A node's names are not resolved.
    let found = found.filter(|address| matches!(&*address.type_, "InternalIP" | "ExternalIP"));
    let addresses = addresses(found.map(|address| address.address))
        .map_err(|error| invalid("status.addresses", error))?;
    let networks = node.spec.pod_cidr.into_iter().chain(node.spec.pod_cidrs);
    let pod_networks = self::networks(networks).map_err(|error| invalid("spec.podCIDRs", error))?;
    Ok(Some(Object::Node(Arc::new(Node {
        name,
        addresses,
        pod_networks,
        tunnel_disabled,
    }))))
}

/// Reads the networks of services. Errors name the object and the field.
pub fn service_cidr(object: objects::ServiceCidr) -> Result<Option<Object>, String> {
    let name = cluster_name("ServiceCIDR", &object.metadata)?.name;
    let networks = networks(object.spec.cidrs)
        .map_err(|error| format!("ServiceCIDR {name}: spec.cidrs: {error}"))?;
    Ok(Some(Object::ServiceNetworks(networks.into())))
}

/// Parses networks. Skips empty texts and duplicates.
fn networks(texts: impl IntoIterator<Item = String>) -> Result<Vec<IpNet>, String> {
    let mut networks = Vec::new();
    for text in texts {
        if text.is_empty() {
            continue;
        }
        let network: IpNet = text
            .parse()
            .map_err(|_| format!("{text:?} is not a network"))?;
        let network = network.trunc();
        if is_too_wide(network) {
            return Err(format!(
                "{text:?} is not a network that only pods or services have addresses in"
            ));
        }
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    Ok(networks)
}

/// Reports whether `network` contains addresses that no pod or service can have: all of them, the loopback, or, written
/// as IPv4-mapped IPv6, those of IPv4.
fn is_too_wide(network: IpNet) -> bool {
    let overlaps = |other: &str| {
        let other: Result<IpNet, _> = other.parse();
        other.is_ok_and(|other| other.contains(&network) || network.contains(&other))
    };
    let foreign: [IpAddr; 2] = [
        std::net::Ipv4Addr::LOCALHOST.into(),
        std::net::Ipv6Addr::LOCALHOST.into(),
    ];
    network.prefix_len() == 0
        || foreign.iter().any(|address| network.contains(address))
        || overlaps("::ffff:0:0/96")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Object, read};

    fn parse(document: Value) -> Result<Object, String> {
        let mut found = read(document, &"cluster.local".parse().unwrap())?;
        let (name, object) = found.pop().unwrap();
        assert_eq!((name.namespace.as_str(), found.len()), ("", 0));
        Ok(object)
    }

    fn node_object() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "a", "annotations": {}},
            "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "2001:db8:1::/64"]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "a.example"},
                {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "ExternalIP", "address": "2001:db8::1"},
                {"type": "ExternalIP", "address": "192.0.2.1"},
            ]},
        })
    }

    #[test]
    fn reads_a_node() {
        let Ok(Object::Node(node)) = parse(node_object()) else {
            panic!("not read");
        };
        assert_eq!(node.name, "a");
        assert!(!node.tunnel_disabled);
        let text: Vec<_> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["192.0.2.1", "2001:db8::1"]);
        let text: Vec<_> = node.pod_networks.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["10.1.0.0/24", "2001:db8:1::/64"]);
        let mut disabled = node_object();
        disabled["metadata"]["annotations"]["auth-daemon.io/tunnel"] = "disabled".into();
        let Ok(Object::Node(node)) = parse(disabled) else {
            panic!("not read");
        };
        assert!(node.tunnel_disabled);
        let new = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "new"}});
        assert!(matches!(parse(new), Ok(Object::Node(_))), "not ready yet");
    }

    #[test]
    fn faults_of_nodes_name_object_and_field() {
        for (pointer, value, expected) in [
            (
                "/spec/podCIDRs/1",
                json!("2001:db8:1::"),
                "Node a: spec.podCIDRs: \"2001:db8:1::\" is not a network",
            ),
            (
                "/spec/podCIDR",
                json!("10.1.0.0/33"),
                "Node a: spec.podCIDRs: \"10.1.0.0/33\"",
            ),
            ("/spec/podCIDR", json!("0.0.0.0/0"), "Node a: spec.podCIDRs"),
            (
                "/spec/podCIDR",
                json!("127.0.0.0/8"),
                "Node a: spec.podCIDRs",
            ),
            ("/spec/podCIDR", json!("::/64"), "Node a: spec.podCIDRs"),
            (
                "/spec/podCIDR",
                json!("::ffff:10.0.0.0/104"),
                "Node a: spec.podCIDRs",
            ),
            (
                "/status/addresses/1/address",
                json!("192.0.2.256"),
                "Node a: status.addresses: \"192.0.2.256\"",
            ),
            (
                "/metadata/annotations",
                json!({"auth-daemon.io/tunnel": "off"}),
                "Node a: metadata.annotations[auth-daemon.io/tunnel]: \"off\" is neither",
            ),
            ("/metadata/name", json!(""), "Node: metadata.name"),
        ] {
            let mut node = node_object();
            *node.pointer_mut(pointer).unwrap() = value;
            let error = parse(node).unwrap_err();
            assert!(error.contains(expected), "{pointer}: {error}");
        }
    }

    #[test]
    fn reads_networks_of_services() {
        let object = |cidrs: Value| {
            json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
                "metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs},
            })
        };
        let Ok(Object::ServiceNetworks(networks)) =
            parse(object(json!(["10.96.0.0/16", "2001:db8:2::/112"])))
        else {
            panic!("not read");
        };
        assert_eq!(networks.len(), 2);
        let error = parse(object(json!(["10.96.0.0"]))).unwrap_err();
        assert!(
            error.contains("ServiceCIDR kubernetes: spec.cidrs: \"10.96.0.0\""),
            "{error}"
        );
    }
}
