//! Services.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Object, object_name, port_number};
use auth_common::TUNNEL_PORT;
use auth_kubernetes::objects;
use auth_mesh::{
    Identity, ObjectName, Port, Service, TargetPort, TrustDomain, Waypoint, WaypointAt,
};

/// Annotation that pins the service accounts that may run a service: names, namespace/name, or whole SPIFFE IDs, which may be
/// of another trust domain, separated by commas.
pub const ACCOUNTS_ANNOTATION: &str = "auth-daemon.io/service-accounts";
/// Istio's label of a service whose connections go through a waypoint, which has a service of that name; `none` for no
/// waypoint.
const USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// Label that says in which other namespace the waypoint is.
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";

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
    let addresses = super::addresses(ips.filter(|ip| ip != "None"))
        .map_err(|error| invalid("spec.clusterIP", error))?;
    let ingress = service.status.load_balancer.ingress.into_iter();
    let virtual_ips = ingress.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    let load_balancers = super::addresses(virtual_ips.filter_map(|ingress| ingress.ip))
        .map_err(|error| invalid("status.loadBalancer.ingress", error))?;
    let mut external_addresses =
        super::addresses(spec.external_ips).map_err(|error| invalid("spec.externalIPs", error))?;
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
    let labels = service.metadata.labels.unwrap_or_default();
    let waypoint = waypoint(&labels, &name.namespace).map(Arc::new);
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
        federated: pinned_identities
            .iter()
            .flatten()
            .any(|identity| identity.trust_domain() != trust_domain.as_str()),
        pinned_identities,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        waypoint,
        sticky: spec.session_affinity.as_deref() == Some("ClientIP"),
        local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        ..Service::new(name)
    }))))
}

fn waypoint(labels: &BTreeMap<String, String>, namespace: &str) -> Option<Waypoint> {
    let name = labels.get(USE_WAYPOINT).filter(|name| *name != "none")?;
    let namespace = labels
        .get(USE_WAYPOINT_NAMESPACE)
        .map_or(namespace, String::as_str);
    Some(Waypoint {
        at: WaypointAt::Service(ObjectName {
            namespace: namespace.to_owned(),
            name: name.clone(),
        }),
        port: TUNNEL_PORT,
    })
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
            if account.starts_with("spiffe://") {
                let identity = account
                    .parse()
                    .map_err(|error| format!("{account:?}: {error}"))?;
                return Ok(trust_domain.resolve(&identity).unwrap_or(identity));
            }
            let (namespace, account) = account.split_once('/').unwrap_or((namespace, account));
            trust_domain
                .identity(namespace, account)
                .map_err(|error| format!("{account:?}: {error}"))
        })
        .collect::<Result<BTreeSet<_>, _>>()?;
    Ok(identities)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::discovery::manifest::{pod::tests::domain, read};

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

    #[test]
    fn reads_the_waypoint_of_a_service() {
        for (labels, expected) in [
            (json!({USE_WAYPOINT: "proxy"}), Some("default/proxy")),
            (
                json!({USE_WAYPOINT: "proxy", USE_WAYPOINT_NAMESPACE: "edge"}),
                Some("edge/proxy"),
            ),
            (json!({USE_WAYPOINT: "none"}), None),
            (json!({USE_WAYPOINT_NAMESPACE: "edge"}), None),
            (json!({}), None),
        ] {
            let object = json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": labels},
                "spec": {"clusterIP": "10.96.0.7", "ports": [{"port": 80}]},
            });
            let (_, object) = read(object, &domain()).unwrap().pop().unwrap();
            let Object::Service(service) = object else {
                panic!("no service");
            };
            let found = service.waypoint.as_ref().map(|found| found.to_string());
            assert_eq!(found.as_deref(), expected, "{labels}");
        }
    }

    #[test]
    fn pins_identities_of_other_trust_domains() {
        let of = |accounts: &str| {
            let object = json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "web", "annotations": {ACCOUNTS_ANNOTATION: accounts}},
                "spec": {"clusterIP": "10.96.0.7", "ports": [{"port": 80}]},
            });
            let (_, object) = read(object, &domain())?.pop().unwrap();
            let Object::Service(service) = object else {
                panic!("no service");
            };
            let pinned = service.pinned_identities.iter().flatten();
            let pinned: Vec<_> = pinned.map(ToString::to_string).collect();
            Ok((pinned, service.federated))
        };
        let own = "spiffe://cluster.local/ns/shop/sa/web".to_owned();
        let foreign = "spiffe://far.example/ns/shop/sa/web".to_owned();
        assert_eq!(of(&foreign), Ok((vec![foreign.clone()], true)));
        assert_eq!(of(&own), Ok((vec![own.clone()], false)));
        assert_eq!(
            of(&format!("shop/web, {foreign}")),
            Ok((vec![own, foreign], true))
        );
        let error: Result<_, String> = of("spiffe://far.example/web");
        assert!(error.unwrap_err().contains("path is not"));
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
}
