//! Services.

use auth_mesh::{Port, Service, TargetPort};

use crate::{
    read::{Mesh, bounded, name, network_address, port, service_name, waypoint},
    workload_api::{self as api, load_balancing},
};

/// Reads a service. Its endpoints are in the workloads, which name the services that they are in.
pub(crate) fn service(found: api::Service, mesh: &Mesh) -> Result<Service, String> {
    name("name", &found.name)?;
    let own_name = service_name(&found.namespace, &found.hostname)?;
    if found.visibility() == api::service::Visibility::Namespace {
        return Err("visibility: NAMESPACE is not supported".into());
    }
    let routing = routing(found.load_balancing.as_ref())?;
    let waypoint = waypoint(found.waypoint.as_ref(), mesh);
    let mut addresses = Vec::new();
    // The address of a service without endpoints of its own is a destination like any other.
    if !routing.passthrough {
        for address in bounded("addresses", found.addresses)? {
            addresses.extend(network_address("addresses", &address, mesh)?);
        }
    }
    let ports = bounded("ports", found.ports)?;
    let ports = ports
        .iter()
        .map(|found| {
            let number = port("ports.servicePort", found.service_port)?;
            Ok(Port {
                name: port_name(number),
                port: number,
                // Each workload says which port it has.
                target: TargetPort::Number(number),
            })
        })
        .collect::<Result<_, String>>()?;
    Ok(Service {
        addresses,
        ports,
        publish_not_ready: routing.all,
        waypoint,
        local: routing.local,
        ..Service::new(own_name)
    })
}

/// The name by which slices refer to the port `number`: the API has no names of ports.
pub(crate) fn port_name(number: u16) -> String {
    number.to_string()
}

/// What a service's load balancing settings ask for.
#[derive(Default)]
struct Routing {
    local: bool,
    all: bool,
    passthrough: bool,
}

fn routing(found: Option<&api::LoadBalancing>) -> Result<Routing, String> {
    use load_balancing::{HealthPolicy, Mode, Scope};
    let Some(found) = found else {
        return Ok(Routing::default());
    };
    let scopes: Vec<_> = found.routing_preference().take(8).collect();
    let local = match found.mode() {
        // Endpoints of this cluster and network are the only ones anyway.
        Mode::Strict => match scopes
            .iter()
            .find(|scope| !matches!(scope, Scope::Node | Scope::Network | Scope::Cluster))
        {
            None => scopes.contains(&Scope::Node),
            Some(other) => {
                return Err(format!(
                    "loadBalancing: STRICT within {} is not supported",
                    other.as_str_name()
                ));
            }
        },
        // A preference, which is not followed.
        Mode::Failover | Mode::UnspecifiedMode => false,
        Mode::Passthrough => {
            return Ok(Routing {
                passthrough: true,
                ..Routing::default()
            });
        }
    };
    Ok(Routing {
        local,
        all: found.health_policy() == HealthPolicy::AllowAll,
        passthrough: false,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use load_balancing::{HealthPolicy, Mode, Scope};

    use super::*;
    use crate::read::tests::mesh;

    pub(crate) fn web() -> api::Service {
        api::Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: "web.shop.svc.cluster.local".into(),
            addresses: vec![api::NetworkAddress {
                network: String::new(),
                address: vec![10, 96, 0, 7],
                length: None,
            }],
            ports: vec![api::Port {
                service_port: 80,
                target_port: 8080,
            }],
            ..Default::default()
        }
    }

    fn balanced(mode: Mode, scopes: &[Scope]) -> Result<Service, String> {
        let balancing = api::LoadBalancing {
            routing_preference: scopes.iter().map(|scope| *scope as i32).collect(),
            mode: mode as i32,
            health_policy: HealthPolicy::AllowAll as i32,
        };
        let found = api::Service {
            load_balancing: Some(balancing),
            ..web()
        };
        service(found, &mesh())
    }

    #[test]
    fn reads_a_service() {
        let found = service(web(), &mesh()).unwrap();
        assert_eq!(found.name.to_string(), "shop/web");
        assert_eq!(
            found.addresses,
            ["10.96.0.7".parse::<std::net::IpAddr>().unwrap()]
        );
        assert_eq!(
            (found.ports[0].port, found.ports[0].name.as_str()),
            (80, "80")
        );
        assert!(!found.local && !found.publish_not_ready && found.waypoint.is_none());
    }

    #[test]
    fn follows_settings_that_exclude_endpoints_and_refuses_those_it_cannot_follow() {
        let local = balanced(Mode::Strict, &[Scope::Node]).unwrap();
        assert!(local.local && local.publish_not_ready);
        assert!(!balanced(Mode::Failover, &[Scope::Zone]).unwrap().local);
        assert!(
            balanced(Mode::Strict, &[Scope::Zone])
                .unwrap_err()
                .contains("ZONE")
        );
        assert!(
            balanced(Mode::Passthrough, &[])
                .unwrap()
                .addresses
                .is_empty()
        );
    }

    #[test]
    fn leaves_out_addresses_of_other_networks_and_ranges() {
        let mut found = web();
        found.addresses.push(api::NetworkAddress {
            network: "other".into(),
            address: vec![10, 96, 0, 8],
            length: None,
        });
        found.addresses.push(api::NetworkAddress {
            network: String::new(),
            address: vec![10, 97, 0, 0],
            length: Some(16),
        });
        assert_eq!(service(found, &mesh()).unwrap().addresses.len(), 1);
    }
}
