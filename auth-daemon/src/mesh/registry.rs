//! What is known of the mesh at one moment, with the lookups that a connection needs.
//!
//! Discovery publishes whole snapshots. Readers load the current one without a lock and keep it for as long as they
//! need a consistent view.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{Identity, ObjectName, Service, Workload};

/// What a discovery source knows, before it is indexed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Pods of the mesh.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
}

/// An indexed [`Inventory`].
#[derive(Debug, Default)]
pub struct Snapshot {
    workloads: Vec<Arc<Workload>>,
    pods: HashMap<IpAddr, Arc<Workload>>,
    services: HashMap<IpAddr, Arc<Resolved>>,
    disputed: HashSet<IpAddr>,
    by_node: HashMap<String, HashSet<Identity>>,
    faults: Vec<String>,
}

/// A service with its endpoints worked out.
#[derive(Debug)]
struct Resolved {
    name: ObjectName,
    ports: HashMap<u16, ServicePort>,
}

#[derive(Debug)]
struct ServicePort {
    endpoints: Arc<[Endpoint]>,
    identities: Arc<BTreeSet<Identity>>,
}

/// Where a connection to a mesh address may go.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The service dialled; none when a pod was dialled by its own address.
    pub service: Option<ObjectName>,
    /// Ready endpoints whose identity may run the service.
    pub endpoints: Arc<[Endpoint]>,
    /// The identities that may answer (secure naming).
    pub identities: Arc<BTreeSet<Identity>>,
}

impl Destination {
    /// The identities that may answer, for an error.
    pub fn allowed(&self) -> String {
        let allowed: Vec<_> = self.identities.iter().map(Identity::as_str).collect();
        allowed.join(" or ")
    }
}

/// A server behind a destination.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The pod.
    pub workload: Arc<Workload>,
    /// The pod's address, of the family that was dialled, and the app's own port.
    pub address: SocketAddr,
}

/// Why an address of the mesh leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// Not, or no longer, an address of the mesh.
    #[error("{0} is no address of a pod or service of the mesh (any more)")]
    Unknown(IpAddr),
    /// More than one live pod or service says it has this address.
    #[error("{0} is claimed by more than one pod or service; fix the objects that claim it")]
    Disputed(IpAddr),
    /// The service has no such TCP port.
    #[error("service {0} has no TCP port {1}")]
    NoPort(ObjectName, u16),
    /// No pod of the service is ready, or none may run it.
    #[error("service {0} has no ready endpoint for port {1} that may run it")]
    NoEndpoint(ObjectName, u16),
}

impl Unreachable {
    /// The service that was dialled, where it is known.
    pub fn service(&self) -> Option<&ObjectName> {
        match self {
            Self::NoPort(service, _) | Self::NoEndpoint(service, _) => Some(service),
            Self::Unknown(_) | Self::Disputed(_) => None,
        }
    }
}

impl Snapshot {
    /// Indexes `inventory`. Contradictions become [`Snapshot::faults`], and what they touch is refused.
    pub fn new(inventory: Inventory) -> Self {
        let mut snapshot = Self {
            workloads: inventory.workloads.into_iter().map(Arc::new).collect(),
            ..Self::default()
        };
        let mut owners: HashMap<IpAddr, String> = HashMap::new();
        let mut claim = |address: IpAddr, owner: String, snapshot: &mut Self| {
            if let Some(other) = owners.get(&address) {
                snapshot.faults.push(format!(
                    "address {address} is claimed by {other} and by {owner}: connections to it are refused"
                ));
                snapshot.disputed.insert(address);
            } else {
                owners.insert(address, owner);
            }
        };
        for pod in snapshot.workloads.clone() {
            for &address in &pod.addresses {
                claim(address, format!("pod {}", pod.name), &mut snapshot);
                snapshot.pods.insert(address, pod.clone());
            }
        }
        for pod in &snapshot.workloads {
            // A pod that has no node yet runs nowhere.
            if !pod.node.is_empty() {
                let identities = snapshot.by_node.entry(pod.node.clone()).or_default();
                identities.insert(pod.identity.clone());
            }
        }
        let mut by_namespace: HashMap<&str, Vec<&Arc<Workload>>> = HashMap::new();
        let workloads = snapshot.workloads.clone();
        for pod in &workloads {
            by_namespace
                .entry(&pod.name.namespace)
                .or_default()
                .push(pod);
        }
        for service in &inventory.services {
            let pods: Vec<_> = by_namespace
                .get(service.name.namespace.as_str())
                .into_iter()
                .flatten()
                .filter(|pod| service.selects(pod))
                .copied()
                .collect();
            // A service without a pod of the mesh is none of ours, unless its owner says who may run it.
            if pods.is_empty() && service.pinned_identities.is_none() {
                continue;
            }
            for &address in &service.addresses {
                claim(address, format!("service {}", service.name), &mut snapshot);
                let resolved = Arc::new(Resolved::new(service, &pods, address));
                snapshot.services.insert(address, resolved);
            }
        }
        for address in &snapshot.disputed {
            snapshot.pods.remove(address);
            snapshot.services.remove(address);
        }
        snapshot
    }

    /// All pods.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// The pod that has `address`.
    pub fn pod(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.pods.get(&address)
    }

    /// Whether a pod with `identity` runs on `node`.
    pub fn runs(&self, node: &str, identity: &Identity) -> bool {
        self.by_node
            .get(node)
            .is_some_and(|identities| identities.contains(identity))
    }

    /// Whether more than one pod or service says that `address` is its own.
    pub fn is_disputed(&self, address: IpAddr) -> bool {
        self.disputed.contains(&address)
    }

    /// Addresses of pods, those in dispute included: what is captured and then cannot be served is refused.
    pub fn pod_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.pods.keys().chain(&self.disputed).copied()
    }

    /// Virtual addresses of services.
    pub fn service_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.services.keys().copied()
    }

    /// Contradictions in the inventory, each naming the objects.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    /// Where a connection that dialled `address` may go, and who may answer there.
    pub fn resolve(&self, address: SocketAddr) -> Result<Destination, Unreachable> {
        let ip = address.ip();
        if let Some(service) = self.services.get(&ip) {
            let port = service
                .ports
                .get(&address.port())
                .ok_or_else(|| Unreachable::NoPort(service.name.clone(), address.port()))?;
            if port.endpoints.is_empty() {
                return Err(Unreachable::NoEndpoint(
                    service.name.clone(),
                    address.port(),
                ));
            }
            return Ok(Destination {
                service: Some(service.name.clone()),
                endpoints: port.endpoints.clone(),
                identities: port.identities.clone(),
            });
        }
        if let Some(pod) = self.pods.get(&ip) {
            return Ok(Destination {
                service: None,
                endpoints: Arc::new([Endpoint {
                    workload: pod.clone(),
                    address,
                }]),
                identities: Arc::new(BTreeSet::from([pod.identity.clone()])),
            });
        }
        Err(if self.disputed.contains(&ip) {
            Unreachable::Disputed(ip)
        } else {
            Unreachable::Unknown(ip)
        })
    }
}

impl Resolved {
    fn new(service: &Service, pods: &[&Arc<Workload>], address: IpAddr) -> Self {
        let may_run = |pod: &Workload| {
            service
                .pinned_identities
                .as_ref()
                .is_none_or(|pinned| pinned.contains(&pod.identity))
        };
        let ports = service
            .ports
            .iter()
            .map(|port| {
                let endpoints: Arc<[Endpoint]> = pods
                    .iter()
                    .filter(|pod| (pod.ready || service.publish_not_ready) && may_run(pod))
                    .filter_map(|pod| {
                        let ip = pod
                            .addresses
                            .iter()
                            .find(|ip| ip.is_ipv4() == address.is_ipv4())?;
                        Some(Endpoint {
                            workload: (*pod).clone(),
                            address: SocketAddr::new(*ip, port.target.on(pod)?),
                        })
                    })
                    .collect();
                let identities = service.pinned_identities.clone().unwrap_or_else(|| {
                    endpoints
                        .iter()
                        .map(|endpoint| endpoint.workload.identity.clone())
                        .collect()
                });
                let resolved = ServicePort {
                    endpoints,
                    identities: Arc::new(identities),
                };
                (port.port, resolved)
            })
            .collect();
        Self {
            name: service.name.clone(),
            ports,
        }
    }
}

/// The current [`Snapshot`], published by discovery, read by everyone.
#[derive(Debug)]
pub struct Registry {
    current: ArcSwap<Snapshot>,
    changed: watch::Sender<u64>,
}

impl Registry {
    /// Holds an empty snapshot until the first [`Registry::publish`].
    pub fn new() -> Self {
        Self {
            current: ArcSwap::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Replaces the snapshot and wakes those who wait for a change.
    pub fn publish(&self, snapshot: Snapshot) {
        self.current.store(Arc::new(snapshot));
        self.changed.send_modify(|version| *version += 1);
    }

    /// Counts publications: 0 before the first.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Port, TargetPort};

    fn pod(name: &str, account: &str, address: &str, ready: bool) -> Workload {
        Workload {
            name: ObjectName {
                namespace: "default".into(),
                name: name.into(),
            },
            uid: String::new(),
            identity: format!("spiffe://cluster.local/ns/default/sa/{account}")
                .parse()
                .unwrap(),
            addresses: vec![address.parse().unwrap()],
            node: "a".into(),
            ready,
            labels: [("app".to_owned(), "web".to_owned())].into(),
            named_ports: [("http".to_owned(), 8080)].into(),
            netns: None,
        }
    }

    fn service(target: TargetPort) -> Service {
        Service {
            name: ObjectName {
                namespace: "default".into(),
                name: "web".into(),
            },
            addresses: vec!["10.96.0.7".parse().unwrap()],
            ports: vec![Port { port: 80, target }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            pinned_identities: None,
            publish_not_ready: false,
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
        assert_eq!(snapshot.pod_addresses().count(), 1);
        assert!(snapshot.faults()[0].contains("pod default/one"));
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
                // In dispute, but alive.
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
                .service_addresses()
                .count(),
            0
        );
        foreign.pinned_identities = Some(BTreeSet::new());
        assert_eq!(
            Snapshot::new(inventory(foreign))
                .service_addresses()
                .count(),
            1
        );
    }
}
