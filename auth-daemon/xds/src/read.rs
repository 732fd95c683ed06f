//! What all resources have in common: names, addresses, ports, and their bounds.

use std::{net::IpAddr, sync::Arc};

use auth_mesh::{ObjectName, TrustDomain, Waypoint, WaypointAt};

use crate::workload_api::{GatewayAddress, NetworkAddress, gateway_address};

/// The node's mesh, cluster and network: what resources are read against.
#[derive(Clone, Debug)]
pub struct Mesh {
    /// The mesh's trust domain, of identities that name none.
    pub trust_domain: TrustDomain,
    /// The cluster's ID in Istio.
    pub cluster: String,
    /// The cluster's network in Istio. Workloads of other networks are behind gateways, which are not supported.
    pub network: String,
    /// The namespace whose policies apply to all.
    pub root_namespace: String,
}

/// Maximum length of a name in a resource, in bytes.
const MAX_NAME: usize = 1024;
/// Maximum number of addresses of a workload or service, and of ports of a service.
pub(crate) const MAX_LIST: usize = 256;

/// Checks a name: 1 to 1024 printable characters.
pub(crate) fn name<'a>(field: &str, text: &'a str) -> Result<&'a str, String> {
    match text.len() {
        1..=MAX_NAME if !text.contains(char::is_control) => Ok(text),
        0 => Err(format!("{field}: is empty")),
        1..=MAX_NAME => Err(format!("{field}: contains control characters")),
        _ => Err(format!("{field}: is longer than {MAX_NAME} bytes")),
    }
}

/// Checks that a list is within the bounds.
pub(crate) fn bounded<T>(field: &str, list: Vec<T>) -> Result<Vec<T>, String> {
    match list.len() {
        0..=MAX_LIST => Ok(list),
        more => Err(format!("{field}: are {more}, of {MAX_LIST} at most")),
    }
}

/// Reads an address of 4 or 16 bytes, which may be any.
pub(crate) fn any_address(bytes: &[u8]) -> Result<IpAddr, String> {
    let address: IpAddr = if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        four.into()
    } else if let Ok(sixteen) = <[u8; 16]>::try_from(bytes) {
        sixteen.into()
    } else {
        return Err(format!("{} bytes are not an IP address", bytes.len()));
    };
    Ok(address)
}

/// Reads an address that a pod or service can have.
pub(crate) fn address(field: &str, bytes: &[u8]) -> Result<IpAddr, String> {
    let ip = any_address(bytes)
        .map_err(|error| format!("{field}: {error}"))?
        .to_canonical();
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
        return Err(format!(
            "{field}: {ip} is not an address that a pod or service can have"
        ));
    }
    Ok(ip)
}

/// Reads an address in `mesh`'s network. `None` if it is in another, or a range of addresses.
pub(crate) fn network_address(
    field: &str,
    found: &NetworkAddress,
    mesh: &Mesh,
) -> Result<Option<IpAddr>, String> {
    let ip = address(field, &found.address)?;
    let bits: u32 = if found.address.len() == 4 { 32 } else { 128 };
    let is_host = found.length.is_none_or(|length| length == bits);
    Ok((is_host && found.network == mesh.network).then_some(ip))
}

/// Reads a TCP port, which is not 0.
pub(crate) fn port(field: &str, number: u32) -> Result<u16, String> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{field}: {number} is not a port"))
}

/// Returns the name of a service in the model: that of the Kubernetes object, or the hostname if the service is of a
/// ServiceEntry. The two cannot be equal, because names of Kubernetes services have no dots.
pub(crate) fn service_name(namespace: &str, hostname: &str) -> Result<ObjectName, String> {
    let namespace = name("namespace", namespace)?;
    let hostname = name("hostname", hostname)?;
    let of_kubernetes = hostname
        .split_once('.')
        .filter(|(name, rest)| {
            let domain = rest.strip_prefix(namespace);
            !name.is_empty() && domain.is_some_and(|domain| domain.starts_with(".svc."))
        })
        .map(|(name, _)| name);
    Ok(ObjectName {
        namespace: namespace.to_owned(),
        name: of_kubernetes.unwrap_or(hostname).to_owned(),
    })
}

/// Reads `namespace/name`, of which the name may contain slashes.
pub(crate) fn object_name(field: &str, text: &str) -> Result<ObjectName, String> {
    let (namespace, own) = name(field, text)?
        .split_once('/')
        .ok_or_else(|| format!("{field}: {text:?} is not namespace/name"))?;
    Ok(ObjectName {
        namespace: name(field, namespace)?.to_owned(),
        name: name(field, own)?.to_owned(),
    })
}

/// Reads a waypoint. One that cannot be read is kept as unusable: traffic must not go around it.
pub(crate) fn waypoint(found: Option<&GatewayAddress>, mesh: &Mesh) -> Option<Arc<Waypoint>> {
    let read = readable_waypoint(found?, mesh);
    Some(Arc::new(read.unwrap_or_else(|reason| Waypoint {
        at: WaypointAt::Unusable(reason),
        port: 0,
    })))
}

fn readable_waypoint(found: &GatewayAddress, mesh: &Mesh) -> Result<Waypoint, String> {
    use gateway_address::Destination;
    let at = match &found.destination {
        Some(Destination::Hostname(hostname)) => {
            let service = service_name(&hostname.namespace, &hostname.hostname);
            WaypointAt::Service(service.map_err(|error| format!("waypoint.hostname: {error}"))?)
        }
        Some(Destination::Address(address)) => {
            let address = network_address("waypoint.address", address, mesh)?;
            WaypointAt::Address(address.ok_or("waypoint.address: is in another network")?)
        }
        None => return Err("waypoint: has neither hostname nor address".into()),
    };
    let port = port("waypoint.hboneMtlsPort", found.hbone_mtls_port)?;
    Ok(Waypoint { at, port })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn mesh() -> Mesh {
        Mesh {
            trust_domain: TrustDomain::default(),
            cluster: "Kubernetes".into(),
            network: String::new(),
            root_namespace: "istio-system".into(),
        }
    }

    #[test]
    fn services_are_named_as_in_kubernetes() {
        let name = |namespace, hostname| service_name(namespace, hostname).unwrap().to_string();
        assert_eq!(name("shop", "web.shop.svc.cluster.local"), "shop/web");
        assert_eq!(name("shop", "web.shop.svc.example.org"), "shop/web");
        for other in [
            "web.other.svc.cluster.local",
            "api.example.com",
            "web",
            ".shop.svc.x",
        ] {
            assert_eq!(name("shop", other), format!("shop/{other}"));
        }
        for (namespace, hostname) in [("", "web"), ("shop", ""), ("shop", "a\nb")] {
            assert!(service_name(namespace, hostname).is_err());
        }
    }

    #[test]
    fn refuses_addresses_that_nothing_can_have() {
        let mapped = [[0; 10].as_slice(), &[0xff, 0xff, 10, 1, 0, 1]].concat();
        assert_eq!(address("a", &mapped).unwrap().to_string(), "10.1.0.1");
        for bad in [
            &[][..],
            &[10, 0, 0],
            &[127, 0, 0, 1],
            &[0, 0, 0, 0],
            &[224, 0, 0, 1],
        ] {
            assert!(address("a", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_waypoint_that_cannot_be_read_stays_a_waypoint() {
        use gateway_address::Destination;
        let read = |destination, port| {
            let found = GatewayAddress {
                destination,
                hbone_mtls_port: port,
            };
            waypoint(Some(&found), &mesh()).unwrap().at.clone()
        };
        let at = |network: &str| {
            Some(Destination::Address(NetworkAddress {
                network: network.into(),
                address: vec![10, 0, 0, 9],
                length: None,
            }))
        };
        let found = read(at(""), 15008);
        assert_eq!(found, WaypointAt::Address([10, 0, 0, 9].into()));
        for (unusable, expected) in [
            (read(at("other"), 15008), "another network"),
            (read(at(""), 0), "0 is not a port"),
            (read(None, 15008), "neither hostname nor address"),
        ] {
            let WaypointAt::Unusable(reason) = unusable else {
                panic!("{unusable:?}");
            };
            assert!(reason.contains(expected), "{reason}");
        }
        assert_eq!(waypoint(None, &mesh()), None);
    }
}
