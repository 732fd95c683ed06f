//! Workloads: pods, WorkloadEntries, and endpoints of ServiceEntries and EndpointSlices.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use auth_mesh::{Hbone, Membership, ObjectName, Slice, SliceEndpoint, TrustDomain, Workload};

use crate::{
    read::{self, Mesh, bounded, name, object_name, port, service_name},
    service::port_name,
    workload_api as api,
};

/// A workload in the model of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundWorkload {
    /// The workload itself.
    pub workload: Workload,
    /// One slice for each service that it is an endpoint of.
    pub slices: Vec<Arc<Slice>>,
    /// Policies that select it by its labels.
    pub policies: Vec<ObjectName>,
}

/// Returns the resource name of a pod.
pub(crate) fn pod_uid(mesh: &Mesh, pod: &ObjectName) -> String {
    format!("{}//Pod/{}/{}", mesh.cluster, pod.namespace, pod.name)
}

/// Reads a workload. `istiod` gives names to pods as Kubernetes does; every other workload is named by its UID.
pub(crate) fn workload(found: api::Workload, mesh: &Mesh) -> Result<FoundWorkload, String> {
    let uid = name("uid", &found.uid)?.to_owned();
    let mut own_name = ObjectName {
        namespace: name("namespace", &found.namespace)?.to_owned(),
        name: name("name", &found.name)?.to_owned(),
    };
    if pod_uid(mesh, &own_name) != uid {
        own_name.name.clone_from(&uid);
    }
    if found.network != mesh.network {
        return Err(format!(
            "network: {:?} is not this node's ({:?}), and network gateways are not supported",
            found.network, mesh.network
        ));
    }
    if found.addresses.is_empty() {
        return Err(match found.hostname.as_str() {
            "" => "addresses: are missing".into(),
            _ => "hostname: names are not looked up; use addresses".to_owned(),
        });
    }
    let mut addresses = Vec::new();
    for bytes in bounded("addresses", found.addresses.clone())? {
        let address = read::address("addresses", &bytes)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let host_network = found.network_mode() == api::NetworkMode::HostNetwork;
    let hbone = match found.tunnel_protocol() {
        api::TunnelProtocol::Hbone => Hbone::Offered,
        // Sidecars accept plaintext where policies allow it, as without a tunnel.
        api::TunnelProtocol::None | api::TunnelProtocol::LegacyIstioMtls => Hbone::No,
    };
    let waypoint = read::waypoint(found.waypoint.as_ref(), mesh);
    let is_member = hbone != Hbone::No || waypoint.is_some();
    let slices = slices(&found, &own_name, &addresses)?;
    let policies = bounded(
        "authorizationPolicies",
        found.authorization_policies.clone(),
    )?
    .iter()
    .map(|policy| object_name("authorizationPolicies", policy))
    .collect::<Result<_, _>>()?;
    Ok(FoundWorkload {
        workload: Workload {
            addresses,
            node: found.node.clone(),
            ready: found.status() == api::WorkloadStatus::Healthy,
            host_network,
            membership: Some(match is_member {
                true => Membership::Enabled,
                false => Membership::Disabled,
            }),
            hbone,
            waypoint,
            labels: BTreeMap::new(),
            ..Workload::new(own_name, identity(&found, mesh)?)
        },
        slices,
        policies,
    })
}

fn identity(found: &api::Workload, mesh: &Mesh) -> Result<auth_mesh::Identity, String> {
    let account = match found.service_account.as_str() {
        "" => "default",
        account => account,
    };
    let of = |domain: &TrustDomain| {
        domain
            .identity(&found.namespace, account)
            .map_err(|error| format!("serviceAccount: {error}"))
    };
    match found.trust_domain.as_str() {
        "" => of(&mesh.trust_domain),
        known if mesh.trust_domain.is_named(known) => of(&mesh.trust_domain),
        other => of(&other
            .parse()
            .map_err(|error| format!("trustDomain: {error}"))?),
    }
}

fn slices(
    found: &api::Workload,
    own_name: &ObjectName,
    addresses: &[IpAddr],
) -> Result<Vec<Arc<Slice>>, String> {
    if found.services.len() > read::MAX_LIST {
        return Err(format!(
            "services: are {}, of {} at most",
            found.services.len(),
            read::MAX_LIST
        ));
    }
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|address| SliceEndpoint {
            address: *address,
            pod: Some(own_name.clone()),
            node: (!found.node.is_empty()).then(|| found.node.as_str().into()),
            ready: found.status() == api::WorkloadStatus::Healthy,
            serves_last: false,
        })
        .collect();
    // Other workloads are named by their UID.
    let is_pod = own_name.name != found.uid;
    let mut slices = Vec::new();
    for (key, list) in &found.services {
        let (namespace, hostname) = key
            .split_once('/')
            .ok_or_else(|| format!("services: {key:?} is not namespace/hostname"))?;
        let service = service_name(namespace, hostname)?;
        let is_service_entry = service.name == hostname;
        if list.ports.len() > read::MAX_LIST {
            return Err(format!("services: {service}: has too many ports"));
        }
        let mut ports = Vec::new();
        for found in &list.ports {
            // The workload does not have the port that the service names.
            if found.target_port == 0 {
                continue;
            }
            let number = port("services.servicePort", found.service_port)?;
            let target = port("services.targetPort", found.target_port)?;
            ports.push((port_name(number), target));
        }
        slices.push(Arc::new(Slice {
            name: ObjectName {
                namespace: service.namespace.clone(),
                name: format!("{}/{}", service.name, found.uid),
            },
            service: service.name,
            ports,
            endpoints: endpoints.clone(),
            mesh_only: !is_pod || is_service_entry,
        }));
    }
    Ok(slices)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::read::tests::mesh;

    pub(crate) fn pod(name: &str, address: u8) -> api::Workload {
        let ports = api::PortList {
            ports: vec![api::Port {
                service_port: 80,
                target_port: 8080,
            }],
        };
        api::Workload {
            uid: format!("Kubernetes//Pod/shop/{name}"),
            name: name.into(),
            namespace: "shop".into(),
            addresses: vec![vec![10, 1, 0, address]],
            tunnel_protocol: api::TunnelProtocol::Hbone as i32,
            service_account: name.into(),
            node: "b".into(),
            services: [("shop/web.shop.svc.cluster.local".to_owned(), ports)].into(),
            ..Default::default()
        }
    }

    #[test]
    fn reads_a_pod() {
        let found = workload(pod("web-1", 1), &mesh()).unwrap();
        let of = &found.workload;
        assert_eq!(of.name.to_string(), "shop/web-1");
        assert_eq!(
            of.identity.as_str(),
            "spiffe://cluster.local/ns/shop/sa/web-1"
        );
        assert_eq!(
            (of.node.as_str(), of.ready, of.hbone),
            ("b", true, Hbone::Offered)
        );
        assert_eq!(of.membership, Some(Membership::Enabled));
        assert_eq!(found.slices[0].service, "web");
        assert_eq!(found.slices[0].ports, [("80".to_owned(), 8080)]);
    }

    #[test]
    fn kubernetes_knows_pods_behind_its_services_alone() {
        let entry = api::Workload {
            uid: "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm".into(),
            ..pod("vm", 2)
        };
        let mut selected = pod("web-1", 1);
        let ports = selected.services.values().next().unwrap().clone();
        selected.services = [("shop/db.example.com".to_owned(), ports)].into();
        for (found, expected) in [(pod("web-1", 1), false), (entry, true), (selected, true)] {
            let found = workload(found, &mesh()).unwrap();
            assert_eq!(found.slices[0].mesh_only, expected, "{:?}", found.slices);
        }
    }

    #[test]
    fn an_identity_under_an_alias_is_the_meshs_own() {
        let alias = "old.example".parse().unwrap();
        let mesh = Mesh {
            trust_domain: TrustDomain::default().with_aliases([alias]),
            ..mesh()
        };
        for (domain, expected) in [
            ("", "cluster.local"),
            ("old.example", "cluster.local"),
            ("other.example", "other.example"),
        ] {
            let found = api::Workload {
                trust_domain: domain.into(),
                ..pod("web-1", 1)
            };
            let found = workload(found, &mesh).unwrap().workload.identity;
            assert_eq!(found.trust_domain(), expected);
        }
    }

    #[test]
    fn other_workloads_cannot_take_a_pods_name() {
        let entry = api::Workload {
            uid: "Kubernetes/networking.istio.io/WorkloadEntry/shop/web-1".into(),
            ..pod("web-1", 2)
        };
        let found = workload(entry.clone(), &mesh()).unwrap();
        assert_eq!(found.workload.name.name, entry.uid);
        let remote = api::Workload {
            uid: "other//Pod/shop/web-1".into(),
            ..entry
        };
        assert_ne!(
            workload(remote, &mesh()).unwrap().workload.name.name,
            "web-1"
        );
    }

    #[test]
    fn a_workload_is_in_the_mesh_if_it_speaks_hbone_or_has_a_waypoint() {
        let plain = api::Workload {
            tunnel_protocol: 0,
            ..pod("web-1", 1)
        };
        let membership = |found| workload(found, &mesh()).unwrap().workload.membership;
        assert_eq!(membership(plain.clone()), Some(Membership::Disabled));
        let waypoint = api::GatewayAddress {
            destination: Some(api::gateway_address::Destination::Hostname(
                api::NamespacedHostname {
                    namespace: "shop".into(),
                    hostname: "waypoint.shop.svc.cluster.local".into(),
                },
            )),
            hbone_mtls_port: 15008,
        };
        let behind = api::Workload {
            waypoint: Some(waypoint),
            ..plain
        };
        assert_eq!(membership(behind.clone()), Some(Membership::Enabled));
        let found = workload(behind, &mesh())
            .unwrap()
            .workload
            .waypoint
            .unwrap();
        assert_eq!(found.to_string(), "shop/waypoint");
    }

    #[test]
    fn refuses_what_it_cannot_serve() {
        for (change, expected) in [
            (
                (|w| w.network = "other".into()) as fn(&mut api::Workload),
                "network gateways are not supported",
            ),
            (|w| w.addresses.clear(), "addresses: are missing"),
            (
                |w| {
                    w.addresses.clear();
                    w.hostname = "db.example".into();
                },
                "names are not looked up",
            ),
            (|w| w.addresses = vec![vec![127, 0, 0, 1]], "127.0.0.1"),
            (|w| w.uid.clear(), "uid: is empty"),
            (|w| w.service_account = "a/b".into(), "serviceAccount"),
            (|w| w.trust_domain = "A_B!".into(), "trustDomain"),
            (
                |w| w.authorization_policies = vec!["x".into()],
                "namespace/name",
            ),
            (|w| w.addresses = vec![vec![1, 2, 3, 4]; 257], "257"),
        ] {
            let mut found = pod("web-1", 1);
            change(&mut found);
            let error = workload(found, &mesh()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
