//! Checks that a caller is who it claims to be: its certificate, its address, the CA's revocations, and that its trust
//! domain is trusted.

use std::{net::IpAddr, sync::Arc};

use auth_mesh::{Identity, ObjectName, Snapshot};
use auth_tunnel::tls::{
    svid::Svid,
    trust::{Revocations, Revoked, Trust, TrustStore, Untrusted},
};

/// Why a caller is not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    /// The source address belongs to a pod with another identity.
    #[error("{source_address} is the address of pod {pod}, which is {expected}, not {presented}")]
    Impostor {
        /// Where the connection comes from.
        source_address: IpAddr,
        /// The pod known there.
        pod: ObjectName,
        /// That pod's identity.
        expected: Identity,
        /// The identity in the presented certificate.
        presented: Identity,
    },
    /// More than one pod or service claims the address, so it identifies none of them.
    #[error("{0} is claimed by more than one pod or service; fix the objects that claim it")]
    Disputed(IpAddr),
    /// The client claims an address other than the tunnel's source address.
    #[error("the client at {tunnel} says that it is {claimed}")]
    ClaimedAddress {
        /// Source address of the tunnel.
        tunnel: IpAddr,
        /// Client address in CONNECT.
        claimed: IpAddr,
    },
}

/// Checks that neither `svid`, nor its identity, nor the node of the pod at `address` is revoked, and that the trust domain of
/// `svid` is (still) trusted. Returns the trust that this was checked against.
pub(crate) fn check_trusted(
    snapshot: &Snapshot,
    trust: &TrustStore,
    svid: &Svid,
    address: IpAddr,
) -> Result<Arc<Trust>, Untrusted> {
    let trust = trust.check(svid)?;
    check_revoked_node(snapshot, &trust.revoked, address)?;
    Ok(trust)
}

/// Checks that the node of the pod at `address` is not revoked.
pub(crate) fn check_revoked_node(
    snapshot: &Snapshot,
    revoked: &Revocations,
    address: IpAddr,
) -> Result<(), Revoked> {
    match snapshot.pod(address) {
        Some(pod) => revoked.check_node(&pod.node),
        None => Ok(()),
    }
}

/// Checks that the holder of `presented` may act as the client at `claimed`, through a tunnel from `tunnel`.
///
/// A pod that is not known here is trusted by its certificate alone, because its own node may discover it first.
pub(crate) fn admit_source(
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
    use auth_mesh::{Inventory, Workload};
    use auth_tunnel::tls::trust::{Reason, TrustBundle};

    /// Pods on node `a` that all claim `address`.
    fn pods_at(pods: &[(&str, &Identity)], address: IpAddr) -> Snapshot {
        let workloads = pods.iter().map(|(name, identity)| {
            let name = ObjectName {
                namespace: "default".into(),
                name: (*name).into(),
            };
            Workload {
                addresses: vec![address],
                node: "a".into(),
                ..Workload::new(name, (*identity).clone())
            }
        });
        Snapshot::new(Inventory {
            workloads: workloads.collect(),
            services: vec![],
        })
    }

    #[test]
    fn a_known_address_is_its_pods_alone() {
        let web: Identity = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        let api: Identity = "spiffe://cluster.local/ns/default/sa/api".parse().unwrap();
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let other: IpAddr = "10.0.0.2".parse().unwrap();
        let snapshot = pods_at(&[("web-1", &web)], address);
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
        let disputed = pods_at(&[("web-1", &web), ("web-2", &web)], address);
        let denied = admit_source(&disputed, &web, address, address).unwrap_err();
        assert_eq!(denied, Denied::Disputed(address));
    }

    #[test]
    fn revoked_is_a_certificate_an_identity_or_a_node() {
        let web: Identity = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let snapshot = pods_at(&[("web-1", &web)], address);
        let svid = Svid {
            identity: web.clone(),
            serial: "0a".into(),
            node: None,
            person: None,
            not_before: std::time::UNIX_EPOCH,
            not_after: std::time::UNIX_EPOCH,
        };
        let check = |revoked: &Revocations, address: &str| {
            let trust = TrustStore::new(Trust {
                revoked: revoked.clone(),
                ..Trust::fixed(TrustBundle::of_roots(
                    auth_mesh::TrustDomain::default(),
                    vec![],
                ))
            });
            let address = address.parse().unwrap();
            let checked = check_trusted(&snapshot, &trust, &svid, address);
            checked.map(drop).map_err(|why| why.to_string())
        };
        let mut revoked = Revocations::default();
        assert_eq!(check(&revoked, "10.0.0.1"), Ok(()));
        revoked.nodes.insert("a".into(), Reason::KeyCompromise);
        assert_eq!(
            check(&revoked, "10.0.0.1").unwrap_err(),
            "node a is revoked (keyCompromise)"
        );
        assert_eq!(check(&revoked, "10.0.0.2"), Ok(()), "of no known node");
        revoked.serials.insert("0a".into(), Reason::Superseded);
        assert_eq!(
            check(&revoked, "10.0.0.2").unwrap_err(),
            "certificate 0a of spiffe://cluster.local/ns/default/sa/web is revoked (superseded)"
        );
        revoked.identities.insert(web, Reason::Unspecified);
        assert_eq!(
            check(&revoked, "10.0.0.2").unwrap_err(),
            "spiffe://cluster.local/ns/default/sa/web is revoked (unspecified)"
        );
    }
}
