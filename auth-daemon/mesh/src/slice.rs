//! Endpoints of services without a selector, which users or controllers list in EndpointSlices.

use std::{net::IpAddr, sync::Arc};

use super::ObjectName;

/// Some of the endpoints of a service (an EndpointSlice).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Namespace and name.
    pub name: ObjectName,
    /// Name of the service, in the same namespace.
    pub service: String,
    /// TCP ports of each endpoint, by the names of the service's ports.
    pub ports: Vec<(String, u16)>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
    /// Whether nothing but the mesh leads connections from the service to these endpoints, because Kubernetes does not know
    /// the service or the endpoints.
    pub mesh_only: bool,
}

/// An endpoint in a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// The endpoint's address. Never IPv4-mapped.
    pub address: IpAddr,
    /// The pod of the endpoint, according to the slice.
    pub pod: Option<ObjectName>,
    /// The node of the endpoint, according to the slice.
    pub node: Option<Arc<str>>,
    /// Whether the endpoint accepts connections.
    pub ready: bool,
    /// Whether the endpoint is terminating but still serves. It is used if no endpoint is ready.
    pub serves_last: bool,
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::{
        AddressKind, Destination, Edit, Identity, MeshDefault, Port, Service, Snapshot, TargetPort,
        Unreachable, Workload, resolved::MAX_SLICED,
    };

    const VIRTUAL: &str = "10.96.0.7:80";

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    fn pod(pod: &str, address: &str) -> Workload {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{pod}");
        Workload {
            addresses: vec![address.parse().unwrap()],
            node: "a".into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Workload::new(name(pod), identity.parse().unwrap())
        }
    }

    fn service() -> Service {
        let port = |name: &str, port| Port {
            name: name.into(),
            port,
            target: TargetPort::Number(port),
        };
        Service {
            addresses: vec!["10.96.0.7".parse().unwrap(), "fd96::7".parse().unwrap()],
            ports: vec![port("http", 80), port("other", 81)],
            ..Service::new(name("web"))
        }
    }

    fn endpoint(address: &str) -> SliceEndpoint {
        SliceEndpoint {
            address: address.parse().unwrap(),
            pod: None,
            node: None,
            ready: true,
            serves_last: false,
        }
    }

    fn slice(slice: &str, endpoints: Vec<SliceEndpoint>) -> Slice {
        Slice {
            name: name(slice),
            service: "web".into(),
            ports: vec![("http".into(), 8080)],
            endpoints,
            mesh_only: false,
        }
    }

    fn known(change: impl FnOnce(&mut Edit)) -> Snapshot {
        let mut edit = Edit::from(Snapshot::default());
        edit.service(service());
        edit.pod(pod("one", "10.1.0.1"));
        edit.pod(Workload {
            membership: Some(crate::Membership::Disabled),
            ..pod("out", "10.1.0.9")
        });
        change(&mut edit);
        edit.finish()
    }

    fn resolve(snapshot: &Snapshot) -> Result<Destination, Unreachable> {
        snapshot.resolve(VIRTUAL.parse().unwrap())
    }

    /// Whether the service is known, and not in the mesh.
    fn is_outside(snapshot: &Snapshot) -> bool {
        let address: SocketAddr = VIRTUAL.parse().unwrap();
        snapshot.kind(address.ip()) == Some(AddressKind::Outside)
    }

    /// Addresses with their pods: the account of a mesh pod, `-` for a pod outside the mesh, nothing if there is no
    /// pod.
    fn endpoints(snapshot: &Snapshot) -> Vec<String> {
        let found = resolve(snapshot).unwrap();
        let endpoints = found.endpoints.iter().map(|endpoint| {
            let pod = endpoint.workload.as_ref();
            let who = match (pod, endpoint.meshed) {
                (Some(pod), true) => pod.identity.service_account(),
                (Some(_), false) => "-",
                (None, false) => "",
                (None, true) => panic!("of the mesh, and no pod"),
            };
            format!("{} {who}", endpoint.address)
        });
        endpoints.collect()
    }

    #[test]
    fn an_address_of_a_pod_of_the_mesh_is_that_pod_whatever_the_slice_says() {
        let snapshot = known(|edit| {
            let endpoint = |address: &str, pod: &str| SliceEndpoint {
                pod: Some(name(pod)),
                ..endpoint(address)
            };
            edit.pod(Workload {
                addresses: vec![],
                ..pod("starts", "10.1.0.5")
            });
            edit.slice(slice(
                "s",
                vec![
                    // The slice refers to a pod outside the mesh.
                    endpoint("10.1.0.1", "out"),
                    // The slice refers to a pod whose address is not known yet.
                    endpoint("10.1.0.5", "starts"),
                    endpoint("10.1.0.9", "out"),
                    endpoint("192.0.2.1", "gone"),
                ],
            ));
        });
        assert_eq!(
            endpoints(&snapshot),
            [
                "10.1.0.1:8080 one",
                "10.1.0.5:8080 starts",
                "10.1.0.9:8080 -",
                "192.0.2.1:8080 "
            ]
        );
        let identities = resolve(&snapshot).unwrap().identities;
        let accounts: Vec<_> = identities.iter().map(Identity::service_account).collect();
        assert_eq!(accounts, ["one", "starts"], "who may answer a tunnel");
    }

    #[test]
    fn a_service_of_others_stays_theirs_until_a_pod_of_the_mesh_has_an_address() {
        let mut snapshot = known(|edit| edit.slice(slice("s", vec![endpoint("10.1.0.7")])));
        assert!(is_outside(&snapshot));
        for (change, expected) in [
            (pod("two", "10.1.0.7"), Some("10.1.0.7:8080 two")),
            // A disputed address has no owner, and is not reached in plaintext either.
            (pod("thief", "10.1.0.7"), None),
            (pod("thief", "10.1.0.8"), Some("10.1.0.7:8080 two")),
        ] {
            let mut edit = Edit::from(snapshot);
            edit.pod(change);
            snapshot = edit.finish();
            match expected {
                Some(expected) => assert_eq!(endpoints(&snapshot), [expected]),
                None => {
                    let refused = resolve(&snapshot);
                    assert!(
                        matches!(refused, Err(Unreachable::NoEndpoint(..))),
                        "{refused:?}"
                    );
                }
            }
        }
        let mut edit = Edit::from(snapshot);
        edit.remove_pod(&name("two"));
        assert!(is_outside(&edit.finish()));
    }

    #[test]
    fn a_service_whose_endpoints_only_the_mesh_leads_to_is_the_meshs() {
        let snapshot = known(|edit| {
            edit.slice(Slice {
                mesh_only: true,
                ..slice("s", vec![endpoint("10.1.0.7")])
            });
        });
        assert_eq!(endpoints(&snapshot), ["10.1.0.7:8080 "]);
    }

    #[test]
    fn several_slices_are_one_list() {
        let mut snapshot = known(|edit| {
            let failing = |address: &str| SliceEndpoint {
                ready: false,
                ..endpoint(address)
            };
            // The endpoint is in both slices while it moves, and ready in one.
            edit.slice(slice("a", vec![failing("10.1.0.1"), failing("10.1.0.2")]));
            edit.slice(slice("b", vec![endpoint("10.1.0.1"), endpoint("10.1.0.3")]));
            // Endpoints of the other address family, and of another port.
            edit.slice(slice("c", vec![endpoint("fd00::1")]));
            edit.slice(Slice {
                ports: vec![("other".into(), 8081)],
                ..slice("d", vec![endpoint("10.1.0.4")])
            });
        });
        assert_eq!(
            endpoints(&snapshot),
            ["10.1.0.1:8080 one", "10.1.0.3:8080 "]
        );
        let other = snapshot.resolve("10.96.0.7:81".parse().unwrap()).unwrap();
        assert_eq!(other.endpoints[0].address.to_string(), "10.1.0.4:8081");
        let six = snapshot.resolve("[fd96::7]:80".parse().unwrap()).unwrap();
        assert_eq!(six.endpoints[0].address.to_string(), "[fd00::1]:8080");
        let mut edit = Edit::from(snapshot);
        edit.remove_slice(&name("b"));
        snapshot = edit.finish();
        assert!(matches!(
            resolve(&snapshot),
            Err(Unreachable::NoEndpoint(..))
        ));
    }

    #[test]
    fn terminating_endpoints_serve_only_without_others() {
        let going = SliceEndpoint {
            ready: false,
            serves_last: true,
            ..endpoint("10.1.0.1")
        };
        let snapshot = known(|edit| edit.slice(slice("a", vec![going.clone()])));
        assert_eq!(endpoints(&snapshot), ["10.1.0.1:8080 one"]);
        let snapshot = known(|edit| edit.slice(slice("a", vec![going, endpoint("10.1.0.3")])));
        assert_eq!(endpoints(&snapshot), ["10.1.0.3:8080 "]);
    }

    #[test]
    fn a_slice_may_move_to_another_service_and_a_service_get_a_selector() {
        let first = known(|edit| edit.slice(slice("s", vec![endpoint("10.1.0.1")])));
        let mut edit = Edit::from(first.clone());
        edit.slice(Slice {
            service: "api".into(),
            ..slice("s", vec![endpoint("10.1.0.1")])
        });
        let refused = resolve(&edit.finish());
        assert!(
            matches!(refused, Err(Unreachable::NoEndpoint(..))),
            "{refused:?}"
        );
        let mut edit = Edit::from(first);
        edit.service(Service {
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..service()
        });
        let selecting = edit.finish();
        assert_eq!(endpoints(&selecting), ["10.1.0.1:80 one", "10.1.0.9:80 -"]);
        let mut edit = Edit::from(selecting);
        edit.service(service());
        assert_eq!(
            endpoints(&edit.finish()),
            ["10.1.0.1:8080 one"],
            "and lose it"
        );
    }

    #[test]
    fn a_pinned_service_uses_no_address_outside_of_the_mesh() {
        let snapshot = known(|edit| {
            let pinned = ["spiffe://cluster.local/ns/shop/sa/one".parse().unwrap()];
            edit.service(Service {
                pinned_identities: Some(pinned.into()),
                ..service()
            });
            edit.slice(slice(
                "s",
                vec![endpoint("10.1.0.1"), endpoint("192.0.2.1")],
            ));
        });
        assert_eq!(endpoints(&snapshot), ["10.1.0.1:8080 one"]);
    }

    #[test]
    fn a_service_of_another_trust_domain_has_foreign_endpoints() {
        let snapshot = known(|edit| {
            let pinned = ["spiffe://far.example/ns/shop/sa/web".parse().unwrap()];
            edit.service(Service {
                pinned_identities: Some(pinned.into()),
                federated: true,
                ..service()
            });
            // The second is a pod of this mesh, which is not of that trust domain.
            let endpoints = vec![endpoint("192.0.2.1"), endpoint("10.1.0.1")];
            edit.slice(slice("s", endpoints));
        });
        assert!(!is_outside(&snapshot), "captured");
        let found = resolve(&snapshot).unwrap();
        let [foreign] = &*found.endpoints else {
            panic!("{found:?}");
        };
        assert_eq!(foreign.address.to_string(), "192.0.2.1:8080");
        assert!(foreign.foreign && !foreign.meshed);
        assert_eq!(found.allowed(), "spiffe://far.example/ns/shop/sa/web");
    }

    #[test]
    fn only_those_on_the_clients_node_are_local() {
        let snapshot = known(|edit| {
            let on = |node: &str, address| SliceEndpoint {
                node: Some(node.into()),
                ..endpoint(address)
            };
            // The pod's own node takes precedence.
            let endpoints = vec![
                on("b", "10.1.0.1"),
                on("b", "192.0.2.1"),
                endpoint("192.0.2.2"),
            ];
            edit.slice(slice("s", endpoints));
        });
        let found = resolve(&snapshot).unwrap();
        let on = |node| -> Vec<_> { found.endpoints.iter().map(|e| e.is_on(node)).collect() };
        assert_eq!(on("a"), [true, false, false]);
        assert_eq!(on("b"), [false, true, false]);
    }

    #[test]
    fn no_service_has_more_endpoints_than_fit() {
        let many = |slice_name: String| {
            let endpoints = (0..1000_u32).map(|number| {
                let number = number + 1000 * u32::from(slice_name.as_bytes()[0]);
                endpoint(&std::net::Ipv4Addr::from(0x0a02_0000 + number).to_string())
            });
            slice(&slice_name, endpoints.collect())
        };
        let names = (b'a'..).map(|letter| char::from(letter).to_string());
        let mut edit = Edit::from(Snapshot::with_defaults(MeshDefault::default()));
        edit.service(Service {
            pinned_identities: None,
            ..service()
        });
        edit.pod(pod("one", "10.1.0.1"));
        edit.slice(slice("0", vec![endpoint("10.1.0.1")]));
        let empty = Snapshot::default();
        let counts = |snapshot: &Snapshot| {
            let errors: Vec<_> = snapshot.errors_since(&empty).collect();
            (resolve(snapshot).unwrap().endpoints.len(), errors)
        };
        let mut snapshot = edit.finish();
        for name in names.take(MAX_SLICED / 1000) {
            assert_eq!(counts(&snapshot).1, [""; 0]);
            let mut edit = Edit::from(snapshot);
            edit.slice(many(name));
            snapshot = edit.finish();
        }
        let (count, errors) = counts(&snapshot);
        assert_eq!(count, MAX_SLICED);
        assert!(
            errors[0].contains("service shop/web has more than"),
            "{errors:?}"
        );
        let mut edit = Edit::from(snapshot);
        edit.remove_slice(&name("a"));
        assert_eq!(counts(&edit.finish()).1, [""; 0]);
    }
}
