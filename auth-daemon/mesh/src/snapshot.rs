//! The known state of the mesh at one moment, with the lookups that a connection needs.
//!
//! Snapshots share unchanged parts, so that the cost of the next one depends on what changed, not on the size of the
//! cluster ([`Edit`]). A lookup takes a few steps through a B-tree. Readers load the current snapshot without a lock
//! and keep it for as long as they need a consistent view.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{HashMap, OrdMap, OrdSet, ordmap::DiffItem};

use super::{
    Destination, Edit, Endpoint, Identity, Membership, MeshDefault, ObjectName, Service, Slice,
    Workload,
    claims::{AddressKind, Claim, Claims},
    resolved::MAX_SLICED,
};

/// What a discovery source knows, before indexing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Pods.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
}

/// The known state of the mesh, indexed.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) defaults: Arc<MeshDefault>,
    pub(super) namespaces: OrdMap<String, Namespace>,
    /// Mesh pods that are assigned to a node.
    pub(super) nodes: HashMap<String, OrdMap<ObjectName, Arc<Workload>>>,
    pub(super) addresses: OrdMap<IpAddr, Claims>,
    pub(super) disputed: OrdSet<IpAddr>,
    /// Slices, indexed by the address and pod of their endpoints, either of which may determine the pod at an endpoint.
    pub(super) slices: SlicesBy,
    /// Services with more endpoints in slices than the limit.
    pub(super) crowded: OrdSet<ObjectName>,
    /// Ready pods of the node daemon, with their nodes. `None` if they are not tracked, and every node is assumed to
    /// have one.
    pub(super) daemons: Option<Daemons>,
}

/// See [`Snapshot::daemons`].
#[derive(Clone, Debug, Default)]
pub(super) struct Daemons {
    pub(super) pods: HashMap<ObjectName, String>,
    /// Number of ready daemons on each node: more than one during a takeover.
    pub(super) nodes: HashMap<String, usize>,
}

/// See [`Snapshot::slices`].
#[derive(Clone, Debug, Default)]
pub(super) struct SlicesBy {
    pub(super) address: HashMap<IpAddr, OrdSet<ObjectName>>,
    pub(super) pod: HashMap<ObjectName, OrdSet<ObjectName>>,
}

/// The contents of a namespace.
#[derive(Clone, Debug, Default)]
pub(super) struct Namespace {
    pub(super) membership: Option<Membership>,
    /// By name.
    pub(super) pods: OrdMap<String, Arc<Workload>>,
    /// By name.
    pub(super) services: OrdMap<String, Arc<ServiceState>>,
    /// Services, by one label of their selectors.
    pub(super) by_label: HashMap<(String, String), OrdSet<String>>,
    /// By name.
    pub(super) slices: OrdMap<String, Arc<Slice>>,
    /// Slices, by their service.
    pub(super) by_service: HashMap<String, OrdSet<String>>,
}

/// A service, and the pods that its selector matches.
#[derive(Clone, Debug)]
pub(super) struct ServiceState {
    pub(super) service: Arc<Service>,
    /// The selected pods, by name.
    pub(super) selected: OrdMap<String, Arc<Workload>>,
}

/// Reason why an address cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// The address is not, or no longer, a mesh address.
    #[error("{0} is no address of a pod or service of the mesh (any more)")]
    Unknown(IpAddr),
    /// More than one live pod or service claims the address.
    #[error("{0} is claimed by more than one pod or service; fix the objects that claim it")]
    Disputed(IpAddr),
    /// The service has no such TCP port.
    #[error("service {0} has no TCP port {1}")]
    NoPort(ObjectName, u16),
    /// No pod of the service is ready, or none of the ready pods may run it.
    #[error("service {0} has no ready endpoint for port {1} that may run it")]
    NoEndpoint(ObjectName, u16),
}

impl Unreachable {
    /// Returns the service that was dialled, if it is known.
    pub fn service(&self) -> Option<&ObjectName> {
        match self {
            Self::NoPort(service, _) | Self::NoEndpoint(service, _) => Some(service),
            Self::Unknown(_) | Self::Disputed(_) => None,
        }
    }
}

impl Snapshot {
    /// Indexes `inventory`. Every pod whose membership is not set is in the mesh.
    pub fn new(inventory: Inventory) -> Self {
        let mut edit = Edit::from(Self::default());
        for pod in inventory.workloads {
            edit.pod(pod);
        }
        for service in inventory.services {
            edit.service(service);
        }
        edit.finish()
    }

    /// Creates an empty snapshot whose pods are in the mesh according to `defaults`.
    pub fn with_defaults(defaults: MeshDefault) -> Self {
        Self {
            defaults: Arc::new(defaults),
            ..Self::default()
        }
    }

    /// Returns the mesh pods, by namespace and name.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        let pods = self.namespaces.values().flat_map(|ns| ns.pods.values());
        pods.filter(|pod| self.is_member(pod))
    }

    /// Returns all services, by namespace and name, including those outside the mesh.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        let services = self.namespaces.values().flat_map(|ns| ns.services.values());
        services.map(|state| &state.service)
    }

    /// Returns the mesh pods on `node`, by namespace and name, including those without an address.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.nodes.get(node).into_iter().flat_map(OrdMap::values)
    }

    /// Returns the mesh pod that owns `address`.
    pub fn pod(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        match self.addresses.get(&address)?.owner()? {
            Claim::Pod(pod) => Some(pod),
            Claim::Service(_) => None,
        }
    }

    /// Reports whether a mesh pod with `identity` runs on `node`.
    pub fn runs(&self, node: &str, identity: &Identity) -> bool {
        self.on_node(node).any(|pod| pod.identity == *identity)
    }

    /// Reports whether `node` has a ready daemon. Always true if daemons are not tracked.
    pub fn has_daemon(&self, node: &str) -> bool {
        let known = self.daemons.as_ref();
        known.is_none_or(|daemons| daemons.nodes.contains_key(node))
    }

    /// Reports whether more than one pod or service claims `address`.
    pub fn is_disputed(&self, address: IpAddr) -> bool {
        self.disputed.contains(&address)
    }

    /// Returns the kind of `address`, if it is a mesh address.
    pub fn kind(&self, address: IpAddr) -> Option<AddressKind> {
        self.addresses.get(&address).map(Claims::kind)
    }

    /// Returns the addresses of pods and services, with their kinds.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, AddressKind)> {
        let addresses = self.addresses.iter();
        addresses.map(|(address, claims)| (*address, claims.kind()))
    }

    /// Returns the addresses that are new since `before`, changed their kind, or are gone (`None`). The cost depends on
    /// the number of changes.
    pub fn addresses_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (IpAddr, Option<AddressKind>)> {
        let changes = before.addresses.diff(&self.addresses);
        changes.filter_map(|change| match change {
            DiffItem::Add(address, claims) => Some((*address, Some(claims.kind()))),
            DiffItem::Update { old, new } => {
                let kind = new.1.kind();
                (old.1.kind() != kind).then_some((*new.0, Some(kind)))
            }
            DiffItem::Remove(address, _) => Some((*address, None)),
        })
    }

    /// Returns descriptions of all conflicts. Each names the objects.
    pub fn errors(&self) -> impl Iterator<Item = String> {
        let disputed = self.disputed.iter().map(|address| self.error(*address));
        disputed.chain(self.crowded.iter().map(crowd))
    }

    /// Returns the conflicts that `before` did not have. The cost depends on the number of changes.
    pub fn errors_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = String> {
        let changes = before.disputed.diff(&self.disputed);
        let disputed = changes.filter_map(|change| match change {
            imbl::ordset::DiffItem::Add(address) => Some(self.error(*address)),
            imbl::ordset::DiffItem::Remove(_) => None,
        });
        let changes = before.crowded.diff(&self.crowded);
        let crowded = changes.filter_map(|change| match change {
            imbl::ordset::DiffItem::Add(service) => Some(crowd(service)),
            imbl::ordset::DiffItem::Remove(_) => None,
        });
        disputed.chain(crowded)
    }

    fn error(&self, address: IpAddr) -> String {
        let claims = self.addresses.get(&address).map_or(&[][..], Claims::all);
        let who: Vec<_> = claims
            .iter()
            .map(|claim| match claim {
                Claim::Pod(pod) => format!("pod {}", pod.name),
                Claim::Service(service) => format!("service {}", service.name),
            })
            .collect();
        format!(
            "address {address} is claimed by {}: connections to it are refused",
            who.join(" and by ")
        )
    }

    /// Resolves `address` to the endpoints that a connection may use and the identities that may answer.
    pub fn resolve(&self, address: SocketAddr) -> Result<Destination, Unreachable> {
        let ip = address.ip();
        let claims = self.addresses.get(&ip).ok_or(Unreachable::Unknown(ip))?;
        match claims.owner().ok_or(Unreachable::Disputed(ip))? {
            Claim::Pod(pod) => Ok(Destination {
                service: None,
                endpoints: Arc::new([Endpoint {
                    workload: Some(pod.clone()),
                    address,
                    meshed: true,
                    node: None,
                }]),
                identities: Arc::new(BTreeSet::from([pod.identity.clone()])),
                sticky: false,
                local: false,
            }),
            Claim::Service(service) => {
                let name = || service.name.clone();
                let port = service
                    .ports
                    .get(&address.port())
                    .ok_or_else(|| Unreachable::NoPort(name(), address.port()))?;
                if port.endpoints.is_empty() {
                    return Err(Unreachable::NoEndpoint(name(), address.port()));
                }
                Ok(Destination {
                    service: Some(name()),
                    endpoints: port.endpoints.clone(),
                    identities: port.identities.clone(),
                    sticky: service.sticky,
                    local: service.local,
                })
            }
        }
    }

    /// Returns the slices of a service, by name.
    pub(super) fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &Arc<Slice>> {
        let namespace = self.namespaces.get(&service.namespace);
        namespace.into_iter().flat_map(move |namespace| {
            let names = namespace
                .by_service
                .get(&service.name)
                .into_iter()
                .flatten();
            names.filter_map(|name| namespace.slices.get(name))
        })
    }

    /// Returns the pod `name`, in the mesh or not.
    pub(super) fn any_pod(&self, name: &ObjectName) -> Option<&Arc<Workload>> {
        self.namespaces.get(&name.namespace)?.pods.get(&name.name)
    }

    /// Reports whether `pod` is in the mesh.
    pub(super) fn is_member(&self, pod: &Workload) -> bool {
        let namespace = &pod.name.namespace;
        let said = pod.membership.or_else(|| {
            let namespace = self.namespaces.get(namespace);
            namespace.and_then(|namespace| namespace.membership)
        });
        !pod.host_network
            && said.unwrap_or_else(|| self.defaults.of(namespace)) == Membership::Enabled
    }
}

fn crowd(service: &ObjectName) -> String {
    format!(
        "service {service} has more than {MAX_SLICED} endpoints in endpoint slices: those beyond are left out"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Port, TargetPort};

    fn in_default(name: &str) -> ObjectName {
        ObjectName {
            namespace: "default".into(),
            name: name.into(),
        }
    }

    fn pod(name: &str, account: &str, address: &str, ready: bool) -> Workload {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
        Workload {
            addresses: vec![address.parse().unwrap()],
            node: "a".into(),
            ready,
            labels: [("app".to_owned(), "web".to_owned())].into(),
            named_ports: [("http".to_owned(), 8080)].into(),
            ..Workload::new(in_default(name), identity.parse().unwrap())
        }
    }

    fn service(target: TargetPort) -> Service {
        Service {
            addresses: vec!["10.96.0.7".parse().unwrap()],
            ports: vec![Port {
                name: String::new(),
                port: 80,
                target,
            }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..Service::new(in_default("web"))
        }
    }

    fn resolve(workloads: Vec<Workload>, service: Service) -> Result<Destination, Unreachable> {
        Snapshot::new(Inventory {
            workloads,
            services: vec![service],
        })
        .resolve("10.96.0.7:80".parse().unwrap())
    }

    #[test]
    fn a_service_leads_to_its_ready_pods() {
        let found = resolve(
            vec![
                pod("one", "web", "10.1.0.1", true),
                pod("two", "web", "10.1.0.2", false),
                pod("three", "api", "10.1.0.3", true),
            ],
            service(TargetPort::Name("http".into())),
        )
        .unwrap();
        let addresses: Vec<_> = found
            .endpoints
            .iter()
            .map(|e| e.address.to_string())
            .collect();
        assert_eq!(addresses, ["10.1.0.1:8080", "10.1.0.3:8080"]);
        let names: Vec<_> = found
            .identities
            .iter()
            .map(Identity::service_account)
            .collect();
        assert_eq!(names, ["api", "web"]);
    }

    #[test]
    fn a_pinned_service_never_uses_another_account() {
        let mut pinned = service(TargetPort::Number(80));
        pinned.pinned_identities =
            Some(["spiffe://cluster.local/ns/default/sa/web".parse().unwrap()].into());
        let found = resolve(
            vec![
                pod("one", "web", "10.1.0.1", true),
                pod("three", "api", "10.1.0.3", true),
            ],
            pinned.clone(),
        )
        .unwrap();
        assert_eq!(found.endpoints.len(), 1);
        assert_eq!(found.identities.len(), 1);
        let none = resolve(vec![pod("three", "api", "10.1.0.3", true)], pinned).unwrap_err();
        assert!(matches!(none, Unreachable::NoEndpoint(_, 80)), "{none}");
    }

    #[test]
    fn an_address_with_two_owners_is_refused() {
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![
                pod("one", "web", "10.1.0.1", true),
                pod("two", "api", "10.1.0.1", true),
            ],
            services: vec![],
        });
        let address = "10.1.0.1:80".parse().unwrap();
        assert!(matches!(
            snapshot.resolve(address),
            Err(Unreachable::Disputed(_))
        ));
        assert!(snapshot.pod(address.ip()).is_none());
        assert_eq!(snapshot.addresses().count(), 1);
        assert!(
            snapshot
                .errors()
                .next()
                .unwrap()
                .contains("by pod default/one and by pod")
        );
    }

    #[test]
    fn an_address_goes_to_the_pod_that_stays() {
        let going = Workload {
            terminating: true,
            ..pod("one", "web", "10.1.0.1", true)
        };
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![going.clone(), pod("two", "api", "10.1.0.1", true)],
            services: vec![],
        });
        let address = "10.1.0.1".parse().unwrap();
        assert_eq!(snapshot.pod(address).unwrap().name.name, "two");
        assert_eq!(snapshot.errors().count(), 0);
        let both = Workload {
            name: in_default("two"),
            ..going.clone()
        };
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![going, both],
            services: vec![],
        });
        assert!(snapshot.is_disputed(address));
    }

    #[test]
    fn pods_that_go_serve_while_there_are_no_others() {
        let going = Workload {
            terminating: true,
            ..pod("one", "web", "10.1.0.1", true)
        };
        let http = || service(TargetPort::Number(80));
        let found = resolve(vec![going.clone()], http()).unwrap();
        assert_eq!(found.endpoints.len(), 1);
        let two = pod("two", "web", "10.1.0.2", true);
        let found = resolve(vec![going.clone(), two], http()).unwrap();
        assert_eq!(
            found.endpoints[0].workload.as_ref().unwrap().name.name,
            "two"
        );
        assert_eq!(found.endpoints.len(), 1);
        let failing = Workload {
            ready: false,
            ..going
        };
        assert!(resolve(vec![failing], http()).is_err());
    }

    #[test]
    fn membership_is_the_pods_then_the_namespaces_then_the_default() {
        use Membership::{Disabled, Enabled};
        let default = |membership| MeshDefault {
            membership,
            excluded: ["default".to_owned()].into(),
        };
        for (own, namespace, defaults, meshed) in [
            (None, None, MeshDefault::default(), true),
            (None, None, default(Enabled), false),
            (None, Some(Enabled), default(Disabled), true),
            (None, Some(Disabled), MeshDefault::default(), false),
            (Some(Enabled), Some(Disabled), default(Disabled), true),
            (Some(Disabled), Some(Enabled), MeshDefault::default(), false),
        ] {
            let mut edit = Edit::from(Snapshot::with_defaults(defaults.clone()));
            edit.pod(Workload {
                membership: own,
                ..pod("one", "web", "10.1.0.1", true)
            });
            edit.service(service(TargetPort::Number(80)));
            edit.namespace("default", namespace);
            let snapshot = edit.finish();
            let case = format!("{own:?} {namespace:?} {defaults:?}");
            assert_eq!(snapshot.workloads().count(), usize::from(meshed), "{case}");
            assert_eq!(snapshot.on_node("a").count(), usize::from(meshed), "{case}");
            // A service whose pods are all outside the mesh is not a mesh service.
            let addresses = if meshed { 2 } else { 0 };
            assert_eq!(snapshot.addresses().count(), addresses, "{case}");
        }
    }

    #[test]
    fn a_service_has_pods_outside_the_mesh_too_unless_it_is_pinned() {
        let outside = Workload {
            host_network: true,
            ..pod("two", "api", "10.1.0.2", true)
        };
        let pods = vec![pod("one", "web", "10.1.0.1", true), outside];
        let found = resolve(pods.clone(), service(TargetPort::Number(80))).unwrap();
        let meshed: Vec<_> = found.endpoints.iter().map(|e| e.meshed).collect();
        assert_eq!(meshed, [true, false]);
        assert_eq!(found.identities.len(), 1, "who may answer a tunnel");
        let mut pinned = service(TargetPort::Number(80));
        pinned.pinned_identities =
            Some(["spiffe://cluster.local/ns/default/sa/api".parse().unwrap()].into());
        let error = resolve(pods, pinned).unwrap_err();
        assert!(matches!(error, Unreachable::NoEndpoint(..)), "{error}");
    }

    #[test]
    fn daemons_are_there_unless_others_are_known() {
        let snapshot = Snapshot::default();
        assert!(snapshot.has_daemon("a"));
        let mut edit = Edit::from(snapshot);
        edit.know_daemons();
        for daemon in ["old", "new"] {
            edit.daemon(&in_default(daemon), Some("a"));
        }
        let snapshot = edit.finish();
        assert!(snapshot.has_daemon("a") && !snapshot.has_daemon("b"));
        let mut edit = Edit::from(snapshot);
        edit.daemon(&in_default("old"), None);
        let snapshot = edit.finish();
        assert!(snapshot.has_daemon("a"), "its successor is there");
        let mut edit = Edit::from(snapshot);
        edit.daemon(&in_default("new"), None);
        assert!(!edit.finish().has_daemon("a"));
    }

    #[test]
    fn knows_which_identities_run_where() {
        let on = |node: &str, pod: Workload| Workload {
            node: node.into(),
            ..pod
        };
        let snapshot = Snapshot::new(Inventory {
            workloads: vec![
                on("a", pod("one", "web", "10.1.0.1", true)),
                on("a", pod("two", "web", "10.1.0.2", false)),
                on("b", pod("three", "api", "10.1.0.3", true)),
                // The address is disputed, but the pod is alive.
                on("b", pod("four", "db", "10.1.0.3", true)),
                on("", pod("five", "cron", "10.1.0.5", true)),
            ],
            services: vec![],
        });
        let runs = |node: &str, account: &str| {
            let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
            snapshot.runs(node, &identity.parse().unwrap())
        };
        assert!(runs("a", "web") && runs("b", "api") && runs("b", "db"));
        for (node, account) in [
            ("b", "web"),
            ("a", "api"),
            ("", "cron"),
            ("c", "web"),
            ("a", "x"),
        ] {
            assert!(!runs(node, account), "{account} on {node:?}");
        }
    }

    #[test]
    fn unknown_addresses_and_ports_say_so() {
        let starting = vec![pod("one", "web", "10.1.0.1", false)];
        let error = resolve(starting.clone(), service(TargetPort::Number(80))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "service default/web has no ready endpoint for port 80 that may run it"
        );
        let snapshot = Snapshot::new(Inventory {
            workloads: starting,
            services: vec![service(TargetPort::Number(80))],
        });
        assert!(matches!(
            snapshot.resolve("10.96.0.7:81".parse().unwrap()),
            Err(Unreachable::NoPort(_, 81))
        ));
        assert!(matches!(
            snapshot.resolve("10.96.0.8:80".parse().unwrap()),
            Err(Unreachable::Unknown(_))
        ));
    }

    #[test]
    fn a_service_of_others_is_no_mesh_address() {
        let mut foreign = service(TargetPort::Number(80));
        let inventory = |service| Inventory {
            workloads: vec![],
            services: vec![service],
        };
        assert_eq!(
            Snapshot::new(inventory(foreign.clone()))
                .addresses()
                .count(),
            0
        );
        foreign.pinned_identities = Some(BTreeSet::new());
        assert_eq!(Snapshot::new(inventory(foreign)).addresses().count(), 1);
    }
}
