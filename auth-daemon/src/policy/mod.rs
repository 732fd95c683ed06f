//! Verdicts on who may call whom: plain functions of what is known.

use std::net::IpAddr;

use crate::mesh::{Identity, ObjectName, Snapshot};

/// Why a caller is not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The address is that of a pod that is somebody else.
    #[error("{source_address} is the address of pod {pod}, which is {expected}, not {presented}")]
    Impostor {
        /// Where the connection comes from.
        source_address: IpAddr,
        /// The pod known there.
        pod: ObjectName,
        /// Who that pod is.
        expected: Identity,
        /// Whose certificate was presented.
        presented: Identity,
    },
    /// More than one pod claims the address: nobody can be told from it.
    #[error("{0} is claimed by more than one pod or service; fix the objects that claim it")]
    Disputed(IpAddr),
    /// The client speaks for an address that it does not call from.
    #[error("the client at {tunnel} says that it is {claimed}")]
    ClaimedAddress {
        /// Where the tunnel comes from.
        tunnel: IpAddr,
        /// What CONNECT claims.
        claimed: IpAddr,
    },
}

/// Whether the holder of `presented` may speak as the client at `claimed`, through a tunnel from `tunnel`.
///
/// A pod that is not known here is believed by its certificate alone: its node may have heard of it first.
pub fn admit_source(
    snapshot: &Snapshot,
    presented: &Identity,
    tunnel: IpAddr,
    claimed: IpAddr,
) -> Result<(), Denied> {
    if tunnel != claimed {
        return Err(Denied::ClaimedAddress { tunnel, claimed });
    }
    if snapshot.is_disputed(tunnel) {
        return Err(Denied::Disputed(tunnel));
    }
    match snapshot.pod(tunnel) {
        Some(pod) if pod.identity != *presented => Err(Denied::Impostor {
            source_address: tunnel,
            pod: pod.name.clone(),
            expected: pod.identity.clone(),
            presented: presented.clone(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Inventory, Workload};

    #[test]
    fn a_known_address_is_its_pods_alone() {
        let web: Identity = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        let api: Identity = "spiffe://cluster.local/ns/default/sa/api".parse().unwrap();
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let other: IpAddr = "10.0.0.2".parse().unwrap();
        let workload = Workload {
            name: ObjectName {
                namespace: "default".into(),
                name: "web-1".into(),
            },
            uid: String::new(),
            identity: web.clone(),
            addresses: vec![address],
            node: "a".into(),
            ready: true,
            labels: Default::default(),
            named_ports: Default::default(),
            netns: None,
        };
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![workload.clone()],
            services: vec![],
        });
        assert_eq!(admit_source(&snapshot, &web, address, address), Ok(()));
        assert_eq!(
            admit_source(&snapshot, &api, other, other),
            Ok(()),
            "unknown address"
        );
        let denied = admit_source(&snapshot, &api, address, address).unwrap_err();
        assert!(denied.to_string().contains("pod default/web-1"), "{denied}");
        let denied = admit_source(&snapshot, &web, address, other).unwrap_err();
        assert!(matches!(denied, Denied::ClaimedAddress { .. }));
        let disputed = Snapshot::new(Inventory {
            workloads: vec![workload.clone(), workload],
            services: vec![],
        });
        let denied = admit_source(&disputed, &web, address, address).unwrap_err();
        assert_eq!(denied, Denied::Disputed(address));
    }
}
