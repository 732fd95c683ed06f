//! Endpoint slices.

use std::sync::Arc;

use super::{Object, address, object_name, port_number};
use auth_kubernetes::objects;
use auth_mesh::{ObjectName, Slice, SliceEndpoint};

/// Label with the service that an endpoint slice belongs to.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Maximum number of endpoints and of ports in a slice, as in the Kubernetes API.
const MAX_SLICE_ENDPOINTS: usize = 1000;
const MAX_SLICE_PORTS: usize = 100;

/// Reads an endpoint slice. Returns `None` if it has no service, or no addresses. Errors name the object and the field.
pub fn slice(slice: objects::EndpointSlice) -> Result<Option<Object>, String> {
    let name = object_name("EndpointSlice", &slice.metadata)?;
    let invalid = |field: &str, what: String| format!("EndpointSlice {name}: {field}: {what}");
    let labels = slice.metadata.labels.unwrap_or_default();
    let service = labels.get(SERVICE_LABEL).filter(|name| !name.is_empty());
    let is_v4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        // Names (FQDN), and types added in the future.
        _ => return Ok(None),
    };
    let Some(service) = service.cloned() else {
        return Ok(None);
    };
    for (field, count, most) in [
        ("endpoints", slice.endpoints.len(), MAX_SLICE_ENDPOINTS),
        ("ports", slice.ports.len(), MAX_SLICE_PORTS),
    ] {
        if count > most {
            return Err(invalid(field, format!("are {count}, of {most} at most")));
        }
    }
    let mut ports = Vec::new();
    for (index, port) in slice.ports.into_iter().enumerate() {
        // A port without a number cannot be used by services.
        let (Some(number), "TCP") = (port.port, port.protocol.as_deref().unwrap_or("TCP")) else {
            continue;
        };
        let number =
            port_number(number).map_err(|error| invalid(&format!("ports[{index}].port"), error))?;
        ports.push((port.name.unwrap_or_default(), number));
    }
    let mut endpoints = Vec::new();
    for (index, endpoint) in slice.endpoints.into_iter().enumerate() {
        let field = || format!("endpoints[{index}].addresses[0]");
        let Some(text) = endpoint.addresses.first() else {
            continue;
        };
        let address = address(text).map_err(|error| invalid(&field(), error))?;
        if address.is_ipv4() != is_v4 {
            let kind = &slice.address_type;
            return Err(invalid(
                &field(),
                format!("{text:?} is not an {kind} address"),
            ));
        }
        let pod = endpoint.target_ref.and_then(|target| {
            let is_pod = target.kind.as_deref() == Some("Pod");
            let pod = target.name.filter(|name| is_pod && !name.is_empty())?;
            let namespace = target.namespace.filter(|namespace| !namespace.is_empty());
            Some(ObjectName {
                namespace: namespace.unwrap_or_else(|| name.namespace.clone()),
                name: pod,
            })
        });
        let conditions = endpoint.conditions;
        let ready = conditions.ready.unwrap_or(true);
        endpoints.push(SliceEndpoint {
            address,
            pod,
            node: endpoint.node_name.map(Arc::from),
            ready,
            serves_last: conditions.serving.unwrap_or(ready)
                && conditions.terminating.unwrap_or(false),
        });
    }
    Ok(Some(Object::Slice(Arc::new(Slice {
        name,
        service,
        ports,
        endpoints,
        mesh_only: false,
    }))))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::read, *};

    fn slice_object() -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {SERVICE_LABEL: "web"}},
            "addressType": "IPv4",
            "ports": [
                {"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "any"}, {"name": null, "port": 9090, "protocol": "TCP"},
            ],
            "endpoints": [
                {"addresses": ["10.1.0.1", "10.1.0.2"], "nodeName": "a",
                 "targetRef": {"kind": "Pod", "name": "web-1"}},
                {"addresses": ["10.1.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true},
                 "targetRef": {"kind": "Pod", "name": "web-2", "namespace": "other"}},
                {"addresses": ["10.1.0.4"], "conditions": {"ready": false, "serving": true},
                 "targetRef": {"kind": "Node", "name": "a"}},
                {"addresses": []},
            ],
        })
    }

    #[test]
    fn reads_an_endpoint_slice() {
        let objects = read(slice_object(), &"cluster.local".parse().unwrap()).unwrap();
        let [(_, Object::Slice(slice))] = objects.as_slice() else {
            panic!("{objects:?}");
        };
        assert_eq!((slice.service.as_str(), slice.ports.len()), ("web", 2));
        assert_eq!(slice.ports[1], (String::new(), 9090));
        let seen: Vec<_> = slice
            .endpoints
            .iter()
            .map(|endpoint| {
                let pod = endpoint.pod.as_ref().map(ObjectName::to_string);
                let (ready, last) = (endpoint.ready, endpoint.serves_last);
                (
                    endpoint.address.to_string(),
                    pod.unwrap_or_default(),
                    ready,
                    last,
                )
            })
            .collect();
        let expected = [
            ("10.1.0.1", "shop/web-1", true, false),
            ("10.1.0.3", "other/web-2", false, true),
            ("10.1.0.4", "", false, false),
        ];
        let expected = expected.map(|(ip, pod, ready, last)| (ip.into(), pod.into(), ready, last));
        assert_eq!(seen, expected);
        assert_eq!(slice.endpoints[0].node.as_deref(), Some("a"));
    }

    #[test]
    fn slices_without_a_service_are_ignored_and_those_beyond_the_limits_are_refused() {
        let changed = |pointer: &str, value: Value| {
            let mut object = slice_object();
            *object.pointer_mut(pointer).unwrap() = value;
            read(object, &"cluster.local".parse().unwrap())
        };
        for (pointer, value) in [
            ("/addressType", json!("FQDN")),
            ("/metadata/labels", json!({})),
        ] {
            assert_eq!(changed(pointer, value).unwrap(), [], "{pointer}");
        }
        let endpoint = |text: &str| json!([{"addresses": [text]}]);
        let many = |one: Value, count: usize| Value::Array(vec![one; count]);
        for (pointer, value, expected) in [
            (
                "/endpoints",
                endpoint("127.0.0.1"),
                "endpoints[0].addresses[0]: \"127.0.0.1\"",
            ),
            ("/endpoints", endpoint("fd00::1"), "is not an IPv4 address"),
            (
                "/endpoints",
                endpoint("web.example"),
                "is not an IP address",
            ),
            (
                "/endpoints",
                many(endpoint("10.0.0.1")[0].clone(), 1001),
                "are 1001, of 1000 at most",
            ),
            (
                "/ports",
                many(json!({"port": 1}), 101),
                "are 101, of 100 at most",
            ),
            (
                "/ports",
                json!([{"port": 70000}]),
                "ports[0].port: 70000 is not a port",
            ),
        ] {
            let error = changed(pointer, value).unwrap_err();
            let named = error.contains("EndpointSlice") && error.contains(expected);
            assert!(named, "{pointer}: {error}");
        }
    }
}
