//! Objects of remote clusters in a snapshot.
//!
//! A snapshot has the namespaces of all clusters side by side. Those of a remote cluster carry its name, `shop@east`, and so
//! do the nodes of its pods, `node-1@east`. No namespace or node of Kubernetes has a `@` in its name, so that nothing of a
//! remote cluster is ever taken for an object of this one.

use std::{fmt, str::FromStr, sync::Arc};

use super::{ObjectName, Service, Snapshot, Workload, snapshot::ServiceState};

const SEPARATOR: char = '@';
/// Maximum length of a cluster's name, in bytes: that of a key of a Secret.
const MAX_NAME: usize = 253;

/// The name of a remote cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterName(Arc<str>);

impl FromStr for ClusterName {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        match name.len() {
            1..=MAX_NAME if name.bytes().all(valid) => Ok(Self(name.into())),
            _ => Err(
                "is not the name of a cluster: 1 to 253 letters, digits, dots, hyphens and underscores",
            ),
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl ClusterName {
    /// Returns the name that a namespace or node of this cluster has in a snapshot.
    pub fn qualify(&self, name: &str) -> String {
        format!("{name}{SEPARATOR}{}", self.0)
    }

    /// Returns `pod`, a pod of this cluster, as a snapshot has it. Its node exposes nothing here.
    pub fn pod(&self, mut pod: Workload) -> Workload {
        pod.name.namespace = self.qualify(&pod.name.namespace);
        if !pod.node.is_empty() {
            pod.node = self.qualify(&pod.node);
        }
        pod.host_ports = Vec::new();
        pod
    }

    /// Returns `service`, a service of this cluster, as a snapshot has it. It only adds its pods to the service of the same
    /// name and namespace of the snapshot's own cluster. Its addresses mean nothing here, where they may be another service's.
    pub fn service(&self, mut service: Service) -> Service {
        service.name.namespace = self.qualify(&service.name.namespace);
        service.addresses = Vec::new();
        service.external_addresses = Vec::new();
        service.node_ports = Vec::new();
        service.waypoint = None;
        service
    }
}

impl ObjectName {
    /// Returns the name of the remote cluster that the object is of. `None` if it is of the snapshot's own cluster.
    pub fn cluster(&self) -> Option<&str> {
        split(&self.namespace).1
    }

    /// Returns the name without its cluster.
    pub(super) fn in_own_cluster(self) -> Self {
        match split(&self.namespace) {
            (_, None) => self,
            (namespace, Some(_)) => Self {
                namespace: namespace.to_owned(),
                name: self.name,
            },
        }
    }
}

/// Returns the namespace `name` without its cluster.
pub(super) fn namespace_of(name: &str) -> &str {
    split(name).0
}

/// Reports whether the namespace `name` is of a remote cluster.
pub(super) fn is_remote(name: &str) -> bool {
    split(name).1.is_some()
}

fn split(namespace: &str) -> (&str, Option<&str>) {
    match namespace.split_once(SEPARATOR) {
        Some((namespace, cluster)) => (namespace, Some(cluster)),
        None => (namespace, None),
    }
}

impl Snapshot {
    /// Returns the services of remote clusters that have the name and namespace of `own`, by cluster.
    pub(super) fn remote_services<'a>(
        &'a self,
        own: &'a ObjectName,
    ) -> impl Iterator<Item = &'a Arc<ServiceState>> {
        let first = format!("{}{SEPARATOR}", own.namespace);
        let namespaces = self.namespaces.range(first.clone()..);
        namespaces
            .take_while(move |(name, _)| name.starts_with(&first))
            .filter_map(|(_, namespace)| namespace.services.get(&own.name))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::SocketAddr};

    use proptest::prelude::*;

    use super::*;
    use crate::{AddressKind, Edit, HostPort, Membership, Port, TargetPort, Unreachable};

    const VIRTUAL: &str = "10.96.0.7:80";

    fn east() -> ClusterName {
        "east".parse().unwrap()
    }

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    /// A pod of the trust domain `domain`, of the service account of its name.
    fn pod(domain: &str, pod: &str, address: &str) -> Workload {
        let identity = format!("spiffe://{domain}/ns/shop/sa/{pod}");
        Workload {
            addresses: vec![address.parse().unwrap()],
            node: "a".into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Workload::new(name(pod), identity.parse().unwrap())
        }
    }

    fn service(port: u16) -> Service {
        Service {
            addresses: vec!["10.96.0.7".parse().unwrap()],
            ports: vec![Port {
                name: "http".into(),
                port: 80,
                target: TargetPort::Number(port),
            }],
            node_ports: vec![(30080, 80)],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..Service::new(name("web"))
        }
    }

    /// The service in both clusters, on port 8080 here and on 9090 there.
    fn known(change: impl FnOnce(&mut Edit)) -> Snapshot {
        let mut edit = Edit::from(Snapshot::default());
        edit.service(service(8080));
        edit.service(east().service(service(9090)));
        change(&mut edit);
        edit.finish()
    }

    /// The endpoints, and the identities that may answer.
    fn resolved(snapshot: &Snapshot) -> (Vec<String>, Vec<String>) {
        let found = snapshot.resolve(VIRTUAL.parse().unwrap()).unwrap();
        let endpoints = found.endpoints.iter();
        (
            endpoints
                .map(|endpoint| endpoint.address.to_string())
                .collect(),
            found.identities.iter().map(ToString::to_string).collect(),
        )
    }

    #[test]
    fn a_service_leads_to_its_ready_pods_of_this_cluster_and_else_to_those_of_remote_ones() {
        let there = || east().pod(pod("far", "there", "10.2.0.1"));
        let far = "spiffe://far/ns/shop/sa/there";
        let only_there = known(|edit| edit.pod(there()));
        assert_eq!(
            resolved(&only_there),
            (vec!["10.2.0.1:9090".to_owned()], vec![far.to_owned()])
        );
        let own = "spiffe://own/ns/shop/sa/here";
        let unready = |serves: bool| Workload {
            ready: serves,
            terminating: true,
            ..pod("own", "here", "10.1.0.1")
        };
        for (here, there, expected) in [
            (pod("own", "here", "10.1.0.1"), there(), own),
            (unready(true), there(), far),
            (
                unready(true),
                Workload {
                    terminating: true,
                    ..there()
                },
                own,
            ),
            (
                unready(false),
                Workload {
                    terminating: true,
                    ..there()
                },
                far,
            ),
        ] {
            let both = known(|edit| {
                edit.pod(here);
                edit.pod(there);
            });
            assert_eq!(resolved(&both).1, [expected]);
        }
        let gone = known(|edit| {
            edit.pod(there());
            edit.remove_service(&east().service(service(1)).name);
        });
        assert!(matches!(
            gone.resolve(VIRTUAL.parse().unwrap()),
            Err(Unreachable::NoEndpoint(..))
        ));
    }

    #[test]
    fn only_what_may_run_the_service_in_both_clusters_and_is_of_the_mesh_is_an_endpoint() {
        let there = |membership| {
            east().pod(Workload {
                membership,
                ..pod("far", "there", "10.2.0.1")
            })
        };
        let pinned = |service: Service, account: &str| Service {
            pinned_identities: Some(BTreeSet::from([account.parse().unwrap()])),
            ..service
        };
        let (far, other) = ("spiffe://far/ns/shop/sa/there", "spiffe://far/ns/shop/sa/x");
        for (here, remote, membership, expected) in [
            (service(1), service(2), None, true),
            (service(1), service(2), Some(Membership::Disabled), false),
            (pinned(service(1), far), service(2), None, true),
            (pinned(service(1), other), service(2), None, false),
            (service(1), pinned(service(2), other), None, false),
        ] {
            let snapshot = known(|edit| {
                edit.service(here);
                edit.service(east().service(remote));
                edit.pod(there(membership));
            });
            let found = snapshot.resolve(VIRTUAL.parse().unwrap());
            assert_eq!(found.is_ok(), expected, "{found:?}");
        }
    }

    #[test]
    fn nothing_of_a_remote_cluster_is_taken_for_this_clusters() {
        let mut exposed = pod("far", "web-0", "10.2.0.1");
        exposed.host_ports = vec![HostPort {
            addresses: vec!["192.0.2.1".parse().unwrap()],
            port: 80,
            target: 8080,
        }];
        let snapshot = known(|edit| {
            edit.remove_service(&name("web"));
            edit.pod(pod("own", "web-0", "10.1.0.1"));
            edit.pod(east().pod(exposed));
            edit.namespace(&east().qualify("shop"), Some(Membership::Enabled));
        });
        assert_eq!(snapshot.on_node("a").count(), 1, "of two of that name");
        assert_eq!(snapshot.exposed().count(), 0);
        assert_eq!(snapshot.enabled_namespaces().count(), 0);
        let virtual_address: SocketAddr = VIRTUAL.parse().unwrap();
        assert_eq!(
            snapshot.kind(virtual_address.ip()),
            None,
            "the remote service's"
        );
        let there = snapshot.pod("10.2.0.1".parse().unwrap()).unwrap();
        assert_eq!(there.name.to_string(), "shop@east/web-0");
        assert_eq!(there.name.cluster(), Some("east"));
    }

    #[test]
    fn what_means_nothing_here_takes_no_memory() {
        const MANY: usize = 1000;
        let ip = "192.0.2.1".parse().unwrap();
        let exposed = HostPort {
            addresses: vec![ip],
            port: 80,
            target: 8080,
        };
        let pod = east().pod(Workload {
            host_ports: vec![exposed; MANY],
            ..pod("far", "there", "10.2.0.1")
        });
        assert_eq!(pod.host_ports.capacity(), 0);
        let service = east().service(Service {
            addresses: vec![ip; MANY],
            external_addresses: vec![ip; MANY],
            node_ports: vec![(30080, 80); MANY],
            ..service(9090)
        });
        assert_eq!(service.addresses.capacity(), 0);
        assert_eq!(service.external_addresses.capacity(), 0);
        assert_eq!(service.node_ports.capacity(), 0);
    }

    #[test]
    fn an_address_of_this_cluster_stays_its_own_and_two_remote_clusters_dispute_one() {
        let address = "10.1.0.1";
        let ip = address.parse().unwrap();
        let there = || east().pod(pod("far", "there", address));
        let west: ClusterName = "west".parse().unwrap();
        let outside = Workload {
            membership: Some(Membership::Disabled),
            ..pod("own", "here", address)
        };
        for (here, kind) in [
            (pod("own", "here", address), AddressKind::Pod),
            (outside, AddressKind::Outside),
        ] {
            let both = known(|edit| {
                edit.pod(there());
                edit.pod(here);
            });
            assert_eq!(both.kind(ip), Some(kind));
            assert_eq!(both.describe(ip).unwrap(), "pod shop/here");
            let errors: Vec<_> = both.errors().collect();
            assert!(
                errors.len() == 1
                    && errors[0].contains("pod shop/here")
                    && errors[0].contains("pod shop@east/there"),
                "{errors:?}"
            );
            assert_eq!(both.errors_since(&Snapshot::default()).count(), 1);
        }
        let service = known(|edit| edit.pod(east().pod(pod("far", "there", "10.96.0.7"))));
        assert_eq!(
            service.kind("10.96.0.7".parse().unwrap()),
            Some(AddressKind::Service)
        );
        let finished = known(|edit| {
            edit.pod(there());
            edit.pod(Workload {
                finished: true,
                ..pod("own", "here", address)
            });
        });
        assert_eq!(finished.describe(ip).unwrap(), "pod shop@east/there");
        let disputed = known(|edit| {
            edit.pod(there());
            edit.pod(west.pod(pod("far", "there", address)));
        });
        let dialled = SocketAddr::new(ip, 80);
        assert_eq!(
            disputed.resolve(dialled).unwrap_err(),
            Unreachable::Disputed(ip)
        );
        assert_eq!(disputed.kind(ip), Some(AddressKind::Pod), "captured");
    }

    #[test]
    fn a_remote_pod_outside_the_mesh_claims_nothing() {
        let there = Workload {
            membership: Some(Membership::Disabled),
            ..pod("far", "there", "10.2.0.1")
        };
        let snapshot = known(|edit| edit.pod(east().pod(there)));
        assert_eq!(snapshot.kind("10.2.0.1".parse().unwrap()), None);
    }

    #[test]
    fn names_of_clusters_are_keys_of_secrets() {
        for good in ["east", "gke_project_us-east1_c1", "A.b", &"x".repeat(253)] {
            assert!(good.parse::<ClusterName>().is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "a@b", "\n", &"x".repeat(254)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        /// Whatever remote clusters say, what this cluster's own addresses are does not change.
        #[test]
        fn remote_clusters_take_nothing_from_this_one(
            own in prop::collection::vec((1..6_u8, any::<[bool; 3]>()), 0..5),
            remote in prop::collection::vec(("east|west", 1..9_u8, any::<[bool; 3]>()), 0..12),
        ) {
            let pod = |index: usize, last: u8, [outside, terminating, ready]: [bool; 3]| Workload {
                membership: outside.then_some(Membership::Disabled),
                terminating,
                ready,
                ..pod("own", &format!("p{index}"), &format!("10.1.0.{last}"))
            };
            let mut edit = Edit::from(Snapshot::default());
            edit.service(service(8080));
            for (index, (last, flags)) in own.iter().enumerate() {
                edit.pod(pod(index, *last, *flags));
            }
            let alone = edit.snapshot();
            for (index, (cluster, last, flags)) in remote.iter().enumerate() {
                let cluster: ClusterName = cluster.parse().unwrap();
                edit.service(cluster.service(service(9090)));
                edit.pod(cluster.pod(pod(index, *last, *flags)));
            }
            let merged = edit.snapshot();
            for (address, kind) in alone.addresses().filter(|(address, _)| *address != std::net::IpAddr::from([10, 96, 0, 7])) {
                prop_assert_eq!(merged.kind(address), Some(kind));
                prop_assert_eq!(merged.is_disputed(address), alone.is_disputed(address));
                let at = SocketAddr::new(address, 80);
                let text = |found: &Snapshot| format!("{:?}", found.resolve(at));
                prop_assert_eq!(text(&merged), text(&alone));
            }
            // If this cluster has a ready endpoint, no other is used.
            if let Ok(found) = alone.resolve(VIRTUAL.parse().unwrap())
                && found.endpoints.iter().any(|e| e.workload.as_ref().is_some_and(|pod| pod.ready && !pod.terminating))
            {
                prop_assert_eq!(resolved(&merged), resolved(&alone));
            }
            // Without the remote clusters, everything is as it was.
            for (index, (cluster, ..)) in remote.iter().enumerate() {
                let cluster: ClusterName = cluster.parse().unwrap();
                let of = |name: &str| ObjectName { namespace: cluster.qualify("shop"), name: name.into() };
                edit.remove_pod(&of(&format!("p{index}")));
                edit.remove_service(&of("web"));
            }
            let after = edit.finish();
            prop_assert!(after.addresses().eq(alone.addresses()));
            prop_assert_eq!(after.errors().count(), alone.errors().count());
        }
    }
}
